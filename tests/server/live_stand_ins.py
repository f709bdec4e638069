"""What live sessions are tested with: faces that show how loud it is, and time that costs nothing."""

from __future__ import annotations

import threading
from fractions import Fraction

import numpy as np

from musetalk.compositor import FrameCompositor
from musetalk.media.audio import SAMPLE_RATE
from musetalk.rendering import OpenedTemplate
from musetalk.server.live import LiveSession, LiveSettings
from tests.conftest import make_template


class LoudnessListener:
    """A frame's prompt is the largest sample beside it, times 1000; it needs nothing that comes later."""

    def __init__(self, fps, state=None):
        self.fps = fps
        self.heard, self.frames, self.held = state or (0, 0, np.zeros(0, np.float32))

    def _begin(self, frame):
        return int(frame * SAMPLE_RATE / self.fps)

    def hear(self, samples):
        self.held = np.concatenate([self.held, samples])
        self.heard += len(samples)
        while self.heard >= self._begin(self.frames + 1):
            n = self._begin(self.frames + 1) - self._begin(self.frames)
            yield np.array([[round(1000 * float(np.abs(self.held[:n]).max(initial=0)))]])
            self.held = self.held[n:]
            self.frames += 1

    def flush(self):
        return iter(())

    @property
    def state(self):
        return self.heard, self.frames, self.held


class LoudFaces:
    """The face is as bright as its sound is loud."""

    name, device, dtype, fingerprint = "lite", "cpu", "float32", "loud"

    def listen(self, fps, *, live=False, state=None):
        return LoudnessListener(fps, state)

    def generate(self, audio_prompts, indices):
        return [np.full((16, 16, 3), min(250, int(prompt[0])), np.uint8) for prompt in audio_prompts]


def opened(engine=None, template=None) -> OpenedTemplate:
    engine, template = engine or LoudFaces(), template or make_template(3, (64, 48))
    return OpenedTemplate("state", template, engine, engine, FrameCompositor(template))


class Shown:
    """Keeps what leaves a session; ends the session after `frames`."""

    def __init__(self, session: LiveSession, frames: int, *, keep: bool = True):
        self.session, self.wanted, self.keep = session, frames, keep
        self.frames = self.samples = 0
        self.pictures: list[bytes] = []
        self.sound: list[np.ndarray] = []
        session.add_output(self)

    def write(self, i420, samples):
        self.frames += 1
        self.samples += len(samples)
        if self.keep:
            self.pictures.append(i420.tobytes())
            self.sound.append(samples.copy())
        if self.frames >= self.wanted:
            self.session.end("enough")


class FreeTime:
    """Every sample is due at once. `script` is called with the samples heard so far before each block."""

    def __init__(self, block: int, script=lambda heard: None):
        self.block, self.script = block, script

    def wait(self, heard, cancel):
        self.script(heard)
        return self.block


def session(fps=Fraction(25), block=320, script=lambda heard: None, template=None, **settings) -> LiveSession:
    return LiveSession(
        "tested",
        "anna",
        template or opened(),
        LiveSettings(Fraction(fps), **settings),
        pace=FreeTime(block, script),
        now=lambda: 0.0,
    )


def events_of(live: LiveSession) -> list[dict]:
    events: list[dict] = []
    live.listen(events.append)
    return events


def in_background(live: LiveSession) -> threading.Thread:
    thread = threading.Thread(target=live.run, daemon=True)
    thread.start()
    return thread
