"""Speech on its way into a live session, and the sound on its way out beside the frames.

The decision a reader would question: both count samples and know no clock. Speech begins once a little of it
is there, or once as much silence has passed since its first piece: pieces that come in real time, each a bit
late, would otherwise be torn apart by gaps.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from musetalk.errors import BusyError, InputError
from musetalk.media.audio import MAX_SAMPLE_RATE, SAMPLE_RATE, float_samples

START_SAMPLES = SAMPLE_RATE * 40 // 1000  # of speech that are there before it begins to be heard
SPOKEN_LATE = SAMPLE_RATE // 4  # samples of a microphone's that may wait before pauses in it are shortened
TOO_LATE = SAMPLE_RATE  # … before it is cut, pause or not
QUIET = 0.01  # of full scale: no sample of a pause is louder
MAX_WAITING = SAMPLE_RATE * 300  # samples of speech that may wait to be heard


class Sound(NamedTuple):
    """Samples of a session, in their order.

    Attributes:
        samples: (n,) float32 at 16 kHz.
        spoken: how many of them, from the first, are speech; silence follows.
        ends: the speech ends here because its sender said so.
    """

    samples: np.ndarray
    spoken: int
    ends: bool = False


class SpeechQueue:
    """Speech that was pushed and isn't heard yet; silence where there is none. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: deque[np.ndarray] = deque()
        self._flows = False
        self._ended = False
        self._realtime = False
        self._passed = 0  # samples of silence since speech began to wait
        self.waiting = 0
        self.cleared = 0  # how often all was forgotten

    def set_realtime(self, realtime: bool) -> None:
        """Whether speech comes from a microphone: then what waits too long is shortened at its pauses.

        Otherwise it would be said later and later, for the microphone's clock isn't ours and no hold-up could
        be made up for.
        """
        with self._lock:
            self._realtime = realtime

    def push(self, samples: np.ndarray) -> int:
        """Appends (n,) float32 samples at 16 kHz; returns n.

        Raises:
            BusyError: more waits than may.
        """
        with self._lock:
            if self.waiting + len(samples) > MAX_WAITING:
                raise BusyError(
                    f"{self.waiting // SAMPLE_RATE} s of speech wait already 待播语音过多",
                    "send speech at most some minutes ahead",
                    10,
                )
            if len(samples):
                self._blocks.append(samples.astype(np.float32, copy=False))
                self.waiting += len(samples)
            return len(samples)

    def end(self) -> None:
        """Says that an utterance is complete: what is there is heard without waiting for more."""
        with self._lock:
            self._ended = True

    def clear(self) -> None:
        """Forgets all that isn't heard yet."""
        with self._lock:
            self._blocks.clear()
            self.waiting = 0
            self.cleared += 1
            self._flows = self._ended = False

    def take(self, n: int) -> Sound:
        """The session's next `n` samples."""
        with self._lock:
            if self._realtime:
                self._shorten()
            if not self._begins(n):
                ended, self._ended = self._ended and not self.waiting, self._ended and bool(self.waiting)
                return Sound(np.zeros(n, np.float32), 0, ended)
            taken = self._pop(n)
            ends = self._ended and not self.waiting
            if ends or len(taken) < n:
                self._flows, self._ended, self._passed = False, False, 0
            return Sound(np.pad(taken, (0, n - len(taken))), len(taken), ends)

    def _begins(self, n: int) -> bool:
        """Whether speech is heard in the next `n` samples."""
        if not self.waiting:
            self._flows, self._passed = False, 0
            return False
        enough = self._ended or self.waiting >= START_SAMPLES or self._passed >= START_SAMPLES
        self._flows = self._flows or enough
        self._passed += 0 if self._flows else n
        return self._flows

    def _shorten(self) -> None:
        while self.waiting > SPOKEN_LATE:
            head = self._blocks[0]
            if self.waiting <= TOO_LATE and np.abs(head).max() > QUIET:
                return
            self._blocks.popleft()
            self.waiting -= len(head)

    def _pop(self, n: int) -> np.ndarray:
        taken: list[np.ndarray] = [np.zeros(0, np.float32)]
        missing = n
        while missing and self._blocks:
            block = self._blocks.popleft()
            taken.append(block[:missing])
            if len(block) > missing:
                self._blocks.appendleft(block[missing:])
            missing -= len(taken[-1])
        self.waiting -= n - missing
        return np.concatenate(taken)


class SpeechSender:
    """One sender of samples: their rate, and what of them isn't whole yet, are his alone.

    Args:
        queue: takes his speech, as it takes that of others.
        rate: Hz.

    Raises:
        InputError: no sound has such a rate.
    """

    def __init__(self, queue: SpeechQueue, rate: int = SAMPLE_RATE) -> None:
        self._queue = queue
        self._odd = b""
        self._resampler: Any = None
        self._cleared = queue.cleared
        self.set_rate(rate)

    def set_rate(self, rate: int) -> None:
        """The rate (Hz) of what he pushes from now on.

        Raises:
            InputError: no sound has such a rate.
        """
        if not isinstance(rate, int) or not 1000 <= rate <= MAX_SAMPLE_RATE:
            raise InputError(f"rate is {rate!r} 采样率无效", f"send a rate from 1000 to {MAX_SAMPLE_RATE} Hz")
        self._finish_resampling()
        self._rate = rate

    def push_pcm(self, content: bytes) -> int:
        """Appends s16le bytes, cut anywhere; returns the samples at 16 kHz that came of them.

        Raises:
            BusyError: more waits than may.
        """
        self._forget_cleared()
        content = self._odd + content
        whole = len(content) // 2 * 2
        self._odd = content[whole:]
        return self._queue.push(self._at_16_khz(float_samples(np.frombuffer(content[:whole], "<i2"))))

    def end(self) -> int:
        """Says that his utterance is complete.

        Returns:
            Samples at 16 kHz that the resampler had kept back until now.
        """
        kept_back = self._finish_resampling()
        self._odd = b""
        self._queue.end()
        return kept_back

    def _at_16_khz(self, samples: np.ndarray) -> np.ndarray:
        if self._rate == SAMPLE_RATE:
            return samples
        import soxr

        if self._resampler is None:
            self._resampler = soxr.ResampleStream(self._rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        return self._resampler.resample_chunk(samples)  # type: ignore[no-any-return]

    def _finish_resampling(self) -> int:
        self._forget_cleared()
        if self._resampler is None:
            return 0
        rest = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        self._resampler = None
        return self._queue.push(rest)

    def _forget_cleared(self) -> None:
        """Drops what is kept of speech that an interrupt has dropped."""
        if self._cleared != self._queue.cleared:
            self._cleared, self._resampler, self._odd = self._queue.cleared, None, b""


class HeardSound:
    """What a session has heard and its viewers haven't: taken out as the frames beside it leave."""

    def __init__(self) -> None:
        self._blocks: deque[Sound] = deque()

    def append(self, block: Sound) -> None:
        """Appends what was heard last."""
        self._blocks.append(block)

    def take(self, n: int) -> Sound:
        """The next `n` samples, which were heard."""
        samples, spoken, ends = [np.zeros(0, np.float32)], 0, False
        while n:
            block = self._blocks.popleft()
            whole = len(block.samples) <= n
            head = block.samples[:n]
            samples.append(head)
            spoken += min(block.spoken, len(head))
            ends_here = block.ends and block.spoken <= len(head)  # silence may follow in the block
            ends |= ends_here
            if not whole:
                rest = Sound(block.samples[n:], max(0, block.spoken - n), block.ends and not ends_here)
                self._blocks.appendleft(rest)
            n -= len(head)
        return Sound(np.concatenate(samples), spoken, ends)
