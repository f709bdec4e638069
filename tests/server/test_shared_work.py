"""Work that several want: done once, cancelled with the last of them, and never begun anew when overdue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from musetalk.errors import CancelledRun
from musetalk.server.shared_work import SharedCancel, SharedWork


class Slow:
    """Work that goes on until it is told to end, and counts how often it began."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.wanted: list[threading.Event] = []

    def __call__(self, cancel: threading.Event) -> str:
        self.wanted.append(cancel)
        self.begun.set()
        while not self.go_on.is_set():
            if cancel.is_set():
                raise CancelledRun("cancelled", "")
        return "made"


def both_wait(slow: Slow, submit: Callable[[int], object]) -> tuple:
    """Two who want the same, the second while the first's work is under way."""
    first = submit(0)
    assert slow.begun.wait(60)
    second = submit(1)
    [cancel] = slow.wanted
    assert isinstance(cancel, SharedCancel)
    while len(cancel._all) < 2:
        pass
    return first, second


@pytest.mark.parametrize("who", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_it_is_done_unless_both_have_cancelled(who):
    work, slow, cancels = SharedWork[str](), Slow(), [threading.Event() for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        asked = both_wait(slow, lambda i: threads.submit(work.do, "anna", slow, cancels[i]))
        for index in who:
            cancels[index].set()
        if 1 in who:
            assert isinstance(asked[1].exception(60), CancelledRun)
        if who == [0, 1]:
            assert isinstance(asked[0].exception(60), CancelledRun)
        else:
            assert not asked[0].done()
            slow.go_on.set()
            assert asked[0].result(60) == "made"
        if 1 not in who:
            assert asked[1].result(60) == "made"
    assert len(slow.wanted) == 1 and not work._under_way


def test_what_took_too_long_is_not_begun_anew_by_those_who_waited():
    work, slow, own = SharedWork[str](), Slow(), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        asked = both_wait(slow, lambda i: threads.submit(work.do, "anna", slow, own if i else None))
        slow.wanted[0].set()
        try:
            assert isinstance(asked[0].exception(60), CancelledRun)
            assert isinstance(asked[1].exception(10), CancelledRun)
        finally:
            own.set()
    assert len(slow.wanted) == 1


def test_a_failure_reaches_both_and_the_next_asks_anew():
    work, slow = SharedWork[str](), Slow()

    def fails(cancel: threading.Event) -> str:
        slow(cancel)
        raise ValueError("broken")

    with ThreadPoolExecutor(2) as threads:
        asked = both_wait(slow, lambda i: threads.submit(work.do, "anna", fails, None))
        slow.go_on.set()
        assert [type(one.exception(60)) for one in asked] == [ValueError, ValueError]
    assert work.do("anna", lambda cancel: "made", None) == "made"
