"""Files that appear under their name only when whole, and the checksums that tell them apart.

The decisions a reader would question: replacing and removing is tried again on Windows, where a reader or a
virus scanner that holds a file open for a moment makes both fail. And an unfinished file is locked by whoever
writes it, since the system gives the lock back however that process ends: what a killed process left can be
told from what a live one works on, in another container too, where a process id would say nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from musetalk.errors import OutputError

if sys.platform != "win32":
    import fcntl

WINDOWS_ATTEMPTS = 50
WINDOWS_PAUSE = 0.1  # seconds
HASH_BLOCK = 1 << 20  # bytes
OWNER_NAME = ".owner"  # the locked file of an unfinished folder
UNLOCKED_GRACE = 60.0  # seconds in which what can't be locked, or isn't yet, counts as somebody's work


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def patiently(change: Callable[[], object]) -> None:
    """Runs `change`, again for a while where Windows says that the file is open elsewhere."""
    for attempt in range(WINDOWS_ATTEMPTS):
        try:
            change()
            return
        except PermissionError:
            if os.name != "nt" or attempt == WINDOWS_ATTEMPTS - 1:
                raise
            time.sleep(WINDOWS_PAUSE)


def replace_file(source: Path, target: Path) -> None:
    """Gives `source` the name `target`, in place of whatever had it."""
    patiently(lambda: source.replace(target))


def remove_file(path: Path) -> None:
    """Removes `path`; nothing happens when it isn't there."""
    patiently(lambda: path.unlink(missing_ok=True))


def remove_folder(folder: Path) -> None:
    """Removes `folder` with what is in it; nothing happens when it isn't there."""
    with contextlib.suppress(FileNotFoundError):
        patiently(lambda: shutil.rmtree(folder))


def _lock(stream: IO[bytes], *, wait: bool) -> bool:
    """Locks an open file until it is closed; on Windows to be open is to be locked."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another, or a file system without locks
        return False
    return True


def claim(path: Path) -> IO[bytes]:
    """Makes `path` and opens it; until the stream is closed, `sweep` leaves it alone.

    Raises:
        FileExistsError: `path` is there already.
        OSError: it can't be made.
    """
    while True:
        stream = path.open("xb")
        if not _lock(stream, wait=True) or _same(stream, path):
            return stream
        stream.close()  # swept before it was locked


def publish(stream: IO[bytes], unfinished: Path, target: Path) -> None:
    """Closes a claimed file and gives it its name: the name first, where the system moves open files."""
    if sys.platform == "win32":
        stream.close()
    replace_file(unfinished, target)
    stream.close()


def _same(stream: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sweep(folder: Path, pattern: str) -> None:
    """Removes unfinished files and folders that a process which is gone left behind.

    Args:
        folder: where they lie; nothing happens when it can't be read.
        pattern: regular expression of their whole names.
    """
    try:
        found = [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):  # somebody else's, or swept by another run meanwhile
            _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    held = path / OWNER_NAME if path.is_dir() else path
    if sys.platform != "win32" and held.exists():
        with held.open("rb+") as stream:
            if _lock(stream, wait=False):
                _remove(path)
    elif time.time() - path.stat().st_mtime > UNLOCKED_GRACE:
        held.unlink(missing_ok=True)  # fails on Windows when it is open
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears as `target` when the block ends well, and not at all otherwise.

    What killed processes left of earlier files for `target` is removed.

    Raises:
        OutputError: the folder or file can't be written.
    """
    sweep(target.parent, unfinished_pattern(target.name))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with claim(temporary) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            publish(stream, temporary, target)
    except OutputError:
        raise
    except OSError as e:
        raise OutputError(
            f"{target} can't be written: {e.strerror or e}", "check the folder and its free space"
        ) from e
    finally:
        remove_file(temporary)


def unfinished_pattern(name: str) -> str:
    """Regular expression of what `atomic_file` calls its file until it is whole."""
    return rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp"
