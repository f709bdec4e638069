"""What files are, whatever they are called: made by Pillow and ffmpeg, then given other names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musetalk.config import PreprocessingConfig
from musetalk.errors import InputError
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.image import image_size, read_image
from musetalk.media.kind import is_picture, kind_of
from musetalk.preprocessing.source import SourceFrames, source_files

CLIPS = {
    "mp4": ("-c:v", "libx264"),
    "mov": ("-c:v", "libx264"),
    "ts": ("-c:v", "libx264"),
    "m2ts": ("-c:v", "libx264", "-mpegts_m2ts_mode", 1, "-f", "mpegts"),
    "3gp": ("-c:v", "mpeg4"),
    "wmv": ("-c:v", "wmv2"),
    "mpg": ("-c:v", "mpeg2video"),
    "flv": ("-c:v", "flv1"),
    "avi": ("-c:v", "mpeg4"),
    "mkv": ("-c:v", "libx264"),
    "webm": ("-c:v", "libvpx-vp9"),
    "ogv": ("-c:v", "libtheora"),
    "h264": ("-c:v", "libx264"),
    "mxf": ("-c:v", "mpeg2video"),
    "nut": ("-c:v", "libx264"),
    "ivf": ("-c:v", "libvpx"),
    "y4m": (),
    "dv": ("-c:v", "dvvideo", "-s", "720x576"),
}
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def settings() -> PreprocessingConfig:
    return PreprocessingConfig()


@pytest.mark.parametrize("suffix", CLIPS)
@pytest.mark.parametrize("name", ["clip.jpg", "clip", "clip.png", "clip.mp4"])
def test_clips_of_any_name(tmp_path: Path, suffix: str, name: str) -> None:
    source = ["-f", "lavfi", "-i", "testsrc=s=352x288:r=25:d=0.4"]
    made = tmp_path / f"made.{suffix}"
    command = [ffmpeg_path(), "-v", "error", "-y", *source, "-pix_fmt", "yuv420p", *CLIPS[suffix], made]
    subprocess.run([str(word) for word in command], check=True)
    path = made.rename(tmp_path / name)
    assert kind_of(path) == "video" and not is_picture(path)
    frames = SourceFrames(path, settings())
    assert frames.moving
    assert 8 <= len(list(frames)) <= 11


@pytest.mark.parametrize("form", PICTURES)
@pytest.mark.parametrize("name", ["face.mp4", "face", "face.jpg", "face.mov"])
def test_pictures_of_any_name(tmp_path: Path, form: str, name: str) -> None:
    Image.new("RGB", (64, 48), (200, 90, 30)).save(tmp_path / name, format=form)
    assert kind_of(tmp_path / name) == "image" and is_picture(tmp_path / name)
    [frame] = SourceFrames(tmp_path / name, settings())
    assert frame.shape == (48, 64, 3)
    assert np.abs(frame[20, 20, ::-1].astype(int) - (200, 90, 30)).max() <= 4


def test_a_folder_s_pictures_are_known_by_their_content(tmp_path: Path) -> None:
    for i, name in enumerate(("1", "2.bin", "10.mp4")):
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in source_files(tmp_path)] == ["1", "2.bin", "10.mp4"]


def test_what_no_bytes_tell_is_what_its_name_says(tmp_path: Path) -> None:
    for name, kind in (("a.jpg", "image"), ("a.mp4", "video"), ("a", "video")):
        (tmp_path / name).write_text("nothing that is known")
        assert kind_of(tmp_path / name) == kind
        with pytest.raises(InputError):
            list(SourceFrames(tmp_path / name, settings()))


@pytest.mark.parametrize("form", ["JPEG2000", "ICO"])
def test_pictures_of_a_form_that_is_not_read_are_called_pictures(tmp_path: Path, form: str) -> None:
    path = tmp_path / "face.bin"
    Image.new("RGB", (64, 64)).save(path, form)
    assert kind_of(path) == "image"
    with pytest.raises(InputError, match="not an image that can be read"):
        read_image(path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_in_the_header_is_the_frame_s(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(tmp_path / "p.jpg", exif=exif)
    height, width = read_image(tmp_path / "p.jpg").shape[:2]
    assert image_size(tmp_path / "p.jpg") == (width, height)


def heic(path: Path) -> Path:
    """A HEIC picture, where the package that makes and reads them is installed."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif, which is optional")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 90, 30))).save(str(path), quality=95)
    return path


@pytest.mark.parametrize("name", ["face.heic", "face.jpg", "face"])
def test_heic_with_its_package(tmp_path: Path, name: str) -> None:
    path = heic(tmp_path / name)
    [frame] = SourceFrames(path, settings())
    assert frame.shape == (48, 64, 3)
    assert np.abs(frame[20, 20, ::-1].astype(int) - (200, 90, 30)).max() <= 4


def test_heic_without_its_package_names_format_and_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"ftypheic\0\0\0\0mif1heic"
    (tmp_path / "face.jpg").write_bytes((len(head) + 4).to_bytes(4, "big") + head + bytes(200))
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "face.jpg")
    assert "HEIC" in caught.value.message and "pip install pillow-heif" in caught.value.hint
