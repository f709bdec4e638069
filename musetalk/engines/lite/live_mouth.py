"""Speech → rig parameters while it is spoken: a small causal network that learned the whole-file one's answers.

The mouth network for files hears a second of sound on either side of a moment, through Whisper. A live session
has `LOOK_AHEAD_STEPS` of it, and is to cost next to nothing. So a student of that network hears log-mel and
loudness alone and remembers what its convolutions need of the past: each step of sound is heard once, however
it comes. Everything is counted in steps of 20 ms from the session's first sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musetalk.engines.lite.parameters import HIGH, LOW
from musetalk.engines.lite.speech import (
    AUDIBLE,
    AUDIBLE_REACH,
    HIGHEST_LOUDNESS,
    LEVEL_MEMORY,
    LOWEST_LOUDNESS,
    QUIETEST_LEVEL,
    frame_values,
)
from musetalk.errors import WeightsError
from musetalk.whisper import HOP, N_FFT, STEP_SAMPLES, STEPS_PER_SECOND, frame_count, mel_filters

LIVE_FILE = "live_mouth.npz"
LOOK_AHEAD_STEPS = 7  # heard beyond the step that is answered
BEFORE = N_FFT - HOP  # samples before a step that its first spectrum hears
MEL_SCALE, MEL_LIMIT = 1.5, 3.0  # bel over the speaker's level that count as one, and how many at most
FORGETTING = 0.5 ** (1 / LEVEL_MEMORY)
N_FEATURES = 2 * 80 + 1  # two spectra and the loudness of a step
N_OUTPUTS = len(LOW) + 1  # rig parameters and activity
ACTIVITY_GAIN, ACTIVITY_LOSS = 1.25, 0.125  # a mouth at rest is exactly so


class Level(NamedTuple):
    """The speaker's level: mean of the steps' log powers by their amplitudes, older steps counting less.

    Attributes:
        bels: weighted sum of log10 powers.
        weight: sum of the weights.
    """

    bels: float = 0.0
    weight: float = 0.0


def step_features(samples: np.ndarray, level: Level) -> tuple[np.ndarray, float, Level]:
    """What the network hears of one step.

    Args:
        samples: (`BEFORE` + 320,) float64, the step behind what came before it.
        level: of the speech so far.

    Returns:
        (161,) float32 features, the step's mean power, and the level with this step.
    """
    spectra = np.fft.rfft(np.stack([samples[:N_FFT], samples[HOP:]]) * _window())
    mel = np.log10(np.maximum((spectra.real**2 + spectra.imag**2) @ mel_filters().T, 1e-10))
    step = samples[BEFORE:]
    power = float(step @ step) / STEP_SAMPLES
    bel, weight = np.log10(max(power, 1e-12)), np.sqrt(power)
    level = Level(FORGETTING * level.bels + weight * bel, FORGETTING * level.weight + weight)
    over = max(level.bels / max(level.weight, 1e-9), np.log10(QUIETEST_LEVEL))
    features = np.empty(N_FEATURES, np.float32)
    features[:-1] = np.clip((mel - over) / MEL_SCALE, -MEL_LIMIT, MEL_LIMIT).ravel()
    features[-1] = np.clip(bel - over, LOWEST_LOUDNESS, HIGHEST_LOUDNESS)
    return features, power, level


@lru_cache(maxsize=1)
def _window() -> np.ndarray:
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(N_FFT) / N_FFT)
    window.setflags(write=False)
    return window


Memory = tuple[np.ndarray, ...]
"""Per layer the inputs (k, channels) float32 that its next step needs, oldest first."""


class LiveNetwork:
    """The student: causal convolutions over steps, on numpy.

    Args:
        path: of `LIVE_FILE`.

    Raises:
        WeightsError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise WeightsError(f"{path} is missing", "restore models/lite from the repository")
        try:
            with np.load(path) as stored:
                arrays = {name: stored[name].astype(np.float32) for name in stored.files}
            self._dilations = [int(dilation) for dilation in arrays["dilations"]]
            self._first = arrays["first.weight"], arrays["first.bias"]
            self._blocks = [
                tuple(arrays[f"{i}.{part}"] for part in ("weight", "bias", "mix", "mix_bias"))
                for i in range(len(self._dilations))
            ]
            self._head = arrays["head.weight"], arrays["head.bias"]
        except (OSError, ValueError, KeyError) as e:
            raise WeightsError(f"{path} is damaged", "restore models/lite from the repository") from e

    def silence(self) -> Memory:
        """What is remembered before the first step."""
        channels = len(self._first[1])
        lengths = [2 * dilation for dilation in self._dilations]
        return (
            np.zeros((2, N_FEATURES), np.float32),
            *(np.zeros((length, channels), np.float32) for length in lengths),
        )

    def step(self, features: np.ndarray, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Rig parameters (10,) of the step `LOOK_AHEAD_STEPS` ago, and what is remembered next."""
        kept = []
        x, past = _heard(features, memory[0], 1)
        kept.append(past)
        weight, bias = self._first
        x = np.maximum(x @ weight + bias, 0)
        layers = zip(self._blocks, self._dilations, memory[1:], strict=True)
        for (weight, bias, mix, mix_bias), dilation, past in layers:
            taps, past = _heard(x, past, dilation)
            kept.append(past)
            x = x + np.maximum(taps @ weight + bias, 0) @ mix + mix_bias
        weight, bias = self._head
        out = x @ weight + bias
        activity = np.clip(ACTIVITY_GAIN / (1 + np.exp(-out[-1])) - ACTIVITY_LOSS, 0, 1)
        return np.clip(out[:-1] * activity, LOW, HIGH), tuple(kept)


def _heard(x: np.ndarray, past: np.ndarray, dilation: int) -> tuple[np.ndarray, np.ndarray]:
    """A kernel's three inputs side by side, and the past with `x` in it."""
    taps = np.concatenate([past[0], past[dilation], x])
    return taps, np.concatenate([past[1:], x[None]])


class LiveState(NamedTuple):
    """What a listener remembers between two pieces of speech.

    Attributes:
        heard: samples so far.
        samples: (n,) float32, the last of them: `BEFORE` and those of a step that isn't whole.
        level: of the speech.
        memory: of the network; None before the first step.
        quiet: steps since the last that could be heard.
        answered: steps whose mouth shape is known.
        curve: (k, 10) float32, the last known steps, up to `answered`.
        frames: frames whose mouth shape was given out.
    """

    heard: int = 0
    samples: np.ndarray = np.zeros(BEFORE, np.float32)
    level: Level = Level()
    memory: Memory | None = None
    quiet: int = STEPS_PER_SECOND
    answered: int = -LOOK_AHEAD_STEPS
    curve: np.ndarray = np.zeros((0, len(LOW)), np.float32)
    frames: int = 0


class LiveMouthListener:
    """Rig parameters of one live session's speech; an engine's `Listener`.

    A step is answered once `LOOK_AHEAD_STEPS` beyond it are heard, a frame once the steps on both sides of
    its middle are answered.

    Args:
        network: the student.
        fps: frames per second.
        state: of an earlier listener, to go on from.
    """

    def __init__(self, network: LiveNetwork, fps: Fraction, state: LiveState | None = None) -> None:
        self._network = network
        self._fps = fps
        self._state = state or LiveState(memory=network.silence())

    @property
    def state(self) -> LiveState:
        """What is remembered; later hearing makes a new one."""
        return self._state

    def hear(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Rig parameters (k, 10) float32 of the frames that `samples` (n,) float32 complete."""
        state = self._state
        samples = np.nan_to_num(samples.astype(np.float32, copy=False), posinf=0, neginf=0)
        held = np.concatenate([state.samples, samples])
        self._state = state._replace(samples=held, heard=state.heard + len(samples))
        while len(self._state.samples) >= BEFORE + STEP_SAMPLES:
            self._step()
            yield from self._frames(self._complete())

    def flush(self) -> Iterator[np.ndarray]:
        """Rig parameters of the frames that remain of what was heard, as if silence followed."""
        kept = self._state
        steps = LOOK_AHEAD_STEPS + 1
        self._state = kept._replace(samples=np.pad(kept.samples, (0, steps * STEP_SAMPLES)))
        for _ in range(steps):
            self._step()
        yield from self._frames(frame_count(kept.heard, self._fps))
        # what came of silence is answered again when more comes
        beyond = self._state.answered - kept.answered
        curve = self._state.curve[: max(0, len(self._state.curve) - beyond)]
        self._state = kept._replace(curve=curve, frames=self._state.frames)

    def _step(self) -> None:
        """Hears one step; answers one."""
        state = self._state
        assert state.memory is not None
        window = state.samples[: BEFORE + STEP_SAMPLES].astype(np.float64)
        features, power, level = step_features(window, state.level)
        values, memory = self._network.step(features, state.memory)
        quiet = 0 if power > AUDIBLE else state.quiet + 1
        if quiet > LOOK_AHEAD_STEPS + AUDIBLE_REACH:
            values = np.zeros_like(values)
        answered = state.answered + 1
        curve = np.concatenate([state.curve, values[None]]) if answered > 0 else state.curve
        self._state = state._replace(
            samples=state.samples[STEP_SAMPLES:],
            level=level,
            memory=memory,
            quiet=quiet,
            answered=answered,
            curve=curve,
        )

    def _complete(self) -> int:
        """Frames whose middles lie between answered steps, and that were heard whole."""
        state = self._state
        known = int((state.answered - 1) * self._fps / STEPS_PER_SECOND + Fraction(1, 2))
        return min(known if state.answered > 0 else 0, frame_count(state.heard, self._fps))

    def _frames(self, complete: int) -> Iterator[np.ndarray]:
        """The frames up to number `complete` that weren't given out; what no later one needs is dropped."""
        state = self._state
        if complete <= state.frames:
            return
        first = state.answered - len(state.curve)
        yield frame_values(state.curve, first, range(state.frames, complete), self._fps)
        passed = int((complete + Fraction(1, 2)) * STEPS_PER_SECOND / self._fps) - first
        unneeded = max(0, min(passed, len(state.curve) - 1))
        self._state = state._replace(frames=complete, curve=state.curve[unneeded:])
