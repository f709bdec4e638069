"""A folder of frames: filled at the end or not at all, and cleared of what killed runs left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from musetalk.config import REPOSITORY
from musetalk.media.frame_folder import FrameFolder
from musetalk.media.image import read_image

HELD_FOLDER = """
import sys
from pathlib import Path
import numpy as np
from musetalk.media.frame_folder import FrameFolder
folder = FrameFolder(Path(sys.argv[1])).__enter__()
folder.write(np.zeros((16, 16, 3), np.uint8))
print("open", flush=True)
sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 16, 24, 3), dtype=np.uint8)


def fill(folder: Path, pictures: np.ndarray) -> None:
    with FrameFolder(folder) as opened:
        for picture in pictures:
            opened.write(picture)


def test_frames_come_back_and_those_of_a_longer_run_are_gone(tmp_path: Path) -> None:
    fill(tmp_path / "f", frames(7))
    (tmp_path / "f" / "notes.txt").write_text("mine")
    fill(tmp_path / "f", frames(3))
    assert names(tmp_path / "f") == ["00000000.png", "00000001.png", "00000002.png", "notes.txt"]
    for i, picture in enumerate(frames(3)):
        np.testing.assert_array_equal(read_image(tmp_path / "f" / f"{i:08d}.png"), picture)


def test_a_failed_run_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "f", frames(2))
    for folder in (tmp_path / "f", tmp_path / "new"):
        with pytest.raises(ZeroDivisionError), FrameFolder(folder) as opened:
            opened.write(frames(1)[0])
            raise ZeroDivisionError
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["00000000.png", "00000001.png"]


def test_frames_of_a_killed_run_are_swept_and_those_of_a_live_one_are_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HELD_FOLDER, str(tmp_path)]
    runs = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    (tmp_path / ".git.tmp").mkdir()
    try:
        for run in runs:
            assert run.stdout is not None and run.stdout.readline().strip() == b"open"
        assert len(names(tmp_path)) == 3
        for run, left in zip(runs, (2, 1), strict=True):
            run.kill()
            run.wait()
            fill(tmp_path, frames(1))
            assert len(names(tmp_path)) == left + 1
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert names(tmp_path) == [".git.tmp", "00000000.png"]
