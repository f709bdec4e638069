"""Renderings that are asked for, watched and fetched later; each one ends, whatever happens.

The decisions a reader would question: a job's pictures are encoded once, as fragments that can be played
while they come and, by the same encoder, as the file that remains. And what is known of a job lies beside its
files and not in a database: whoever shares the folder, the worker after a restart or another one behind the
same balancer, answers for it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout

from musetalk.config import Defaults, EncodingConfig, PreprocessingConfig, parse_articulation, parse_fps
from musetalk.errors import BusyError, InputError, MuseTalkError
from musetalk.file_rendering import TooShortError
from musetalk.files import atomic_file, remove_file, remove_folder
from musetalk.media.fragments import FragmentWriter, Picture
from musetalk.pipeline import StageClock
from musetalk.rendering import Request, render
from musetalk.server.line import Turn
from musetalk.server.paths import hide_folders
from musetalk.server.signals import Changes
from musetalk.server.worker import Place, Worker

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]

FINAL = ("completed", "failed", "cancelled")
JOBS_FOLDER = "jobs"  # in the folder of finished videos
RECORD, STREAM, VIDEO, OWNER = "job.json", "stream.mp4", "video.mp4", "owner.lock"
JOB_ID = re.compile(r"video_[0-9a-f]{24}")
UPLOADED_TEMPLATE = "portrait-"  # how ids of templates begin that were made for a job's own portrait
UPLOADED_ID = re.compile(rf"{UPLOADED_TEMPLATE}[0-9a-f]{{20}}")
MARKS_FOLDER = "portraits"  # beside the jobs: an empty file for each such template, as old as its last use
QUEUED_PER_THREAD = 16  # jobs that may wait for each that runs
REMOVAL_SECONDS = 1.0  # that a removal waits for a cancelled job's thread
TOLD_STEPS = 100  # of progress
KEY_SECONDS = 10.0  # between key frames: all viewers begin at the first, and a still background costs little

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Job:
    """One rendering.

    Attributes:
        progress: per cent.
        stage: "queued", "template", "render" or "done".
        created_at, completed_at, deadline: seconds since 1970; past its deadline a job fails.
        seconds, frames: of the video, once they are known.
        error: code, message and hint of a failure.
        client: who asked, for the limit of each client.
        key, digest: of the caller's Idempotency-Key, and of what was asked with it.
    """

    id: str
    template_id: str
    fps: str
    created_at: float
    deadline: float
    articulation: float = Defaults.articulation
    status: Status = "queued"
    progress: int = 0
    stage: str = "queued"
    completed_at: float | None = None
    size: str | None = None
    seconds: float | None = None
    frames: int = 0
    engine: str | None = None
    error: dict[str, str] | None = None
    client: str = ""
    key: str = ""
    digest: str = ""

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL


@dataclasses.dataclass
class RunningJob:
    """A job of this worker that hasn't ended, with what its threads and watchers share.

    Attributes:
        audio: the speech's file.
        portrait: what its template is to be made of; None for one that is there.
        owner: tells other workers that this one has it.
        turn: its place in the worker's line.
        streamed: bytes of the stream so far.
        writer: its encoder, while it has one.
        removed: its folder goes once its thread is done with it.
        over: its thread is.
    """

    job: Job
    folder: Path
    audio: Path
    portrait: Path | None
    settings: PreprocessingConfig
    encoding: EncodingConfig
    owner: FileLock
    turn: Turn
    cancel: threading.Event
    changes: Changes = dataclasses.field(default_factory=Changes)
    streamed: int = 0
    writer: FragmentWriter | None = None
    removed: bool = False
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def stop(self) -> None:
        """Makes its thread end, even where that waits for the encoder."""
        self.cancel.set()
        writer = self.writer
        if writer is not None:
            writer.abort()


class ElsewhereError(MuseTalkError):
    """Another worker has the job."""

    error_code = "busy"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a caller wants rendered.

    Attributes:
        audio, portrait: saved uploads inside `folder`.
        digest: of everything that shapes the result.
    """

    folder: Path
    audio: Path
    portrait: Path | None
    template_id: str
    fps: str
    articulation: float
    settings: PreprocessingConfig
    encoding: EncodingConfig
    digest: str
    client: str = ""
    key: str = ""


def template_of(portrait_sha256: str) -> str:
    """Id of the template that is made of a job's own portrait: the same picture is preprocessed once."""
    return f"{UPLOADED_TEMPLATE}{portrait_sha256[:20]}"


class Jobs:
    """All jobs over one folder.

    Args:
        worker: renders.
        folder: a folder for each job, with its record, uploads and video.
    """

    def __init__(self, worker: Worker, folder: Path) -> None:
        self._worker = worker
        self.folder = folder
        self._lock = threading.Lock()
        self._running: dict[str, RunningJob] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._keys: dict[str, str] = {}
        for job in self.newest_first():
            self._keys[job.key] = job.id
            if not job.final:
                self._end_abandoned(job.id)

    def new_folder(self) -> Path:
        """Where a job's uploads go before the job is made."""
        folder = self.folder / f"video_{secrets.token_hex(12)}"
        folder.mkdir(parents=True)
        return folder

    def submit(self, asked: Asked) -> tuple[Job, bool]:
        """A new job, and True; or the one that the same key made before, and False.

        Raises:
            BusyError: too much waits already.
            InputError: the key came with another request before, or fps or articulation can't be used.
        """
        parse_fps(asked.fps)
        parse_articulation(asked.articulation)
        with self._lock:
            known = self._keyed(asked.key)
            if known is None:
                running = self._admitted(asked)
        if known is not None:
            remove_folder(asked.folder)
            if known.digest != asked.digest:
                raise InputError("the Idempotency-Key came with another request", "use a new key for each")
            return known, False
        threading.Thread(target=self._run, args=(running,), name=running.job.id, daemon=True).start()
        return running.job, True

    def _admitted(self, asked: Asked) -> RunningJob:
        opened = [running.job for running in self._running.values() if not running.job.final]
        if len(opened) >= QUEUED_PER_THREAD * self._worker.most_work:
            raise BusyError(f"{len(opened)} jobs wait already 排队已满", "try again later", 10)
        self._worker.clients.check(asked.client, "jobs", sum(job.client == asked.client for job in opened))
        now = time.time()
        job = Job(
            asked.folder.name,
            asked.template_id,
            asked.fps,
            now,
            now + self._worker.server.job_deadline,
            asked.articulation,
            client=asked.client,
            key=asked.key,
            digest=asked.digest,
        )
        owner, cancel = _owner_lock(asked.folder), threading.Event()
        owner.acquire()
        try:
            self._note_use(asked)
            self._save(job)
            turn = self._worker.promise(cancel)
        except BaseException:
            owner.release()
            raise
        running = RunningJob(
            job,
            asked.folder,
            asked.audio,
            asked.portrait,
            asked.settings,
            asked.encoding,
            owner,
            turn,
            cancel,
        )
        self._running[job.id] = running
        if asked.key:
            self._keys[asked.key] = job.id
        return running

    @property
    def open_count(self) -> int:
        """Jobs of this worker that haven't ended."""
        with self._lock:
            return sum(not running.job.final for running in self._running.values())

    def get(self, job_id: str) -> Job | None:
        """A job, of this worker or of another one over the same folder."""
        with self._lock:
            running = self._running.get(job_id)
        return running.job if running is not None else self._read(job_id)

    def running(self, job_id: str) -> RunningJob | None:
        """A job of this worker that hasn't ended."""
        with self._lock:
            return self._running.get(job_id)

    def newest_first(self) -> list[Job]:
        """All jobs, the newest first."""
        names = [path.name for path in self.folder.iterdir() if JOB_ID.fullmatch(path.name)]
        found = (self.get(name) for name in names)
        return sorted((job for job in found if job), key=lambda job: (job.created_at, job.id), reverse=True)

    def remove(self, job_id: str) -> bool:
        """Cancels a job that runs, and removes one that has ended with its files; whether it was removed.

        Raises:
            KeyError: there is no such job.
            ElsewhereError: another worker renders it.
        """
        job, running = self.get(job_id), self.running(job_id)
        if job is None:
            raise KeyError(job_id)
        if running is not None and not running.job.final:
            self._stop(running, "cancelled", _told("cancelled", "the job was cancelled 已取消"))
            return False
        if running is None and not job.final and not self._end_abandoned(job_id):
            raise ElsewhereError(
                f"job {job_id} is rendered by another worker 由其他服务渲染", "cancel it there"
            )
        self._forget(job)
        return True

    def _forget(self, job: Job) -> None:
        """Removes a job that has ended; where its thread hasn't yet, that removes the rest."""
        with self._lock:
            self._keys.pop(job.key, None)
            running = self._running.pop(job.id, None)
            if running is not None:
                running.removed = True
        if running is None:
            remove_folder(self.folder / job.id)
        else:
            remove_file(self.folder / job.id / RECORD)
            running.over.wait(REMOVAL_SECONDS)

    def video(self, job_id: str) -> Path:
        """Where a completed job's file is."""
        return self.folder / job_id / VIDEO

    def end_overdue(self) -> None:
        """Fails the jobs whose deadline is over, even where their thread is stuck."""
        now = time.monotonic()  # the clock on the wall may be set
        with self._lock:
            overdue = [running for running in self._running.values() if running.turn.deadline < now]
        for running in overdue:
            words = f"it took longer than {self._worker.server.job_deadline:g} s 任务超时"
            self._stop(running, "failed", _told("deadline", words))

    def sweep(self) -> None:
        """Ends jobs whose worker is gone; removes those that ended long ago, and the oldest of too many."""
        server, room = self._worker.server, 0
        oldest = time.time() - 3600 * server.keep
        for folder in self.folder.glob("video_*"):
            with contextlib.suppress(OSError):  # an upload that was cut off has no record
                if not (folder / RECORD).exists() and folder.stat().st_mtime < oldest:
                    remove_folder(folder)
        jobs = self.newest_first()
        for job in jobs:
            if not job.final:
                self._end_abandoned(job.id)
                continue
            room += _bytes_in(self.folder / job.id)
            if room > server.keep_bytes or (job.completed_at or job.created_at) < oldest:
                with contextlib.suppress(OSError):
                    self._forget(job)
        self._sweep_templates(oldest, {job.template_id for job in jobs if not job.final})

    def _sweep_templates(self, oldest: float, used: set[str]) -> None:
        """Removes the templates that jobs made of their own portraits, when no job used them for long."""
        store = self._worker.service.store
        for mark in (self.folder / MARKS_FOLDER).glob(f"{UPLOADED_TEMPLATE}*"):
            if mark.name in used or not UPLOADED_ID.fullmatch(mark.name):
                continue
            with contextlib.suppress(OSError, MuseTalkError):
                if mark.stat().st_mtime < oldest:
                    store.clean(mark.name)
                    remove_file(mark)

    def _note_use(self, asked: Asked) -> None:
        """Marks the template that a job makes of its own portrait; a job that uses a marked one renews it."""
        mark = self.folder / MARKS_FOLDER / asked.template_id
        if UPLOADED_ID.fullmatch(asked.template_id) and (asked.portrait is not None or mark.exists()):
            mark.parent.mkdir(exist_ok=True)
            mark.touch()

    def close(self) -> None:
        """Cancels what still runs."""
        with self._lock:
            left = list(self._running.values())
        for running in left:
            self._stop(running, "failed", _told("worker_lost", "the worker was stopped 服务已停止"))

    def _run(self, running: RunningJob) -> None:
        job = running.job
        try:
            with self._worker.line.in_turn(running.turn):
                if not job.final:
                    self._render(running)
        except MuseTalkError as e:
            shown = hide_folders(e, (*self._worker.folders, running.folder))
            self._end(job, "failed", _told(shown.error_code, shown.message, shown.hint))
        except Exception as e:
            log.exception("job %s failed", job.id)
            self._end(job, "failed", _told("internal", f"internal error 内部错误: {type(e).__name__}"))
        finally:
            running.changes.tell()
            running.owner.release()
            with contextlib.suppress(OSError):
                for leftover in (STREAM, OWNER, *(() if job.status == "completed" else (VIDEO,))):
                    remove_file(running.folder / leftover)
            with self._lock:
                self._running.pop(job.id, None)
            if running.removed:
                with contextlib.suppress(OSError):
                    remove_folder(running.folder)
            running.over.set()

    def _render(self, running: RunningJob) -> None:
        job = running.job
        if running.portrait is not None:
            self._advance(running, stage="template")
            self._worker.make_template(
                job.template_id, running.portrait, running.settings, cancel=running.cancel
            )
        self._advance(running, stage="render")
        clock = StageClock()
        with self._worker.loaded(job.template_id) as place:
            self._write(running, place, clock)
        self._worker.note_rendering(clock.seconds, job.frames)
        self._end(job, "completed", None)

    def _write(self, running: RunningJob, place: Place, clock: StageClock) -> None:
        from musetalk.media.audio import probe_audio

        job, fps = running.job, parse_fps(running.job.fps)
        duration = probe_audio(running.audio).duration
        expected = max(1, int((duration or 0) * fps))
        opened = place.service.renderer().open(job.template_id)
        width, height = opened.template.frame_size
        job.size, job.engine = f"{width}x{height}", opened.engine.name
        picture = Picture(width + width % 2, height + height % 2, fps)
        generate = place.scheduler.generate(opened, running.cancel)
        request = Request(
            fps,
            place.service.config.batch_size,
            articulation=job.articulation,
            generate=generate,
            cancel=running.cancel,
        )
        speech = _speech(running.audio)
        finished = running.folder / VIDEO
        with (
            FragmentWriter(
                picture, running.audio, running.encoding, finished=finished, key_seconds=KEY_SECONDS
            ) as writer,
            self._pumped(running, writer),
        ):
            frames, info = render(opened, speech, request, clock)
            with contextlib.closing(frames):
                for frame in frames:
                    with clock.stage("encode"):
                        writer.write(frame.i420)
                    self._advance(running, frames=writer.frame_count, expected=expected)
            if not running.cancel.is_set():
                if not writer.frame_count:
                    raise TooShortError(info.position)
                writer.finish()
                job.seconds = round(float(writer.frame_count / fps), 3)

    @contextlib.contextmanager
    def _pumped(self, running: RunningJob, writer: FragmentWriter) -> Iterator[None]:
        """The stream is kept while the block lasts; whoever stops the job meanwhile stops the encoder."""
        pump = threading.Thread(target=self._pump, args=(running, writer), name="fragments", daemon=True)
        pump.start()
        running.writer = writer
        try:
            if running.cancel.is_set():  # it came before there was an encoder to stop
                writer.abort()
            yield
        finally:
            running.writer = None
            writer.abort()
            pump.join()

    def _pump(self, running: RunningJob, writer: FragmentWriter) -> None:
        """Keeps the stream where viewers read it."""
        try:
            with (running.folder / STREAM).open("wb", buffering=0) as stream:
                for fragment in writer.fragments():
                    stream.write(fragment.content)
                    running.streamed += len(fragment.content)
                    running.changes.tell()
        except OSError as e:
            log.warning("job %s: the stream can't be kept: %s", running.job.id, e)
            writer.abort()

    def _advance(self, running: RunningJob, stage: str = "", frames: int = 0, expected: int = 1) -> None:
        job = running.job
        progress = min(TOLD_STEPS - 1, TOLD_STEPS * frames // expected)
        with self._lock:
            if job.final or not (stage or progress > job.progress):
                job.frames = max(job.frames, frames)
                return
            job.status, job.stage = "in_progress", stage or job.stage
            job.progress, job.frames = max(job.progress, progress), frames
            if stage:
                self._save(job)
        running.changes.tell()

    def _stop(self, running: RunningJob, status: Status, error: dict[str, str]) -> None:
        """Ends a job whose thread may be anywhere: what that makes of it afterwards doesn't count."""
        self._end(running.job, status, error)
        running.stop()
        self._worker.line.leave(running.turn)

    def _end(self, job: Job, status: Status, error: dict[str, str] | None) -> None:
        """Gives a job its final state, the first one that it gets."""
        with self._lock:
            if job.final:
                return
            job.status, job.error, job.completed_at = status, error, time.time()
            job.stage, job.progress = "done", TOLD_STEPS if status == "completed" else job.progress
            running = self._running.get(job.id)
            with contextlib.suppress(MuseTalkError):  # a full disk: it is known while the worker lives
                self._save(job)
        if running is not None:
            running.changes.tell()

    def _save(self, job: Job) -> None:
        folder = self.folder / job.id
        if folder.is_dir():
            with atomic_file(folder / RECORD) as stream:
                stream.write(json.dumps(dataclasses.asdict(job), ensure_ascii=True).encode())

    def _read(self, job_id: str) -> Job | None:
        if not JOB_ID.fullmatch(job_id):
            return None
        try:
            return Job(**json.loads((self.folder / job_id / RECORD).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _keyed(self, key: str) -> Job | None:
        """The job that came with this key; the caller holds the lock."""
        job_id = self._keys.get(key, "") if key else ""
        running = self._running.get(job_id)
        return running.job if running is not None else self._read(job_id)

    def _end_abandoned(self, job_id: str) -> bool:
        """Fails a job whose worker is gone; False when its worker, this one perhaps, still has it."""
        if self.running(job_id) is not None:
            return False
        try:
            with _owner_lock(self.folder / job_id).acquire(timeout=0):
                job = self._read(job_id)  # it may have ended since it was read
                if job is not None and not job.final:
                    words = "the worker ended while it rendered 服务中断"
                    self._end(job, "failed", _told("worker_lost", words))
        except Timeout:
            return False
        return True


def _bytes_in(folder: Path) -> int:
    """Of all files that are there when each is looked at."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size


def _owner_lock(folder: Path) -> FileLock:
    """Held by the worker that has the job, from whatever thread; the system frees it when that ends."""
    return FileLock(folder / OWNER, thread_local=False)


def read_stream(running: RunningJob) -> IO[bytes] | None:
    """The stream of a job that runs, from its beginning; None before it has one."""
    try:
        return (running.folder / STREAM).open("rb")
    except FileNotFoundError:
        return None


def digest_of(*parts: object) -> str:
    """A value that two requests share only when all their parts are equal."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def _speech(audio: Path) -> Any:
    from musetalk.media.audio import read_waveform

    return read_waveform(audio)


def _told(code: str, message: str, hint: str = "") -> dict[str, str]:
    return {"code": code, "message": message, "hint": hint}
