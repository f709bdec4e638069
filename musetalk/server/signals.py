"""Waiting in the event loop for what happens on other threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


class Changes:
    """Tells coroutines that something has changed; what it is they look up themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def tell(self) -> None:
        """Wakes everybody who waits; from any thread."""
        with self._lock:
            for loop, event in self._waiting:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(event.set)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """A watch that misses no change made inside the block."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiting.add(entry)
        try:
            yield Watch(entry[1])
        finally:
            with self._lock:
                self._waiting.discard(entry)


class Watch:
    """One coroutine's view of `Changes`.

    Args:
        event: is set at each change.
    """

    def __init__(self, event: asyncio.Event) -> None:
        self._event = event

    async def change(self, seconds: float) -> bool:
        """Waits for a change since the last call; whether there was one within `seconds`."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        self._event.clear()
        return True
