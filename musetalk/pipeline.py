"""Overlapped stages: each iterator runs on a thread of its own, over bounded queues.

A pipeline is a chain of plain generators; `Pipeline.overlap` puts one of them on a thread. Queues bound
memory and hold back a fast stage; the first error ends every stage and is raised where the chain is
consumed, in the main thread, which therefore stays free for signals.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")

POLL = 0.05  # seconds between looks at the stop event
JOIN_TIMEOUT = 0.5  # seconds for all threads; one inside a long native call is left to end with the process
_END = object()


class StageClock:
    """Seconds that each stage worked, waiting left out, with the intervals when they are wanted.

    Args:
        record: keep every (start, end) interval, for a chart.
    """

    def __init__(self, *, record: bool = False) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.intervals: dict[str, list[tuple[float, float]]] = {}
        self._record = record

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the block's time for `name`; one thread per name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start
            if self._record:
                self.intervals.setdefault(name, []).append((start - self.started, end - self.started))

    def summary(self) -> str:
        """Each stage with its seconds, for a log."""
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())

    def timed(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, with the time spent making each counted for `name`."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]


class Pipeline:
    """Threads and queues of one run; leaving the block stops and joins them all.

    Args:
        cancel: ends every stage as well, once it is set.

    Attributes:
        abandoned: a stage didn't stop in time when the block was left; it uses what it was given for a while.
    """

    def __init__(self, cancel: threading.Event | None = None) -> None:
        self.abandoned = False
        self._cancel = cancel
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        deadline = time.monotonic() + JOIN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            self.abandoned |= thread.is_alive()

    def _stopped(self) -> bool:
        return self._stop.is_set() or self._cancelled()

    def _cancelled(self) -> bool:
        """Whether the run was cancelled: it ends then, and what a stage says of that is no failure."""
        return self._cancel is not None and self._cancel.is_set()

    def overlap(self, items: Iterable[Item], name: str, depth: int) -> Iterator[Item]:
        """`items`, made on a thread called `name`, at most `depth` ahead of the consumer."""
        results: queue.Queue = queue.Queue(maxsize=depth)
        context = contextvars.copy_context()  # so that a log record can be told to its request
        thread = threading.Thread(
            target=context.run, args=(self._produce, items, results), name=name, daemon=True
        )
        self._threads.append(thread)
        thread.start()
        return self._consume(results)

    def call(self, function: Callable[[], Item], name: str) -> Item:
        """`function()` on a thread, so that a long native call doesn't hold back signals."""
        return next(self.overlap((function() for _ in range(1)), name, 1))

    def wait(self, results: queue.Queue[Item] | queue.SimpleQueue[Item]) -> Item | None:
        """The queue's next item; None once the pipeline stops."""
        while not self._stopped():
            with contextlib.suppress(queue.Empty):
                return results.get(timeout=POLL)
        return None

    def _put(self, results: queue.Queue, entry: object) -> bool:
        while not self._stopped():
            with contextlib.suppress(queue.Full):
                results.put(entry, timeout=POLL)
                return True
        return False

    def _produce(self, items: Iterable[Item], results: queue.Queue) -> None:
        iterator = iter(items)
        try:
            while self._put(results, next(iterator)):
                pass
        except StopIteration:
            self._put(results, _END)
        except BaseException as e:  # noqa: BLE001 - carried to the consuming thread and raised there
            self._error = self._error or e
            self._stop.set()
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _consume(self, results: queue.Queue) -> Iterator[Item]:
        while (item := self.wait(results)) is not _END:
            if item is None:
                if self._error is not None and not self._cancelled():
                    raise self._error
                return
            yield item
