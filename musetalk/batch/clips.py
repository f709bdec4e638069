"""One worker's share of a batch: templates made, clips rendered, each attempt's outcome told as a value.

The decision a reader would question: nothing here raises. What went wrong with a clip is as much a result as
the clip, and goes the same way, through pipes and clusters, to whoever keeps the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from musetalk.batch.jobs import Job
from musetalk.batch.transfer import deliver, fetch, is_remote, name_of
from musetalk.config import Defaults
from musetalk.device import CORES_VARIABLE
from musetalk.errors import EngineError, MuseTalkError
from musetalk.files import file_sha256
from musetalk.open_templates import OpenTemplates
from musetalk.rendering import Conduct
from musetalk.service import IntegratedMuseTalkService

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What all workers of a batch have in common.

    Attributes:
        cache_dir: the folder of template caches.
        memory_limit: bytes of open templates, for each worker.
        cores: that each worker's engines may use; None for all there are.
    """

    cache_dir: Path
    memory_limit: int = Defaults.memory_limit
    cores: int | None = None


def keep_to_share(setup: Setup) -> None:
    """Holds this process, which is a worker and nothing else, to its share of the cores."""
    if setup.cores is not None:
        os.environ[CORES_VARIABLE] = str(setup.cores)


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        seconds: that it took its worker.
        stages: seconds of its parts.
        frames, duration: of the clip; 0 where none was to be made.
        size, sha256, mtime_ns: of the file.
        engine, device: that ran.
        error_code, exit_code, message, hint: why it failed; "" and 0 where it didn't.
    """

    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    frames: int = 0
    duration: float = 0.0
    size: int = 0
    sha256: str = ""
    mtime_ns: int = 0
    engine: str = ""
    device: str = ""
    error_code: str = ""
    exit_code: int = 0
    message: str = ""
    hint: str = ""

    @property
    def failed(self) -> bool:
        """Whether there is no clip."""
        return bool(self.error_code)


def failure(error: MuseTalkError, seconds: float = 0.0) -> Outcome:
    """The outcome of a task that `error` ended."""
    return Outcome(
        seconds,
        error_code=error.error_code,
        exit_code=error.exit_code,
        message=error.message,
        hint=error.hint,
    )


class ClipMaker:
    """A worker's engines and open templates.

    Args:
        setup: what it shares with the others.
        device: "auto", "cpu", "cuda:0"; None: as each row's settings say.
    """

    def __init__(self, setup: Setup, device: str | None = None) -> None:
        self._device = device
        self._service = IntegratedMuseTalkService(
            setup.cache_dir, templates=OpenTemplates(setup.memory_limit)
        )

    def prepare(self, job: Job, cancel: threading.Event | None = None) -> Outcome:
        """Makes the job's template, or finds it up to date; nothing is left of it once `cancel` is set."""
        return _told(lambda: self._prepare(job, cancel))

    def render(self, job: Job, cancel: threading.Event | None = None) -> Outcome:
        """Makes the job's clip; nothing is left of it once `cancel` is set."""
        return _told(lambda: self._render(job, cancel))

    def _service_for(self, job: Job) -> IntegratedMuseTalkService:
        settings = job.settings
        engine = settings.engine
        if self._device is not None:
            engine = dataclasses.replace(engine, device=self._device)
        return self._service.sharing(engine, settings.encoding, settings.template)

    def _prepare(self, job: Job, cancel: threading.Event | None) -> Outcome:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="musetalk-") as folder:
            picture = fetch(job.picture, Path(folder))
            service = self._service_for(job)
            answer = service.preprocess_template(job.template_id, picture, cancel=cancel)
        seconds = time.perf_counter() - start
        return Outcome(seconds, engine=answer["engine"], device=answer["device"])

    def _render(self, job: Job, cancel: threading.Event | None) -> Outcome:
        start = time.perf_counter()
        service, how = self._service_for(job), job.settings.rendering
        with contextlib.ExitStack() as stack:
            remote = is_remote(job.output)
            folder = Path()
            if remote or is_remote(job.audio):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="musetalk-")))
            audio = fetch(job.audio, folder)
            output = folder / f"made-{name_of(job.output)}" if remote else Path(job.output)
            answer = service.realtime_inference(
                job.template_id,
                audio,
                output,
                how.fps,
                how.frames_dir or None,
                how.articulation,
                Conduct(cancel=cancel, bar=False),
            )
            status, sha256 = output.stat(), file_sha256(output)
            if remote:
                deliver(output, job.output)
        return Outcome(
            time.perf_counter() - start,
            answer["stages"],
            answer["frames"],
            answer["duration"],
            status.st_size,
            sha256,
            status.st_mtime_ns,
            answer["engine"],
            answer["device"],
        )


def _told(work: Callable[[], Outcome]) -> Outcome:
    start = time.perf_counter()
    try:
        return work()
    except MuseTalkError as e:
        error = e
    except ModuleNotFoundError as e:
        error = EngineError(f"the Python package {e.name} is not installed 缺少Python包", "run make install")
    except Exception as e:
        log.exception("a clip failed")
        words = f"internal error 内部错误: {type(e).__name__}: {e}"
        error = MuseTalkError(words, "please report this with the lines above 请附上以上日志反馈")
    return failure(error, time.perf_counter() - start)
