"""Mouth curves of labelled speech: closures are closed, silence is still, rounding is rounded."""

from itertools import pairwise

import numpy as np
import pytest

from musetalk.engines.lite.parameters import PARAMETER_INDEX, RIG_PARAMETERS, rig_opening
from musetalk.training.phones import DIPHTHONGS, SHAPES, Phone, closures, mouth_curves, split_diphthongs


def _said(*names: str, length: float = 0.1, silence: float = 0.5) -> list[Phone]:
    phones, start = [Phone("pau", 0, silence)], silence
    for name in names:
        phones.append(Phone(name, start, start + length))
        start += length
    return [*phones, Phone("pau", start, start + silence)]


def _at(curves: np.ndarray, seconds: float, name: str) -> float:
    return float(curves[round(seconds * 50), PARAMETER_INDEX[name]])


@pytest.mark.parametrize("name", SHAPES)
def test_curves_stay_in_the_parameters_ranges_even_beside_closures(name):
    curves = mouth_curves(_said("p", name, "w", name, "aa"), 80)
    for column, parameter in zip(curves.T, RIG_PARAMETERS, strict=True):
        assert parameter.low <= column.min()
        assert column.max() <= parameter.high


def test_diphthongs_end_in_shapes():
    for name in DIPHTHONGS:
        parts = split_diphthongs([Phone(name, 0, 1)])
        assert all(part.name in SHAPES for part in parts)
        assert parts[0].start == 0
        assert parts[-1].end == 1
        assert all(a.end == b.start for a, b in pairwise(parts))


def test_vowels_open_as_wide_as_phonetics_has_them():
    def wide(name: str) -> float:
        return float(rig_opening(mouth_curves(_said(name, length=0.3), 70)).max())

    assert wide("aa") > wide("eh") > wide("ih") > wide("uw")
    assert wide("aa") == pytest.approx(0.17, abs=0.03)


@pytest.mark.parametrize("name", ["p", "b", "m"])
def test_lips_are_shut_in_closures_between_open_vowels(name):
    curves = mouth_curves(_said("aa", name, "aa"), 70)
    inside = rig_opening(curves)[round(0.6 * 50) : round(0.7 * 50) + 1]
    assert inside.min() < 0.002
    assert rig_opening(curves)[round(0.55 * 50)] > 0.08


@pytest.mark.parametrize("name", ["f", "v"])
def test_the_lower_lip_tucks_under_the_teeth(name):
    curves = mouth_curves(_said("aa", name, "iy"), 70)
    assert _at(curves, 0.65, "lip_tuck") > 0.95
    assert _at(curves, 0.55, "lip_tuck") < 0.05


def test_lips_round_for_u_and_spread_for_i():
    curves = mouth_curves(_said("iy", "iy", "uw", "uw"), 80)
    assert _at(curves, 0.6, "lip_width") > 0.3
    assert _at(curves, 0.8, "pucker") > 0.55


def test_w_and_r_nearly_close_the_lips_between_open_vowels():
    for name in ("w", "r"):
        gap = rig_opening(mouth_curves(_said("aa", "aa", name, "aa", "aa"), 80))
        assert gap[round(0.75 * 50)] < 0.45 * gap[round(0.6 * 50)]


def test_rounding_outlasts_its_vowel():
    curves = mouth_curves(_said("iy", "uw", "iy", length=0.2), 80)
    before, after = (_at(curves, time, "pucker") for time in (0.66, 0.94))
    assert after > 1.3 * before


def test_rounding_spreads_to_consonants_that_have_none_of_their_own():
    rounded = mouth_curves(_said("uw", "t", "uw"), 70)
    spread = mouth_curves(_said("iy", "t", "iy"), 70)
    assert _at(rounded, 0.65, "pucker") > _at(spread, 0.65, "pucker") + 0.3


def test_silence_is_exactly_still_200_ms_after_speech():
    curves = mouth_curves(_said("aa", "m", "aa"), 70)
    end = 0.5 + 0.3
    assert not curves[round((end + 0.2) * 50) :].any()
    assert not curves[: round(0.3 * 50)].any()


def test_loudness_moves_the_jaw_a_little_and_nothing_else():
    phones = _said("aa", length=0.3)
    soft, loud = (mouth_curves(phones, 70, np.full(70, level)) for level in (-10.0, 10.0))
    jaw = PARAMETER_INDEX["jaw_open"]
    assert 1.2 < loud[32, jaw] / soft[32, jaw] < 1.6
    np.testing.assert_array_equal(np.delete(soft, jaw, 1), np.delete(loud, jaw, 1))


def test_a_short_closure_still_lasts_50_ms():
    ((start, end),) = closures([Phone("b", 1.0, 1.02)])
    assert end - start == pytest.approx(0.05)


def test_no_phones_no_movement():
    assert not mouth_curves([], 10).any()
