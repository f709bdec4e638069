"""Waveform → log-mel → encoder hidden states → audio prompts, each a generator over the one before.

The encoder is whatever the caller passes: a function from a (80, 3000) spectrogram to the stacked
hidden states of Whisper's encoder. It always sees whole 30 s segments, the last one padded with
silence, because Whisper's states depend on where in the segment a sound lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
PIECE_STEPS = 250
BLOCK_FRAMES = 64  # frames of audio prompts that leave together

Encoder = Callable[[np.ndarray], np.ndarray]
"""(80, 3000) float32 log-mel → (layers + 1, 1500, width) float32 hidden states, embedding first."""


class HiddenStates(NamedTuple):
    """Encoder states of one stretch of the waveform.

    Attributes:
        states: (layers + 1, steps, width), 50 steps per second.
        n_samples: length of the stretch at 16 kHz; steps = floor(n_samples / 320).
    """

    states: np.ndarray
    n_samples: int


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


def log_mel(segment: np.ndarray, n_frames: int = MEL_FRAMES) -> np.ndarray:
    """Whisper's input for one segment.

    Args:
        segment: (n,) float32 at 16 kHz, at most n_frames × 10 ms; silence is appended up to there.
        n_frames: 3000 for Whisper's 30 s; fewer for encoders that take shorter segments.

    Returns:
        (80, n_frames) float32: log10 of the mel power, floored 8 below the segment's maximum, then
        (x + 4) / 4, as Radford et al. 2022 (openai/whisper, whisper/audio.py).
    """
    padded = np.zeros(n_frames * HOP, np.float64)
    padded[: len(segment)] = segment
    padded = np.pad(padded, N_FFT // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP][:n_frames]
    mel_power = np.empty((N_MELS, n_frames))
    for start in range(0, n_frames, MEL_CHUNK):
        spectrum = np.fft.rfft(windows[start : start + MEL_CHUNK] * _hann_window(), axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        mel_power[:, start : start + MEL_CHUNK] = mel_filters() @ power.T
    log_power = np.log10(np.maximum(mel_power, 1e-10))
    log_power = np.maximum(log_power, log_power.max() - 8.0)
    return ((log_power + 4.0) / 4.0).astype(np.float32)


def segments(waveform: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cut blocks of any length into (480000,) segments; the last one keeps its own length."""
    pending: list[np.ndarray] = []
    held = 0
    for block in waveform:
        while held + len(block) >= SEGMENT_SAMPLES:
            head, block = np.split(block, [SEGMENT_SAMPLES - held])
            yield np.concatenate([*pending, head])
            pending, held = [], 0
        if len(block):
            pending.append(block)
            held += len(block)
    if held:
        yield np.concatenate(pending)


def hidden_states(waveform: Iterable[np.ndarray], encoder: Encoder) -> Iterator[HiddenStates]:
    """Encoder states of a 16 kHz waveform that arrives in float32 (n,) blocks, a segment at a time."""
    for segment in segments(waveform):
        steps = len(segment) // STEP_SAMPLES
        yield HiddenStates(encoder(log_mel(segment))[:, :steps], len(segment))


def audio_prompts(blocks: Iterable[HiddenStates], fps: Fraction) -> Iterator[np.ndarray]:
    """Per video frame the ten encoder steps around it: (k, 10 × (layers + 1), width) blocks, 1 ≤ k ≤ 64.

    Frame i takes the steps from floor(i × 50 / fps) of the states that have ceil(50 / fps) × 2 zero
    steps in front (MuseTalk, musetalk/utils/audio_processor.py); zeros stand for what lies beyond the
    end, so the last windows are as long as the others. All blocks together are
    `frame_count(n_samples, fps)` frames. A frame leaves as soon as its window and its own duration
    are complete; memory holds one block of states and a few seconds' copy.
    """
    lead = -(-STEPS_PER_SECOND * fps.denominator // fps.numerator) * 2
    held: np.ndarray | None = None  # states from step `first` on, counted with the zeros in front
    first = n_samples = done = 0
    for piece in _pieces(blocks):
        if held is None:
            held = np.zeros((piece.states.shape[0], lead, piece.states.shape[2]), piece.states.dtype)
        held = np.concatenate([held, piece.states], axis=1)
        n_samples += piece.n_samples
        del piece  # a view that would keep its whole segment
        last_start = first + held.shape[1] - WINDOW_STEPS
        complete = min(frame_count(n_samples, fps), _frames_starting_by(last_start, fps))
        yield from _windows(held, first, range(done, complete), fps)
        done = max(done, complete)
        passed = min(_window_start(done, fps) - first, held.shape[1])
        held, first = held[:, passed:], first + passed
    total = frame_count(n_samples, fps)
    if held is not None and done < total:
        missing = max(0, _window_start(total - 1, fps) + WINDOW_STEPS - first - held.shape[1])
        held = np.pad(held, ((0, 0), (0, missing), (0, 0)))
        yield from _windows(held, first, range(done, total), fps)


def _pieces(blocks: Iterable[HiddenStates]) -> Iterator[HiddenStates]:
    """The same states a few seconds at a time, so that a segment isn't copied whole."""
    for states, n_samples in blocks:
        whole = states.shape[1] // PIECE_STEPS * PIECE_STEPS
        for start in range(0, whole, PIECE_STEPS):
            yield HiddenStates(states[:, start : start + PIECE_STEPS], PIECE_STEPS * STEP_SAMPLES)
        yield HiddenStates(states[:, whole:], n_samples - whole * STEP_SAMPLES)
        del states  # before the next segment is encoded


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
