"""Who does what next: rows grouped by template, retries, and what is left when a worker dies.

Plain state without processes or clocks, so that a pool, a cluster and a simulation are scheduled by the same
code. The decision a reader would question: a template's rows stay with the worker that opened it while there
are templates that nobody has open; only then do idle workers open the one that has the most left to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from musetalk.batch.clips import Outcome
from musetalk.batch.jobs import Job

ATTEMPTS = 2  # for each row, on two workers
WORTH_ANOTHER_TRY = ("internal", "device", "engine", "output", "worker_lost")
"""Codes of failures that may be the worker's and not the row's."""


@dataclass(frozen=True)
class Task:
    """Something for a worker to do.

    Attributes:
        kind: make the job's template, or its clip.
        attempt: 1 for the first.
        avoid: the worker that it failed on.
    """

    kind: Literal["prepare", "render"]
    job: Job
    attempt: int = 1
    avoid: str = ""


@dataclass(frozen=True)
class Settled:
    """A row that is through.

    Attributes:
        outcome: the clip's, or why there is none.
        attempts: that it took.
        worker: that did it last.
    """

    job: Job
    outcome: Outcome
    attempts: int
    worker: str


@dataclass
class _Group:
    """The rows of one template.

    Attributes:
        waiting: not handed out yet.
        ready: the template is there, or it isn't for us to make.
        making: its making was handed out.
        holders: workers that were given one of its rows.
    """

    waiting: deque[Job]
    ready: bool
    making: bool = False
    holders: set[str] = field(default_factory=set)


class Schedule:
    """The rows of a batch on their way.

    Args:
        jobs: to be done.
        depth: tasks that a worker may have at once; the first is under way, the others wait for it.

    Attributes:
        retried: how often a task was given to another worker.
        lost: workers that died.
    """

    def __init__(self, jobs: Iterable[Job], depth: int = 1) -> None:
        self.depth = depth
        self.retried = self.lost = 0
        self.unsettled = 0
        self._groups: dict[Hashable, _Group] = {}
        self._again: deque[Task] = deque()
        self._held: dict[str, deque[Task]] = {}
        for job in jobs:
            group = self._groups.setdefault(job.group, _Group(deque(), ready=not job.picture))
            group.waiting.append(job)
            self.unsettled += 1

    @property
    def finished(self) -> bool:
        """Whether every row is settled."""
        return not self.unsettled

    def holds(self, worker: str) -> int:
        """Tasks that a worker has."""
        return len(self._held.get(worker, ()))

    def next_task(self, worker: str, *, alone: bool = False) -> Task | None:
        """Hands `worker` its next task; None when there is none for it now.

        Args:
            alone: there is no other worker, so that it may try again what failed on it.
        """
        if self.holds(worker) >= self.depth:
            return None
        task = self._retry(worker, alone) or self._fresh(worker)
        if task is not None:
            self._held.setdefault(worker, deque()).append(task)
        return task

    def _retry(self, worker: str, alone: bool) -> Task | None:
        for task in self._again:
            if alone or task.avoid != worker:
                self._again.remove(task)
                return task
        return None

    def _fresh(self, worker: str) -> Task | None:
        groups = self._groups.values()
        own = [group for group in groups if group.ready and worker in group.holders]
        unmade = [group for group in groups if not group.ready and not group.making]
        free = [group for group in groups if group.ready and not group.holders]
        held = [group for group in groups if group.ready]
        for choice in (own, unmade, free):
            if choice:
                return self._taken(max(choice, key=lambda group: len(group.waiting)), worker)
        if held:
            return self._taken(max(held, key=lambda group: len(group.waiting) / len(group.holders)), worker)
        return None

    def _taken(self, group: _Group, worker: str) -> Task:
        if not group.ready:
            group.making = True
            return Task("prepare", group.waiting[0])
        group.holders.add(worker)
        job = group.waiting.popleft()
        if not group.waiting:
            del self._groups[job.group]
        return Task("render", job)

    def done(self, worker: str, outcome: Outcome) -> list[Settled]:
        """Takes the outcome of the task that `worker` had first; the rows that are settled by it."""
        task = self._held[worker].popleft()
        if outcome.failed and outcome.error_code in WORTH_ANOTHER_TRY and task.attempt < ATTEMPTS:
            self._try_again(task, worker)
            return []
        return self._settled(task, outcome, worker)

    def lose(self, worker: str, outcome: Outcome) -> list[Settled]:
        """Takes back what a dead worker had; the rows that are settled by its death.

        Args:
            outcome: of a row that has had its attempts.
        """
        self.lost += 1
        tasks = self._held.pop(worker, deque())
        for group in self._groups.values():
            group.holders.discard(worker)
        settled: list[Settled] = []
        if tasks:
            first = tasks.popleft()
            if first.attempt < ATTEMPTS:
                self._try_again(first, worker)
            else:
                settled = self._settled(first, outcome, worker)
        self._again.extend(tasks)  # they hadn't begun
        return settled

    def _try_again(self, task: Task, worker: str) -> None:
        self.retried += 1
        self._again.append(replace(task, attempt=task.attempt + 1, avoid=worker))

    def _settled(self, task: Task, outcome: Outcome, worker: str) -> list[Settled]:
        jobs = [task.job]
        if task.kind == "prepare" and outcome.failed:
            jobs = list(self._groups.pop(task.job.group).waiting)
        elif task.kind == "prepare":
            self._groups[task.job.group].ready, jobs = True, []
        self.unsettled -= len(jobs)
        return [Settled(job, outcome, task.attempt, worker) for job in jobs]
