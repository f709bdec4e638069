"""What a template is made from: files and folders of images, their order, their hash, their bounds."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.config import EngineConfig, PreprocessingConfig
from musetalk.errors import InputError
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.preprocessing import source as sources
from musetalk.preprocessing.following import find_faces
from musetalk.preprocessing.source import SourceFrames, source_files, source_sha256
from tests.media.test_video import VERSION


def write_image(path, level: int, size: tuple[int, int] = (32, 40)) -> None:
    assert cv2.imwrite(str(path), np.full((*size, 3), level, np.uint8))


def test_images_of_a_folder_come_in_natural_order_and_nothing_else_does(tmp_path):
    for i, name in enumerate(("2.png", "10.png", "a².png")):
        write_image(tmp_path / name, 10 * i)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._2.png").write_bytes(b"left by a copy from another system")
    assert [path.name for path in source_files(tmp_path)] == ["2.png", "10.png", "a².png"]
    assert [int(frame[0, 0, 0]) for frame in SourceFrames(tmp_path, PreprocessingConfig())] == [0, 10, 20]


def test_hash_follows_names_and_contents_of_the_images_alone(tmp_path):
    (tmp_path / "1.png").write_bytes(b"one")
    hashes = [source_sha256(tmp_path)]
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    hashes.append(source_sha256(tmp_path))
    (tmp_path / "2.png").write_bytes(b"two")
    hashes.append(source_sha256(tmp_path))
    assert len(set(hashes)) == 3
    (tmp_path / "notes.txt").write_text("no image")
    assert source_sha256(tmp_path) == hashes[-1]


@pytest.mark.parametrize("name", ["missing.jpg", "x" * 300 + ".jpg", "nul\0.jpg", "empty", "empty/none.jpg"])
def test_source_that_is_not_there_is_bad_input(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        source_sha256(tmp_path / name)
    assert caught.value.hint


def test_frames_of_different_sizes_are_bad_input(tmp_path):
    write_image(tmp_path / "1.png", 0)
    write_image(tmp_path / "2.png", 0, (48, 40))
    with pytest.raises(InputError, match="differ in size"):
        find_faces(tmp_path, PreprocessingConfig(), "lite", EngineConfig(), "cpu")


def test_template_that_no_memory_would_hold_is_bad_input(tmp_path, monkeypatch):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", 0)
    monkeypatch.setattr(sources, "MAX_TEMPLATE_BYTES", 3 * 32 * 40 * 3)
    with pytest.raises(InputError, match="4 frames at 40×32"):
        find_faces(tmp_path, PreprocessingConfig(), "lite", EngineConfig(), "cpu")


def write_clip(path: Path, *options: object, source: str = "testsrc=s=64x48:r=30:d=2") -> Path:
    command = [ffmpeg_path(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *map(str, options), str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("rate", ["6", "24000/1001", "25", "30000/1001", "60", "120"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".ts"])
def test_a_clip_s_own_rate_is_known(tmp_path: Path, rate: str, suffix: str) -> None:
    source = f"testsrc=s=64x48:r={rate}:d=1"
    frames = SourceFrames(
        write_clip(tmp_path / f"c{suffix}", "-pix_fmt", "yuv420p", source=source), PreprocessingConfig()
    )
    count = sum(1 for _ in frames)
    timeline = frames.timeline()
    assert timeline is not None and timeline.is_even
    assert timeline.fps == Fraction(rate) and len(timeline.spans) == count


def test_a_clip_of_varying_rate_keeps_the_time_of_each_frame(tmp_path: Path) -> None:
    """As a phone films it: half-way the light fails and only every fourth picture is taken."""
    kept = r"select='lt(n\,30)+not(mod(n\,4))',settb=1/1000"
    path = write_clip(
        tmp_path / "c.mkv",
        "-vf",
        kept,
        "-vsync" if VERSION < 6 else "-fps_mode",
        "passthrough",
        "-enc_time_base",
        "1/1000",
    )
    frames = SourceFrames(path, PreprocessingConfig())
    assert sum(1 for _ in frames) == 37
    timeline = frames.timeline()
    assert timeline is not None and not timeline.is_even
    taken = [*range(30), *range(32, 60, 4), 60]
    spans = [(later - earlier) / 30 for earlier, later in pairwise(taken)]
    np.testing.assert_allclose(timeline.spans[:-1], spans[: len(timeline.spans) - 1], atol=0.002)
    assert timeline.duration == pytest.approx(2, abs=0.15)


def test_pictures_have_no_time_of_their_own(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png", 0)
    for source in (tmp_path / "1.png", tmp_path):
        frames = SourceFrames(source, PreprocessingConfig())
        assert len(list(frames)) == 1 and frames.timeline() is None
