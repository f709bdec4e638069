"""Files of a batch that lie elsewhere: brought into a folder before they are used, sent off when whole.

The decision a reader would question: `file://` is a path of the machine like any other and needs no package.
What other addresses reach is fsspec's business; credentials come from the environment, never from a row.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from musetalk.errors import EngineError, InputError, OutputError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a drive
WHOLE_AT_ONCE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https", "memory")
"""Where an object shows only when all of it was sent; elsewhere it is sent under another name."""


def is_remote(place: str) -> bool:
    """Whether a row's file has to be brought or sent."""
    return _SCHEME.match(place) is not None and not place.lower().startswith("file://")


def local_path(place: str) -> Path:
    """The absolute path of a file of this machine, named by path or by `file://`."""
    if place.lower().startswith("file://"):
        parts = urlsplit(place)
        host = f"//{parts.netloc}" if parts.netloc not in ("", "localhost") else ""
        place = url2pathname(host + parts.path)
    return Path(place).absolute()


def absolute(place: str) -> str:
    """What a row says as an absolute path or the address as it is.

    Raises:
        InputError: an address that can't be read, "s3://[x" say.
    """
    try:
        if not is_remote(place):
            return str(local_path(place))
        urlsplit(place)
    except (ValueError, OSError) as e:
        raise InputError(
            f"{place} is no address 地址无效: {e}", "use a path, s3://, https:// or file://"
        ) from e
    return place


def name_of(place: str) -> str:
    """The file's own name."""
    return unquote(urlsplit(place).path).rpartition("/")[2] if is_remote(place) else Path(place).name


def _opened(place: str) -> tuple[Any, str]:
    """The file system that an address belongs to, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(place)
    except ImportError as e:
        raise EngineError(
            f"{place} needs a Python package: {e} 缺少Python包", "pip install -r requirements-remote.txt"
        ) from e
    except ValueError as e:
        raise InputError(f"{place} can't be reached: {e}", "use a path, s3://, https:// or file://") from e


def fetch(place: str, folder: Path) -> Path:
    """The file as one of this machine: itself, or a copy in `folder`.

    Raises:
        InputError: it isn't there or can't be read.
        EngineError: a package for such addresses isn't installed.
    """
    if not is_remote(place):
        return Path(place)
    system, path = _opened(place)
    target = folder / (name_of(place) or "file")
    try:
        system.get_file(path, str(target))
    except Exception as e:
        raise InputError(f"{place} can't be fetched 无法下载: {_words(e)}", "check the address") from e
    return target


def deliver(file: Path, place: str) -> None:
    """Sends a whole file to its address, where it shows only when all of it is there.

    Raises:
        OutputError: it can't be written.
        EngineError: a package for such addresses isn't installed.
    """
    system, path = _opened(place)
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    at_once = protocol in WHOLE_AT_ONCE
    target = path if at_once else f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        if not at_once:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.put_file(str(file), target)
        if not at_once:
            system.mv(target, path)
    except Exception as e:
        raise OutputError(
            f"{place} can't be written 无法上传: {_words(e)}", "check address and rights"
        ) from e


def remote_size(place: str) -> int | None:
    """Bytes of a file elsewhere; None where it isn't there or nobody says."""
    system, path = _opened(place)
    try:
        return system.info(path).get("size")
    except Exception:  # noqa: BLE001 - each file system has errors of its own; all mean that it isn't known
        return None


def _words(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
