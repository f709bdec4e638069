"""Prompts against the reference's own numbers, through an encoder written here a second time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from musetalk.config import parse_fps
from musetalk.engines.base import hear_all
from musetalk.media.audio import read_waveform
from musetalk.whisper import Encoder, PromptListener, frame_count, log_mel, mel_filters

DATA = Path(__file__).parent / "data" / "audio"
GOLDEN_CASES = [("a3", 1, 25), ("a3_30", 1, 30), ("a1p37", 2, 25), ("a31", 3, 25), ("a31_24", 3, 24)]
HEADS = 4


def _norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", np.float32(0))


def _gelu(x: np.ndarray) -> np.ndarray:
    """x·Φ(x), the error function by Abramowitz and Stegun 7.1.26 (1.5e-7)."""
    z = np.abs(x) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return x * 0.5 * (1 + np.sign(x) * (1 - poly * np.exp(-z * z)))


def _convolve(x: np.ndarray, weights: dict[str, np.ndarray], name: str, stride: int) -> np.ndarray:
    """(time, channels), kernel 3, padding 1."""
    kernel = weights[f"{name}.weight"]
    padded = np.pad(x, ((1, 1), (0, 0)))
    taps = [padded[k : len(x) + k : stride] @ kernel[:, :, k].T for k in range(3)]
    return taps[0] + taps[1] + taps[2] + weights[f"{name}.bias"]


def _attend(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    q, k, v = (
        _linear(x, weights, f"{name}.{part}_proj").reshape(len(x), HEADS, -1).transpose(1, 0, 2)
        for part in "qkv"
    )
    scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(q.shape[-1]))
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    return _linear(mixed.transpose(1, 0, 2).reshape(x.shape), weights, f"{name}.out_proj")


@lru_cache(maxsize=1)
def _weights() -> dict[str, np.ndarray]:
    with np.load(DATA / "encoder.npz") as stored:
        return dict(stored)


def encode(mel: np.ndarray) -> np.ndarray:
    """Whisper's encoder, width 64: (80, 3000) → (5, 1500, 64), the last state after the final norm."""
    weights = _weights()
    x = _gelu(_convolve(mel.T, weights, "conv1", 1))
    x = _gelu(_convolve(x, weights, "conv2", 2)) + weights["embed_positions.weight"]
    states = [x]
    for layer in range(4):
        name = f"layers.{layer}"
        x = x + _attend(_norm(x, weights, f"{name}.self_attn_layer_norm"), weights, f"{name}.self_attn")
        hidden = _gelu(_linear(_norm(x, weights, f"{name}.final_layer_norm"), weights, f"{name}.fc1"))
        x = x + _linear(hidden, weights, f"{name}.fc2")
        states.append(x)
    states[-1] = _norm(x, weights, "layer_norm")
    return np.stack(states)


def _prompts(waveform: Iterable[np.ndarray], encoder: Encoder, fps: Fraction) -> Iterator[np.ndarray]:
    return hear_all(PromptListener(encoder, fps), waveform)


@lru_cache(maxsize=64)
def _encoded(content: bytes) -> np.ndarray:
    return encode(np.frombuffer(content, np.float32).reshape(80, 3000))


def _remembered(mel: np.ndarray) -> np.ndarray:
    """`encode`, once for each spectrogram."""
    return _encoded(mel.tobytes())


@pytest.mark.parametrize(("case", "tone", "fps"), [*GOLDEN_CASES, ("a61", 4, 25)])
def test_prompts_equal_the_reference(case: str, tone: int, fps: int) -> None:
    with np.load(DATA / "prompts.npz") as golden:
        expected, total = golden[f"audio_{case}"], int(golden[f"audio_{case}_n"])
    waveform = read_waveform(DATA / f"tone_{tone}.flac")
    prompts = np.concatenate(list(_prompts(waveform, _remembered, Fraction(fps))))
    assert prompts.shape == (total, 50, 64)
    np.testing.assert_allclose(prompts[:: max(1, total // 40)], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("n_samples", [1, 300, 16_000, 333_333, 480_000])
def test_log_mel_equals_transformers(n_samples: int) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs the full environment (make install-full)"
    )
    random = np.random.default_rng(n_samples)
    t = np.arange(n_samples) / 16_000
    segment = 0.5 * np.sin(2 * np.pi * (300 + 40 * t) * t) + 0.01 * random.standard_normal(n_samples)
    segment = segment.astype(np.float32)
    extractor = transformers.WhisperFeatureExtractor()
    expected = extractor(segment, sampling_rate=16_000, return_tensors="np").input_features[0]
    np.testing.assert_allclose(log_mel(segment), expected, rtol=0, atol=1e-4)


def test_log_mel_of_silence_is_flat_and_finite() -> None:
    np.testing.assert_array_equal(log_mel(np.zeros(1000, np.float32)), np.float32(-1.5))


def test_log_mel_finds_a_tone_in_the_band_that_holds_its_frequency() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    expected = int(np.argmax(mel_filters()[:, 25]))  # 1000 Hz is bin 25 of 40 Hz each
    assert set(log_mel(tone)[:, 10:90].argmax(axis=0)) == {expected}


def test_mel_filters_have_unit_area() -> None:
    """Slaney's normalisation; narrow filters fall between the 40 Hz bins, the wide ones don't."""
    areas = mel_filters().sum(axis=1) * 40
    np.testing.assert_allclose(areas[40:], 1.0, atol=0.07)


@pytest.mark.parametrize(
    ("n_samples", "fps", "expected"),
    [
        (16_000, "25", 25),
        (15_999, "25", 24),
        (16_000 * 3600, "25", 90_000),
        (16_000 * 3600, "29.97", 107_892),
        (16_000 * 3600, "23.976", 86_313),
        (48_000, "1/3", 1),
        (47_999, "1/3", 0),
        (0, "25", 0),
    ],
)
def test_frame_count_is_exact(n_samples: int, fps: str, expected: int) -> None:
    assert frame_count(n_samples, parse_fps(fps)) == expected


def test_nothing_leaves_an_empty_waveform() -> None:
    assert list(_prompts([np.zeros(0, np.float32)], encode, Fraction(25))) == []


class NumberingEncoder:
    """Two layers of width 1 that hold the step's number from 1 on, the second one negated."""

    def __init__(self, *, again: bool = False) -> None:
        self.calls = 0
        self.again = again  # whether one segment is encoded over and over

    def __call__(self, _mel: np.ndarray) -> np.ndarray:
        first = 0 if self.again else 1500 * self.calls
        steps = np.arange(first, first + 1500, dtype=np.float32) + 1
        self.calls += 1
        return np.stack([steps, -steps])[:, :, None]


def cut(n_samples: int, block: int) -> Iterator[np.ndarray]:
    for start in range(0, n_samples, block):
        yield np.zeros(min(block, n_samples - start), np.float32)


def expected_prompts(n_samples: int, fps: Fraction) -> np.ndarray:
    """The rule, frame by frame: ten steps, each with its two layers; zeros outside the states."""
    lead = int(np.ceil(Fraction(50) / fps)) * 2
    total = n_samples // 320
    frames = []
    for i in range(int(Fraction(n_samples, 16_000) * fps)):
        begin = int(i * 50 / fps) - lead
        steps = [step + 1 if 0 <= step < total else 0 for step in range(begin, begin + 10)]
        frames.append([[layer * step] for step in steps for layer in (1, -1)])
    return np.array(frames, np.float32).reshape(-1, 20, 1)


RATES = ["1/2", "1", "7.3", "12", "23.976", "25", "29.97", "50", "59.94", "60", "240"]


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize(
    ("n_samples", "block"), [(100, 6400), (16_000, 6400), (70_123, 3200), (480_319, 7001)]
)
def test_every_frame_has_its_whole_window_at_any_rate(n_samples: int, block: int, fps: str) -> None:
    rate = parse_fps(Fraction(fps) if "/" in fps else fps)
    blocks = list(_prompts(cut(n_samples, block), NumberingEncoder(), rate))
    assert all(1 <= len(prompts) <= 64 and prompts.shape[1:] == (20, 1) for prompts in blocks)
    together = np.concatenate(blocks) if blocks else np.zeros((0, 20, 1), np.float32)
    np.testing.assert_array_equal(together, expected_prompts(n_samples, rate))


@pytest.mark.parametrize("fps", ["7.3", "25", "29.97", "60"])
@pytest.mark.parametrize("block", [160, 16_000])
def test_live_frames_have_the_same_windows(block: int, fps: str) -> None:
    rate = parse_fps(Fraction(fps) if "/" in fps else fps)
    listener = PromptListener(NumberingEncoder(again=True), rate, live=True)
    together = np.concatenate(list(hear_all(listener, cut(9_601, block))))
    np.testing.assert_array_equal(together, expected_prompts(9_601, rate))


def test_live_frames_leave_at_most_200_ms_behind_the_sound() -> None:
    listener, given = PromptListener(NumberingEncoder(again=True), Fraction(25), live=True), 0
    for heard in range(160, 8_000, 160):
        given += sum(map(len, listener.hear(np.zeros(160, np.float32))))
        assert given >= (heard - 3200) * 25 // 16_000


def test_segments_of_a_session_join_without_gap() -> None:
    fps, state, joined = Fraction(30_000, 1001), None, []
    for number in range(1, 8):
        listener = PromptListener(NumberingEncoder(again=True), fps, state=pickle.loads(pickle.dumps(state)))
        joined += [*listener.hear(np.zeros(8001, np.float32)), *listener.flush()]
        state = listener.state
        assert sum(map(len, joined)) == frame_count(number * 8001, fps)
    together, whole = np.concatenate(joined), expected_prompts(7 * 8001, fps)
    known = (together == whole) | (together == 0)  # a segment's last windows end before their last steps
    assert known.all() and (together == whole).mean() > 0.8


def test_frames_leave_before_the_next_segment_is_asked_for() -> None:
    asked = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal asked
        for block in cut(480_000 * 4, 480_000):
            asked += 1
            yield block

    done = 0
    for prompts in _prompts(source(), NumberingEncoder(), Fraction(25)):
        done += len(prompts)
        assert asked <= done // 750 + 1
    assert done == 3000


def test_memory_stays_with_one_segment(measure_peak: Callable[[Callable[[], object]], int]) -> None:
    def run(seconds: int) -> Callable[[], object]:
        def drain() -> int:
            def encoder(_mel: np.ndarray) -> np.ndarray:
                return np.zeros((2, 1500, 8), np.float32)

            return sum(map(len, _prompts(cut(seconds * 16_000, 16_000), encoder, Fraction(25))))

        return drain

    short, long = measure_peak(run(60)), measure_peak(run(600))
    assert long < short + 1_000_000


@pytest.fixture
def measure_peak() -> Callable[[Callable[[], object]], int]:
    """Bytes that a call holds at its worst."""
    import tracemalloc

    def measure(call: Callable[[], object]) -> int:
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    return measure
