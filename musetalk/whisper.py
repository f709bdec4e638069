"""Waveform → log-mel → encoder hidden states → audio prompts.

The encoder is whatever the caller passes: a function from a (80, 3000) spectrogram to the stacked
hidden states of Whisper's encoder. It always sees whole 30 s segments, the last one padded with
silence, because Whisper's states depend on where in the segment a sound lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from musetalk.media.audio import SAMPLE_RATE

SEGMENT_SECONDS = 30
SEGMENT_SAMPLES = SEGMENT_SECONDS * SAMPLE_RATE
N_FFT = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
N_MELS = 80
MEL_FRAMES = SEGMENT_SAMPLES // HOP
MEL_CHUNK = 300  # frames transformed at once, few enough to stay in the processor's cache
STEP_SAMPLES = 2 * HOP  # samples per encoder step: the encoder's second convolution has stride 2
STEPS_PER_SECOND = SAMPLE_RATE // STEP_SAMPLES
WINDOW_STEPS = 10  # steps of one audio prompt: 2 × (2 left + 2 right + 1)
PIECE_STEPS = 250  # whose prompts are made at once, so that a segment isn't copied whole
LIVE_STEPS = 2
LIVE_AHEAD = 2  # steps; the window of a frame reaches another six beyond it
BLOCK_FRAMES = 64  # frames of audio prompts that leave together

Encoder = Callable[[np.ndarray], np.ndarray]
"""(80, 3000) float32 log-mel → (layers + 1, 1500, width) float32 hidden states, embedding first."""


def frame_count(n_samples: int, fps: Fraction) -> int:
    """floor(duration × fps) video frames for `n_samples` at 16 kHz, in exact integer arithmetic."""
    return n_samples * fps.numerator // (SAMPLE_RATE * fps.denominator)


@lru_cache(maxsize=1)
def mel_filters() -> np.ndarray:
    """(80, 201) float64 triangular filters over 0–8 kHz on Slaney's mel scale, each of unit area.

    Slaney, "Auditory Toolbox" (1998): linear up to 1 kHz (200/3 Hz per mel), then logarithmic with
    27 steps to a factor of 6.4.
    """
    mels = np.linspace(0.0, 15.0 + 27.0 * np.log(8.0) / np.log(6.4), N_MELS + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp((mels - 15.0) * np.log(6.4) / 27.0))
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    triangles = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre))
    filters = np.maximum(triangles, 0.0) * 2.0 / (upper - lower)
    filters.setflags(write=False)
    return filters


@lru_cache(maxsize=1)
def _hann_window() -> np.ndarray:
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(N_FFT) / N_FFT)
    window.setflags(write=False)
    return window


def log_mel(segment: np.ndarray, n_frames: int = MEL_FRAMES, at_once: int = MEL_CHUNK) -> np.ndarray:
    """Whisper's input for one segment.

    Args:
        segment: (n,) float32 at 16 kHz, at most n_frames × 10 ms; silence is appended up to there.
        n_frames: 3000 for Whisper's 30 s; fewer for encoders that take shorter segments.
        at_once: frames that are transformed together.

    Returns:
        (80, n_frames) float32: log10 of the mel power, floored 8 below the segment's maximum, then
        (x + 4) / 4, as Radford et al. 2022 (openai/whisper, whisper/audio.py).
    """
    padded = np.zeros(n_frames * HOP, np.float64)
    padded[: len(segment)] = segment
    padded = np.pad(padded, N_FFT // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP][:n_frames]
    mel_power = np.empty((N_MELS, n_frames))
    for start in range(0, n_frames, at_once):
        spectrum = np.fft.rfft(windows[start : start + at_once] * _hann_window(), axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        mel_power[:, start : start + at_once] = mel_filters() @ power.T
    log_power = np.log10(np.maximum(mel_power, 1e-10))
    log_power = np.maximum(log_power, log_power.max() - 8.0)
    return ((log_power + 4.0) / 4.0).astype(np.float32)


class PromptState(NamedTuple):
    """What a listener remembers between two pieces of speech.

    Attributes:
        heard: samples so far.
        samples: (n,) float32, those of the segment of 30 s that isn't complete.
        known: steps whose encoder states were used, over the whole session.
        states: (layers + 1, k, width) states from step `first` on, up to `known`; None before the first.
        first: counted with the zeros in front.
        frames: frames whose prompts were given out.
    """

    heard: int = 0
    samples: np.ndarray = np.zeros(0, np.float32)
    known: int = 0
    states: np.ndarray | None = None
    first: int = 0
    frames: int = 0


class PromptListener:
    """Audio prompts of one session's speech: per video frame the ten encoder steps around it.

    Frame i takes the steps from floor(i × 50 / fps) of the states that have ceil(50 / fps) × 2 zero
    steps in front (MuseTalk, musetalk/utils/audio_processor.py); zeros stand for what lies beyond the
    end, so the last windows are as long as the others. A block of prompts is (k, 10 × (layers + 1),
    width), 1 ≤ k ≤ 64; memory holds one segment's sound and a few seconds' states.

    Args:
        encoder: from a segment's spectrogram to its hidden states.
        fps: frames per second.
        live: encodes a segment again at every `LIVE_STEPS`, from its beginning to `LIVE_AHEAD` steps
            beyond them, instead of once when it is complete.
        state: of an earlier listener, to go on from.
    """

    def __init__(
        self, encoder: Encoder, fps: Fraction, *, live: bool = False, state: PromptState | None = None
    ) -> None:
        self._encoder = encoder
        self._fps = fps
        self._live = live
        self._state = state or PromptState()

    @property
    def state(self) -> PromptState:
        """What is remembered; later hearing makes a new one."""
        return self._state

    def hear(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Prompts of the frames that `samples` (n,) float32 at 16 kHz complete."""
        while len(samples):
            state = self._state
            taken, samples = np.split(samples, [SEGMENT_SAMPLES - len(state.samples)])
            self._state = state._replace(
                samples=np.concatenate([state.samples, taken]), heard=state.heard + len(taken)
            )
            if self._live:
                yield from self._answer_live()
            if len(self._state.samples) == SEGMENT_SAMPLES:
                yield from self._answer(SEGMENT_SAMPLES, SEGMENT_SAMPLES // STEP_SAMPLES)
                self._state = self._state._replace(samples=np.zeros(0, np.float32))

    def flush(self) -> Iterator[np.ndarray]:
        """Prompts of the frames that remain of what was heard, zeros standing for what comes next."""
        if not self._state.heard:
            return
        held = len(self._state.samples)
        yield from self._answer(held, held // STEP_SAMPLES)
        state = self._state
        total = frame_count(state.heard, self._fps)
        if state.frames >= total:
            return
        assert state.states is not None
        missing = _window_start(total - 1, self._fps) + WINDOW_STEPS - state.first - state.states.shape[1]
        padded = np.pad(state.states, ((0, 0), (0, max(0, missing)), (0, 0)))
        yield from _windows(padded, state.first, range(state.frames, total), self._fps)
        self._state = state._replace(frames=total)

    def _answer_live(self) -> Iterator[np.ndarray]:
        """What is due on the fixed grid of `LIVE_STEPS`."""
        while True:
            due = self._known_in_segment() + LIVE_STEPS
            end = (due + LIVE_AHEAD) * STEP_SAMPLES
            if len(self._state.samples) < end:
                return
            yield from self._answer(end, due)

    def _known_in_segment(self) -> int:
        state = self._state
        return state.known - (state.heard - len(state.samples)) // STEP_SAMPLES

    def _answer(self, n_samples: int, steps: int) -> Iterator[np.ndarray]:
        """Encodes the segment's first `n_samples`; takes the states up to its step `steps`."""
        known = self._known_in_segment()
        if steps <= known and self._state.states is not None:
            return
        states = self._encoder(log_mel(self._state.samples[:n_samples]))
        for start in range(known, max(steps, known + 1), PIECE_STEPS):
            yield from self._add(states[:, start : min(start + PIECE_STEPS, steps)])

    def _add(self, states: np.ndarray) -> Iterator[np.ndarray]:
        """Prompts that are complete with these further states."""
        kept = self._state
        if kept.states is None:
            lead = -(-STEPS_PER_SECOND * self._fps.denominator // self._fps.numerator) * 2
            kept = kept._replace(states=np.zeros((states.shape[0], lead, states.shape[2]), states.dtype))
        assert kept.states is not None
        held = np.concatenate([kept.states, states], axis=1)
        known = kept.known + states.shape[1]
        last_start = kept.first + held.shape[1] - WINDOW_STEPS
        heard = min(kept.heard, known * STEP_SAMPLES)
        complete = min(frame_count(heard, self._fps), _frames_starting_by(last_start, self._fps))
        yield from _windows(held, kept.first, range(kept.frames, complete), self._fps)
        frames = max(kept.frames, complete)
        passed = min(_window_start(frames, self._fps) - kept.first, held.shape[1])
        self._state = kept._replace(
            known=known, states=held[:, passed:], first=kept.first + passed, frames=frames
        )


def _window_start(frame: int, fps: Fraction) -> int:
    """floor(frame × 50 / fps): where the frame's window begins, counted with the zeros in front."""
    return frame * STEPS_PER_SECOND * fps.denominator // fps.numerator


def _frames_starting_by(step: int, fps: Fraction) -> int:
    """How many frames' windows begin at `step` or before."""
    return max(0, -(-(step + 1) * fps.numerator // (STEPS_PER_SECOND * fps.denominator)))


def _windows(held: np.ndarray, first: int, frames: range, fps: Fraction) -> Iterator[np.ndarray]:
    """The windows of `frames` in `held`, whose first column is step `first`."""
    layers, _, width = held.shape
    offsets = np.arange(WINDOW_STEPS)
    for begin in range(frames.start, frames.stop, BLOCK_FRAMES):
        numbers = range(begin, min(begin + BLOCK_FRAMES, frames.stop))
        starts = np.array([_window_start(frame, fps) - first for frame in numbers])
        windows = held[:, starts[:, None] + offsets].transpose(1, 2, 0, 3)
        yield np.ascontiguousarray(windows).reshape(len(numbers), WINDOW_STEPS * layers, width)
