"""Files that appear whole or not at all, and Windows' way of holding them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from musetalk import files
from musetalk.errors import OutputError
from musetalk.files import (
    atomic_file,
    claim,
    file_sha256,
    remove_file,
    remove_folder,
    replace_file,
    sweep,
    unfinished_pattern,
)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(target) as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_target_that_is_a_folder_is_an_output_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError), atomic_file(tmp_path / "folder") as stream:
        stream.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_hash_is_that_of_the_content(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


class HeldFile:
    """A file whose first two replacements fail as Windows lets them fail."""

    refusals = 2

    def replace(self, target):
        if self.refusals:
            self.refusals -= 1
            raise PermissionError("open elsewhere")


def test_replacing_is_tried_again_on_windows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WINDOWS_PAUSE", 0)
    with pytest.raises(PermissionError):
        replace_file(HeldFile(), tmp_path)
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))
    held = HeldFile()
    replace_file(held, tmp_path)
    assert held.refusals == 0
    held.refusals = files.WINDOWS_ATTEMPTS
    with pytest.raises(PermissionError):
        replace_file(held, tmp_path)


class HeldTwice:
    """A file or folder that Windows lets nobody remove at first."""

    def __init__(self):
        self.refusals = 2

    def __call__(self, *_arguments, **_settings):
        if self.refusals:
            self.refusals -= 1
            raise PermissionError("open elsewhere")


@pytest.mark.parametrize("remove", [remove_file, remove_folder])
def test_removing_is_tried_again_on_windows_only(tmp_path, monkeypatch, remove):
    held = HeldTwice()
    monkeypatch.setattr(files, "WINDOWS_PAUSE", 0)
    monkeypatch.setattr(files.shutil, "rmtree", held)
    with pytest.raises(PermissionError):
        remove(SimpleNamespace(unlink=held))
    held.refusals = 2
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))
    remove(SimpleNamespace(unlink=held))
    assert held.refusals == 0


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from musetalk.files import atomic_file
with atomic_file(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    target = tmp_path / "state.pkl"
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(target)], check=False)
    assert len(list(tmp_path.iterdir())) == 1 and not target.exists()
    with atomic_file(tmp_path / "other.pkl") as stream:
        stream.write(b"another file")
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_file(target) as stream:
        stream.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pkl", "state.pkl"]


def test_two_writers_of_one_file_leave_each_other_alone(tmp_path):
    target = tmp_path / "file"
    with atomic_file(target) as slow:
        slow.write(b"slow")
        with atomic_file(target) as quick:
            quick.write(b"quick")
        assert target.read_bytes() == b"quick"
    assert target.read_bytes() == b"slow" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_nothing_can_be_locked_only_old_files_are_swept(tmp_path, monkeypatch):
    """As on Windows, which refuses to remove what is open instead."""
    pattern = unfinished_pattern("file")
    paths = [tmp_path / f".file.{number:08x}.tmp" for number in range(3)]
    for path in paths[:2]:
        path.write_bytes(b"half")
    (paths[2]).mkdir()
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    sweep(tmp_path, pattern)
    assert len(list(tmp_path.iterdir())) == 3
    for path in paths[1:]:
        os.utime(path, (0, 0))
    sweep(tmp_path, pattern)
    assert list(tmp_path.iterdir()) == paths[:1]


def test_sweeping_a_folder_that_is_not_there_does_nothing(tmp_path):
    sweep(tmp_path / "nowhere", ".*")
    assert not list(tmp_path.iterdir())


def test_a_claimed_file_is_nobody_elses(tmp_path):
    with claim(tmp_path / "file"):
        sweep(tmp_path, "file")
        with pytest.raises(FileExistsError):
            claim(tmp_path / "file")
    sweep(tmp_path, "file")
    assert not list(tmp_path.iterdir())
