"""A crew of Ray actors, on a cluster or on a local Ray.

The decision a reader would question: files are not copied where they needn't be. A node that sees the mark
which the driver left in the cache folder shares its disks, and works on them as a local process would. To any
other node what a row needs travels: templates once per node, through Ray's object store; sound with its row;
the clip back to the driver, which gives it its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from musetalk.batch.clips import ClipMaker, Outcome, Setup, failure, keep_to_share
from musetalk.batch.crew import Done, Event, Lost, Ready
from musetalk.batch.jobs import Job
from musetalk.batch.pool import CARD_BYTES
from musetalk.batch.schedule import Task
from musetalk.batch.transfer import is_remote, name_of
from musetalk.device import card_memory
from musetalk.errors import EngineError, InterruptedRun, MuseTalkError, OutputError
from musetalk.files import atomic_file, claim, remove_file, remove_folder, sweep
from musetalk.templates.store import TemplateStore, check_template_id

log = logging.getLogger(__name__)

POLL = 0.5  # seconds
PATIENCE = 30.0  # seconds without a worker after which a person is told
END_SECONDS = 6.0  # in which actors drop what they do
MARK_PREFIX = ".batch-"
MARK_PATTERN = r"\.batch-[0-9a-f]{16}"
CONTROL, WORK = "control", "work"  # threads of an actor: so that it can be told to stop while it renders
SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
MUSETALK_CORES = 2.0  # for an actor that runs MuseTalk without a card

Packed = Mapping[str, bytes]
"""A template's two files by name, the pickle first."""


@dataclass(frozen=True)
class Asked:
    """What a person asks of actors; None leaves it to what there is."""

    count: int | None = None
    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Staff:
    """The actors of a batch and what each takes of its node.

    Attributes:
        count: how many.
        cpus: cores.
        gpus: of one card; 0 for none.
        cores: that its engines' threads are held to; None for all of the node's: the number of threads moves
            MuseTalk's last bits on a CPU.
    """

    count: int
    cpus: float = 1.0
    gpus: float = 0.0
    cores: int | None = 1


def card_share(card_bytes: int, cards: Collection[int]) -> float:
    """The part of a card that an actor takes, in hundredths and never too small.

    Args:
        card_bytes: of memory that it needs.
        cards: bytes that each card has.
    """
    smallest = min(cards)
    return 1.0 if card_bytes >= smallest else -(-100 * card_bytes // smallest) / 100


@contextlib.contextmanager
def connected(address: str, cpus: int) -> Iterator[None]:
    """A connection to Ray, and with address "local" a Ray that ends with it.

    Args:
        address: "local", "auto", "ray://HOST:PORT" or "HOST:PORT".
        cpus: of a local one.

    Raises:
        EngineError: Ray isn't installed, or isn't there.
        InterruptedRun: a signal ended the block.
    """
    try:
        import ray
    except ImportError as e:
        raise EngineError(
            f"--ray needs the Python package {e.name} 缺少Python包", "pip install -r requirements-ray.txt"
        ) from e
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    came: list[int] = []
    options: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as e:
        raise EngineError(
            f"no Ray answers at {address} 无法连接Ray: {str(e).partition(chr(10))[0]}",
            "start one with `ray start --head`, or use --ray local",
        ) from e
    for number, handler in handlers.items():  # Ray takes them; ours end the batch
        signal.signal(number, _noting(handler, came))
    try:
        yield
    except KeyboardInterrupt as e:  # Ray puts one of its own in place of what a handler raises
        number = came[0] if came and came[0] in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM
        raise InterruptedRun(128 + number) from e
    finally:
        ray.shutdown()


def _noting(handler: Any, came: list[int]) -> Any:
    """A signal's handler that notes which it was."""
    if not callable(handler):
        return handler

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler(number, frame)

    return handle


def staff(musetalk: bool, device: str, asked: Asked) -> Staff:
    """The actors for the cluster that is connected.

    Args:
        musetalk: whether that engine may run.
        device: "cpu" for no cards, whatever there is.
    """
    import ray

    there = ray.cluster_resources()
    cards = there.get("GPU", 0.0) if musetalk and device != "cpu" else 0.0
    return staff_for(musetalk, there.get("CPU", 0.0), cards, asked, _cluster_cards if cards else list)


def staff_for(
    musetalk: bool, cpus: float, cards: float, asked: Asked, card_bytes: Callable[[], list[int]]
) -> Staff:
    """The actors for a cluster of so many cores and cards.

    Args:
        card_bytes: asks for the memory of each card of a node.
    """
    gpus = asked.gpus
    if gpus is None:
        gpus = card_share(CARD_BYTES, known) if cards and (known := card_bytes()) else 0.0
    own = asked.cpus or (MUSETALK_CORES if musetalk and not gpus else 1.0)
    fit = min(cpus // own, cards // gpus if gpus else cpus)
    cores = None if musetalk and not gpus else max(1, int(own))
    return Staff(asked.count or max(1, int(fit)), own, gpus, cores)


def _cluster_cards() -> list[int]:
    """Bytes of memory of each card that a task with one sees."""
    import ray

    return ray.get(ray.remote(num_gpus=0.01, num_cpus=0)(card_memory).remote())


class ClipActor:
    """A worker on some node.

    Args:
        setup: what all have in common.
        mark: the driver's file that nodes see which share its disks; None where none is to be believed.
        begin: called first, to set up the log say.
    """

    def __init__(self, setup: Setup, mark: Path | None, begin: Callable[[], None]) -> None:
        begin()
        keep_to_share(setup)
        self._cancel = threading.Event()
        self._folder: Path | None = None
        if mark is None or not mark.exists():
            digest = hashlib.sha256(str(setup.cache_dir).encode("utf-8", "surrogatepass")).hexdigest()[:16]
            self._folder = Path(tempfile.gettempdir()) / f"musetalk-batch-{digest}"
            setup = dataclasses.replace(setup, cache_dir=self._folder)
        self._store = TemplateStore(setup.cache_dir)
        self._maker = ClipMaker(setup)

    def place(self) -> tuple[str, int, bool]:
        """The node's name, the process, and whether it shares the driver's disks."""
        return socket.gethostname(), os.getpid(), self._folder is None

    def do(self, task: Task, template: Any, files: Mapping[str, bytes]) -> tuple[Outcome, Any]:
        """Does a task.

        Args:
            template: a list with a reference to the packed template, for a node that hasn't got it.
            files: contents of the driver's files, for a node that doesn't see them.

        Returns:
            What became of it, and what travels back: the packed template, or the clip's bytes.
        """
        try:
            if self._folder is None:
                return self._work(task), None
            return self._work_away(task, template, files, self._folder)
        except MuseTalkError as e:
            return failure(e), None

    def _work(self, task: Task) -> Outcome:
        do = self._maker.prepare if task.kind == "prepare" else self._maker.render
        return do(task.job, self._cancel)

    def _work_away(
        self, task: Task, template: Any, files: Mapping[str, bytes], folder: Path
    ) -> tuple[Outcome, Any]:
        if template:
            unpack(self._store, task.job.template_id, template[0])
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            job = _moved(task.job, files, Path(own))
            outcome = self._work(dataclasses.replace(task, job=job))
            if outcome.failed:
                return outcome, None
            if task.kind == "prepare":
                return outcome, pack(self._store, job.template_id)
            return outcome, None if is_remote(job.output) else Path(job.output).read_bytes()

    def drop(self) -> None:
        """Ends what is under way, and removes what travelled here."""
        self._cancel.set()
        if self._folder is not None:
            with contextlib.suppress(OSError):  # another actor of the node works there, and removes it later
                remove_folder(self._folder)


def pack(store: TemplateStore, template_id: str) -> Packed:
    """A template's files, to travel.

    Raises:
        CacheError: it isn't there.
    """
    store.read_metadata(template_id)
    with store.lock(template_id):
        paths = (store.found_pickle(template_id), store.found_metadata(template_id))
        return {path.name: path.read_bytes() for path in paths}


def unpack(store: TemplateStore, template_id: str, reference: Any) -> None:
    """Puts a template that travelled into a node's cache, unless it is there."""
    import ray

    with store.lock(check_template_id(template_id)):
        path = store.metadata_path(template_id)
        known = path.read_bytes() if path.exists() else b""
        packed: Packed = ray.get(reference)
        if known == packed[path.name]:
            return
        remove_file(path)  # a pickle counts only beside the metadata that name it
        for target in (store.pickle_path(template_id), path):
            with atomic_file(target) as stream:
                stream.write(packed[target.name])


def contents_of(places: Iterable[str]) -> dict[str, bytes]:
    """What files of this machine hold; of those that can't be read the node says that they are missing."""
    found = {}
    for place in places:
        if not is_remote(place):
            with contextlib.suppress(OSError, ValueError):
                found[place] = Path(place).read_bytes()
    return found


def _moved(job: Job, files: Mapping[str, bytes], folder: Path) -> Job:
    """The job with the driver's files under this node's names."""
    places = {}
    for number, (place, content) in enumerate(files.items()):
        path = folder / str(number) / name_of(place)
        path.parent.mkdir()
        path.write_bytes(content)
        places[place] = str(path)
    output = job.output if is_remote(job.output) else str(folder / f"made{Path(job.output).suffix}")
    audio, picture = (places.get(place, place) for place in (job.audio, job.picture))
    return dataclasses.replace(job, audio=audio, picture=picture, output=output)


@dataclass
class _Member:
    actor: Any
    started: float
    beginning: Any
    node: str = ""
    pid: int = 0
    ready: bool = False
    shares: bool = True
    sent: deque[tuple[Task, Any]] = field(default_factory=deque)


class RayCrew:
    """Actors, each with engines and open templates of its own; one that dies is replaced.

    Args:
        setup: what they have in common.
        staff: how many, and what each takes of its node.
        begin: called first in each, to set up the log say; picklable.
        shared: whether nodes share the driver's disks; None finds out on each.
    """

    def __init__(
        self,
        setup: Setup,
        staff: Staff,
        begin: Callable[[], None],
        *,
        shared: bool | None = None,
    ) -> None:
        import ray

        self._setup = dataclasses.replace(setup, cores=staff.cores)
        self._begin = begin
        self._store = TemplateStore(setup.cache_dir)
        self._mark = setup.cache_dir / f"{MARK_PREFIX}{secrets.token_hex(8)}"
        setup.cache_dir.mkdir(parents=True, exist_ok=True)
        sweep(setup.cache_dir, MARK_PATTERN)  # those of drivers that were killed
        self._claimed = claim(self._mark)
        self._believed = None if shared is False else self._mark
        groups = {CONTROL: 1, WORK: 1}
        options = {"num_cpus": staff.cpus, "num_gpus": staff.gpus, "max_restarts": 0}
        self._kind = ray.remote(concurrency_groups=groups, **options)(ClipActor)
        self._members: dict[str, _Member] = {}
        self._templates: dict[str, Any] = {}
        self._count = 0
        self._told = False
        self._started = time.monotonic()
        for _ in range(staff.count):
            self._start()

    def _start(self) -> None:
        actor = self._kind.remote(self._setup, self._believed, self._begin)
        beginning = actor.place.options(concurrency_group=WORK).remote()
        self._members[f"actor-{self._count}"] = _Member(actor, time.perf_counter(), beginning)
        self._count += 1

    @property
    def workers(self) -> Collection[str]:
        """See `Crew`."""
        return [name for name, member in self._members.items() if member.ready]

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        """The node and the process of each worker."""
        return {name: (member.node, member.pid) for name, member in self._members.items() if member.ready}

    def send(self, worker: str, task: Task) -> None:
        """See `Crew`."""
        member = self._members[worker]
        template, files = ([], {}) if member.shares else self._parcel(task)
        reference = member.actor.do.options(concurrency_group=WORK).remote(task, template, files)
        member.sent.append((task, reference))

    def _parcel(self, task: Task) -> tuple[list[Any], dict[str, bytes]]:
        """What a node needs for a task that doesn't see the driver's disks."""
        import ray

        job, template = task.job, []
        wanted = [job.picture] if task.kind == "prepare" else [job.audio]
        if task.kind == "render":
            if job.template_id not in self._templates:
                with contextlib.suppress(MuseTalkError):  # the node says that it is missing
                    self._templates[job.template_id] = ray.put(pack(self._store, job.template_id))
            template = [found] if (found := self._templates.get(job.template_id)) is not None else []
        return template, contents_of(wanted)

    def wait(self) -> Iterable[Event]:
        """See `Crew`."""
        import ray

        heads: dict[Any, str] = {}
        for name, member in self._members.items():
            if not member.ready:
                heads[member.beginning] = name
            elif member.sent:
                heads[member.sent[0][1]] = name
        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait(list(heads), timeout=POLL)
            self._tell_if_nobody_comes()
        ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        return [self._event(heads[reference], reference) for reference in ready]

    def _tell_if_nobody_comes(self) -> None:
        if not self._told and not self.workers and time.monotonic() - self._started > PATIENCE:
            self._told = True
            log.warning("⚠️ the cluster has no room for a worker yet 集群资源不足，仍在等待")

    def _event(self, name: str, reference: Any) -> Event:
        import ray

        member = self._members[name]
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as e:
            return self._replaced(name, member, str(e).partition("\n")[0])
        if not member.ready:
            member.node, member.pid, member.shares = answer
            member.ready = True
            return Ready(name, time.perf_counter() - member.started)
        task, _ = member.sent.popleft()
        return Done(name, self._kept(task, *answer))

    def _kept(self, task: Task, outcome: Outcome, returned: Any) -> Outcome:
        """The outcome, once what travelled back with it has its place here."""
        import ray

        if returned is None:
            return outcome
        if task.kind == "prepare":
            self._templates[task.job.template_id] = ray.put(returned)
            return outcome
        path = Path(task.job.output)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as stream:
                stream.write(returned)
            return dataclasses.replace(outcome, mtime_ns=path.stat().st_mtime_ns)
        except OutputError as e:
            return failure(e, outcome.seconds)
        except OSError as e:
            return failure(OutputError(f"{path} can't be written: {e}", "check the folder"), outcome.seconds)

    def _replaced(self, name: str, member: _Member, words: str) -> Lost:
        import ray

        del self._members[name]
        with contextlib.suppress(Exception):  # it is dead already, as a rule
            ray.kill(member.actor)
        self._start()
        where = f"{name} on {member.node}" if member.node else name
        return Lost(name, f"{where}: {words}")

    def close(self) -> None:
        """See `Crew`."""
        import ray

        with contextlib.suppress(OSError):
            self._claimed.close()
            remove_file(self._mark)
        members = list(self._members.values())
        self._members.clear()
        drops = [m.actor.drop.options(concurrency_group=CONTROL).remote() for m in members if m.ready]
        under_way = [reference for member in members for _, reference in member.sent]
        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.wait([*drops, *under_way], num_returns=len(drops) + len(under_way), timeout=END_SECONDS)
        for member in members:
            with contextlib.suppress(Exception):
                ray.kill(member.actor)
