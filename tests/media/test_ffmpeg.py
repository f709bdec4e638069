"""The child process: which ffmpeg, what it may open, what it says, and that it never stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from musetalk.config import REPOSITORY
from musetalk.errors import EngineError, InputError
from musetalk.media import ffmpeg
from tests.media.conftest import ends

NULL_SINK = ["-f", "rawvideo", "-pix_fmt", "gray", "-video_size", "64x64", "-i", "pipe:0", "-f", "null", "-"]
ENDLESS = ["-f", "lavfi", "-i", "color=s=64x64", "-f", "rawvideo", "-pix_fmt", "gray", "pipe:1"]


def test_the_named_ffmpeg_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / ("my ffmpeg.exe" if os.name == "nt" else "my ffmpeg")
    shutil.copy(ffmpeg.ffmpeg_path(), named)
    monkeypatch.setenv("FFMPEG_BINARY", str(named))
    assert Path(ffmpeg.ffmpeg_path()) == named


def test_a_named_ffmpeg_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMPEG_BINARY", "/nowhere/ffmpeg")
    with pytest.raises(EngineError, match="/nowhere/ffmpeg") as caught:
        ffmpeg.ffmpeg_path()
    assert "FFMPEG_BINARY" in caught.value.hint


@pytest.fixture
def searched_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ffmpeg is looked for again, without FFMPEG_BINARY, before and after the test."""
    monkeypatch.delenv("FFMPEG_BINARY", raising=False)
    ffmpeg._find_ffmpeg.cache_clear()
    yield
    ffmpeg._find_ffmpeg.cache_clear()


def system_ffmpeg(folder: Path) -> Path:
    """A program called ffmpeg, as the system might have one, that can be started."""
    program = folder / ("ffmpeg.exe" if os.name == "nt" else "ffmpeg")
    shutil.copy(ffmpeg.ffmpeg_path(), program)
    ffmpeg._find_ffmpeg.cache_clear()
    return program


def test_the_wheel_s_ffmpeg_comes_before_the_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched_anew: None
) -> None:
    system_ffmpeg(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "imageio_ffmpeg" in ffmpeg.ffmpeg_path()


def test_the_system_s_ffmpeg_serves_where_the_wheel_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched_anew: None
) -> None:
    program = system_ffmpeg(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", _no_program)
    assert Path(ffmpeg.ffmpeg_path()) == program


def test_without_any_ffmpeg_the_error_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched_anew: None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", _no_program)
    with pytest.raises(EngineError) as caught:
        ffmpeg.ffmpeg_path()
    assert "imageio-ffmpeg" in caught.value.hint


def _no_program() -> str:
    raise RuntimeError("No ffmpeg exe could be found.")


@pytest.mark.parametrize("path", [".", "", "programs", os.pathsep.join(["", ".", "programs"])])
def test_no_ffmpeg_is_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for folder in (tmp_path, tmp_path / "programs"):
        folder.mkdir(exist_ok=True)
        for name in ("ffmpeg", "ffmpeg.exe"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("FFMPEG_BINARY", raising=False)
    ffmpeg._find_ffmpeg.cache_clear()
    try:
        assert "imageio_ffmpeg" in ffmpeg.ffmpeg_path()
        with pytest.raises(EngineError):
            ffmpeg._find_ffmpeg("ffmpeg")
        monkeypatch.setenv("PATH", str(tmp_path / "programs"))
        assert Path(ffmpeg._find_ffmpeg("ffmpeg")).parent == tmp_path / "programs"
    finally:
        ffmpeg._find_ffmpeg.cache_clear()


def test_complaint_names_the_cause_first_and_no_addresses(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"junk" * 100)
    with ffmpeg.Child(["-i", ffmpeg.file_url(tmp_path / "x.mp4"), "-f", "null", "-"]) as child:
        assert child.finish() != 0
    assert child.complaint.startswith("moov atom not found")
    assert "0x" not in child.complaint


def test_a_child_that_talks_a_lot_is_drained() -> None:
    chatter = ["-f", "lavfi", "-i", "color=s=16x16:r=1000:d=8", "-vf", "showinfo", "-f", "null", "-"]
    with ffmpeg.Child(chatter) as child:
        assert child.finish() == 0
    assert len(child.log) < 100_000


def test_writing_and_reading_whole_buffers() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    echo = [*NULL_SINK[:-3], "-f", "rawvideo", "pipe:1"]
    with ffmpeg.Child(echo, stdin=True, stdout=True) as child:
        child.write(frames.data.cast("B"))
        assert child._process.stdin is not None
        child._process.stdin.close()
        received = np.empty_like(frames)
        assert child.read_array(received)
        assert child.read(1) == b""
        assert not child.read_array(received)
    np.testing.assert_array_equal(received, frames)


def test_leaving_the_context_ends_an_endless_child(children: Callable[[], list[int]]) -> None:
    with ffmpeg.Child(ENDLESS, stdout=True) as child:
        assert len(child.read(4096)) == 4096
        assert len(children()) == 1
    assert children() == []


def test_a_write_that_blocks_ends_when_another_thread_kills_the_child() -> None:
    stuck = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "-video_size",
        "64x64",
        "-re",
        "-i",
        "pipe:0",
        "-f",
        "null",
        "-",
    ]
    failures: list[OSError] = []

    def write(child: ffmpeg.Child) -> None:
        frame = memoryview(bytes(1 << 22))
        try:
            while True:
                child.write(frame)
        except OSError as e:
            failures.append(e)

    with ffmpeg.Child(stuck, stdin=True) as child:
        writer = threading.Thread(target=write, args=(child,))
        writer.start()
        child.kill()
        writer.join(30)
        assert not writer.is_alive()
    assert len(failures) == 1


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs a handle on another's child (Linux)")
def test_the_child_ends_when_we_are_killed(tmp_path: Path) -> None:
    """SIGKILL leaves no chance to clean up: the broken pipe must do it."""
    script = (
        "import sys; from musetalk.media.ffmpeg import Child\n"
        f"child = Child({NULL_SINK!r}, stdin=True)\n"
        "print(child._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert ends(pid)


@pytest.mark.skipif(os.name == "nt", reason="POSIX sessions")
def test_ctrl_c_on_the_terminal_does_not_reach_the_child() -> None:
    with ffmpeg.Child(ENDLESS, stdout=True) as child:
        assert os.getsid(child._process.pid) == child._process.pid


@pytest.mark.parametrize("kind", ["audio", "video", "image"])
def test_check_input_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "good").write_bytes(b"x")
    (tmp_path / "empty").write_bytes(b"")
    assert ffmpeg.check_input_file(str(tmp_path / "good"), kind) == tmp_path / "good"
    for bad in (tmp_path / "none", tmp_path, tmp_path / "empty", Path("a\0b")):
        with pytest.raises(InputError, match=kind) as caught:
            ffmpeg.check_input_file(bad, kind)
        assert caught.value.hint
