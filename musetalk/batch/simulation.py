"""Stand-ins for workers: a batch in virtual time, scheduled by the code that schedules the real one.

What is simulated is the waiting: starts, templates opened and made, frames, deaths. What is not: disks and
networks that many share, and the cores of one machine; what was measured has to hold their cost.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from musetalk.batch.clips import Outcome
from musetalk.batch.crew import Done, Event, Lost, Ready, carry_out
from musetalk.batch.jobs import Job, Settings, make_jobs
from musetalk.batch.manifest import DONE
from musetalk.batch.schedule import Schedule, Settled, Task
from musetalk.errors import InputError

FPS = 25.0  # of a clip whose length is simulated
SEED = 7


@dataclass(frozen=True)
class Times:
    """What things take, in seconds; a report's `times`. By default `lite` on a core, see docs/scale.md.

    Attributes:
        start: of a worker, until it takes tasks.
        prepare: to make a template.
        open: to open a template, the first time on a worker.
        clip: of a clip, beside its frames.
        frame: of each frame.
    """

    start: float = 0.9
    prepare: float = 1.2
    open: float = 0.1
    clip: float = 0.05
    frame: float = 0.0061


@dataclass(frozen=True)
class Plan:
    """A batch to simulate.

    Attributes:
        workers: how many.
        clips, templates: how many of each; templates are pictures yet to be made.
        seconds: of speech in a clip, on average; lengths lie from a third of it to five thirds.
        lifetime: hours that a worker lives on average; 0 for ever.
        times: what things take.
    """

    workers: int
    clips: int = 10_000
    templates: int = 200
    seconds: float = 20.0
    lifetime: float = 0.0
    times: Times = field(default_factory=Times)


@dataclass
class _Member:
    """A stand-in.

    Attributes:
        opened: templates it has open.
        tasks: what it has been given, in that order.
    """

    opened: set[str] = field(default_factory=set)
    tasks: list[Task] = field(default_factory=list)


class StandIns:
    """A crew in virtual time.

    Args:
        workers: how many.
        times: what things take them.
        frames: of each row, by its number.
        lifetime: seconds that one lives on average; 0 for ever.

    Attributes:
        now: seconds since the beginning.
        busy: seconds that all of them worked together.
        opened: how often a template was opened.
    """

    def __init__(
        self, workers: int, times: Times, frames: Mapping[int, int], lifetime: float = 0.0, seed: int = SEED
    ) -> None:
        self.now = self.busy = 0.0
        self.opened = 0
        self._times = times
        self._frames = frames
        self._lifetime = lifetime
        self._chance = random.Random(seed)
        self._born = self._order = 0
        self._members: dict[str, _Member] = {}
        self._present: set[str] = set()
        self._events: list[tuple[float, int, Event]] = []
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        name = f"stand-in-{self._born}"
        self._born += 1
        self._members[name] = _Member()
        self._expect(self._times.start, Ready(name, self._times.start))
        if self._lifetime:
            self._expect(self._chance.expovariate(1 / self._lifetime), Lost(name, "its time had come"))

    def _expect(self, seconds: float, event: Event) -> None:
        self._order += 1  # events of one moment come in the order in which they were foreseen
        heapq.heappush(self._events, (self.now + seconds, self._order, event))

    @property
    def workers(self) -> Collection[str]:
        """See `Crew`."""
        return self._present

    def send(self, worker: str, task: Task) -> None:
        """See `Crew`."""
        member = self._members[worker]
        member.tasks.append(task)
        if len(member.tasks) == 1:
            self._begin(worker, member)

    def _begin(self, name: str, member: _Member) -> None:
        task, times = member.tasks[0], self._times
        frames, seconds = 0, times.prepare
        if task.kind == "render":
            frames = self._frames[task.job.row]
            seconds = times.clip + frames * times.frame
            if task.job.template_id not in member.opened:
                member.opened.add(task.job.template_id)
                self.opened += 1
                seconds += times.open
        self._expect(seconds, Done(name, Outcome(seconds, frames=frames)))

    def wait(self) -> Iterable[Event]:
        """See `Crew`."""
        while True:
            at, _, event = heapq.heappop(self._events)
            member = self._members.get(event.worker)
            if member is None:
                continue  # it died meanwhile
            self.now = at
            if isinstance(event, Lost):
                del self._members[event.worker]
                self._present.discard(event.worker)
                self._start()
            elif isinstance(event, Ready):
                self._present.add(event.worker)
            else:
                self.busy += event.outcome.seconds
                del member.tasks[0]
                if member.tasks:
                    self._begin(event.worker, member)
            return [event]

    def close(self) -> None:
        """See `Crew`."""
        self._members.clear()


def simulate(plan: Plan, depth: int = 1) -> dict[str, Any]:
    """What a plan's batch would take."""
    chance = random.Random(SEED)
    lengths = [chance.triangular(plan.seconds / 3, plan.seconds * 5 / 3) for _ in range(plan.clips)]
    frames = {row: int(seconds * FPS) for row, seconds in enumerate(lengths, 1)}
    rows = [
        {"template": f"{chance.randrange(plan.templates)}.png", "audio": "a", "output": f"{row}.mp4"}
        for row in frames
    ]
    jobs, _ = make_jobs(rows, Settings())
    return simulated(jobs, frames, plan, depth)


def replay(report: Mapping[str, Any], workers: int, lifetime: float = 0.0) -> dict[str, Any]:
    """What the rows of a real batch's report would take so many workers, by the times measured in it.

    Raises:
        InputError: it is no report, or has no clips.
    """
    try:
        times = Times(**report["times"])
        entries = [entry for entry in report["entries"] if entry["state"] == DONE]
        suffix = ".png" if times.prepare else ""
        rows = [
            {"template": entry["template_id"] + suffix, "audio": "a", "output": f"{number}.mp4"}
            for number, entry in enumerate(entries)
        ]
        frames = {number: int(entry["frames"]) for number, entry in enumerate(entries, 1)}
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"that is no report of a batch: {e}", "make one with --report FILE") from e
    if not rows:
        raise InputError("the report has no clips 报告中没有视频", "make one with --report FILE")
    jobs, _ = make_jobs(rows, Settings())
    return simulated(jobs, frames, Plan(workers, lifetime=lifetime, times=times))


def simulated(jobs: list[Job], frames: Mapping[int, int], plan: Plan, depth: int = 1) -> dict[str, Any]:
    """What these jobs would take a plan's workers.

    Args:
        frames: of each row, by its number.
    """
    crew = StandIns(plan.workers, plan.times, frames, plan.lifetime * 3600)
    schedule, settled = Schedule(jobs, depth), list[Settled]()
    carry_out(schedule, crew, settled.append)
    done = [row for row in settled if not row.outcome.failed]
    made = sum(row.outcome.frames for row in done)
    return {
        "workers": plan.workers,
        "rows": len(jobs),
        "done": len(done),
        "failed": len(settled) - len(done),
        "workers_lost": schedule.lost,
        "retried": schedule.retried,
        "templates_opened": crew.opened,
        "seconds": round(crew.now, 1),
        "clips_per_second": round(len(done) / crew.now, 3),
        "frames_per_second": round(made / crew.now, 1),
        "busy": round(crew.busy / (crew.now * plan.workers), 4),
    }
