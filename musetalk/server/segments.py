"""Sessions of callers who send their speech as files, a segment at a time, and fetch a video of each.

The decision a reader would question: a segment that was answered is answered again in the same words when
the caller repeats it, because a caller whose connection broke can't know whether his call came through. And
a segment that completes no frame gives no file but is heard: the frame it began comes with the next one, and
so does its sound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from musetalk.config import Defaults, parse_articulation, parse_fps
from musetalk.errors import BusyError, CancelledRun, InputError
from musetalk.file_rendering import Files, TooShortError, render_file
from musetalk.files import remove_file
from musetalk.pipeline import StageClock
from musetalk.rendering import Position, Request
from musetalk.server.worker import Seat, Worker

IDLE_SECONDS = 600.0  # after which a session whose caller is silent ends by itself
SEGMENT_NAME = re.compile(r"[\w-]*_\d{5,}_[0-9a-f]{8}\.mp4")
WAITING_SEGMENTS = 4  # of one session, the one that is rendered included
KEPT_ANSWERS = 4  # of the last segments of a session


class SegmentAnswer(TypedDict):
    """Answer of `process_segment`."""

    success: bool
    session_id: str
    segment_index: int
    video_path: str
    video_filename: str
    video_url: str
    duration: float
    frames: int
    process_time: float
    latency_ms: float
    is_final: bool


class SessionAnswer(TypedDict):
    """Answer of `end_session`."""

    success: bool
    session_id: str
    segments_processed: int
    total_latency: float
    average_latency: float


@dataclasses.dataclass
class Session:
    """One caller's session.

    Attributes:
        position: where it stands behind the last segment.
        holds_place: until the final segment was rendered.
        waiting: segments that are rendered or wait for it.
        unheard: sound files, as bytes, of segments since the last that gave a video.
        answers: of the last segments, by their index and sound file.
        latencies: seconds from each segment's call to its answer.
    """

    session_id: str
    template_id: str
    seat: Seat
    articulation: float = Defaults.articulation
    position: Position = dataclasses.field(default_factory=Position)
    answers: dict[tuple[int, str], SegmentAnswer] = dataclasses.field(default_factory=dict)
    latencies: list[float] = dataclasses.field(default_factory=list)
    last_call: float = dataclasses.field(default_factory=time.monotonic)
    cancel: threading.Event = dataclasses.field(default_factory=threading.Event)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    holds_place: bool = True
    waiting: int = 0
    unheard: list[bytes] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Lets one segment be rendered at a time.

        Raises:
            BusyError: several wait already; a caller sends a segment when he has the last one's answer.
        """
        if self.waiting >= WAITING_SEGMENTS:
            raise BusyError(f"{self.waiting} segments of this session wait already 片段排队已满", "", 1)
        self.waiting += 1
        try:
            with self.lock:
                yield
        finally:
            self.waiting -= 1


class SegmentSessions:
    """All sessions of this kind.

    Args:
        worker: renders.
        videos_dir: where finished segments go, one flat folder.
    """

    def __init__(self, worker: Worker, videos_dir: Path) -> None:
        self._worker = worker
        self.videos_dir = videos_dir
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def start(
        self,
        session_id: str,
        template_id: str,
        articulation: float = Defaults.articulation,
        client: str = "",
    ) -> Session:
        """A session on a template, which is opened now; the same call again finds it.

        Raises:
            CacheError: the template can't be used.
            BusyError: all places are taken.
        """
        if not session_id or len(session_id) > 200:
            raise InputError(f"session_id is {session_id[:40]!r}", "use an id of 1 to 200 characters")
        articulation = parse_articulation(articulation)
        self.end_idle()
        with self._lock:
            known = self._sessions.get(session_id)
        if known is not None and (known.template_id, known.articulation) == (template_id, articulation):
            return known
        if known is not None:
            with contextlib.suppress(InputError):  # another call ended it meanwhile
                self.end(session_id)
        seat = self._worker.take_place(template_id, client=client)
        session = Session(session_id, template_id, seat, articulation)
        try:
            seat.place.service.renderer().open(template_id)
        except BaseException:
            self._worker.give_place_back(seat)
            raise
        with self._lock:
            kept = self._sessions.setdefault(session_id, session)
        if kept is not session:  # the same call came through a second time meanwhile
            self._worker.give_place_back(seat)
        return kept

    def process(self, session_id: str, audio: Path, index: int, final: bool) -> SegmentAnswer:
        """Renders one segment; the features hear what came before it.

        Raises:
            InputError: no such session, or the sound can't be used.
            BusyError: the worker is being stopped.
        """
        called = time.monotonic()
        session = self._session(session_id)
        with session.turn(), self._worker.segment_work(session.cancel):
            repeated = session.answers.get((index, str(audio)))
            if repeated is not None:
                return repeated
            if not session.holds_place:
                raise InputError("the session had its final segment 会话已结束", "start another session")
            session.last_call = called
            answer = self._render(session, audio, index, final, called)
            session.answers[index, str(audio)] = answer
            while len(session.answers) > KEPT_ANSWERS:
                del session.answers[next(iter(session.answers))]
            session.latencies.append(time.monotonic() - called)
            session.last_call = time.monotonic()
            if final:
                self._free(session)
            return answer

    def _free(self, session: Session) -> None:
        """Gives a session's place back, once."""
        with self._lock:
            held, session.holds_place = session.holds_place, False
        if held:
            self._worker.give_place_back(session.seat)

    def _render(self, session: Session, audio: Path, index: int, final: bool, called: float) -> SegmentAnswer:
        place, clock = session.seat.place, StageClock()
        opened = place.service.renderer().open(session.template_id)
        output = self.videos_dir / f"{_file_stem(session.session_id)}_{index:05d}_{secrets.token_hex(4)}.mp4"
        fps = parse_fps(Defaults.fps)
        request = Request(
            fps,
            place.service.config.batch_size,
            session.position,
            articulation=session.articulation,
            generate=place.scheduler.generate(opened, session.cancel, live=True),
            cancel=session.cancel,
        )
        encoding = dataclasses.replace(place.service.encoding, sound=self._worker.server.segment_sound)
        try:
            with _as_files(session.unheard) as earlier:
                files = Files(audio, output, earlier=earlier)
                info, _ = render_file(opened, files, request, encoding, clock)
            position, session.unheard = info.position, []
        except TooShortError as e:
            position = e.position
            session.unheard.append(audio.read_bytes())
        self._worker.note_rendering(clock.seconds, position.frames - session.position.frames)
        frames, session.position = position.frames - session.position.frames, position
        elapsed = time.monotonic() - called
        return {
            "success": True,
            "session_id": session.session_id,
            "segment_index": index,
            "video_path": str(output) if frames else "",
            "video_filename": output.name if frames else "",
            "video_url": f"/videos/{output.name}" if frames else "",
            "duration": round(float(frames / fps), 3),
            "frames": frames,
            "process_time": round(elapsed, 3),
            "latency_ms": round(1000 * elapsed, 1),
            "is_final": final,
        }

    def end(self, session_id: str) -> SessionAnswer:
        """Ends a session and frees its place; what it renders is cancelled.

        Raises:
            InputError: no such session.
        """
        with self._lock:
            session = self._sessions.pop(session_id, None)
        if session is None:
            raise _unknown(session_id)
        session.cancel.set()
        self._free(session)
        total = sum(session.latencies)
        return {
            "success": True,
            "session_id": session_id,
            "segments_processed": len(session.latencies),
            "total_latency": round(total, 3),
            "average_latency": round(total / max(1, len(session.latencies)), 3),
        }

    def end_idle(self) -> None:
        """Ends sessions whose callers were silent for `IDLE_SECONDS`."""
        now = time.monotonic()
        with self._lock:
            silent = [s for s in self._sessions.values() if now - s.last_call > IDLE_SECONDS]
            idle = [session.session_id for session in silent if not session.lock.locked()]
        for session_id in idle:
            with contextlib.suppress(InputError):  # its caller ended it meanwhile
                self.end(session_id)

    def sweep(self) -> None:
        """Removes segments' videos that are older than the worker keeps them."""
        oldest = time.time() - 3600 * self._worker.server.keep
        for path in self.videos_dir.iterdir():
            with contextlib.suppress(OSError):
                if SEGMENT_NAME.fullmatch(path.name) and path.stat().st_mtime < oldest:
                    remove_file(path)

    def holds(self, session_id: str) -> bool:
        """Whether there is such a session."""
        with self._lock:
            return session_id in self._sessions

    def _session(self, session_id: str) -> Session:
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise _unknown(session_id)
        if session.cancel.is_set():
            raise CancelledRun("the session was ended 会话已结束", "")
        return session


@contextlib.contextmanager
def _as_files(contents: Sequence[bytes]) -> Iterator[tuple[Path, ...]]:
    """Sounds that are kept in memory, as files while the block lasts."""
    if not contents:
        yield ()
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        paths = tuple(Path(folder) / str(index) for index in range(len(contents)))
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        yield paths


def _unknown(session_id: str) -> InputError:
    return InputError(f"no session {session_id[:60]!r} 会话不存在", "call /api/start_session first")


def _file_stem(session_id: str) -> str:
    """The id as part of a file name: letters, digits and dashes."""
    return "".join(c if c.isalnum() or c == "-" else "_" for c in session_id)[:60]
