"""Speech → rig parameters at any frame rate: level, Whisper encoder, mouth network, frame times.

Speech runs through the encoder in windows of at most 10 s that overlap by 2 s, instead of Whisper's padded
30 s: a short clip costs what it is long, the first frames leave after 9 s of input, and no sound is encoded
without its neighbours. The network gives a curve at the encoder's 50 steps per second; frame i takes its
value at the middle of its time on screen, (i + 0.5) / fps, so that no frame rate is special. The mouth
network itself looks ahead 120 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musetalk.device import usable_cores
from musetalk.engines.lite.parameters import HIGH, LOW
from musetalk.errors import WeightsError
from musetalk.whisper import STEP_SAMPLES, STEPS_PER_SECOND, frame_count, log_mel

ENCODER_FILE = "whisper_tiny_en_encoder.onnx"
NETWORK_FILE = "mouth_network.onnx"

CORE_STEPS = 8 * STEPS_PER_SECOND  # steps a window answers for
CONTEXT_STEPS = STEPS_PER_SECOND  # steps before and after them that it also hears
SHORTEST_STEPS = 2 * STEPS_PER_SECOND  # shorter windows are padded with silence

SPEECH_LEVEL = 10 ** (-24 / 10)  # mean power of active speech that the encoder is given, -24 dBFS
QUIETEST_LEVEL = 10 ** (-54 / 10)  # what is quieter isn't raised further: noise must not become speech
ACTIVE_SHARE = 0.25  # of the mean power: what is louder counts as speech
AUDIBLE = 10 ** (-66 / 10)  # mean power; where nothing within 200 ms is louder the mouth rests
AUDIBLE_REACH = STEPS_PER_SECOND // 5  # steps
LEVEL_MEMORY = 30 * STEPS_PER_SECOND  # steps after which the level has forgotten half
LOWEST_LOUDNESS, HIGHEST_LOUDNESS = -4.0, 1.5  # bel over the speaker's level


def step_powers(waveform: np.ndarray, n_steps: int) -> np.ndarray:
    """(n_steps,) mean square of the 40 ms round each step of 20 ms."""
    padded = np.zeros((n_steps + 2) * STEP_SAMPLES, np.float32)
    heard = waveform[: n_steps * STEP_SAMPLES]
    padded[STEP_SAMPLES : STEP_SAMPLES + len(heard)] = heard
    halves = (padded * padded).reshape(-1, STEP_SAMPLES).mean(1)
    return (halves[:n_steps] + halves[1 : n_steps + 1]) / 2


def audible(powers: np.ndarray) -> np.ndarray:
    """(T,) bool: whether anything within `AUDIBLE_REACH` of a step is louder than `AUDIBLE`."""
    kernel = np.ones(2 * AUDIBLE_REACH + 1)
    return np.convolve(powers > AUDIBLE, kernel)[AUDIBLE_REACH : AUDIBLE_REACH + len(powers)] > 0.5


class SpeechLevel:
    """Running estimate of the speaker's level: mean power of active speech, older speech counting less."""

    def __init__(self) -> None:
        self.power = 0.0
        self.steps = 0.0

    def update(self, powers: np.ndarray) -> float:
        """Take in a window's step powers; returns the level as a power, not below `QUIETEST_LEVEL`."""
        active = powers[powers > ACTIVE_SHARE * powers.mean()]
        kept = 0.5 ** (len(powers) / LEVEL_MEMORY)
        self.power = kept * self.power + float(active.sum())
        self.steps = kept * self.steps + len(active)
        return max(self.power / max(self.steps, 1.0), QUIETEST_LEVEL)


def loudness(powers: np.ndarray, level: float) -> np.ndarray:
    """(T,) float32 loudness over the speaker's level in bel, limited to what the network was trained on."""
    bel = np.log10(np.maximum(powers, 1e-12) / level)
    return np.clip(bel, LOWEST_LOUDNESS, HIGHEST_LOUDNESS).astype(np.float32)


class NetworkInput(NamedTuple):
    """What the two networks are given for a window of T steps.

    Attributes:
        mel: (1, 80, 2 T) float32, Whisper's log-mel of the window brought to `SPEECH_LEVEL`.
        loudness: (T,) float32 bel over the speaker's level.
    """

    mel: np.ndarray
    loudness: np.ndarray


def network_input(window: np.ndarray, level: SpeechLevel) -> NetworkInput:
    """Prepare (n,) float32 samples at 16 kHz; training prepares its windows by the same function."""
    n_steps = max(-(-len(window) // STEP_SAMPLES), SHORTEST_STEPS)
    window = np.nan_to_num(window, posinf=0, neginf=0)
    powers = step_powers(window, n_steps)
    speech_power = level.update(powers[: max(1, len(window) // STEP_SAMPLES)])
    gain = np.float32(np.sqrt(SPEECH_LEVEL / speech_power))
    mel = log_mel(window * gain, 2 * n_steps)
    return NetworkInput(mel[None], loudness(powers, speech_power))


class _Window(NamedTuple):
    samples: np.ndarray
    first: int  # step of the window that it answers for first
    steps: int  # how many


def windows(waveform: Iterable[np.ndarray]) -> Iterator[_Window]:
    """Cut blocks of any length into overlapping windows; their answered steps follow without gap."""
    core, context = CORE_STEPS * STEP_SAMPLES, CONTEXT_STEPS * STEP_SAMPLES
    held = np.zeros(0, np.float32)
    first = 0
    for block in waveform:
        held = np.concatenate([held, block.astype(np.float32, copy=False)])
        while len(held) >= first * STEP_SAMPLES + core + context:
            yield _Window(held[: first * STEP_SAMPLES + core + context], first, CORE_STEPS)
            held = held[first * STEP_SAMPLES + core - context :]
            first = CONTEXT_STEPS
    steps = -(-len(held) // STEP_SAMPLES) - first
    if steps > 0:
        yield _Window(held, first, steps)


def frame_values(curves: Iterable[np.ndarray], n_samples: list[int], fps: Fraction) -> Iterator[np.ndarray]:
    """Sample consecutive blocks (T, 10) of a 50 Hz curve at the frames' middles, linearly between steps.

    `n_samples` holds the one number of samples read so far: the input ends while the curve is drawn, and the
    frames are `frame_count` of all samples. Values beyond the last step repeat it.
    """
    rate = STEPS_PER_SECOND / fps  # steps per frame
    held, first_held, done = None, 0, 0
    for block in curves:
        held = block if held is None else np.concatenate([held, block])
        last = first_held + len(held) - 1
        complete = int((last - 1) / rate - Fraction(1, 2)) + 1 if last > rate / 2 else 0
        complete = max(done, min(complete, frame_count(n_samples[0], fps)))
        if complete > done:
            yield _interpolated(held, first_held, range(done, complete), rate)
            done = complete
            passed = max(0, min(int((done + Fraction(1, 2)) * rate) - first_held, len(held) - 1))
            held, first_held = held[passed:], first_held + passed
    total = frame_count(n_samples[0], fps)
    if held is not None and total > done:
        yield _interpolated(held, first_held, range(done, total), rate)


def _interpolated(curve: np.ndarray, first_step: int, frames: range, rate: Fraction) -> np.ndarray:
    steps = (np.arange(frames.start, frames.stop) + 0.5) * float(rate) - first_step
    before = np.clip(np.floor(steps).astype(int), 0, len(curve) - 1)
    after = np.minimum(before + 1, len(curve) - 1)
    share = np.clip(steps - before, 0, 1)[:, None].astype(np.float32)
    return curve[before] * (1 - share) + curve[after] * share


class MouthNetwork:
    """Whisper tiny.en's encoder and the mouth network, on the CPU.

    Args:
        models_dir: folder of `ENCODER_FILE` and `NETWORK_FILE`.

    Raises:
        WeightsError: one of them is missing or damaged.
    """

    def __init__(self, models_dir: Path) -> None:
        self.encoder = open_session(models_dir / ENCODER_FILE)
        self.network = open_session(models_dir / NETWORK_FILE)

    def rig_parameters(self, waveform: Iterable[np.ndarray], fps: Fraction) -> Iterator[np.ndarray]:
        """Mouth shapes of floor(samples × fps / 16000) frames, in blocks.

        Args:
            waveform: float32 (n,) blocks at 16 kHz, of any length; memory holds one window of them.
            fps: frames per second.

        Returns:
            Blocks (k, 10) float32, k ≥ 1, in the order and ranges of `RIG_PARAMETERS`.
        """
        n_samples = [0]

        def counted() -> Iterator[np.ndarray]:
            for block in waveform:
                n_samples[0] += len(block)
                yield block

        return frame_values(self.curves(counted()), n_samples, fps)

    def curves(self, waveform: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The rig parameters at 50 steps per second, (T, 10) blocks; step j stands for the time j × 20 ms."""
        level = SpeechLevel()
        for window in windows(waveform):
            given = network_input(window.samples, level)
            (states,) = self.encoder.run(None, {"mel": given.mel})
            (values,) = self.network.run(None, {"hidden_states": states, "loudness": given.loudness})
            values = np.clip(values, LOW, HIGH) * audible(step_powers(window.samples, len(values)))[:, None]
            yield values[window.first : window.first + window.steps]


def open_session(path: Path) -> Any:
    """An onnxruntime session on the cores that are really there; its threads sleep between runs."""
    import onnxruntime

    if not path.is_file():
        raise WeightsError(f"{path} is missing", "restore models/lite from the repository")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # a plan of memory per window length would be kept: 30 MB, no faster
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    refusals = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (refusals.Fail, refusals.InvalidProtobuf, refusals.InvalidArgument, refusals.InvalidGraph) as e:
        raise WeightsError(f"{path} is damaged", "restore models/lite from the repository") from e
