"""Paths in requests: as this machine and as the caller's container know them, and where they may lie.

The decision a reader would question: a path that isn't here is looked up by its last name in the folders that
caller and worker share, because two containers mount one folder under different names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from musetalk.errors import InputError, MuseTalkError


def last_name(text: str) -> str:
    """The file's own name in a path of any system."""
    return PureWindowsPath(PurePosixPath(text).name).name


def find_input(text: str, shared: Sequence[Path], allowed: Sequence[Path] | None) -> Path:
    """The file that a request names.

    Args:
        text: a path as the caller's system writes it.
        shared: folders in which a path that isn't here is looked up by its last name.
        allowed: what the file must lie below, links resolved; None allows every place.

    Raises:
        InputError: it lies elsewhere.
    """
    path = _path(text, trusted=allowed is None)
    if not _exists(path) and (name := last_name(text)) not in ("", ".", ".."):
        path = next((folder / name for folder in shared if _exists(folder / name)), path)
    return _allowed(path, allowed)


def check_output(text: str, allowed: Sequence[Path] | None) -> Path:
    """The path that a request wants written.

    Raises:
        InputError: it lies outside the allowed folders.
    """
    return _allowed(_path(text, trusted=allowed is None), allowed)


def find_cache(text: str, own: Path, template_id: str, allowed: Sequence[Path] | None) -> Path:
    """The cache folder that a request names, which may be a template's own folder inside the worker's.

    Args:
        text: a path as the caller's system writes it.
        own: the worker's cache folder.
        allowed: what another folder must lie below, links resolved, to be used; one that isn't here at all is
            the caller's name for the worker's. None allows every place.

    Raises:
        InputError: it lies elsewhere.
    """
    path = _path(text, trusted=allowed is None)
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # `_allowed` says what is wrong with it
        if path.resolve() in (own.resolve(), (own / template_id).resolve()):
            return own
    if allowed is not None and not _exists(path):
        return own
    return _allowed(path, allowed)


def hide_folders(error: MuseTalkError, own: Sequence[Path]) -> MuseTalkError:
    """`error`, its words without the folders of this machine, for callers from elsewhere."""
    for folder in sorted((str(path.absolute()) for path in own), key=len, reverse=True):
        for name in ("message", "hint"):
            words = getattr(error, name).replace(folder + os.sep, "").replace(folder, Path(folder).name)
            setattr(error, name, words)
    return error


def _path(text: str, *, trusted: bool) -> Path:
    """`text` as a path, when looking at it can do no harm: a share's name alone would make Windows log in."""
    if "\0" in text:
        raise InputError("a path can't hold a zero byte 路径无效", "correct the path")
    share = text.replace("\\", "/").startswith("//")
    if not trusted and (share or PureWindowsPath(text).is_reserved()):
        raise InputError(
            "network shares and devices can't be named 路径无效", "name a file in a shared folder"
        )
    return Path(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, say
        return False


def _allowed(path: Path, allowed: Sequence[Path] | None) -> Path:
    if allowed is None:
        return path
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as e:
        raise InputError(f"path {path.name!r} can't be resolved 路径无效", "correct the path") from e
    if not any(resolved.is_relative_to(folder.resolve()) for folder in allowed):
        raise InputError(
            f"path {last_name(str(path))!r} is outside the folders that callers may use 路径不在允许的目录内",
            "put the file into a shared folder, or start the worker with --allow_dir",
        )
    return resolved
