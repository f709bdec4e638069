"""What rig parameters mean in distances on a face, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.engines.lite.parameters import (
    HIGH,
    LOW,
    PARAMETER_INDEX,
    RIG_PARAMETERS,
    articulated,
    rig_opening,
    rig_width,
)


def shape(**values: float) -> np.ndarray:
    parameters = np.zeros((1, len(RIG_PARAMETERS)), np.float32)
    for name, value in values.items():
        parameters[0, PARAMETER_INDEX[name]] = value
    return parameters


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 0.0),
        ({"jaw_open": 0.5}, 0.1),
        ({"jaw_open": 1.0, "lip_open": 1.0, "upper_lip_raise": 1.0, "lower_lip_drop": 1.0}, 0.34),
        ({"jaw_open": 0.5, "lip_press": 0.5}, 0.05),
        ({"jaw_open": 1.0, "lip_press": 1.3}, 0.0),
        ({"smile": 1.0, "tongue_up": 1.0}, 0.0),
    ],
)
def test_opening(values: dict[str, float], expected: float) -> None:
    assert rig_opening(shape(**values)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"lip_width": -1.0}, -0.1), ({"pucker": 1.0}, -0.12), ({"lip_width": 0.5, "pucker": 0.5}, -0.01)],
)
def test_outer_width(values: dict[str, float], expected: float) -> None:
    assert rig_width(shape(**values)).item() == pytest.approx(expected)


def test_any_number_of_frames_is_measured_at_once() -> None:
    frames = np.concatenate([shape(jaw_open=0.1 * i) for i in range(6)]).reshape(2, 3, -1)
    np.testing.assert_allclose(rig_opening(frames), [[0, 0.02, 0.04], [0.06, 0.08, 0.1]], atol=1e-6)


def test_ranges_hold_the_closed_mouth() -> None:
    assert (LOW <= 0).all() and (HIGH == 1).all() and len(LOW) == len(RIG_PARAMETERS)


def test_articulation_scales_what_a_mesh_measures_but_closes_all_the_same() -> None:
    said = shape(jaw_open=0.4, lip_open=0.2, lip_width=-0.4, pucker=0.2, smile=0.5, lip_tuck=1.0)
    for articulation in (0.5, 1.0, 1.5):
        given = articulated(said, articulation)
        assert rig_opening(given).item() == pytest.approx(articulation * 0.092, rel=1e-5)
        assert rig_width(given).item() == pytest.approx(articulation * -0.064, rel=1e-5)
        assert given[0, PARAMETER_INDEX["lip_tuck"]] == 1 and given[0, PARAMETER_INDEX["smile"]] == 0.5
    assert rig_opening(articulated(shape(jaw_open=0.4, lip_press=1.0), 1.5)).item() == 0
    assert articulated(shape(jaw_open=0.9), 1.5).max() == 1
