"""A crew of processes on this machine.

The decision a reader would question: there is one way to end a worker, whoever wants it and however the
driver ends: its pipe is closed. It then drops what it renders, removes what is half-written, and goes. So a
killed driver leaves no process behind, on any system.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from musetalk.batch.clips import ClipMaker, Setup, keep_to_share
from musetalk.batch.crew import Done, Event, Lost, Ready
from musetalk.batch.jobs import Job
from musetalk.batch.schedule import Task
from musetalk.device import available_memory, card_memory, resolve_device, usable_cores
from musetalk.engines.choice import available_engines
from musetalk.errors import MuseTalkError
from musetalk.service import IntegratedMuseTalkService

POLL = 0.5  # seconds after which a wait is begun anew: on Windows signals aren't noticed in it
END_SECONDS = 6.0  # in which a worker drops what it does
KILL_SECONDS = 2.0
MAX_PROCESSES = 256
LITE_BYTES = 600 << 20  # of memory for a process that runs lite, one open template of a portrait among it
MUSETALK_BYTES = 5 << 30  # … MuseTalk on a CPU; full-size networks took 4.5 GB at their peak
CARD_BYTES = 6 << 30  # … of a card's memory for MuseTalk in half precision, batch 8: estimated, not measured


def pool_size(jobs: int, cores: int, memory: int, process_bytes: int) -> int:
    """How many processes this machine should have.

    Args:
        jobs: more processes than that have nothing to do.
        cores: that may be used.
        memory: bytes that are free; 0 where the system doesn't tell.
        process_bytes: what one will take.
    """
    fit = memory // process_bytes if memory else cores
    return max(1, min(jobs, cores, fit, MAX_PROCESSES))


def pool_devices(processes: int | None, cards: Sequence[int], card_bytes: int, most: int) -> list[str | None]:
    """The device of each process where there are cards; cards take turns.

    Args:
        processes: how many, or None for as many as fit the cards.
        cards: bytes of memory of each.
        card_bytes: of it that a process takes.
        most: processes that are of use.
    """
    fit = [max(1, memory // card_bytes) for memory in cards]
    places = [f"cuda:{card}" for turn in range(max(fit)) for card in range(len(cards)) if turn < fit[card]]
    if processes is None:
        return list(places[: max(1, most)])
    return [places[i % len(places)] for i in range(processes)]


@dataclass(frozen=True)
class Pool:
    """The processes of a batch on one machine.

    Attributes:
        devices: of each; None for what its rows say.
        cores: that each may use; None for all. MuseTalk on a CPU has all, since the number of threads moves
            its last bits, and a clip is to be that of the one-clip command.
    """

    devices: list[str | None]
    cores: int | None


def local_pool(jobs: Sequence[Job], service: IntegratedMuseTalkService, processes: int | None) -> Pool:
    """The processes that fit the machine.

    Args:
        processes: as many as that, whatever fits.
    """
    musetalk = runs_musetalk(jobs, service)
    most, cores = min(len(jobs), MAX_PROCESSES), usable_cores()
    cards = card_memory() if musetalk and resolve_device(service.config.device).name != "cpu" else []
    if cards:
        devices = pool_devices(processes, cards, CARD_BYTES, most)
    else:
        taken = MUSETALK_BYTES if musetalk else LITE_BYTES
        devices = [None] * (processes or pool_size(most, cores, available_memory(), taken))
    return Pool(devices, None if musetalk and not cards else max(1, cores // len(devices)))


def runs_musetalk(jobs: Iterable[Job], service: IntegratedMuseTalkService) -> bool:
    """Whether any job's engine is MuseTalk, as far as can be told before they run."""
    return any(_runs_musetalk(job, service) for job in {job.group: job for job in jobs}.values())


def _runs_musetalk(job: Job, service: IntegratedMuseTalkService) -> bool:
    request = job.settings.engine.engine
    if request != "auto":
        return request == "musetalk"
    if job.picture:
        return available_engines(job.settings.engine.models)[0].available
    try:
        return service.store.read_metadata(job.template_id).get("engine", "musetalk") == "musetalk"
    except MuseTalkError:
        return False


@dataclass
class _Member:
    process: BaseProcess
    connection: Connection
    started: float
    ready: bool = False


class ProcessCrew:
    """Processes, each with engines and open templates of its own; one that dies is replaced.

    Args:
        setup: what they share.
        devices: of each process; None for what its rows say.
        begin: called first in each process, to set up its log say; picklable.
    """

    def __init__(self, setup: Setup, devices: Sequence[str | None], begin: Callable[[], None]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._setup = setup
        self._begin = begin
        self._count = 0
        self._members: dict[str, _Member] = {}
        for device in devices:
            self._start(device)

    def _start(self, device: str | None) -> None:
        name = f"process-{self._count}" + (f"@{device}" if device else "")
        self._count += 1
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._setup, device, self._begin), name=name, daemon=True
        )
        process.start()
        theirs.close()
        self._members[name] = _Member(process, ours, time.perf_counter())

    @property
    def workers(self) -> Collection[str]:
        """See `Crew`."""
        return [name for name, member in self._members.items() if member.ready]

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [member.process.pid for member in self._members.values() if member.process.pid is not None]

    def send(self, worker: str, task: Task) -> None:
        """See `Crew`."""
        with contextlib.suppress(OSError):  # it is dead; the next wait tells
            self._members[worker].connection.send(task)

    def wait(self) -> Iterable[Event]:
        """See `Crew`."""
        names = {member.connection: name for name, member in self._members.items()}
        ready: list[object] = []
        while not ready:
            ready = list(wait(list(names), POLL))
        return [self._told(names[connection]) for connection in ready if isinstance(connection, Connection)]

    def _told(self, name: str) -> Event:
        member = self._members[name]
        try:
            message = member.connection.recv()
        except (EOFError, OSError):
            return self._replaced(name, member)
        if message is None:
            member.ready = True
            return Ready(name, time.perf_counter() - member.started)
        return Done(name, message)

    def _replaced(self, name: str, member: _Member) -> Lost:
        del self._members[name]
        member.connection.close()
        _end([member.process], KILL_SECONDS)
        self._start(name.partition("@")[2] or None)
        return Lost(name, f"{name} ended with {member.process.exitcode}")

    def close(self) -> None:
        """See `Crew`."""
        for member in self._members.values():
            member.connection.close()
        _end([member.process for member in self._members.values()], END_SECONDS)
        self._members.clear()


def _end(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Waits for processes that were told to end, and kills what doesn't."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join(KILL_SECONDS)


def _work(connection: Connection, setup: Setup, device: str | None, begin: Callable[[], None]) -> None:
    """A process's life: tasks in, outcomes out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the driver decides
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    cancel = threading.Event()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv())
        cancel.set()
        tasks.put(None)
        time.sleep(END_SECONDS)
        os._exit(1)  # native code holds the main thread

    threading.Thread(target=listen, name="listen", daemon=True).start()
    begin()
    keep_to_share(setup)
    maker = ClipMaker(setup, device)
    with contextlib.suppress(OSError):  # the driver has gone
        connection.send(None)
        while (task := tasks.get()) is not None and not cancel.is_set():
            do = maker.prepare if task.kind == "prepare" else maker.render
            connection.send(do(task.job, cancel))
