"""Turns: in the order of coming, as many at once as fit, and none for what is stuck, gone or cancelled."""

from __future__ import annotations

import math
import threading

import pytest

from musetalk.errors import CancelledRun
from musetalk.server.line import Line, Turn

SLOTS = 2


@pytest.fixture
def line() -> Line:
    return Line(lambda: SLOTS, threading.Condition())


def joined(line: Line) -> Turn:
    return line.join(Turn(threading.Event(), math.inf))


def test_turns_come_in_the_order_of_asking(line):
    running = [joined(line) for _ in range(SLOTS)]
    late = [joined(line) for _ in range(4)]
    began: list[int] = []

    def work(index: int) -> None:
        with line.in_turn(late[index]):
            began.append(index)

    for turn in running:
        turn.runs = True
    threads = [threading.Thread(target=work, args=(index,)) for index in (2, 0, 3, 1)]
    for thread in threads:
        thread.start()
    assert (len(line), line.waiting) == (len(running) + 4, 4)
    line.leave(running[0])
    for thread in threads:
        thread.join()
    assert began == [0, 1, 2, 3]


def test_what_is_stuck_is_ended_at_its_deadline_and_others_go_on(line):
    stuck = [joined(line) for _ in range(SLOTS)]
    for turn in stuck:
        turn.runs, turn.deadline = True, 0.0
    line.end_overdue()
    assert all(turn.cancel.is_set() for turn in stuck)
    with line.in_turn(joined(line)):
        assert len(line) == 1


def test_what_left_the_line_or_was_cancelled_never_gets_its_turn(line):
    left, cancelled = (joined(line) for _ in range(2))
    line.leave(left)
    cancelled.cancel.set()
    for turn in (left, cancelled):
        with pytest.raises(CancelledRun), line.in_turn(turn):
            pass
    assert len(line) == 0


def test_what_has_a_place_of_its_own_takes_no_slot(line):
    for _ in range(SLOTS):
        line.join(Turn(threading.Event(), math.inf, runs=True, seated=True))
    with line.in_turn(joined(line)), line.in_turn(joined(line)):
        assert (len(line), line.waiting) == (4, 0)
