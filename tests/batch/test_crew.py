"""The loop between a schedule and those who work: when it goes on, and when it gives up."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from musetalk.batch.clips import Outcome
from musetalk.batch.crew import Done, Event, Lost, Ready, carry_out
from musetalk.batch.jobs import Settings, make_jobs
from musetalk.batch.schedule import Schedule, Settled, Task
from musetalk.errors import EngineError


class Mortal:
    """Workers that die as they are told, each replaced at once.

    Args:
        count: how many there are.
        dying: how many of them die, one after the other, each with what it has.
    """

    def __init__(self, count: int, dying: int) -> None:
        self._dying = dying
        self._born = count
        self.workers: list[str] = []
        self._tasks: dict[str, Task] = {}
        self._events: list[Event] = [Ready(f"w{i}", 0.0) for i in range(count)]
        self.closed = False

    def send(self, worker: str, task: Task) -> None:
        self._tasks[worker] = task

    def wait(self) -> Iterable[Event]:
        events, self._events = self._events, []
        for event in events:
            self.workers.append(event.worker)
        if events:
            return events
        worker = next(iter(self._tasks))
        del self._tasks[worker]
        if not self._dying:
            return [Done(worker, Outcome(1.0, frames=1))]
        self._dying -= 1
        self.workers.remove(worker)
        self._events = [Ready(f"w{self._born}", 0.0)]
        self._born += 1
        return [Lost(worker, "gone")]

    def close(self) -> None:
        self.closed = True


def settled_by(crew: Mortal, rows: int) -> list[Settled]:
    jobs, _ = make_jobs([{"template": "t", "audio": "a", "output": str(i)} for i in range(rows)], Settings())
    settled: list[Settled] = []
    carry_out(Schedule(jobs), crew, settled.append)
    return settled


def test_a_node_that_takes_all_its_workers_along_ends_nothing():
    settled = settled_by(Mortal(8, 8), 30)
    assert len(settled) == 30 and not any(row.outcome.failed for row in settled)


def test_rows_that_kill_are_set_aside_and_named():
    settled = settled_by(Mortal(1, 4), 5)
    assert [row.outcome.error_code for row in settled[:2]] == ["worker_lost"] * 2
    assert "gone" in settled[0].outcome.message and not settled[2].outcome.failed


def test_workers_that_never_do_anything_end_the_batch():
    with pytest.raises(EngineError, match="gone"):
        settled_by(Mortal(2, 100), 500)
