"""Speech → rig parameters at any frame rate: level, Whisper encoder, mouth network, frame times.

Speech runs through the encoder in windows of at most 10 s that overlap by 2 s, instead of Whisper's padded
30 s: a short clip costs what it is long, the first frames leave after 9 s of input, and no sound is encoded
without its neighbours. The network gives a curve at the encoder's 50 steps per second; frame i takes its
value at the middle of its time on screen, (i + 0.5) / fps, so that no frame rate is special. The mouth
network itself looks ahead `LOOK_AHEAD`, whatever the window. A live session can't wait for such windows: it
answers 40 ms at a time with 200 ms of sound beyond them, and what its windows share is encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musetalk.device import usable_cores
from musetalk.engines.lite.parameters import HIGH, LOW
from musetalk.errors import WeightsError
from musetalk.whisper import MEL_CHUNK, STEP_SAMPLES, STEPS_PER_SECOND, frame_count, log_mel

ENCODER_FILE = "whisper_tiny_en_encoder.onnx"
NETWORK_FILE = "mouth_network.onnx"
LOOK_AHEAD = 0.14  # s of states that the mouth network hears beyond a step, its early coming included

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

    def __init__(self, power: float = 0.0, steps: float = 0.0) -> None:
        self.power = power
        self.steps = steps

    def update(self, powers: np.ndarray, new: int | None = None) -> float:
        """Takes in a window's step powers (T,); returns the level as a power, not below `QUIETEST_LEVEL`.

        Where windows overlap, the last `new` steps are those that weren't heard before.
        """
        heard = powers if new is None else powers[max(0, len(powers) - new) :]
        active = heard[heard > ACTIVE_SHARE * powers.mean()]
        kept = 0.5 ** (len(heard) / LEVEL_MEMORY)
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


def network_input(
    window: np.ndarray, level: SpeechLevel, n_steps: int | None = None, new: int | None = None
) -> NetworkInput:
    """Prepare (n,) float32 samples at 16 kHz; training prepares its windows by the same function.

    Args:
        n_steps: steps that are given, by default at least `SHORTEST_STEPS`.
        new: of them, from the last, that the level hasn't heard; None for all.
    """
    n_steps = n_steps or _window_steps(window)
    window = np.nan_to_num(window, posinf=0, neginf=0)
    powers = step_powers(window, n_steps)
    speech_power = level.update(powers[: max(1, len(window) // STEP_SAMPLES)], new)
    gain = np.float32(np.sqrt(SPEECH_LEVEL / speech_power))
    mel = log_mel(window * gain, 2 * n_steps, MEL_CHUNK if new is None else LIVE_MEL_FRAMES)
    return NetworkInput(mel[None], loudness(powers, speech_power))


def _window_steps(window: np.ndarray) -> int:
    """Steps that the networks are given for a window, silence behind a short one included."""
    return max(-(-len(window) // STEP_SAMPLES), SHORTEST_STEPS)


class Grid(NamedTuple):
    """How speech is cut into windows, in steps of 20 ms from the session's first sample.

    Attributes:
        core: a window answers for so many steps.
        before, after: steps that it also hears on either side.
    """

    core: int
    before: int
    after: int


WHOLE_GRID = Grid(8 * STEPS_PER_SECOND, STEPS_PER_SECOND, STEPS_PER_SECOND)
LIVE_CORE, LIVE_BEFORE = 2, WHOLE_GRID.before
LIVE_DELAY = STEPS_PER_SECOND // 5  # steps after its end by which a frame has left
LEAST_AHEAD = 4  # steps beyond a core that a live session hears


def live_grid(fps: Fraction) -> Grid:
    """The grid that hears as far ahead as `LIVE_DELAY` lets every frame leave in time.

    At 25 frames/s each core is a frame, and all of the delay is left for what follows it; at rates whose
    frames end anywhere in a core, less.
    """
    rate = STEPS_PER_SECOND / fps
    needed = [-(-(2 * i + 1) * rate // 2) for i in range(2 * int(fps) + 2)]  # the step at or behind a middle
    answered = [step // LIVE_CORE * LIVE_CORE + LIVE_CORE for step in needed]
    longest = max(step - (i + 1) * rate for i, step in enumerate(answered))
    return Grid(LIVE_CORE, LIVE_BEFORE, min(max(int(LIVE_DELAY - longest), LEAST_AHEAD), LIVE_DELAY))


class Memory(NamedTuple):
    """What a live session's networks remember of the steps that are answered.

    Attributes:
        past: (8, P, 384) float32 the encoder's keys and values, of 9 s at most.
        states: (5, k, 384) float32 its last states, k ≤ `REMEMBERED_STATES`.
    """

    past: np.ndarray
    states: np.ndarray


REMEMBERED_STATES = 16  # steps that the mouth network hears before the first one that it answers
LIVE_MEL_FRAMES = 12  # at once: for so few BLAS wakes no second thread, which would cost more than it saves
CONVOLVED = 2  # steps before the first new one that the encoder's convolutions hear


class SpeechState(NamedTuple):
    """What a listener remembers between two pieces of speech.

    Attributes:
        heard: samples so far.
        samples: (n,) float32, the last of them, from step `first` on.
        answered: steps whose mouth shape is known.
        curve: (k, 10) float32, the last known steps, up to `answered`.
        frames: frames whose mouth shape was given out.
        level: power and weight of `SpeechLevel`.
        memory: of the networks, in a live session that speaks.
    """

    heard: int = 0
    samples: np.ndarray = np.zeros(0, np.float32)
    first: int = 0
    answered: int = 0
    curve: np.ndarray = np.zeros((0, len(LOW)), np.float32)
    frames: int = 0
    level: tuple[float, float] = (0.0, 0.0)
    memory: Memory | None = None


class MouthListener:
    """Rig parameters of one session's speech; an engine's `Listener`.

    Args:
        network: answers a window at a time.
        fps: frames per second.
        grid: how speech is cut into windows; what was heard in which pieces plays no part.
        state: of an earlier listener, to go on from.
    """

    def __init__(
        self, network: MouthNetwork, fps: Fraction, grid: Grid, state: SpeechState | None = None
    ) -> None:
        self._network = network
        self._fps = fps
        self._grid = grid
        self._state = state or SpeechState()

    @property
    def state(self) -> SpeechState:
        """What is remembered; later hearing makes a new one."""
        return self._state

    def hear(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Rig parameters (k, 10) float32 of the frames that `samples` (n,) float32 complete."""
        state = self._state
        held = np.concatenate([state.samples, samples.astype(np.float32, copy=False)])
        self._state = state._replace(samples=held, heard=state.heard + len(samples))
        while len(self._state.samples) >= self._window_end():
            self._answer(self._grid.core, self._state.samples[: self._window_end()])
            yield from self._complete_frames()

    def flush(self) -> Iterator[np.ndarray]:
        """Rig parameters of the frames that remain of what was heard, as if silence followed."""
        kept = self._state
        missing = -(-kept.heard // STEP_SAMPLES) - kept.answered
        if missing > 0:
            self._answer(missing, kept.samples)
        self._state = state = self._state._replace(memory=None)
        total = frame_count(state.heard, self._fps)
        if total > state.frames:
            first = state.answered - len(state.curve)
            yield frame_values(state.curve, first, range(state.frames, total), self._fps)
        # a last step that was heard in part is answered again when the rest of it comes
        whole = max(kept.answered, state.heard // STEP_SAMPLES)
        self._state = state._replace(
            answered=whole, curve=state.curve[: len(state.curve) - (state.answered - whole)], frames=total
        )
        self._forget()

    def _window_end(self) -> int:
        """Samples that are held, at least, when the next window can be answered."""
        state, grid = self._state, self._grid
        return (state.answered + grid.core + grid.after - state.first) * STEP_SAMPLES

    def _answer(self, steps: int, window: np.ndarray) -> None:
        """Adds `steps` steps to the curve, which begin within `window` where it is known to."""
        state = self._state
        level = SpeechLevel(*state.level)
        begin = state.answered - state.first
        values, memory = self._shapes(window, level, begin, steps)
        self._state = state._replace(
            curve=np.concatenate([state.curve, values]),
            answered=state.answered + steps,
            level=(level.power, level.steps),
            memory=memory,
        )
        if steps == self._grid.core:
            self._forget()

    def _shapes(
        self, window: np.ndarray, level: SpeechLevel, begin: int, steps: int
    ) -> tuple[np.ndarray, Memory | None]:
        """Rig parameters of `steps` steps from `begin` of the window on, and what is remembered of them."""
        return self._network.shapes(window, level)[begin : begin + steps], None

    def _forget(self) -> None:
        """Drops samples that no later window hears, and steps that no later frame lies at."""
        state = self._state
        first = max(state.first, state.answered - self._grid.before)
        passed = int((state.frames + Fraction(1, 2)) * STEPS_PER_SECOND / self._fps)
        unneeded = max(0, min(passed - (state.answered - len(state.curve)), len(state.curve) - 1))
        self._state = state._replace(
            samples=state.samples[(first - state.first) * STEP_SAMPLES :].copy(),
            first=first,
            curve=state.curve[unneeded:],
        )

    def _complete_frames(self) -> Iterator[np.ndarray]:
        state, rate = self._state, STEPS_PER_SECOND / self._fps  # steps per frame
        complete = int(
            max(state.answered - 1, 0) / rate + Fraction(1, 2)
        )  # middles at or before the last step
        complete = min(complete, frame_count(state.heard, self._fps))
        if complete > state.frames:
            first = state.answered - len(state.curve)
            yield frame_values(state.curve, first, range(state.frames, complete), self._fps)
            self._state = state._replace(frames=complete)


class LiveListener(MouthListener):
    """A listener that answers a fixed time behind the sound.

    What its windows have in common is encoded once: of each step the encoder's keys and values are kept as
    they were when the steps that are heard ahead were known. Where a window of a whole file begins, the
    encoder begins anew from the same step on: its states depend on their positions.
    """

    def _shapes(
        self, window: np.ndarray, level: SpeechLevel, begin: int, steps: int
    ) -> tuple[np.ndarray, Memory | None]:
        if len(window) < self._window_end():  # at the end silence follows, and nothing is to be remembered
            return super()._shapes(window, level, begin, steps)
        anew = self._state.answered % WHOLE_GRID.core == 0
        memory = None if anew else self._state.memory
        return self._network.next_shapes(window, level, begin, steps, memory)


def frame_values(curve: np.ndarray, first_step: int, frames: range, fps: Fraction) -> np.ndarray:
    """A 50 Hz curve (T, d) that begins at step `first_step`, at the middles of `frames`: (k, d) float32.

    Linearly between steps; what lies beyond the last step repeats it.
    """
    steps = (np.arange(frames.start, frames.stop) + 0.5) * float(STEPS_PER_SECOND / fps) - first_step
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
        self._models_dir = models_dir
        self._live: tuple[Any, Any] | None = None
        self.encoder = open_session(models_dir / ENCODER_FILE)
        self.network = open_session(models_dir / NETWORK_FILE)

    def open_live(self) -> None:
        """Opens the networks again for a few steps at a time, before a session's first word needs them.

        One thread runs them: to share so little work costs more than it saves.
        """
        if self._live is None:
            names = (ENCODER_FILE, NETWORK_FILE)
            encoder, network = (open_session(self._models_dir / name, threads=1) for name in names)
            self._live = encoder, network

    def listen(self, fps: Fraction, *, live: bool = False, state: SpeechState | None = None) -> MouthListener:
        """A listener that gives mouth shapes in the order and ranges of `RIG_PARAMETERS`."""
        if live:
            self.open_live()
            return LiveListener(self, fps, live_grid(fps), state)
        return MouthListener(self, fps, WHOLE_GRID, state)

    def shapes(self, window: np.ndarray, level: SpeechLevel) -> np.ndarray:
        """Rig parameters (T, 10) at 50 steps per second of (n,) float32 samples, T ≥ n / 320.

        Step j stands for the time j × 20 ms of the window; `level` takes the window in. Where nothing can be
        heard the mouth rests without the networks: a session is silent most of the time.
        """
        powers = step_powers(window, _window_steps(window))
        heard = audible(powers)
        if not heard.any():
            level.update(powers[: max(1, len(window) // STEP_SAMPLES)])
            return np.zeros((len(powers), len(LOW)), np.float32)
        given = network_input(window, level)
        (states,) = self.encoder.run(["hidden_states"], {"mel": given.mel})
        (values,) = self.network.run(None, {"hidden_states": states, "loudness": given.loudness})
        return np.clip(values, LOW, HIGH) * heard[:, None]

    def next_shapes(
        self, window: np.ndarray, level: SpeechLevel, begin: int, steps: int, memory: Memory | None
    ) -> tuple[np.ndarray, Memory | None]:
        """Rig parameters (steps, 10) of the steps from `begin` of a live window on, and what is remembered.

        Args:
            window: (n,) float32 samples, what is answered with the steps on both sides that are heard.
            level: takes in what the windows before didn't hold.
            memory: of the steps before `begin`; None for what is heard now to be all that counts.
        """
        n_steps = len(window) // STEP_SAMPLES
        powers = step_powers(window, n_steps)
        heard = audible(powers)[begin : begin + steps]
        new = steps if begin else n_steps
        if not audible(powers).any():
            level.update(powers, new)
            return np.zeros((steps, len(LOW)), np.float32), None
        given = network_input(window, level, n_steps, new)
        assert self._live is not None
        encoder, network = self._live
        ahead = n_steps - begin - steps
        if memory is None:
            states, present = encoder.run(None, {"mel": given.mel})
        else:
            first = max(0, begin - CONVOLVED)
            further = {
                "mel": given.mel[:, :, 2 * first :],
                "skipped": np.array([begin - first]),
                "position": np.array([memory.past.shape[1]]),
                "past": memory.past,
            }
            states, present = encoder.run(None, further)
            states = np.concatenate([memory.states, states], 1)
        count = states.shape[1]
        told = {"hidden_states": states, "loudness": given.loudness[n_steps - count :]}
        (values,) = network.run(None, told)
        values = np.clip(values[count - ahead - steps : count - ahead], LOW, HIGH) * heard[:, None]
        known = states[:, : count - ahead]
        kept = known[:, max(0, known.shape[1] - REMEMBERED_STATES) :]
        return values, Memory(present[:, : present.shape[1] - ahead], kept)


def open_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the cores that are really there; its threads sleep between runs."""
    import onnxruntime

    if not path.is_file():
        raise WeightsError(f"{path} is missing", "restore models/lite from the repository")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # a plan of memory per window length would be kept: 30 MB, no faster
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    refusals = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (refusals.Fail, refusals.InvalidProtobuf, refusals.InvalidArgument, refusals.InvalidGraph) as e:
        raise WeightsError(f"{path} is damaged", "restore models/lite from the repository") from e
