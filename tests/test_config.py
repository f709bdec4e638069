"""Ranges and the exact frame rate."""

from __future__ import annotations

from fractions import Fraction

import pytest

from musetalk.config import (
    EncodingConfig,
    EngineConfig,
    ModelPaths,
    PreprocessingConfig,
    parse_articulation,
    parse_fps,
)
from musetalk.errors import InputError


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        (25, Fraction(25)),
        ("25", Fraction(25)),
        (23.976, Fraction(24000, 1001)),
        ("29.97", Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        ("30000/1001", Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (29.5, Fraction(59, 2)),
        (60, Fraction(60)),
    ],
)
def test_fps_is_exact(given, exact):
    assert parse_fps(given) == exact


@pytest.mark.parametrize(
    "bad",
    [
        0,
        -1,
        "nan",
        float("nan"),
        float("inf"),
        "1e9",
        241,
        "fast",
        "",
        "1/0",
        "1e-9",
        "1e999999999",
        "1e-999999999",
    ],
)
def test_impossible_fps_is_bad_input(bad):
    with pytest.raises(InputError) as caught:
        parse_fps(bad)
    assert caught.value.exit_code == 3 and caught.value.hint


@pytest.mark.parametrize(
    "make",
    [
        lambda: EngineConfig(batch_size=0),
        lambda: EngineConfig(engine="other"),
        lambda: PreprocessingConfig(parsing_mode="chin"),
        lambda: PreprocessingConfig(extra_margin=-1),
        lambda: EncodingConfig(crf=52),
        lambda: ModelPaths(version="v2"),
    ],
)
def test_values_out_of_range_are_bad_input(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("given", [0.5, 1, 1.5, "0.75"])
def test_articulation_from_half_to_one_and_a_half_is_taken(given):
    assert parse_articulation(given) == float(given)


@pytest.mark.parametrize(
    "bad", [0.49, 1.51, -1, float("nan"), float("inf"), "wide", "", True, None, [1], 10**400]
)
def test_articulation_beyond_is_bad_input(bad):
    with pytest.raises(InputError, match="articulation"):
        parse_articulation(bad)
