"""Files that appear under their name only when whole, and the checksums that tell them apart.

The decision a reader would question: replacing and removing is tried again on Windows, where a reader or a
virus scanner that holds a file open for a moment makes both fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from musetalk.errors import OutputError

WINDOWS_ATTEMPTS = 50
WINDOWS_PAUSE = 0.1  # seconds
HASH_BLOCK = 1 << 20  # bytes


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


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears as `target` when the block ends well, and not at all otherwise.

    Raises:
        OutputError: the folder or file can't be written.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        replace_file(temporary, target)
    except OutputError:
        raise
    except OSError as e:
        raise OutputError(
            f"{target} can't be written: {e.strerror or e}", "check the folder and its free space"
        ) from e
    finally:
        temporary.unlink(missing_ok=True)
