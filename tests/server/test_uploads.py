"""Uploads: kept by their content, so that none overwrites another, and swept by their age."""

from __future__ import annotations

import io
import os

from musetalk.server.uploads import PORTRAITS_FOLDER, keep_portrait, sweep_portraits

PICTURE = b"\x89PNG\r\n\x1a\n"


def test_two_portraits_are_two_files_and_one_portrait_is_one(tmp_path):
    first, second, again = (
        keep_portrait(io.BytesIO(PICTURE + content), tmp_path, 100) for content in (b"anna", b"otto", b"anna")
    )
    assert first == again != second
    assert (first.read_bytes(), second.read_bytes()) == (PICTURE + b"anna", PICTURE + b"otto")
    assert set((tmp_path / PORTRAITS_FOLDER).iterdir()) == {first, second}, "nothing is left of the arrival"


def test_only_old_portraits_are_swept_and_nothing_beside_them(tmp_path):
    old, new = (keep_portrait(io.BytesIO(PICTURE + content), tmp_path, 100) for content in (b"old", b"new"))
    beside = tmp_path / "callers.png"
    beside.touch()
    for path in (old, beside):
        os.utime(path, (1, 1))
    sweep_portraits(tmp_path, 2)
    assert (old.exists(), new.exists(), beside.exists()) == (False, True, True)
