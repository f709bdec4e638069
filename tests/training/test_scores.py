"""Scores on curves whose truth is known by construction."""

import numpy as np
import pytest

from musetalk.training import scores

RATE = 25.0
TIMES = np.arange(250) / RATE
WAVE = 1 + np.sin(2 * np.pi * 1.3 * TIMES) + 0.4 * np.sin(2 * np.pi * 3.1 * TIMES)


def test_a_late_copy_agrees_best_at_its_lag():
    late = np.interp(TIMES - 0.08, TIMES, WAVE)
    found = scores.agreement(late, WAVE, RATE)
    assert found.lag == pytest.approx(0.08)
    assert found.best_r > 0.99 > found.r


def test_scale_and_offset_do_not_matter_and_sign_does():
    assert scores.agreement(3 * WAVE + 7, WAVE, RATE).r == pytest.approx(1)
    assert scores.agreement(-WAVE, WAVE, RATE).r == pytest.approx(-1)


def test_gaps_are_left_out():
    holed = WAVE.copy()
    holed[20:60] = np.nan
    assert scores.pearson(holed, WAVE) == pytest.approx(1)


def test_a_still_curve_has_no_correlation():
    assert np.isnan(scores.pearson(np.zeros(250), WAVE))


def test_closures_are_found_within_60_ms_and_missed_beyond():
    opening = np.full(250, 0.2)
    opening[[50, 100]] = 0.0
    opening[200:210] = 0.0
    hits = scores.closure_rate(opening, RATE, [(2.0, 2.04), (4.05, 4.09), (6.0, 6.05), (4.2, 4.3)])
    assert hits == pytest.approx(0.5)


def test_no_closures_to_find_is_unknown():
    assert np.isnan(scores.closure_rate(WAVE, RATE, []))


def test_f_score_counts_false_alarms_and_misses():
    curve = np.zeros(250)
    curve[[50, 150]] = 1  # one right, one false
    assert scores.f_score(curve, RATE, [(2.0, 2.05), (8.0, 8.05)], 0.5) == pytest.approx(0.5)
    assert scores.f_score(curve, RATE, [(2.0, 2.05), (6.0, 6.05)], 0.5) == pytest.approx(1.0)
    assert scores.f_score(np.zeros(250), RATE, [(2.0, 2.05)], 0.5) == 0.0


def test_steady_motion_has_no_jitter():
    steady = np.arange(20)[:, None, None] * np.ones((1, 3, 2))
    shaken = steady + np.where(np.arange(20) % 2, 0.5, -0.5)[:, None, None] * np.array([1.0, 0.0])
    assert scores.jitter(steady) == pytest.approx(0)
    assert scores.jitter(shaken) == pytest.approx(2.0)
