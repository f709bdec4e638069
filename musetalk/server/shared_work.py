"""Work that several want at once and that is done once, for as long as one of them waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from musetalk.errors import CancelledRun

Answer = TypeVar("Answer")

POLL = 0.05  # seconds between two looks at whether somebody has cancelled


class SharedCancel(threading.Event):
    """Is set once everybody who waits for a piece of work has cancelled it."""

    def __init__(self) -> None:
        super().__init__()
        self._all: list[threading.Event] = []

    def join(self, cancel: threading.Event | None) -> None:
        """Somebody waits for it too, until he cancels."""
        self._all.append(cancel or threading.Event())

    @property
    def ended(self) -> bool:
        """Whether it was ended for all, who still waits among them."""
        return super().is_set()

    def is_set(self) -> bool:
        """Whether nobody waits any more, or it was ended for all."""
        return self.ended or all(cancel.is_set() for cancel in self._all)


class SharedWork(Generic[Answer]):
    """Pieces of work under way, by what they are known by."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, tuple[Future[Answer], SharedCancel]] = {}

    def do(
        self, key: Hashable, work: Callable[[threading.Event], Answer], cancel: threading.Event | None
    ) -> Answer:
        """Does a piece of work, or waits for whoever does the same; raises what that raises.

        Args:
            work: takes what is set once nobody wants it any more.

        Raises:
            CancelledRun: `cancel` was set, or the work was ended for all.
        """
        with self._lock:
            mine = key not in self._under_way
            answer, shared = self._under_way.setdefault(key, (Future(), SharedCancel()))
            shared.join(cancel)
        if mine:
            return self._done(key, work, shared)
        try:
            return _result(answer, cancel)
        except CancelledRun:
            if shared.ended or (cancel is not None and cancel.is_set()):
                raise
        return self.do(key, work, cancel)  # it was cancelled by all who had asked for it before

    def _done(self, key: Hashable, work: Callable[[threading.Event], Answer], shared: SharedCancel) -> Answer:
        try:
            made = work(shared)
        except BaseException as e:
            self._forget(key).set_exception(e)
            raise
        self._forget(key).set_result(made)
        return made

    def _forget(self, key: Hashable) -> Future[Answer]:
        """The answer that everybody waits for who has joined so far; whoever comes now asks anew."""
        with self._lock:
            return self._under_way.pop(key)[0]


def _result(answer: Future[Answer], cancel: threading.Event | None) -> Answer:
    """What another makes.

    Raises:
        CancelledRun: `cancel` was set while it was waited for.
    """
    while cancel is None or not cancel.is_set():
        if wait([answer], POLL if cancel else None).done:
            return answer.result()
    raise CancelledRun("the request was cancelled 已取消", "")
