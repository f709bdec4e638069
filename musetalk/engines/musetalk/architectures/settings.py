"""A network's JSON configuration, as far as these modules can build what it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Settings = Mapping[str, Any]


def require(settings: Settings, **values: object) -> None:
    """Checks settings whose other values would mean another network; one that is absent or null is well.

    Raises:
        ValueError: a setting has another value.
    """
    for name, value in values.items():
        found = settings.get(name)
        if found is not None and found != value:
            raise ValueError(f"{name} is {found!r}, not {value!r}")


def whole(settings: Settings, name: str, default: int | None = None) -> int:
    """A positive whole number.

    Raises:
        ValueError: it is missing or something else.
    """
    found = settings.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{name} is {found!r}")
    return found


def positive(settings: Settings, name: str, default: float) -> float:
    """A positive number.

    Raises:
        ValueError: it is something else.
    """
    found = settings.get(name, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found > 0:
        raise ValueError(f"{name} is {found!r}")
    return float(found)


def wholes(settings: Settings, name: str) -> tuple[int, ...]:
    """Positive whole numbers, at least one.

    Raises:
        ValueError: they are missing or something else.
    """
    found = settings.get(name)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise ValueError(f"{name} is {found!r}")
    return tuple(whole({name: value}, name) for value in found)


def kinds(settings: Settings, name: str, allowed: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of `count` blocks.

    Raises:
        ValueError: another number of them, or one that isn't in `allowed`.
    """
    found = settings.get(name)
    if not isinstance(found, Sequence) or len(found) != count or any(kind not in allowed for kind in found):
        raise ValueError(f"{name} is {found!r}, not {count} of {', '.join(allowed)}")
    return tuple(found)
