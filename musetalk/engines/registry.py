"""Engines, each loaded once and shared by every request, template and preprocessing of a process.

The decision a reader would question: what only shapes a request (batch size, strictness) doesn't tell engines
apart, and a weight file that changed on disk does; so a caller who asks for another batch size is served by
the networks that are loaded, and one who put other weights in place is not.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from musetalk.config import EngineConfig, EngineName
from musetalk.device import usable_by_torch
from musetalk.engines.choice import create_engine
from musetalk.weights import files

if TYPE_CHECKING:
    from musetalk.engines.base import Engine

KEPT_ENGINES = 2  # with different settings on one device; the one that was asked for longest ago goes


class EngineRegistry:
    """The engines of a process.

    Args:
        create: makes an engine of a name, settings and a resolved device; `create_engine` by default.
    """

    def __init__(self, create: Callable[[EngineName, EngineConfig, str], Engine] | None = None) -> None:
        self._create = create or create_engine
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[Hashable, threading.Lock] = {}

    def engine(self, name: EngineName, config: EngineConfig, device: str) -> Engine:
        """The engine for `config` on `device`, loaded when it is first asked for.

        Raises:
            WeightsError, EngineError: as `create_engine`.
            DeviceError: torch can't use the device and the configuration is strict about it.
        """
        key = _identity(name, config, device)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            with self._lock:
                engine = self._engines.get(key)
            if engine is None:
                engine = self._create(name, config, device)
            with self._lock:
                self._engines[key] = engine
                self._engines.move_to_end(key)
                self._drop_others(name, device)
        if name == "musetalk" and config.strict_device:
            usable_by_torch(device, strict=True)  # the engine may have gone to the CPU for a laxer caller
        return engine

    def engines(self) -> list[Engine]:
        """Those that are loaded, the one asked for last at the end."""
        with self._lock:
            return list(self._engines.values())

    def _drop_others(self, name: EngineName, device: str) -> None:
        """Forgets the engines of this name and device beyond `KEPT_ENGINES`; the caller holds the lock."""
        alike = [key for key in self._engines if isinstance(key, tuple) and key[:2] == (name, device)]
        for key in alike[:-KEPT_ENGINES]:
            del self._engines[key]
            self._loading.pop(key, None)


def _identity(name: EngineName, config: EngineConfig, device: str) -> Hashable:
    """What tells two engines apart."""
    if name == "lite":
        return name, "cpu"
    settings = dataclasses.replace(
        config, batch_size=EngineConfig.batch_size, engine="auto", device="auto", strict_device=False
    )
    states = []
    for path in files.find_files(config.models).paths():
        status = path.stat() if path.is_file() else None
        states.append((path, status and (status.st_size, status.st_mtime_ns)))
    return name, device, settings, tuple(states)
