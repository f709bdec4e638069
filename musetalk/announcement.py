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
import secrets
import stat
from pathlib import Path
from typing import Any

from musetalk import __version__
from musetalk.config import EngineConfig
from musetalk.files import atomic_file, remove_file

FILE_NAME = ".worker.json"  # in the cache folder
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


def announce(cache_dir: Path, announcement: Announcement) -> None:
    """Leaves word in the cache folder, for this user alone.

    Raises:
        OutputError: the folder can't be written.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(cache_dir / FILE_NAME) as stream:
        if os.name != "nt":
            os.fchmod(stream.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        stream.write(json.dumps(dataclasses.asdict(announcement)).encode())


def withdraw(cache_dir: Path, announcement: Announcement) -> None:
    """Takes the word back, unless another worker's took its place."""
    if find_announcement(cache_dir) == announcement:
        with contextlib.suppress(OSError):
            remove_file(cache_dir / FILE_NAME)


def find_announcement(cache_dir: Path) -> Announcement | None:
    """The word that a worker of this user left; None where there is none that can be believed."""
    try:
        with (cache_dir / FILE_NAME).open("rb") as stream:
            if os.name != "nt":
                status = os.fstat(stream.fileno())
                if status.st_uid != os.getuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    return None
            found = Announcement(**json.loads(stream.read(MAX_BYTES)))
    except (OSError, ValueError, TypeError):
        return None
    sound = isinstance(found.port, int) and isinstance(found.nonce, str) and isinstance(found.host, str)
    return found if sound and len(found.nonce) >= 32 else None
