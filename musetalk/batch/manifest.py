"""What a batch has done so far: one JSON object a line, appended when a row is through, read to go on.

The decision a reader would question: rows are known by the hash of all that shapes them, not by their number,
so that a table may be sorted, cut or added to between two runs. A done row counts only while its output is
the file that was written: as large and as old, or else of the same checksum.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musetalk.batch.jobs import Job
from musetalk.batch.schedule import Settled
from musetalk.batch.transfer import is_remote, remote_size
from musetalk.errors import OutputError
from musetalk.files import file_sha256

DONE, FAILED = "done", "failed"
LOCK_SUFFIX = ".lock"


def entry_of(settled: Settled) -> dict[str, Any]:
    """A row's line: what was asked, what became of it."""
    job, outcome = settled.job, dataclasses.asdict(settled.outcome)
    told = {
        "state": FAILED if settled.outcome.failed else DONE,
        "row": job.row,
        "key": job.key,
        "template_id": job.template_id,
        "audio": job.audio,
        "output": job.output,
        "attempts": settled.attempts,
        "worker": settled.worker,
    }
    errors = ("error_code", "exit_code", "message", "hint")
    made = ("frames", "duration", "size", "sha256", "mtime_ns", "engine", "device", "stages")
    shown = errors if settled.outcome.failed else made
    return {**told, "seconds": round(settled.outcome.seconds, 4), **{name: outcome[name] for name in shown}}


class Manifest:
    """A manifest that this process alone writes; see `open_manifest`.

    Attributes:
        entries: the last line of each key that was there.
    """

    def __init__(self, path: Path, descriptor: int, entries: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.entries = entries
        self._descriptor = descriptor

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line, which is on the disk when this returns.

        Raises:
            OutputError: it can't be written.
        """
        text = json.dumps({**entry, "time": round(time.time(), 3)}, ensure_ascii=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError("the disk is full")
            os.fsync(self._descriptor)
        except OSError as e:
            raise _unwritable(self.path, e) from e

    def done(self, job: Job) -> dict[str, Any] | None:
        """The line of a job that needn't be done again; None where it must."""
        entry = self.entries.get(job.key)
        return entry if entry and entry["state"] == DONE and _holds(entry, job.output) else None


@contextmanager
def open_manifest(path: Path, *, resume: bool) -> Iterator[Manifest]:
    """The manifest, locked against other batches; empty unless `resume`.

    Raises:
        OutputError: it can't be written, or another batch that runs has it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(path.name + LOCK_SUFFIX))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise OutputError(
            f"another batch writes {path} 另一批任务正在运行", "wait for it, or name another --manifest"
        ) from e
    except OSError as e:
        raise _unwritable(path, e) from e
    try:
        entries, torn = _read(path) if resume else ({}, False)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, flags | (0 if resume else os.O_TRUNC), 0o666)
            if torn:
                os.write(descriptor, b"\n")
        except OSError as e:
            raise _unwritable(path, e) from e
        try:
            yield Manifest(path, descriptor, entries)
        finally:
            os.close(descriptor)
    finally:
        lock.release()


def read_entries(path: Path, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """The last line of each row of a table.

    Args:
        rows: their numbers by key; a line may be of a time when its row had another.
    """
    entries, _ = _read(path)
    return [{**entries[key], "row": row} for key, row in rows.items() if key in entries]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """The last line of each key, and whether the file ends in the middle of a line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}, False
    except OSError as e:
        raise _unwritable(path, e) from e
    entries: dict[str, dict[str, Any]] = {}
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
            if entry["state"] in (DONE, FAILED):
                entries[entry["key"]] = entry
        except (ValueError, TypeError, KeyError, RecursionError):  # torn by a kill: that row is done again
            continue
    return entries, bool(content) and not content.endswith(b"\n")


def _holds(entry: dict[str, Any], output: str) -> bool:
    """Whether the file is still what the line says."""
    if is_remote(output):
        return remote_size(output) == entry.get("size")
    try:
        status = Path(output).stat()
        if status.st_size != entry.get("size"):
            return False
        return status.st_mtime_ns == entry.get("mtime_ns") or file_sha256(Path(output)) == entry.get("sha256")
    except OSError:
        return False


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the manifest {path} can't be written 无法写入: {error.strerror or error}",
        "name another place with --manifest 请更换路径",
    )
