"""Layers and geometry of clips and pictures: pixels' shape, two fields, transparency, clean apertures."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from musetalk.errors import InputError
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.image import read_background, read_image
from musetalk.media.layers import WHITE, Background
from musetalk.media.video import VideoReader, probe_video, read_video
from tests.media.test_video import VERSION

RED = (200, 30, 40)  # RGB


def run_ffmpeg(*arguments: object) -> None:
    subprocess.run([ffmpeg_path(), "-v", "error", "-y", *map(str, arguments)], check=True)


def circle(width: int, height: int) -> np.ndarray:
    """A white disc on black that is round on a screen of 4:3, squeezed into `width` × `height`."""
    frame = np.zeros((480, 640), np.uint8)
    cv2.circle(frame, (320, 240), 180, 255, -1)
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    ("size", "aspect"), [((720, 576), "16/15"), ((720, 480), "8/9"), ((480, 480), "4/3"), ((640, 480), "1")]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mpg"])
def test_pixels_are_made_square(tmp_path: Path, size: tuple[int, int], aspect: str, suffix: str) -> None:
    cv2.imwrite(str(tmp_path / "p.png"), circle(*size))
    path = tmp_path / f"v{suffix}"
    run_ffmpeg("-r", 25, "-i", tmp_path / "p.png", "-vf", f"setsar={aspect}", "-pix_fmt", "yuv420p", path)
    frame = next(iter(read_video(path)))
    info = probe_video(path)
    assert frame.shape == (info.height, info.width, 3)
    assert frame.shape[1] / frame.shape[0] == pytest.approx(
        4 / 3, abs=0.04 if suffix == ".mpg" else 0.01
    )  # MPEG-1 knows few
    _, _, width, height = cv2.boundingRect((frame[:, :, 1] > 128).astype(np.uint8))
    assert width == pytest.approx(height, abs=14 if suffix == ".mpg" else 4)


def test_the_aspect_turns_with_the_picture(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "p.png"), circle(480, 480))
    run_ffmpeg("-i", tmp_path / "p.png", "-vf", "setsar=4/3", "-pix_fmt", "yuv420p", tmp_path / "v.mp4")
    turn = ("-display_rotation", 90) if VERSION >= 6 else ()
    tag = () if VERSION >= 6 else ("-metadata:s:v", "rotate=90")
    run_ffmpeg(*turn, "-i", tmp_path / "v.mp4", "-c", "copy", *tag, tmp_path / "r.mp4")
    frame = next(iter(read_video(tmp_path / "r.mp4")))
    assert frame.shape[0] / frame.shape[1] == pytest.approx(4 / 3, abs=0.01)


def combed(frame: np.ndarray) -> float:
    """How much neighbouring lines differ, over how much every second one does."""
    grey = frame[:, :, 1].astype(float)
    return float(np.abs(grey[1:] - grey[:-1]).mean() / (np.abs(grey[2:] - grey[:-2]).mean() + 0.5))


@pytest.mark.parametrize("order", ["tff", "bff"])
@pytest.mark.parametrize("options", [("-c:v", "mpeg2video", "-q:v", 2), ("-c:v", "libx264", "-qp", 10)])
def test_fields_become_one_picture(tmp_path: Path, order: str, options: tuple[object, ...]) -> None:
    """A bar that moves fast, filmed in 50 fields a second: woven together they would be a comb."""
    moving = "color=c=black:s=320x240:r=50:d=1,geq=lum='255*between(mod(X-8*N,320),100,160)':cb=128:cr=128"
    woven = f"tinterlace=mode={'interleave_top' if order == 'tff' else 'interleave_bottom'},setfield={order}"
    flags = ("-flags", "+ilme+ildct", "-pix_fmt", "yuv420p")
    path = tmp_path / ("v.mpg" if "mpeg2video" in options else "v.mp4")
    top = ("-x264opts", order) if "libx264" in options else ("-top", int(order == "tff"))
    top = () if VERSION >= 8 and "libx264" not in options else top
    run_ffmpeg("-f", "lavfi", "-i", f"{moving},{woven}", *options, *top, *flags, path)
    reader = VideoReader(path)
    assert reader.info.interlaced
    frames = list(reader)
    assert 24 <= len(frames) <= 26
    assert max(combed(frame) for frame in frames[2:-2]) < 0.8
    assert np.diff(reader.times) == pytest.approx(0.04, abs=0.001)


def test_progressive_clips_are_left_as_they_are(tmp_path: Path) -> None:
    run_ffmpeg(
        "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=0.2", "-qp", 0, "-pix_fmt", "yuv444p", tmp_path / "v.mp4"
    )
    assert not probe_video(tmp_path / "v.mp4").interlaced


def half_clear(height: int = 48, width: int = 64) -> np.ndarray:
    """RGBA: the left third clear, the middle half clear, the right third not."""
    rgba = np.zeros((height, width, 4), np.uint8)
    rgba[:, :, :3] = RED
    rgba[:, width // 3 : 2 * width // 3, 3] = 128
    rgba[:, 2 * width // 3 :, 3] = 255
    return rgba


ALPHA = {
    "v.mov": ("-c:v", "qtrle"),
    "w.mov": ("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"),
    "v.webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-lossless", 1),
    "w.webm": ("-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", 0, "-b:v", "4M"),
    "v.mkv": ("-c:v", "ffv1", "-pix_fmt", "bgra"),
    "w.mkv": ("-c:v", "png"),
}


@pytest.mark.parametrize("name", ALPHA)
@pytest.mark.parametrize("behind", [(255, 255, 255), (0, 177, 64)])
def test_transparent_clips_lie_over_the_background(
    tmp_path: Path, name: str, behind: tuple[int, int, int]
) -> None:
    Image.fromarray(half_clear()).save(tmp_path / "p.png")
    run_ffmpeg("-i", tmp_path / "p.png", *ALPHA[name], tmp_path / name)
    background = read_background("#{:02x}{:02X}{:02x}".format(*behind))
    frame = next(iter(VideoReader(tmp_path / name, background=background))).astype(int)
    half = [(c * 128 + b * 127) / 255 for c, b in zip(RED, behind, strict=True)]
    for column, colour in ((8, behind), (32, half), (56, RED)):
        assert np.abs(frame[24, column, ::-1] - colour).max() <= 5, column


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_transparent_pictures_lie_over_the_background(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(half_clear()).save(tmp_path / f"p{suffix}", lossless=True)
    frame = read_image(tmp_path / f"p{suffix}", background=read_background("#00b140"))
    assert frame[24, 8].tolist() == [64, 177, 0]
    assert frame[24, 56].tolist() == list(RED[::-1])


def test_a_picture_as_background_covers_the_frame_from_its_middle(tmp_path: Path) -> None:
    behind = np.zeros((40, 200, 3), np.uint8)
    behind[:, 80:120] = (10, 200, 90)
    cv2.imwrite(str(tmp_path / "b.png"), behind)
    shown = read_background(str(tmp_path / "b.png")).behind(80, 60)
    assert shown.shape == (80, 60, 3)
    assert shown[40, 30].tolist() == [10, 200, 90]
    assert (np.abs(shown.astype(int) - (10, 200, 90)).max(axis=2) < 3).all()


def test_opaque_backgrounds_of_one_size_are_taken_as_they_are() -> None:
    assert WHITE.behind(10, 20).shape == (1, 1, 3)
    pixels = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    np.testing.assert_array_equal(Background(pixels).behind(10, 20), pixels)


@pytest.mark.parametrize("text", ["#12345", "#gggggg", "#1234567", "nowhere.png", ""])
def test_what_is_no_background_is_bad_input(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_background(text)
    assert caught.value.hint


def with_clean_aperture(data: bytes, size: tuple[int, int], offset: tuple[int, int]) -> bytes:
    """An mp4, its index behind its media, with a sample entry by which only a part of it is clean."""
    values = (size[0], 1, size[1], 1, offset[0], 1, offset[1], 1)
    box = struct.pack(">I4s8i", 40, b"clap", *values)
    place = data.index(b"avcC") - 4
    result = bytearray(data[:place] + box + data[place:])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        at = result.rindex(name, 0, place) - 4
        result[at : at + 4] = struct.pack(">I", struct.unpack(">I", result[at : at + 4])[0] + len(box))
    return bytes(result)


@pytest.mark.skipif(VERSION < 8, reason="ffmpeg before 7.1 doesn't read clean apertures")
def test_the_clean_aperture_is_what_is_seen(tmp_path: Path) -> None:
    picture = np.zeros((96, 128, 3), np.uint8)
    picture[20:84, 10:106] = (40, 160, 220)
    cv2.imwrite(str(tmp_path / "p.png"), picture)
    run_ffmpeg("-i", tmp_path / "p.png", "-pix_fmt", "yuv444p", "-qp", 0, tmp_path / "v.mp4")
    whole = (tmp_path / "v.mp4").read_bytes()
    middle = (10 + 48 - 64, 20 + 32 - 48)  # of the aperture, from the picture's
    (tmp_path / "c.mp4").write_bytes(with_clean_aperture(whole, (96, 64), middle))
    frame = next(iter(read_video(tmp_path / "c.mp4")))
    assert frame.shape == (64, 96, 3)
    assert np.abs(frame.astype(int) - (40, 160, 220)).max() <= 6
