"""The judge: known curves have known scores, speakers count alike, and halves are by name."""

import json

import numpy as np
import pytest

from musetalk.engines.lite.parameters import PARAMETER_INDEX
from musetalk.training import judge
from musetalk.training.corpus import Clip
from musetalk.training.evaluate import TRACK_NAMES


def _curve(seed: int, seconds: float) -> np.ndarray:
    """A smooth opening at 50 steps per second, 0 to 0.2 eye distances."""
    noise = np.random.default_rng(seed).standard_normal(int(seconds * 50) + 40)
    smooth = np.convolve(noise, np.hanning(15), mode="valid")[: int(seconds * 50)]
    return 0.1 + 0.1 * smooth / np.abs(smooth).max()


def _clip(speaker: str, seed: int, late: float = 0.0, gain: float = 1.0, group: str = "g") -> Clip:
    """A clip whose sound is the seed and whose speaker opens `late` s later, `gain` times as far."""
    curve, fps = _curve(seed, 4), 25.0
    track = np.zeros((100, len(TRACK_NAMES)), np.float32)
    middles = (np.arange(100) + 0.5) / fps - late
    track[:, TRACK_NAMES.index("opening")] = gain * np.interp(middles, (np.arange(200) + 0.5) / 50, curve)
    return Clip(group, speaker, "en", np.full(64_000, seed, np.float32), track, fps)


def _shapes(waveform: np.ndarray) -> np.ndarray:
    curve = _curve(int(waveform[0]), len(waveform) / 16_000)
    values = np.zeros((len(curve), len(PARAMETER_INDEX)), np.float32)
    values[:, PARAMETER_INDEX["jaw_open"]] = curve / 0.2
    return values


def test_who_is_followed_exactly_scores_1_and_how_far_he_moves_is_told():
    (speaker,) = judge.judge([_clip("a", 1, gain=2.0)], _shapes)
    opening = speaker.followed["opening"]
    assert opening.r == pytest.approx(1, abs=0.01)
    assert opening.amplitude == pytest.approx(0.5, abs=0.05)
    assert np.isnan(speaker.followed["width"].r)  # neither moves


@pytest.mark.parametrize(("late", "found"), [(0.08, True), (-0.08, True), (0.3, False)])
def test_lags_of_120_ms_are_found_and_longer_ones_are_not(late, found):
    (speaker,) = judge.judge([_clip("a", 1, late)], _shapes)
    opening = speaker.followed["opening"]
    assert opening.r < 0.9
    assert (opening.best_r > 0.98) == found


def test_a_speaker_counts_once_however_many_clips_there_are():
    clips = [_clip("many", 1), _clip("many", 2), _clip("many", 3), _clip("one", 4, 0.3)]
    many, one = judge.judge(clips, _shapes)
    whole = judge.summary([many, one])["opening"]["r"]["value"]
    assert whole == pytest.approx((many.followed["opening"].r + one.followed["opening"].r) / 2)
    assert many.followed["opening"].r == pytest.approx(1, abs=0.01)


def test_halves_alternate_by_name_within_a_group():
    clips = [_clip(name, 1, group=group) for group in "hg" for name in "cbad"]
    speakers = judge.judge(clips, _shapes)
    assert [(s.group, s.name, s.chosen_on) for s in speakers] == [
        (group, name, name in "ac") for group in "gh" for name in "abcd"
    ]


def test_confidence_is_over_speakers():
    alike = judge.mean_over_speakers([0.5] * 20)
    assert alike == (0.5, 0.5, 0.5)
    apart = judge.mean_over_speakers([0.0, 1.0] * 50 + [float("nan")])
    # the mean of 100 draws of 0 or 1 deviates by 0.05
    assert apart.value == 0.5
    assert apart.low == pytest.approx(0.4, abs=0.02) and apart.high == pytest.approx(0.6, abs=0.05)
    assert np.isnan(judge.mean_over_speakers([float("nan")]).value)


def test_all_scores_are_json():
    speakers = judge.judge([_clip("a", 1), _clip("b", 2, 0.04)], _shapes)
    told = json.loads(judge.json_text(judge.scored(speakers)))
    assert set(told) == {"groups", "halves", "languages", "by_speaker"}
    assert told["groups"]["g"]["speakers"] == 2
    assert told["by_speaker"]["g, b"]["opening"]["best_r"] > 0.98
    assert told["groups"]["g"]["width"]["amplitude"] is None


def test_an_encoder_that_remembers_runs_once_for_each_input():
    class Counting:
        calls = 0

        def run(self, names, given):
            self.calls += 1
            return [given["mel"] * 2]

    session = Counting()
    encoder = judge.RememberingEncoder(session)
    first, second = np.ones((1, 2, 4), np.float32), np.zeros((1, 2, 4), np.float32)
    for mel in (first, second, first.copy(), second):
        np.testing.assert_array_equal(encoder.run(None, {"mel": mel})[0], mel * 2)
    assert session.calls == 2
