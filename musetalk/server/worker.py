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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musetalk import __version__
from musetalk.announcement import Announcement
from musetalk.config import Defaults, EncodingConfig, EngineConfig, PreprocessingConfig, ServerConfig
from musetalk.device import usable_cores
from musetalk.engines.registry import EngineRegistry
from musetalk.errors import BusyError, CancelledRun
from musetalk.open_templates import OpenTemplates
from musetalk.rendering import Conduct, GenerateFaces, OpenedTemplate
from musetalk.server.capacity import measured_capacity, warm_up
from musetalk.server.scheduler import Scheduler
from musetalk.service import InferenceAnswer, IntegratedMuseTalkService, PreprocessAnswer
from musetalk.templates.store import TemplateStore

log = logging.getLogger(__name__)

QUEUED_PER_THREAD = 32  # requests that may wait for each that runs
POLL = 0.05  # seconds between looks at the time that is left


@dataclasses.dataclass
class Place:
    """One device: its service and its scheduler.

    Attributes:
        sessions: that are held here now.
        files: that are rendered here now.
    """

    service: IntegratedMuseTalkService
    scheduler: Scheduler
    sessions: int = 0
    files: int = 0

    @property
    def load(self) -> int:
        """How much is done here now."""
        return self.sessions + self.files

    def has_open(self, template_id: str, cache_dir: Path | None = None) -> bool:
        """Whether the template, of the worker's own cache folder by default, needn't be loaded here."""
        store = self.service.store if cache_dir is None else TemplateStore(cache_dir)
        return self.service.templates.is_open(store, template_id)

    def scheduled(self, cancel: threading.Event | None) -> Callable[[OpenedTemplate], GenerateFaces]:
        """How a file's faces are made here: in turns with everybody else's."""
        stop = cancel or threading.Event()
        return lambda opened: self.scheduler.generate(opened, stop)


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
        self.started = time.monotonic()
        self.draining = False  # takes no more work
        self.stopping = False  # the process ends soon, and sessions with it
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
        self.capacity = server.max_sessions or 0  # 25-fps sessions; 0 until it is measured
        self._changed = threading.Condition()
        self._running = 0
        self._queued = 0
        self.frames = 0  # made so far
        self.refused = 0  # requests and sessions
        self.stages: dict[str, tuple[int, float]] = {}  # times that each was gone through, and its seconds
        self._joined: dict[tuple[object, ...], Future[PreprocessAnswer]] = {}

    @property
    def service(self) -> IntegratedMuseTalkService:
        """The first device's service: the cache folder and the settings are the same for all."""
        return self.places[0].service

    @property
    def running(self) -> int:
        """Pieces of work under way or waiting."""
        return self._running + self._queued

    @property
    def sessions(self) -> int:
        """Sessions that hold a place."""
        return sum(place.sessions for place in self.places)

    @property
    def work_slots(self) -> int:
        """Files that are rendered, or templates that are made, at once."""
        return max(2, usable_cores()) * len(self.places)

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
        if not self.capacity:
            say("measuring how many sessions fit 正在测量并发能力")
            self.capacity = sum(map(measured_capacity, opened))
        say(f"{self.capacity} sessions at 25 frames/s fit 可并发{self.capacity}路")

    def preprocess(
        self,
        template_id: str,
        source: Path,
        settings: PreprocessingConfig | None = None,
        force_refresh: bool = False,
        cache_dir: Path | None = None,
    ) -> PreprocessAnswer:
        """Makes a template when it is its turn; who asks for the same one meanwhile gets the same answer.

        Args:
            cache_dir: where it is kept; None for the worker's own folder.

        Raises:
            BusyError: too much waits already, or the worker is being stopped.
        """
        key = (template_id, str(source), settings, force_refresh, cache_dir)
        with self._changed:
            mine = key not in self._joined
            answer = self._joined.setdefault(key, Future())
        if mine:
            try:
                with self.work():
                    made = self.make_template(template_id, source, settings, force_refresh, cache_dir)
                    answer.set_result(made)
            except BaseException as e:  # noqa: BLE001 - raised where each caller waits for it
                answer.set_exception(e)
            finally:
                with self._changed:
                    del self._joined[key]
        return answer.result()

    def make_template(
        self,
        template_id: str,
        source: Path,
        settings: PreprocessingConfig | None = None,
        force_refresh: bool = False,
        cache_dir: Path | None = None,
    ) -> PreprocessAnswer:
        """Makes a template now, for a caller whose turn it is."""
        service = self.service.sharing(settings=settings, cache_dir=cache_dir)
        return service.preprocess_template(template_id, source, force_refresh=force_refresh)

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
        with self.work(conduct.cancel), contextlib.ExitStack() as stack:
            if template_dir is not None:
                service = self.service.sharing(settings=settings, cache_dir=cache_dir)
                service.preprocess_if_missing(template_id, template_dir)
            place = stack.enter_context(self._loaded(template_id, cache_dir))
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
        """The device to render a template on: the least busy, of equally busy ones where it is open."""
        return min(self.places, key=lambda place: (place.load, not place.has_open(template_id, cache_dir)))

    @contextmanager
    def _loaded(self, template_id: str, cache_dir: Path | None) -> Iterator[Place]:
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
        """Counts a piece of work, which may have to wait for its turn.

        Raises:
            BusyError: too much waits already, or the worker is being stopped.
            CancelledRun: `cancel` was set while it waited.
        """
        with self._changed:
            self._promise(QUEUED_PER_THREAD * self.work_slots)
        with self.promised_work(cancel):
            yield

    def promise(self) -> None:
        """Counts a piece of work that is done later, under `promised_work`; a stop waits for it too.

        Raises:
            BusyError: the worker is being stopped.
        """
        with self._changed:
            self._promise(None)

    def _promise(self, limit: int | None) -> None:
        self.check_open()
        if limit is not None and self._queued >= limit:
            self.refused += 1
            raise BusyError(f"{self._queued} requests wait already 排队已满", "try again later", 10)
        self._queued += 1

    @contextmanager
    def promised_work(self, cancel: threading.Event | None = None) -> Iterator[None]:
        """The turn of what was promised.

        Raises:
            CancelledRun: `cancel` was set while it waited.
        """
        with self._changed:
            try:
                while self._running >= self.work_slots and not (cancel and cancel.is_set()):
                    self._changed.wait(POLL if cancel else None)
            finally:
                self._queued -= 1
            self._running += 1
        try:
            if cancel is not None and cancel.is_set():
                raise CancelledRun("the request was cancelled 已取消", "")
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def note_rendering(self, stages: Mapping[str, float], frames: int) -> None:
        """Counts what a rendering made and the seconds that its stages took."""
        with self._changed:
            self.frames += frames
            for stage, seconds in stages.items():
                runs, total = self.stages.get(stage, (0, 0.0))
                self.stages[stage] = runs + 1, total + seconds

    def take_place(self, template_id: str) -> Place:
        """A session's place, until the caller gives it back.

        Raises:
            BusyError: all places are taken, or the worker is being stopped.
        """
        with self._changed:
            self.check_open()
            if self.sessions >= self.capacity:
                self.refused += 1
                raise BusyError(
                    f"all {self.capacity} sessions are taken 会话数已达上限",
                    "end one, or use another worker 请稍后重试",
                    5,
                )
            place = self.place_for(template_id)
            place.sessions += 1
            return place

    def give_place_back(self, place: Place) -> None:
        """Frees a session's place."""
        with self._changed:
            place.sessions -= 1
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raises BusyError when the worker is being stopped."""
        if self.draining:
            self.refused += 1
            raise BusyError(
                "the worker is being stopped 服务正在停止", "use another worker, or try again later", 5
            )

    def drain(self) -> bool:
        """Takes no more work, ends live sessions and waits for what runs, up to the grace.

        Returns:
            Whether all of it ended.
        """
        deadline = time.monotonic() + self.server.grace
        with self._changed:
            self.draining = self.stopping = True
            while self.running and time.monotonic() < deadline:
                self._changed.wait(POLL)
            return not self.running

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
            "running": self._running,
            "queued": self._queued,
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
