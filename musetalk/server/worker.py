"""What the worker keeps and can do, told by every protocol in the same words.

The decision a reader would question: a worker has one service per device over the same cache folder. A
template is rendered on the device that has it open, else on the one with the fewest sessions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musetalk import __version__
from musetalk.announcement import Announcement
from musetalk.config import (
    REPOSITORY,
    Defaults,
    EncodingConfig,
    EngineConfig,
    PreprocessingConfig,
    ServerConfig,
)
from musetalk.device import usable_cores
from musetalk.engines.registry import EngineRegistry
from musetalk.errors import BusyError
from musetalk.open_templates import OpenTemplates
from musetalk.rendering import Conduct, GenerateFaces, OpenedTemplate
from musetalk.server.capacity import SESSION_FPS, Cost, measured_cost, warm_up
from musetalk.server.clients import Clients
from musetalk.server.line import POLL, Line, Turn
from musetalk.server.scheduler import Scheduler
from musetalk.server.shared_work import SharedWork
from musetalk.service import InferenceAnswer, IntegratedMuseTalkService, PreprocessAnswer
from musetalk.templates.store import TemplateStore

log = logging.getLogger(__name__)

QUEUED_PER_THREAD = 32  # requests that may wait for each that runs
FAREWELL = 1.0  # seconds of the grace in which sessions that still speak are ended and say so


@dataclasses.dataclass
class Place:
    """One device: its service and its scheduler.

    Attributes:
        rate: frames per second that it carries.
        seats: sessions that are held here now.
        files: that are rendered here now.
    """

    service: IntegratedMuseTalkService
    scheduler: Scheduler
    rate: float = 0.0
    seats: list[Seat] = dataclasses.field(default_factory=list)
    files: int = 0

    @property
    def taken(self) -> float:
        """Frames per second that its sessions take."""
        return sum(seat.fps for seat in self.seats)

    @property
    def load(self) -> int:
        """How much is done here now."""
        return len(self.seats) + self.files

    def has_open(self, template_id: str, cache_dir: Path | None = None) -> bool:
        """Whether the template, of the worker's own cache folder by default, needn't be loaded here."""
        store = self.service.store if cache_dir is None else TemplateStore(cache_dir)
        return self.service.templates.is_open(store, template_id)

    def scheduled(self, cancel: threading.Event | None) -> Callable[[OpenedTemplate], GenerateFaces]:
        """How a file's faces are made here: in turns with everybody else's."""
        stop = cancel or threading.Event()
        return lambda opened: self.scheduler.generate(opened, stop)


@dataclasses.dataclass(eq=False)
class Seat:
    """What a session holds.

    Attributes:
        fps: frames per second that it takes of its device.
        live: it plays by itself, and doesn't wait for its caller's next file.
        client: the address of who asked for it.
    """

    place: Place
    fps: float
    live: bool = False
    client: str = ""


class Worker:
    """Engines, open templates, sessions and the work that runs.

    Args:
        cache_dir: the folder of template caches.
        engine: what the worker's own engines are made with; a request may ask for other settings.
        server: addresses and limits.
        devices: names such as "cuda:0"; each gets a scheduler.
        settings: how templates are made where a request doesn't say.
        encoding: shape of output files where a request doesn't say.
        memory_limit: bytes of open templates, on each device.
    """

    def __init__(
        self,
        cache_dir: Path,
        engine: EngineConfig,
        server: ServerConfig,
        devices: tuple[str, ...],
        *,
        settings: PreprocessingConfig | None = None,
        encoding: EncodingConfig | None = None,
        memory_limit: int = Defaults.memory_limit,
    ) -> None:
        self.server = server
        self.clients = Clients(server)
        self.started = time.monotonic()
        self.draining = False  # takes no more work
        self.stopping = False  # the process ends soon, and sessions with it once they have spoken
        self.cut_off = False  # a session that still spoke was ended
        self._patience = 0.0  # on the monotonic clock: until when a session may go on speaking then
        self.announcement: Announcement | None = None
        self.places = []
        engines = EngineRegistry()
        for device in devices:
            service = IntegratedMuseTalkService(
                cache_dir,
                config=dataclasses.replace(engine, device=device),
                settings=settings,
                encoding=encoding,
                engines=engines,
                templates=OpenTemplates(memory_limit),
            )
            name = service.renderer().device.name
            self.places.append(Place(service, Scheduler(name, usable_cores() if name == "cpu" else 1)))
        self.rate = 0.0  # frames per second that all sessions together may take
        self._changed = threading.Condition()
        self.line = Line(lambda: self.work_slots, self._changed)
        self.frames = 0  # made so far
        self.refused = 0  # requests and sessions
        self.stages: dict[str, tuple[int, float]] = {}  # times that each was gone through, and its seconds
        self._made = SharedWork[PreprocessAnswer]()

    @property
    def service(self) -> IntegratedMuseTalkService:
        """The first device's service: the cache folder and the settings are the same for all."""
        return self.places[0].service

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those that callers from elsewhere needn't know the places of."""
        return self.service.store.cache_dir, self.server.videos_dir, self.server.temp_dir, REPOSITORY

    @property
    def sessions(self) -> int:
        """Sessions that hold a place."""
        return sum(len(place.seats) for place in self.places)

    @property
    def capacity(self) -> int:
        """Sessions at 25 frames per second that fit."""
        return int(self.rate / SESSION_FPS)

    @property
    def taken(self) -> float:
        """Frames per second that sessions take."""
        return sum(place.taken for place in self.places)

    @property
    def most_work(self) -> int:
        """Files that are rendered, or templates that are made, at once while there is no session."""
        return max(2, usable_cores()) * len(self.places)

    @property
    def work_slots(self) -> int:
        """As many as are left by the sessions that there are, and one at least."""
        left = 1 - self.taken / self.rate if self.rate else 1
        return max(1, round(self.most_work * left))

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Loads the engine, opens the templates to be preloaded, and measures how many sessions fit.

        Args:
            say: takes a line for each step.
        """
        for name in self.server.preload:
            for place in self.places:
                place.service.renderer().open(name)
            say(f"template {name} is open 模板已加载")
        say("warming up 正在预热")
        opened = [warm_up(place.service) for place in self.places]
        if self.server.max_sessions:
            self.rate = float(SESSION_FPS * self.server.max_sessions)
            for place in self.places:
                place.rate = self.rate
        else:
            say("measuring how many sessions fit 正在测量并发能力")
            self._plan([measured_cost(template) for template in opened])
        say(f"{self.capacity} sessions at 25 frames/s fit 可并发{self.capacity}路")

    def _plan(self, costs: Sequence[Cost]) -> None:
        """Sets what fits: each device by itself, and all of them on the processors that they share."""
        cores = usable_cores()
        for place, cost in zip(self.places, costs, strict=True):
            place.rate = max(round(cost.frames_per_second(cores)), SESSION_FPS)
        by_cores = round(Cost(max(cost.cores for cost in costs)).frames_per_second(cores))
        self.rate = max(min(by_cores, sum(place.rate for place in self.places)), SESSION_FPS)

    def preprocess(
        self,
        template_id: str,
        source: Path,
        settings: PreprocessingConfig | None = None,
        force_refresh: bool = False,
        cache_dir: Path | None = None,
        cancel: threading.Event | None = None,
    ) -> PreprocessAnswer:
        """Makes a template when it is its turn; who asks for the same one meanwhile gets the same answer.

        Args:
            cache_dir: where it is kept; None for the worker's own folder.
            cancel: the work ends once everybody who asked for it has cancelled.

        Raises:
            BusyError: too much waits already, or the worker is being stopped.
            CancelledRun: `cancel` was set.
        """

        def make(shared: threading.Event) -> PreprocessAnswer:
            with self.work(shared):
                return self.make_template(template_id, source, settings, force_refresh, cache_dir, shared)

        key = (template_id, str(source), settings, force_refresh, cache_dir)
        return self._made.do(key, make, cancel)

    def make_template(
        self,
        template_id: str,
        source: Path,
        settings: PreprocessingConfig | None = None,
        force_refresh: bool = False,
        cache_dir: Path | None = None,
        cancel: threading.Event | None = None,
    ) -> PreprocessAnswer:
        """Makes a template now, for a caller whose turn it is."""
        service = self.service.sharing(settings=settings, cache_dir=cache_dir)
        return service.preprocess_template(template_id, source, force_refresh=force_refresh, cancel=cancel)

    def render_file(
        self,
        template_id: str,
        audio: Path,
        output: Path,
        fps: float | str = Defaults.fps,
        *,
        articulation: float = Defaults.articulation,
        batch_size: int | None = None,
        frames_dir: Path | None = None,
        template_dir: Path | None = None,
        settings: PreprocessingConfig | None = None,
        encoding: EncodingConfig | None = None,
        conduct: Conduct | None = None,
        cache_dir: Path | None = None,
    ) -> InferenceAnswer:
        """Renders a sound file onto a template into a video file.

        Args:
            template_dir: the template is made from its picture there where its cache is missing.
            settings: how it is made then.
            cache_dir: where its cache is; None for the worker's own folder.

        Raises:
            BusyError: too much waits already, or the worker is being stopped.
            MuseTalkError: as `IntegratedMuseTalkService.realtime_inference`.
        """
        conduct = conduct or Conduct(bar=False)
        conduct = dataclasses.replace(conduct, cancel=conduct.cancel or threading.Event())
        with self.work(conduct.cancel), contextlib.ExitStack() as stack:
            if template_dir is not None:
                service = self.service.sharing(settings=settings, cache_dir=cache_dir)
                service.preprocess_if_missing(template_id, template_dir, conduct.cancel)
            place = stack.enter_context(self.loaded(template_id, cache_dir))
            conduct = dataclasses.replace(conduct, generate=place.scheduled(conduct.cancel))
            config = dataclasses.replace(
                place.service.config,
                batch_size=place.service.config.batch_size if batch_size is None else batch_size,
            )
            service = place.service.sharing(config=config, encoding=encoding, cache_dir=cache_dir)
            answer = service.realtime_inference(
                template_id, audio, output, fps, frames_dir, articulation, conduct
            )
            self.note_rendering(answer["stages"], answer["frames"])
            return answer

    def place_for(self, template_id: str, cache_dir: Path | None = None) -> Place:
        """The device to render a template on."""
        return self._least_busy(template_id, self.places, cache_dir)

    def _least_busy(self, template_id: str, places: Sequence[Place], cache_dir: Path | None = None) -> Place:
        """Of equally busy ones that where the template is open."""
        return min(places, key=lambda place: (place.load, not place.has_open(template_id, cache_dir)))

    @contextmanager
    def loaded(self, template_id: str, cache_dir: Path | None = None) -> Iterator[Place]:
        """The device that renders a file, which counts as its load meanwhile."""
        with self._changed:
            place = self.place_for(template_id, cache_dir)
            place.files += 1
        try:
            yield place
        finally:
            with self._changed:
                place.files -= 1

    @contextmanager
    def work(self, cancel: threading.Event | None = None) -> Iterator[None]:
        """A piece of work, which may have to wait for its turn.

        Raises:
            BusyError: too much waits already, or the worker is being stopped.
            CancelledRun: `cancel` was set while it waited.
        """
        with self.line.in_turn(self._come(cancel, QUEUED_PER_THREAD * self.most_work)):
            yield

    def promise(self, cancel: threading.Event) -> Turn:
        """A place in the line for work that is done later, `in_turn`; a stop waits for it too.

        Raises:
            BusyError: the worker is being stopped.
        """
        return self._come(cancel, None)

    @contextmanager
    def segment_work(self, cancel: threading.Event) -> Iterator[None]:
        """A piece of work of a session that has its place: it needn't wait.

        Raises:
            BusyError: the worker is being stopped.
        """
        turn = self._come(cancel, None, seated=True)
        try:
            yield
        finally:
            self.line.leave(turn)

    def _come(self, cancel: threading.Event | None, limit: int | None, *, seated: bool = False) -> Turn:
        with self._changed:
            self.check_open()
            waiting = self.line.waiting
            if limit is not None and waiting >= limit:
                self.refused += 1
                raise BusyError(f"{waiting} requests wait already 排队已满", "try again later", 10)
            deadline = time.monotonic() + self.server.job_deadline
            return self.line.join(Turn(cancel or threading.Event(), deadline, runs=seated, seated=seated))

    def note_rendering(self, stages: Mapping[str, float], frames: int) -> None:
        """Counts what a rendering made and the seconds that its stages took."""
        with self._changed:
            self.frames += frames
            for stage, seconds in stages.items():
                runs, total = self.stages.get(stage, (0, 0.0))
                self.stages[stage] = runs + 1, total + seconds

    def take_place(
        self, template_id: str, fps: float = SESSION_FPS, *, live: bool = False, client: str = ""
    ) -> Seat:
        """A session's place, until the caller gives it back.

        Args:
            fps: frames per second that it takes.
            live: it plays by itself: a stop waits until it has spoken.
            client: the address of who asks.

        Raises:
            BusyError: there isn't as much left, or the worker is being stopped.
            ClientLimitError: the client has as many as he may.
        """
        with self._changed:
            self.check_open()
            seats = [seat for place in self.places for seat in place.seats]
            self.clients.check(client, "sessions", sum(seat.client == client for seat in seats))
            fitting = [place for place in self.places if place.taken + fps <= place.rate]
            if self.taken + fps > self.rate or not fitting:
                self.refused += 1
                raise BusyError(
                    f"{self.sessions} sessions take {self.taken:g} of {self.rate:g} frames/s that fit here, "
                    f"{fps:g} more don't 会话数已达上限",
                    "end one, or use another worker 请稍后重试",
                    5,
                )
            seat = Seat(self._least_busy(template_id, fitting), fps, live, client)
            seat.place.seats.append(seat)
            return seat

    def give_place_back(self, seat: Seat) -> None:
        """Frees a session's place."""
        with self._changed:
            seat.place.seats.remove(seat)
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raises BusyError when the worker is being stopped."""
        if self.draining:
            self.refused += 1
            raise BusyError(
                "the worker is being stopped 服务正在停止", "use another worker, or try again later", 5
            )

    def drain(self) -> bool:
        """Takes no more work and waits, up to the grace, for what runs and for sessions that speak.

        Returns:
            Whether all of it ended by itself.
        """
        deadline = time.monotonic() + self.server.grace
        self._patience = deadline - min(FAREWELL, self.server.grace / 2)
        with self._changed:
            self.draining = self.stopping = True
            while (left := self._unfinished()) and time.monotonic() < deadline:
                self._changed.wait(POLL)
            return not (left or self.cut_off)

    def _unfinished(self) -> bool:
        return bool(self.line) or any(seat.live for place in self.places for seat in place.seats)

    def ends_session(self, speaking: bool) -> bool:
        """Whether a live session ends now because the worker does: when it has spoken, or at the last."""
        if not self.stopping or (speaking and time.monotonic() < self._patience):
            return False
        self.cut_off |= speaking
        return True

    def close(self) -> None:
        """Ends the schedulers."""
        for place in self.places:
            place.scheduler.close()

    def status(self) -> dict[str, Any]:
        """What the worker is doing, for operators."""
        info = self.service.get_service_info()
        return {
            "status": "draining" if self.draining else "running",
            "version": __version__,
            "uptime": round(time.monotonic() - self.started, 1),
            "active_sessions": self.sessions,
            "capacity": self.capacity,
            "running": len(self.line) - self.line.waiting,
            "queued": self.line.waiting,
            "queue_depth": sum(place.scheduler.depth for place in self.places),
            "templates_cached": info["cache_info"]["template_count"],
            "templates_open": sum(len(place.service.templates.templates()) for place in self.places),
            "gpu_count": sum(place.scheduler.device != "cpu" for place in self.places),
            "config": {
                "cache_dir": info["cache_dir"],
                "devices": [place.scheduler.device for place in self.places],
                "batch_size": info["batch_size"],
                "engines": info["engines"],
            },
        }
