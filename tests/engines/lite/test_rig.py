"""The rig moves a face mesh by what its parameters promise."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.engines.lite import rig
from musetalk.engines.lite.parameters import (
    CHIN_GAIN,
    OPENING_GAIN,
    PARAMETER_INDEX,
    RIG_PARAMETERS,
    WIDTH_GAIN,
)
from musetalk.faces.head import (
    CHIN,
    INNER_LOWER_LIP,
    LEFT_CORNER,
    OUTER_LOWER_LIP,
    RIGHT_CORNER,
    eye_distance,
    head_frame,
)
from musetalk.faces.head import INNER_BOTTOM as LOWER_LIP
from musetalk.faces.head import INNER_TOP as UPPER_LIP
from tests.engines.lite.face_meshes import load_portrait

FACES = ("astronaut", "charcoal_man", "drawn_girl", "hopper", "painted_woman", "rendered_man")


def moved(mesh: np.ndarray, **values: float) -> np.ndarray:
    """The mesh under the forward fields, lower lip and chin by the lower sheet; (478, 2)."""
    parameters = np.zeros((1, len(RIG_PARAMETERS)), np.float32)
    for name, value in values.items():
        parameters[0, PARAMETER_INDEX[name]] = value
    head = head_frame(mesh)
    lips = rig.measure_lips(head, mesh)
    fields = rig.movement_fields(head, lips, head.to_head(mesh[:, :2]))
    sheets = np.tensordot(rig.coefficients(parameters)[0], fields, axes=([0], [1]))
    result = mesh[:, :2] + sheets[0]
    lower = [*INNER_LOWER_LIP[1:-1], *OUTER_LOWER_LIP[1:-1], CHIN]
    result[lower] = mesh[lower, :2] + sheets[1][lower]
    return result


def distance(points: np.ndarray, mesh: np.ndarray, first: int, second: int) -> float:
    eyes = eye_distance(mesh)
    return float(np.linalg.norm(points[first] - points[second]) / eyes)


@pytest.mark.parametrize("name", FACES)
def test_zero_shuts_every_portrait_s_mouth(name: str) -> None:
    mesh = load_portrait(name).mesh
    head, shut = head_frame(mesh), moved(mesh)
    gap = head.to_head(shut[LOWER_LIP]) - head.to_head(shut[UPPER_LIP])
    assert -2 * rig.LIP_MARGIN[1] - 0.01 < gap[1] < 0.02


@pytest.mark.parametrize("parameter", sorted(OPENING_GAIN))
def test_openers_open_by_their_gain_and_a_little_more_where_gaps_are_narrow(parameter: str) -> None:
    mesh = load_portrait("hopper").mesh
    shut = distance(moved(mesh), mesh, UPPER_LIP, LOWER_LIP)
    opened = distance(moved(mesh, **{parameter: 1.0}), mesh, UPPER_LIP, LOWER_LIP) - shut
    assert 0.92 * OPENING_GAIN[parameter] < opened < 1.08 * OPENING_GAIN[parameter] + 0.01


def test_a_tucked_lower_lip_stays_at_the_teeth_while_the_upper_lip_uncovers_them() -> None:
    mesh = load_portrait("hopper").mesh
    shut = moved(mesh)
    tucked = moved(mesh, jaw_open=0.3, lip_open=0.4, lip_tuck=1.0)
    opened = moved(mesh, jaw_open=0.3, lip_open=0.4)
    assert distance(tucked, mesh, UPPER_LIP, LOWER_LIP) < 0.06
    assert tucked[LOWER_LIP, 1] - shut[LOWER_LIP, 1] < 0.5 * (opened[LOWER_LIP, 1] - shut[LOWER_LIP, 1])
    assert shut[UPPER_LIP, 1] - tucked[UPPER_LIP, 1] > 1.5


def test_a_pucker_straightens_a_smile() -> None:
    mesh = load_portrait("astronaut").mesh
    head = head_frame(mesh)

    def corners_over_middle(points: np.ndarray) -> float:
        here = head.to_head(points)
        return float((here[[13, 14], 1]).mean() - here[[78, 308], 1].mean())

    assert corners_over_middle(moved(mesh)) > 0.06
    assert abs(corners_over_middle(moved(mesh, pucker=1.0))) < 0.03


def test_rounded_lips_part_in_the_middle_only() -> None:
    mesh = load_portrait("hopper").mesh
    open_wide = moved(mesh, jaw_open=0.3, lip_open=0.4)
    rounded = moved(mesh, jaw_open=0.3, lip_open=0.4, pucker=0.8)
    aside, middle = (80, 88), (UPPER_LIP, LOWER_LIP)
    share_wide = distance(open_wide, mesh, *aside) / distance(open_wide, mesh, *middle)
    assert distance(rounded, mesh, *aside) / distance(rounded, mesh, *middle) < 0.8 * share_wide


def test_pressed_lips_stay_shut_while_the_jaw_is_down() -> None:
    mesh = load_portrait("hopper").mesh
    pressed = moved(mesh, jaw_open=1.0, lip_open=1.0, lip_press=1.0)
    assert distance(pressed, mesh, UPPER_LIP, LOWER_LIP) < 0.03
    assert pressed[CHIN, 1] > mesh[CHIN, 1] + 5


def test_width_moves_the_corners_apart_and_together_by_the_gain() -> None:
    mesh = load_portrait("hopper").mesh
    rest = distance(moved(mesh), mesh, LEFT_CORNER, RIGHT_CORNER)
    wide = distance(moved(mesh, lip_width=1.0), mesh, LEFT_CORNER, RIGHT_CORNER)
    narrow = distance(moved(mesh, lip_width=-1.0), mesh, LEFT_CORNER, RIGHT_CORNER)
    assert wide - rest == pytest.approx(WIDTH_GAIN, rel=0.15)
    assert rest - narrow == pytest.approx(WIDTH_GAIN, rel=0.15)


def test_a_pucker_thickens_the_lips_it_narrows() -> None:
    mesh = load_portrait("hopper").mesh
    rest, puckered = moved(mesh), moved(mesh, pucker=1.0)
    assert distance(puckered, mesh, LEFT_CORNER, RIGHT_CORNER) < 0.85 * distance(
        rest, mesh, LEFT_CORNER, RIGHT_CORNER
    )
    assert distance(puckered, mesh, 14, 17) > 1.05 * distance(rest, mesh, 14, 17)


def test_a_smile_raises_the_corners_and_leaves_the_middle() -> None:
    mesh = load_portrait("hopper").mesh
    rest, smiling = moved(mesh), moved(mesh, smile=1.0)
    assert rest[RIGHT_CORNER, 1] - smiling[RIGHT_CORNER, 1] > 3
    assert abs(rest[UPPER_LIP, 1] - smiling[UPPER_LIP, 1]) < 1


def test_sheets_agree_beyond_the_corners() -> None:
    mesh = load_portrait("hopper").mesh
    head = head_frame(mesh)
    lips = rig.measure_lips(head, mesh)
    right = np.concatenate([np.linspace(lips.left - 0.2, lips.left, 9), np.linspace(lips.right, 0.6, 9)])
    line = np.stack([right, np.interp(right, lips.grid, lips.upper)], axis=-1)
    upper, lower = rig.movement_fields(head, lips, line)
    np.testing.assert_allclose(upper, lower, atol=0.02 * head.eye_distance)


@pytest.mark.parametrize("degrees", [-25.0, 25.0])
def test_a_rolled_head_moves_along_its_own_axes(degrees: float) -> None:
    mesh = load_portrait("hopper").mesh
    turn = np.radians(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    rolled = mesh.copy()
    rolled[:, :2] = mesh[:, :2] @ rotation.T
    upright = moved(mesh, jaw_open=0.7, smile=0.5) - mesh[:, :2]
    turned = moved(rolled, jaw_open=0.7, smile=0.5) - rolled[:, :2]
    np.testing.assert_allclose(turned, upright @ rotation.T, atol=0.35)


def test_coefficients_of_a_batch_are_those_of_its_rows() -> None:
    rows = np.random.default_rng(1).uniform(0, 1, (5, len(RIG_PARAMETERS))).astype(np.float32)
    together = rig.coefficients(rows)
    assert together.shape == (5, len(rig.COEFFICIENTS))
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_array_equal(rig.coefficients(row[None])[0], expected)


def test_own_motion_undoes_the_jaw_and_width_of_talking_frames() -> None:
    mesh = load_portrait("hopper").mesh
    eyes = eye_distance(mesh)
    talking, wide = mesh.copy(), mesh.copy()
    talking[LOWER_LIP, 1] += 0.1 * eyes
    wide[RIGHT_CORNER, 0] -= 0.05 * eyes
    motions = rig.own_motions(np.stack([mesh, mesh, mesh, mesh, mesh, mesh, talking, wide]))
    rest = np.stack([motion.rest for motion in motions])
    chin, width = rig.COEFFICIENTS.index("jaw_chin"), rig.COEFFICIENTS.index("lip_width")
    np.testing.assert_allclose(rest[:6], 0, atol=1e-3)
    chin_field = rig.CHIN_SHARE * CHIN_GAIN
    assert rest[6, chin] * chin_field == pytest.approx(-0.08, abs=0.01)
    assert rest[7, width] == pytest.approx(-0.5, abs=0.05)


def test_frames_beside_an_open_one_count_as_wider() -> None:
    mesh = load_portrait("hopper").mesh
    eyes = eye_distance(mesh)
    talking = mesh.copy()
    talking[LOWER_LIP, 1] += 0.06 * eyes
    swings = [motion.swing for motion in rig.own_motions(np.stack([mesh] * 4 + [talking] + [mesh] * 4))]
    widest = rig.LARGEST_SWING
    np.testing.assert_allclose(swings, [0, 0, widest, widest, 0, widest, widest, 0, 0], atol=0.002)


def test_frames_of_a_nearly_still_mouth_all_count_as_its_widest() -> None:
    mesh = load_portrait("hopper").mesh
    eyes = eye_distance(mesh)
    parted = mesh.copy()
    parted[LOWER_LIP, 1] += 0.02 * eyes
    swings = [motion.swing for motion in rig.own_motions(np.stack([mesh] * 6 + [parted] * 2 + [mesh] * 6))]
    np.testing.assert_allclose(swings, [0.02] * 6 + [0, 0] + [0.02] * 6, atol=0.003)


def test_a_short_spell_of_speech_in_a_still_clip_is_closed_like_any_other() -> None:
    mesh = load_portrait("hopper").mesh
    talking = mesh.copy()
    talking[LOWER_LIP, 1] += 0.1 * eye_distance(mesh)
    motions = rig.own_motions(np.stack([mesh] * 100 + [talking] * 3 + [mesh] * 100))
    beside = [motions[i].swing for i in (98, 99, 103, 104)]
    assert min(beside) == pytest.approx(rig.LARGEST_SWING, abs=0.003)


def test_a_mouth_without_width_moves_by_numbers() -> None:
    mesh = load_portrait("hopper").mesh
    mesh[[LEFT_CORNER, RIGHT_CORNER]] = mesh[[LEFT_CORNER, RIGHT_CORNER]].mean(axis=0)
    assert np.isfinite(moved(mesh, pucker=1.0, jaw_open=0.5)).all()


def test_the_jaw_s_share_of_a_gap_is_closed_from_below() -> None:
    mesh = load_portrait("hopper").mesh
    eyes = eye_distance(mesh)
    talking = mesh.copy()
    talking[LOWER_LIP, 1] += 0.15 * eyes
    head = head_frame(talking)
    habit = rig.measure_lips(head, talking, rig.STILL._replace(parted=0.0))
    assert habit.share < 0.2 < rig.measure_lips(head, talking).share


def test_edge_distances_tell_lips_from_mouth() -> None:
    mesh = load_portrait("astronaut").mesh
    head = head_frame(mesh)
    lips = rig.measure_lips(head, mesh)
    middle = (mesh[UPPER_LIP, :2] + mesh[LOWER_LIP, :2]) / 2
    points = head.to_head(np.stack([mesh[0, :2], middle, mesh[17, :2]]))
    distances = rig.edge_distances(lips, points)
    assert distances[0, 0] > 0 > distances[0, 1]
    assert (distances[1] < 0).all()
    assert distances[2, 1] > 0 > distances[2, 0]
