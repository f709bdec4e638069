"""One scheduler per device: sessions ask for faces, its threads serve them in turns.

The decision a reader would question: a session has one request under way at most, so serving the oldest
request first is serving sessions in turns. Those that play live come before those that fill a file. And what
a scheduler's thread logs it logs in the context of whoever asked, so that his command hears of it; of a mixed
batch, whose warnings are its engine's, in that of the first.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from musetalk.engines.base import MixingEngine
from musetalk.errors import CancelledRun
from musetalk.rendering import GenerateFaces, OpenedTemplate

if TYPE_CHECKING:
    import numpy as np

POLL = 0.05  # seconds between looks at whether who asked has gone
MIXED_FRAMES = 32  # of several sessions, generated at once at most


@dataclass(eq=False)
class Asked:
    """Faces that a session waits for."""

    opened: OpenedTemplate
    prompts: np.ndarray
    positions: Sequence[int]
    live: bool
    cancel: threading.Event
    faces: Future[list[np.ndarray]] = field(default_factory=Future)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Scheduler:
    """Generates faces for many sessions on one device.

    Args:
        device: its name, for the threads'.
        threads: how many requests are served at once: 1 on a GPU, the cores on a CPU.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self._waiting: deque[Asked] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"scheduler-{device}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def generate(
        self, opened: OpenedTemplate, cancel: threading.Event, *, live: bool = False
    ) -> GenerateFaces:
        """What a rendering of `opened` calls for its faces; raises `CancelledRun` once `cancel` is set."""

        def ask(prompts: np.ndarray, positions: Sequence[int]) -> list[np.ndarray]:
            asked = Asked(opened, prompts, positions, live, cancel)
            with self._changed:
                if self._closed:
                    raise CancelledRun("the worker was stopped 服务已停止", "")
                self._waiting.append(asked)
                self._changed.notify()
            while not cancel.is_set():
                with contextlib.suppress(FutureTimeout):
                    return asked.faces.result(POLL)
            raise CancelledRun("the request was cancelled 已取消", "")

        return ask

    def close(self) -> None:
        """Refuses what waits and ends the threads after what they work on."""
        with self._changed:
            self._closed = True
            for asked in self._waiting:
                asked.faces.set_exception(CancelledRun("the worker was stopped 服务已停止", ""))
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while batch := self._next():
            try:
                results = batch[0].context.run(_generate, batch)
            except BaseException as e:  # noqa: BLE001 - raised where each session waits for it
                if len(batch) > 1:
                    _generate_apart(batch)
                else:
                    batch[0].faces.set_exception(e)
            else:
                for asked, faces in zip(batch, results, strict=True):
                    asked.faces.set_result(faces)

    def _next(self) -> list[Asked]:
        """The oldest request, live ones first, with those that its engine can mix with it; [] at the end."""
        with self._changed:
            while True:
                self._waiting = deque(asked for asked in self._waiting if not asked.cancel.is_set())
                if self._waiting or self._closed:
                    break
                self._changed.wait()
            if not self._waiting:
                return []
            first = next((asked for asked in self._waiting if asked.live), self._waiting[0])
            batch, frames = [first], len(first.positions)
            if isinstance(first.opened.engine, MixingEngine):
                for asked in self._waiting:
                    fits = frames + len(asked.positions) <= MIXED_FRAMES
                    if asked is not first and asked.opened.engine is first.opened.engine and fits:
                        batch.append(asked)
                        frames += len(asked.positions)
            self._waiting = deque(asked for asked in self._waiting if asked not in batch)
            return batch


def _generate(batch: Sequence[Asked]) -> list[list[np.ndarray]]:
    if len(batch) > 1:
        engine = batch[0].opened.engine
        assert isinstance(engine, MixingEngine)
        return engine.generate_mixed([(a.opened.generator, a.prompts, a.positions) for a in batch])
    return [asked.opened.generator.generate(asked.prompts, asked.positions) for asked in batch]


def _generate_apart(batch: Sequence[Asked]) -> None:
    """Each request by itself, so that one which can't be served fails alone."""
    for asked in batch:
        try:
            [faces] = asked.context.run(_generate, [asked])
        except BaseException as e:  # noqa: BLE001 - raised where its session waits for it
            asked.faces.set_exception(e)
        else:
            asked.faces.set_result(faces)
