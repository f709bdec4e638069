"""Uploads: kept by their content, so that none overwrites another, and swept by their age."""

from __future__ import annotations

import io
import os
import subprocess

import pytest

from musetalk.errors import InputError
from musetalk.media.audio import read_waveform
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.server.uploads import PORTRAITS_FOLDER, keep_portrait, save_upload, sweep_uploads

SOUNDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("wav", "flac", "mp3", "ogg", "m4a", "mka", "aiff", "caf", "au", "ac3", "eac3", "w64"), ()
    ),
    **dict.fromkeys(("mp2", "tta", "wma", "wv", "webm", "avi", "mov", "ts", "voc"), ()),
    "aac": ("-f", "adts"),
    "dts": ("-strict", "-2"),
    "latm": (),
    "amr": ("-ar", "8000", "-ac", "1"),
}
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
    sweep_uploads(tmp_path, 2)
    assert (old.exists(), new.exists(), beside.exists()) == (False, True, True)


def test_what_a_killed_worker_left_of_an_upload_is_swept_and_what_arrives_is_not(tmp_path):
    keep_portrait(io.BytesIO(PICTURE), tmp_path, 100)
    left = tmp_path / PORTRAITS_FOLDER / ".arriving-00000000"
    left.write_bytes(PICTURE)

    class Arriving(io.BytesIO):
        """Half of it has come when the worker keeps house."""

        def read(self, size=-1):
            sweep_uploads(tmp_path, 0)
            return super().read(size)

    kept = keep_portrait(Arriving(PICTURE + b"x"), tmp_path, 100)
    assert kept.read_bytes() == PICTURE + b"x" and not left.exists()


def test_speech_that_a_killed_worker_left_is_swept_by_its_age(tmp_path):
    folder = tmp_path / "speech-abc"
    folder.mkdir()
    sweep_uploads(tmp_path, 2)
    assert folder.exists()
    os.utime(folder, (1, 1))
    sweep_uploads(tmp_path, 2)
    assert not folder.exists()


@pytest.mark.parametrize("suffix", SOUNDS)
def test_every_sound_that_the_commands_take_can_be_sent(tmp_path, suffix):
    made = tmp_path / f"made.{suffix}"
    sine = ["-f", "lavfi", "-i", "sine=d=0.5:r=16000"]
    command = [ffmpeg_path(), "-v", "error", "-y", *sine, *SOUNDS[suffix], str(made)]
    subprocess.run(command, check=True)
    kept = tmp_path / "kept"
    with made.open("rb") as source:
        save_upload(source, kept, "sound", 1 << 20)
    assert kept.read_bytes() == made.read_bytes()
    samples = sum(len(block) for block in read_waveform(kept))
    assert samples == pytest.approx(8000, abs=2500)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\xff\xfehello", b"#EXTM3U\n", b"<svg>", b"ffconcat version 1.0"]
)
@pytest.mark.parametrize("kind", ["picture", "sound"])
def test_what_is_neither_is_refused(tmp_path, content, kind):
    with pytest.raises(InputError):
        save_upload(io.BytesIO(content), tmp_path / "kept", kind, 100)


def test_a_picture_is_no_sound_and_a_sound_no_picture(tmp_path):
    with pytest.raises(InputError):
        save_upload(io.BytesIO(PICTURE), tmp_path / "a", "sound", 100)
    with pytest.raises(InputError):
        save_upload(io.BytesIO(b"RIFF\0\0\0\0WAVE"), tmp_path / "b", "picture", 100)


def test_more_than_the_limit_is_refused(tmp_path):
    with pytest.raises(InputError, match="larger"):
        save_upload(io.BytesIO(PICTURE + b"x" * 100), tmp_path / "a", "picture", 100)
