"""How a resident worker tells the commands of the same user, machine and cache folder that it is there.

The decision a reader would question: the file holds a secret that the worker never sends. A command asks
whoever listens on the port to prove that it knows it, so that no other program that took the port meanwhile,
and no file that another user left in a shared folder, gets to see a request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from musetalk import __version__
from musetalk.config import EngineConfig
from musetalk.errors import OutputError
from musetalk.files import claim, remove_file, sweep

NAMES = re.compile(r"\.worker-[0-9a-f]{8}\.json")  # in the cache folder, one of each worker
MAX_BYTES = 1 << 16
NOT_COMPARED = ("device", "strict_device", "batch_size")  # resolved, or said with each request


@dataclasses.dataclass(frozen=True)
class Announcement:
    """A worker that is there.

    Attributes:
        devices: names such as "cuda:0" that it runs on.
        settings: what its engines were made with; see `engine_settings`.
        nonce: the secret.
    """

    pid: int
    host: str
    port: int
    devices: list[str]
    settings: dict[str, Any]
    version: str = __version__
    nonce: str = dataclasses.field(default_factory=lambda: secrets.token_hex(32))


def engine_settings(config: EngineConfig) -> dict[str, Any]:
    """What must be equal for a worker's engines to give what a command's own would; device apart."""
    settings = dataclasses.asdict(config)
    for name in NOT_COMPARED:
        del settings[name]
    settings["models"] = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in settings["models"].items()
    }
    return {**settings, "ffmpeg": os.environ.get("FFMPEG_BINARY", "")}


def proof(nonce: str, challenge: str) -> str:
    """What only who knows `nonce` can say to `challenge`."""
    return hmac.new(nonce.encode(), challenge.encode(), hashlib.sha256).hexdigest()


@contextlib.contextmanager
def announced(cache_dir: Path, announcement: Announcement) -> Iterator[None]:
    """Leaves word in the cache folder, for this user alone, while the block lasts.

    The word is locked as long as its worker lives: what killed ones left is swept by the next.

    Raises:
        OutputError: the folder can't be written.
    """
    path = cache_dir / f".worker-{secrets.token_hex(4)}.json"
    with contextlib.ExitStack() as stack:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            sweep(cache_dir, NAMES.pattern)
            stream = stack.enter_context(claim(path))
            stack.callback(_remove, path, stream)
            if os.name != "nt":
                os.fchmod(stream.fileno(), stat.S_IRUSR | stat.S_IWUSR)
            stream.write(json.dumps(dataclasses.asdict(announcement)).encode())
            stream.flush()
        except OSError as e:
            raise OutputError(
                f"the cache folder {cache_dir} can't be written: {e.strerror or e}",
                "choose another --cache_dir",
            ) from e
        yield


def _remove(path: Path, stream: IO[bytes]) -> None:
    """Takes the word back; Windows removes no file that is open."""
    if os.name == "nt":
        stream.close()
    with contextlib.suppress(OSError):
        remove_file(path)


def find_announcements(cache_dir: Path) -> list[Announcement]:
    """The words that workers of this user left and that can be believed, the latest first."""
    try:
        paths = [path for path in cache_dir.iterdir() if NAMES.fullmatch(path.name)]
    except OSError:
        return []
    found = [_read(path) for path in paths]
    return [one for _, one in sorted(filter(None, found), key=lambda entry: entry[0], reverse=True)]


def _read(path: Path) -> tuple[float, Announcement] | None:
    """When a word was left, and the word; None where it can't be believed."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            others = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            if os.name != "nt" and (status.st_uid != os.getuid() or others):
                return None
            found = Announcement(**json.loads(stream.read(MAX_BYTES)))
    except (OSError, ValueError, TypeError):
        return None
    sound = isinstance(found.port, int) and isinstance(found.nonce, str) and isinstance(found.host, str)
    return (status.st_mtime, found) if sound and len(found.nonce) >= 32 else None
