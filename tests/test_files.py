"""Files that appear whole or not at all, and Windows' way of holding them."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from musetalk import files
from musetalk.errors import OutputError
from musetalk.files import atomic_file, file_sha256, replace_file


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
