"""Live sessions: speech goes in as it is spoken, frames and their sound leave a fixed time behind it.

A session is one endless rendering: its speech is what was pushed, and silence otherwise. Samples and frames
are counted from the session's beginning; the wall clock only says when the next samples are due. The decision
a reader would question: an interrupt doesn't wait for silence to come through the look-ahead. The rendering
is ended and begun again at the frame shown last, and what was heard since then was silence.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from musetalk.config import Defaults, parse_articulation, parse_fps
from musetalk.errors import InputError, MuseTalkError
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.media.fragments import Picture
from musetalk.pipeline import StageClock
from musetalk.rendering import Frame, GenerateFaces, OpenedTemplate, Position, Request, render
from musetalk.server.live_sound import MAX_WAITING, HeardSound, Sound, SpeechQueue
from musetalk.server.viewers import Output, Viewers

if TYPE_CHECKING:
    from musetalk.server.worker import Place, Seat, Worker

log = logging.getLogger(__name__)

TICK = SAMPLE_RATE // 50  # samples that are heard at once, at least
MOST_BEHIND = SAMPLE_RATE // 2  # samples that are caught up with after a hold-up; more are waited for
REST = SAMPLE_RATE // 5  # samples of silence after which an utterance counts as over
PLAYBACK_EVERY = SAMPLE_RATE // 5  # samples between two reports of the position
NOTED_FRAMES = 25  # after which the worker is told what they took
ALONE_SECONDS = 30.0  # after which a session with nobody connected ends
SILENT_SECONDS = 900.0  # after which a session whose client says nothing ends
ROOM_POLL = 0.1  # seconds between looks whether speech that waits leaves room
MAX_LIVE_FPS = 60
MIN_WIDTH = 64  # pixels

Event = dict[str, Any]
Listener = Callable[[Event], None]
NoteWork = Callable[[Mapping[str, float], int], None]
"""Told the seconds that each stage worked on so many frames."""


class Pace(Protocol):
    """Says when samples are due."""

    def wait(self, heard: int, cancel: threading.Event) -> int:
        """Waits until samples after the first `heard` are due or `cancel` is set; how many are."""
        ...


class WallClock:
    """Real time. After a hold-up of more than `MOST_BEHIND` the session's time stands still instead.

    Attributes:
        held_up: how often that happened.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start: float | None = None
        self.held_up = 0

    def wait(self, heard: int, cancel: threading.Event) -> int:
        """See `Pace`."""
        if self._start is None:
            self._start = self._now() - heard / SAMPLE_RATE
        due = self._due(heard)
        while due < TICK and not cancel.wait((TICK - due) / SAMPLE_RATE):
            due = self._due(heard)
        if due > MOST_BEHIND:
            self._start += (due - MOST_BEHIND) / SAMPLE_RATE
            self.held_up += 1
        return min(due, MOST_BEHIND)

    def _due(self, heard: int) -> int:
        assert self._start is not None
        return int((self._now() - self._start) * SAMPLE_RATE) - heard


class Utterance:
    """What a session's viewers know of its speech: whether it talks, and how far it has come."""

    def __init__(self) -> None:
        self.talking = False
        self.spoken = 0  # samples of the utterance that were shown
        self._silence = 0
        self._told = 0

    @property
    def position(self) -> float:
        """Seconds of the utterance that were shown."""
        return round(self.spoken / SAMPLE_RATE, 3)

    def advance(self, sound: Sound) -> Iterator[Event]:
        """What is to be told once `sound` has been shown."""
        if sound.spoken and not self.talking:
            self.talking, self.spoken, self._told = True, 0, 0
            yield {"type": "state", "state": "talking"}
        self.spoken += sound.spoken
        self._silence = 0 if sound.spoken else self._silence + len(sound.samples)
        if sound.ends or (self.talking and self._silence >= REST):
            yield from self.end(done=sound.ends)
        elif self.talking and self.spoken >= self._told + PLAYBACK_EVERY:
            self._told = self.spoken
            yield {"type": "playback", "position": self.position}

    def end(self, *, done: bool = False) -> Iterator[Event]:
        """What is to be told when the utterance ends here; `done`: because its sender said so."""
        if self.talking or done:
            yield {"type": "playback", "position": self.position, "done": done}
        if self.talking:
            self.talking = False
            yield {"type": "state", "state": "idle"}


@dataclasses.dataclass(frozen=True)
class LiveSettings:
    """How a session is shown.

    Attributes:
        fps: frames per second.
        width: pixels, of what leaves; None for the template's own.
        batch_size: frames generated at once, at most.
        articulation: how far the mouth moves, 1 as usual, where the engine can be told.
    """

    fps: Fraction = Fraction(25)
    width: int | None = None
    batch_size: int = 8
    articulation: float = Defaults.articulation

    def size(self, opened: OpenedTemplate) -> tuple[int, int]:
        """(width, height) in pixels of what leaves, both even."""
        rows, width = opened.compositor.buffer_shape
        height = rows * 2 // 3
        if self.width is None:
            return width, height
        return self.width, max(2, round(height * self.width / width / 2) * 2)


class LiveSession:
    """One face that listens.

    Args:
        session_id: tells it from others.
        template_id: what it shows.
        opened: the template.
        settings: how it is shown.
        generate: makes the faces until the event it is given is set.
        pace: says when samples are due.
        now: seconds, for how long nobody has been there.
        closing: whether the worker's stop ends the session now, when it speaks or doesn't.
        note: told what each stage took, about every second.

    Attributes:
        speech: what was pushed and isn't heard yet.
        viewers: of its fragmented mp4.
        heard: samples so far.
        frames: frames shown so far.
        ended: why the session ends; "" while it lives.
        over: set once its place is free again.
    """

    def __init__(
        self,
        session_id: str,
        template_id: str,
        opened: OpenedTemplate,
        settings: LiveSettings,
        *,
        generate: Callable[[threading.Event], GenerateFaces] | None = None,
        pace: Pace | None = None,
        now: Callable[[], float] = time.monotonic,
        closing: Callable[[bool], bool] = lambda speaking: False,
        note: NoteWork = lambda stages, frames: None,
    ) -> None:
        self.session_id = session_id
        self.template_id = template_id
        self.settings = settings
        self.size = settings.size(opened)
        self.speech = SpeechQueue()
        self.heard = self.frames = self.interrupts = 0
        self.ended = ""
        self.over = threading.Event()
        self.pace = pace or WallClock()
        self._opened = opened
        self._generate = generate
        self._now = now
        self._closing = closing
        self._note = note
        self._clock = StageClock()
        self._noted: dict[str, float] = {}
        self._noted_frames = 0
        self._last_sign = now()
        self._connected = 0
        self._utterance = Utterance()
        self._sound = HeardSound()
        self._stretch = threading.Event()  # set: what is rendered now is no longer wanted
        self._lock = threading.RLock()
        self._outputs: tuple[Output, ...] = ()
        self.viewers = Viewers(self, Picture(*self.size, settings.fps))
        self._listeners: tuple[Listener, ...] = ()

    @property
    def state(self) -> str:
        """What its viewers see: "talking" or "idle"."""
        return "talking" if self._utterance.talking else "idle"

    @property
    def position(self) -> float:
        """Seconds of the present utterance, or of the last, that were shown."""
        return self._utterance.position

    def status(self) -> dict[str, Any]:
        """What operators and clients are told of it."""
        return {
            "session_id": self.session_id,
            "template_id": self.template_id,
            "fps": round(float(self.settings.fps), 6),
            "width": self.size[0],
            "height": self.size[1],
            "state": self.state,
            "seconds": round(self.shown_samples(self.frames) / SAMPLE_RATE, 2),
            "frames": self.frames,
            "viewers": len(self.viewers) + sum(output is not self.viewers for output in self._outputs),
            "waiting_seconds": round(self.speech.waiting / SAMPLE_RATE, 2),
            "frame_ms": self._frame_ms(),
        }

    def _frame_ms(self) -> dict[str, float]:
        """Milliseconds that each stage worked on a frame, on average."""
        frames = max(self.frames, 1)
        return {
            stage: round(1000 * seconds / frames, 2) for stage, seconds in self._clock.seconds.copy().items()
        }

    def shown_samples(self, frames: int) -> int:
        """Samples beside the session's first `frames` frames."""
        return int(frames * SAMPLE_RATE / self.settings.fps)

    def sign(self) -> None:
        """Notes that the client is alive."""
        self._last_sign = self._now()

    def connect(self) -> None:
        """Notes a connection, which `disconnect` ends; a session that has one isn't alone."""
        with self._lock:
            self._connected += 1
            self.sign()

    def disconnect(self) -> None:
        """See `connect`."""
        with self._lock:
            self._connected -= 1
            self.sign()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tells `listener` every event, on the session's thread; returns what ends that."""
        with self._lock:
            self._listeners = (*self._listeners, listener)
        return lambda: self._forget_listener(listener)

    def _forget_listener(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = tuple(known for known in self._listeners if known is not listener)

    def add_output(self, output: Output) -> None:
        """Gives every frame from now on to `output` as well."""
        with self._lock:
            self._outputs = (*self._outputs, output)

    def remove_output(self, output: Output) -> None:
        """Gives no further frame to `output`."""
        with self._lock:
            self._outputs = tuple(known for known in self._outputs if known is not output)

    def speak_file(self, path: Path) -> float:
        """Pushes a sound file as one utterance, waiting for room where it is long.

        Returns:
            Seconds that were pushed: fewer than the file has when an interrupt or the end came between.

        Raises:
            InputError: it can't be decoded.
        """
        interrupts, pushed = self.interrupts, 0
        for block in read_waveform(path):
            while self.speech.waiting + len(block) > MAX_WAITING and self._goes_on(interrupts):
                time.sleep(ROOM_POLL)
            if not self._goes_on(interrupts):
                return pushed / SAMPLE_RATE
            self.speech.push(block)
            pushed += len(block)
            self.sign()
        self.speech.end()
        return pushed / SAMPLE_RATE

    def _goes_on(self, interrupts: int) -> bool:
        return not self.ended and self.interrupts == interrupts

    def interrupt(self) -> float:
        """Drops all speech that wasn't shown, and rests; returns the seconds of it that were.

        Once this returns no frame of that speech leaves.
        """
        with self._lock:
            self.sign()
            self.interrupts += 1
            self.speech.clear()
            self._stretch.set()
            position = self._utterance.position if self._utterance.talking else 0.0
            self._tell_all(self._utterance.end())
        return position

    def end(self, why: str) -> None:
        """Ends the session; its thread returns soon after."""
        with self._lock:
            self.ended = self.ended or why
            self._stretch.set()

    def run(self) -> None:
        """Renders until the session ends; whatever goes wrong is told to its listeners."""
        try:
            while not self.ended:
                self._render_stretch()
        except MuseTalkError as e:
            self.end(e.message)
            self._tell({"type": "error", "error_code": e.error_code, "message": e.message, "hint": e.hint})
        except Exception as e:
            log.exception("live session %s failed", self.session_id)
            self.end("internal error")
            self._tell({"type": "error", "error_code": "internal", "message": type(e).__name__, "hint": ""})
        self._note_work()
        self.viewers.close()
        self._tell({"type": "ended", "message": self.ended})

    def _render_stretch(self) -> None:
        """Renders from the frame shown last until the stretch is dropped."""
        with self._lock:
            stretch, self._stretch = threading.Event(), threading.Event()
            if self.ended:
                return
            self._stretch = stretch
            unshown = self.heard - self.shown_samples(self.frames)
            self._sound = HeardSound()
            silence = Sound(np.zeros(unshown, np.float32), 0)
            self._sound.append(silence)
        request = Request(
            self.settings.fps,
            self.settings.batch_size,
            Position(self.frames),
            live=True,
            articulation=self.settings.articulation,
            generate=self._generate(stretch) if self._generate else None,
            cancel=stretch,
        )
        frames, _ = render(self._opened, self._hear(silence, stretch), request, self._clock)
        try:
            for frame in frames:
                if not self._show(frame, stretch):
                    break
        finally:
            frames.close()

    def _hear(self, silence: Sound, stretch: threading.Event) -> Iterator[np.ndarray]:
        """The stretch's sound as it becomes due, behind the `silence` that was heard for it already."""
        yield silence.samples
        while not stretch.is_set():
            n = self.pace.wait(self.heard, stretch)
            with self._lock:
                if stretch.is_set() or not n:
                    return
                sound = self.speech.take(n)
                self._sound.append(sound)
                self.heard += n
            yield sound.samples

    def _show(self, frame: Frame, stretch: threading.Event) -> bool:
        """Gives a frame and its sound to all outputs; False when the stretch was dropped."""
        with self._lock:
            if stretch.is_set():
                return False
            n = self.shown_samples(self.frames + 1) - self.shown_samples(self.frames)
            sound = self._sound.take(n)
            self.frames += 1
            self._tell_all(self._utterance.advance(sound))
            outputs = self._outputs
        if outputs:
            with self._clock.stage("output"):
                picture = scaled(frame.i420, self.size)
                for output in outputs:
                    output.write(picture, sound.samples)
        if self.frames >= self._noted_frames + NOTED_FRAMES:
            self._note_work()
        self._end_when_left()
        return True

    def _note_work(self) -> None:
        """Tells the worker what was worked since the last time."""
        seconds = self._clock.seconds.copy()
        stages = {stage: total - self._noted.get(stage, 0.0) for stage, total in seconds.items()}
        self._note(stages, self.frames - self._noted_frames)
        self._noted, self._noted_frames = seconds, self.frames

    def _end_when_left(self) -> None:
        silent = self._now() - self._last_sign
        busy = self._utterance.talking or self.speech.waiting > 0
        if silent > SILENT_SECONDS or (silent > ALONE_SECONDS and not self._connected and not busy):
            self.end("the client has gone 客户端已离开")
        if self._closing(busy):
            self.end("the worker is being stopped 服务正在停止")

    def _tell_all(self, events: Iterator[Event]) -> None:
        for event in events:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


def scaled(i420: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An I420 frame (H * 3 // 2, W) at another (width, height), both even; itself where it has that size."""
    import cv2

    rows, width = i420.shape
    height = rows * 2 // 3
    if (width, height) == size:
        return i420
    flat, area = i420.reshape(-1), width * height
    target = np.empty(size[0] * size[1] * 3 // 2, np.uint8)
    begin, into = 0, 0
    for part in (1, 2, 2):
        shape, wanted = (height // part, width // part), (size[0] // part, size[1] // part)
        plane = flat[begin : begin + area // part**2].reshape(shape)
        small = cv2.resize(plane, wanted, interpolation=cv2.INTER_AREA)
        target[into : into + small.size] = small.reshape(-1)
        begin, into = begin + area // part**2, into + small.size
    return target.reshape(size[1] * 3 // 2, size[0])


class LiveSessions:
    """All live sessions of a worker.

    Args:
        worker: gives places and templates.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._sessions: dict[str, LiveSession] = {}
        self._lock = threading.Lock()

    def start(
        self,
        template_id: str,
        fps: float | str = Defaults.fps,
        width: int | None = None,
        articulation: float = Defaults.articulation,
        client: str = "",
    ) -> LiveSession:
        """A session on a template, running.

        Raises:
            CacheError: the template can't be used.
            InputError: `fps`, `width` or `articulation` can't be shown live.
            BusyError: all places are taken.
        """
        rate = parse_fps(fps)
        if rate > MAX_LIVE_FPS:
            raise InputError(f"fps is {fps} 帧率过高", f"a live session has at most {MAX_LIVE_FPS} frames/s")
        settings = LiveSettings(rate, width, articulation=parse_articulation(articulation))
        seat = self.worker.take_place(template_id, float(rate), live=True, client=client)
        try:
            session = self._opened(seat.place, template_id, settings)
            thread = threading.Thread(
                target=self._run, args=(session, seat), name=f"live-{session.session_id[:8]}", daemon=True
            )
            with self._lock:
                self._sessions[session.session_id] = session
            thread.start()
        except BaseException:
            self.worker.give_place_back(seat)
            raise
        return session

    def get(self, session_id: str) -> LiveSession:
        """A session that lives.

        Raises:
            InputError: there is none of that id.
        """
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None or session.ended:
            raise InputError(f"no session {session_id[:60]!r} 会话不存在", "POST /v1/sessions makes one")
        return session

    def all(self) -> list[LiveSession]:
        """Those that live."""
        with self._lock:
            return list(self._sessions.values())

    def _opened(self, place: Place, template_id: str, settings: LiveSettings) -> LiveSession:
        opened = place.service.renderer().open(template_id)
        own_width, width = opened.compositor.buffer_shape[1], settings.width
        if width is not None and not MIN_WIDTH <= width <= own_width:
            raise InputError(f"width is {width} 宽度无效", f"use {MIN_WIDTH} to {own_width} pixels")
        settings = dataclasses.replace(
            settings, width=width and width // 2 * 2, batch_size=place.service.config.batch_size
        )
        return LiveSession(
            secrets.token_hex(8),
            template_id,
            opened,
            settings,
            generate=lambda cancel: place.scheduler.generate(opened, cancel, live=True),
            closing=self.worker.ends_session,
            note=self.worker.note_rendering,
        )

    def _run(self, session: LiveSession, seat: Seat) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions.pop(session.session_id, None)
            self.worker.give_place_back(seat)
            session.over.set()
