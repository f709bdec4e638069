"""What ships keeps still: the mouth rests in sounds that are no speech, and such sounds are learned from."""

from fractions import Fraction

import numpy as np
import pytest

from musetalk.config import LITE_MODELS
from musetalk.engines.lite.parameters import rig_opening
from musetalk.engines.lite.speech import MouthNetwork
from musetalk.training import corpus

TIMES = np.arange(6 * 16_000) / 16_000  # s


def _white() -> np.ndarray:
    return np.random.default_rng(5).standard_normal(len(TIMES))


def _pink() -> np.ndarray:
    spectrum = np.fft.rfft(_white())
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return np.fft.irfft(spectrum, len(TIMES))


def _hum() -> np.ndarray:
    return np.sum([np.sin(2 * np.pi * 50 * k * TIMES) / k for k in range(1, 6)], axis=0)


def _clicks() -> np.ndarray:
    return (np.arange(len(TIMES)) % 4000 == 0).astype(float)


def _music() -> np.ndarray:
    """A minor scale up and down, four notes a second, seven harmonics."""
    scale = [0, 2, 3, 5, 7, 8, 10, 12, 10, 8, 7, 5, 3, 2] * 2
    sound = np.zeros(len(TIMES))
    for number, step in enumerate(scale[:24]):
        begin = number * 4000
        times = TIMES[: len(TIMES) - begin]
        pitch = 220 * 2 ** (step / 12)
        tones = [np.sin(2 * np.pi * pitch * k * times) / k for k in range(1, 8)]
        sound[begin:] += np.sum(tones, axis=0) * np.exp(-3 * times)
    return sound


@pytest.fixture(scope="module")
def network():
    return MouthNetwork(LITE_MODELS)


@pytest.mark.parametrize("level", [0.5, 0.005])
@pytest.mark.parametrize("sound", [_white, _pink, _hum, _clicks, _music])
def test_the_mouth_rests_in_sounds_that_are_not_speech(network, sound, level):
    waveform = sound()
    waveform = (level * waveform / np.abs(waveform).max()).astype(np.float32)
    listener = network.listen(Fraction(25))
    values = np.concatenate([*listener.hear(waveform), *listener.flush()])
    assert rig_opening(values).max() <= 0.05  # eye distances


@pytest.mark.parametrize("kind", corpus.STILL_KINDS)
def test_sounds_to_learn_stillness_from_repeat_by_seed_and_differ_between_seeds(kind):
    first, again, other = (
        corpus.STILL_KINDS[kind](32_000, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (32_000,) and np.isfinite(first).all() and first.std() > 0
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_still_samples_hold_a_mouth_at_rest():
    samples = list(
        corpus.still_samples(48, lambda mel: np.ones((5, mel.shape[2] // 2, 384)), np.random.default_rng(0))
    )
    assert len(samples) == 6
    assert all(len(s.truth) == 400 and not s.truth.any() and s.weight.all() for s in samples)
