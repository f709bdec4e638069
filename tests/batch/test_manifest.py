"""What is done survives kills, and nothing that isn't done passes for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from musetalk.batch.clips import Outcome, failure
from musetalk.batch.jobs import Job, Settings, make_jobs
from musetalk.batch.manifest import entry_of, open_manifest
from musetalk.batch.schedule import Settled
from musetalk.errors import InputError, OutputError
from musetalk.files import file_sha256


def made(folder: Path, name: str) -> tuple[Job, Settled]:
    """A job whose output lies there, and the news that it is through."""
    output = folder / name
    output.write_bytes(name.encode() * 10)
    (job,), _ = make_jobs([{"template": "t", "audio": "a", "output": str(output)}], Settings())
    status = output.stat()
    outcome = Outcome(1.0, {}, 5, 0.2, status.st_size, file_sha256(output), status.st_mtime_ns, "lite", "cpu")
    return job, Settled(job, outcome, 1, "one")


@pytest.fixture
def written(tmp_path) -> tuple[Path, Job, Job]:
    path = tmp_path / "m.jsonl"
    (first, told), (second, told_too) = made(tmp_path, "1.mp4"), made(tmp_path, "2.mp4")
    with open_manifest(path, resume=False) as manifest:
        manifest.append(entry_of(told))
        manifest.append(entry_of(told_too))
    return path, first, second


def is_done(path: Path, job: Job) -> bool:
    with open_manifest(path, resume=True) as manifest:
        return manifest.done(job) is not None


def test_a_done_row_is_known_again_by_what_it_is(written, tmp_path):
    path, first, second = written
    assert is_done(path, first) and is_done(path, second)
    row = {"template": "t", "audio": "a", "output": first.output}
    other_number, other_crf = (
        make_jobs([{**row, "output": "x"}, {**row, **more}], Settings())[0][1] for more in ({}, {"crf": "3"})
    )
    assert other_number.row != first.row and is_done(path, other_number)
    assert not is_done(path, other_crf)


def test_an_output_that_was_lost_cut_or_changed_is_made_again(written):
    path, first, second = written
    Path(first.output).unlink()
    content = bytearray(Path(second.output).read_bytes())
    content[3] ^= 1
    Path(second.output).write_bytes(content)
    assert not is_done(path, first) and not is_done(path, second)


def test_a_copied_output_is_the_same_by_its_checksum(written):
    path, first, _ = written
    os.utime(first.output, ns=(1, 1))
    assert is_done(path, first)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_torn_by_a_kill_costs_that_row_alone(written, tmp_path, cut):
    path, first, second = written
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] if cut > 1 else whole[:-1] + b'\n{"key": "')
    third, told = made(tmp_path, "3.mp4")
    with open_manifest(path, resume=True) as manifest:
        assert manifest.done(first) and bool(manifest.done(second)) == (cut == 1)
        manifest.append(entry_of(told))
    assert is_done(path, third) and is_done(path, first)


def test_a_failed_row_is_told_and_tried_again(tmp_path):
    path, (job, _) = tmp_path / "m.jsonl", made(tmp_path, "1.mp4")
    with open_manifest(path, resume=False) as manifest:
        manifest.append(entry_of(Settled(job, failure(InputError("no sound", "give some")), 2, "one")))
    entry = json.loads(path.read_text("utf-8"))
    assert (entry["error_code"], entry["exit_code"], entry["hint"]) == ("bad_input", 3, "give some")
    assert entry["attempts"] == 2 and not is_done(path, job)


def test_without_resume_it_begins_anew(written):
    path, first, _ = written
    with open_manifest(path, resume=False) as manifest:
        assert manifest.done(first) is None
    assert path.read_bytes() == b""


def test_two_batches_never_share_one(written):
    path, *_ = written
    with (
        open_manifest(path, resume=True),
        pytest.raises(OutputError, match="another batch"),
        open_manifest(path, resume=True),
    ):
        pass
    assert path.read_bytes().count(b"\n") == 2


def test_a_manifest_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="manifest"), open_manifest(tmp_path / "file" / "m", resume=False):
        pass
