"""What a schedule needs of those who do the work, and the one loop that brings both together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from musetalk.batch.clips import Outcome, failure
from musetalk.batch.schedule import Schedule, Settled, Task
from musetalk.errors import EngineError, MuseTalkError

DEATHS_IN_A_ROW = 5  # and twice as many as there are workers: a node takes several along


class WorkerLostError(MuseTalkError, RuntimeError):
    """The worker that had a row died, more than once."""

    error_code = "worker_lost"


@dataclass(frozen=True)
class Ready:
    """A worker can be sent tasks.

    Attributes:
        seconds: that it took to get there.
    """

    worker: str
    seconds: float


@dataclass(frozen=True)
class Done:
    """A worker is through with the first of its tasks."""

    worker: str
    outcome: Outcome


@dataclass(frozen=True)
class Lost:
    """A worker has died; what it had is to be done by others.

    Attributes:
        words: what is known of its end.
    """

    worker: str
    words: str


Event = Ready | Done | Lost


class Crew(Protocol):
    """Workers: processes, actors, or stand-ins. One that is lost is replaced by the crew itself."""

    @property
    def workers(self) -> Collection[str]:
        """Names of those that can be sent tasks."""
        ...

    def send(self, worker: str, task: Task) -> None:
        """Gives a worker a task; it does them in the order of their coming."""
        ...

    def wait(self) -> Iterable[Event]:
        """What happened since the last call; waits until something has."""
        ...

    def close(self) -> None:
        """Ends all workers; what they have under way is dropped without a trace."""
        ...


def carry_out(
    schedule: Schedule,
    crew: Crew,
    settle: Callable[[Settled], None],
    notice: Callable[[Event], None] = lambda event: None,
) -> None:
    """Has a crew do what is scheduled.

    Args:
        settle: told every row that is through, at once.
        notice: told everything that happens.

    Raises:
        EngineError: workers die one after the other without anything done.
    """
    deaths: list[str] = []  # words of those since anything was done
    most = 0  # workers at once
    hungry: dict[str, None] = {}  # in the order in which they came
    while not schedule.finished:
        for event in crew.wait():
            notice(event)
            hungry[event.worker] = None
            if isinstance(event, Done):
                deaths = []
                settled = schedule.done(event.worker, event.outcome)
            elif isinstance(event, Lost):
                deaths.append(event.words)
                settled = schedule.lose(event.worker, _death(event))
            else:
                settled = []
            for row in settled:
                settle(row)
            most = max(most, len(crew.workers))
            if len(deaths) > DEATHS_IN_A_ROW + 2 * most and not schedule.finished:
                raise EngineError(
                    f"workers die one after the other: {deaths[-1]}",
                    "look at the lines above; fewer --processes need less memory",
                )
        _feed(schedule, crew, hungry)


def _feed(schedule: Schedule, crew: Crew, hungry: dict[str, None]) -> None:
    """Gives those who can take more what there is; `hungry` keeps who got nothing."""
    present = crew.workers
    for _ in range(schedule.depth):  # everybody one task before anybody two
        for worker in list(hungry):
            task = schedule.next_task(worker, alone=len(present) == 1) if worker in present else None
            if task is not None:
                crew.send(worker, task)
            if worker not in present or schedule.holds(worker) >= schedule.depth:
                del hungry[worker]


def _death(event: Lost) -> Outcome:
    return failure(
        WorkerLostError(
            f"the worker that rendered it died, twice 工作进程两次退出: {event.words}",
            "look at the row's files; a process that is out of memory dies like this",
        )
    )
