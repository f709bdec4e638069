"""One session's fragmented mp4 for all who watch it: encoded once, while somebody watches.

The decisions a reader would question: a viewer who joins is given what was encoded since the last key frame,
so that he sees a picture at once and nobody's encoder is disturbed; his player goes to the end of it. And a
viewer who takes too slowly is skipped to the newest key frame: a picture that stalls for one is worse than a
jump, and nobody waits for him.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from musetalk.config import EncodingConfig
from musetalk.errors import MuseTalkError
from musetalk.media.audio import SAMPLE_RATE, int16_samples
from musetalk.media.fragments import Fragment, FragmentWriter, Picture

log = logging.getLogger(__name__)

LIVE_ENCODING = EncodingConfig(preset="ultrafast", crf=21)
LIVE_KEY_SECONDS = 0.5  # between key frames: what a viewer who joins is given at once, at most
LIVE_FRAGMENT_SECONDS = 0.01  # less than a frame: each picture leaves alone
FALLEN_BEHIND = 96  # fragments that may wait for a viewer: some two seconds of pictures and of sound


def live_writer(picture: Picture) -> FragmentWriter:
    """The encoder of a live session, for frames and samples at `SAMPLE_RATE`.

    Raises:
        EngineError: there is no ffmpeg.
    """
    return FragmentWriter(
        picture,
        SAMPLE_RATE,
        LIVE_ENCODING,
        fragment_seconds=LIVE_FRAGMENT_SECONDS,
        key_seconds=LIVE_KEY_SECONDS,
    )


class Output(Protocol):
    """Who takes a session's frames; called on the session's thread, and never to hold it up."""

    def write(self, i420: np.ndarray, samples: np.ndarray) -> None:
        """Takes a frame (H * 3 // 2, W) uint8, only lent, and the (n,) float32 samples beside it."""
        ...


class Source(Protocol):
    """What is watched."""

    def add_output(self, output: Output) -> None:
        """Gives every frame from now on to `output` as well."""
        ...

    def remove_output(self, output: Output) -> None:
        """Gives no further frame to `output`."""
        ...


class Viewer:
    """What waits for one viewer. Filled on the encoder's thread, emptied on another.

    Args:
        wake: called when something has come; also at the end.

    Attributes:
        skipped: how often he was skipped forward.
        over: nothing more will come.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[Fragment] = deque()
        self._wants_key = False
        self._begun = False
        self.skipped = 0
        self.over = False

    def offer(self, fragment: Fragment) -> None:
        """Appends a fragment, unless he has fallen behind."""
        with self._lock:
            if len(self._waiting) >= FALLEN_BEHIND:
                header = [] if self._begun else [self._waiting[0]]
                self._waiting = deque(header)
                self._wants_key = True
                self.skipped += 1
            if self._wants_key and not fragment.key:
                return
            self._wants_key = False
            self._waiting.append(fragment)
        self._wake()

    def take(self) -> list[bytes]:
        """All that waits for him."""
        with self._lock:
            contents = [fragment.content for fragment in self._waiting]
            self._waiting.clear()
            self._begun = self._begun or bool(contents)
        return contents

    def end(self) -> None:
        """Says that nothing more will come."""
        self.over = True
        self._wake()


class Viewers:
    """Everybody who watches one session.

    Args:
        source: the session.
        picture: shape of its frames.
    """

    def __init__(self, source: Source, picture: Picture) -> None:
        self._source = source
        self._picture = picture
        self._lock = threading.Lock()
        self._viewers: list[Viewer] = []
        self._writer: FragmentWriter | None = None
        self._header: Fragment | None = None
        self._since_key: list[Fragment] = []
        self._closed = False
        self.encoders_started = 0

    def __len__(self) -> int:
        return len(self._viewers)

    def join(self, wake: Callable[[], None]) -> Viewer:
        """A new viewer, who is given the stream from its last key frame on; one who comes too late has ended.

        Raises:
            EngineError: there is no ffmpeg.
        """
        viewer = Viewer(wake)
        with self._lock:
            if self._closed:
                viewer.end()
                return viewer
            if self._header is not None:
                for fragment in (self._header, *self._since_key):
                    viewer.offer(fragment)
            self._viewers.append(viewer)
            if self._writer is None:
                self._start()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Ends a viewer; with the last one the encoder ends too."""
        with self._lock:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
            if not self._viewers:
                self._stop()

    def write(self, i420: np.ndarray, samples: np.ndarray) -> None:
        """Encodes a frame and its sound; a session's `Output`."""
        writer = self._writer
        if writer is None:
            return
        try:
            writer.write_sound(int16_samples(samples))
            writer.write(i420)
        except MuseTalkError as e:
            with self._lock:
                if writer is self._writer:
                    log.warning("a live session's encoder: %s", e.message)
                    self._stop()
                    self._end_all()

    def close(self) -> None:
        """Ends the encoder and every viewer, those who come later too."""
        with self._lock:
            self._closed = True
            self._stop()
            self._end_all()

    def _start(self) -> None:
        self._writer = live_writer(self._picture)
        self.encoders_started += 1
        threading.Thread(
            target=self._read,
            args=(self._writer,),
            name="viewers",
            daemon=True,
        ).start()
        self._source.add_output(self)

    def _stop(self) -> None:
        self._source.remove_output(self)
        if self._writer is not None:
            self._writer.abort()
        self._writer = self._header = None
        self._since_key = []

    def _end_all(self) -> None:
        for viewer in self._viewers:
            viewer.end()
        self._viewers = []

    def _read(self, writer: FragmentWriter) -> None:
        """Gives the encoder's fragments to everybody, until it ends."""
        with writer:
            for fragment in writer.fragments():
                with self._lock:
                    if writer is not self._writer:
                        break
                    self._keep(fragment)
                    for viewer in self._viewers:
                        viewer.offer(fragment)

    def _keep(self, fragment: Fragment) -> None:
        if self._header is None:
            self._header = fragment
            return
        if fragment.key:
            self._since_key.clear()
        self._since_key.append(fragment)
