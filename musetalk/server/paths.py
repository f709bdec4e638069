"""Paths in requests: as this machine and as the caller's container know them, and where they may lie.

The decision a reader would question: a path that isn't here is looked up by its last name in the folders that
caller and worker share, because two containers mount one folder under different names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from musetalk.errors import InputError


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
    if "\0" in text:
        raise InputError("a path can't hold a zero byte 路径无效", "correct the path")
    path = Path(text)
    if not path.exists() and (name := last_name(text)) not in ("", ".", ".."):
        path = next((folder / name for folder in shared if (folder / name).exists()), path)
    return _allowed(path, allowed)


def check_output(text: str, allowed: Sequence[Path] | None) -> Path:
    """The path that a request wants written.

    Raises:
        InputError: it lies outside the allowed folders.
    """
    if "\0" in text:
        raise InputError("a path can't hold a zero byte 路径无效", "correct the path")
    return _allowed(Path(text), allowed)


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
