"""The head's landmarks are where their names say, and its frame and distances are those of the head."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.faces import head
from tests.engines.lite.face_meshes import load_portrait

SETS = sorted(name for name, value in vars(head).items() if name.isupper() and isinstance(value, tuple))


@pytest.fixture(scope="module")
def mesh() -> np.ndarray:
    return load_portrait("hopper").mesh


def middle(mesh: np.ndarray, indices: tuple[int, ...]) -> np.ndarray:
    return mesh[list(indices), :2].mean(axis=0)


@pytest.mark.parametrize("name", SETS)
def test_every_set_lies_on_the_skin_and_names_no_point_twice(name: str) -> None:
    indices = getattr(head, name)
    assert len(set(indices)) == len(indices)
    assert all(0 <= index < head.SKIN_POINTS for index in indices)


@pytest.mark.parametrize("part", sorted(name[6:] for name in vars(head) if name.startswith("RIGHT_")))
def test_right_is_the_subject_s_right_which_a_portrait_shows_on_the_left(mesh: np.ndarray, part: str) -> None:
    right, left = (np.atleast_1d(getattr(head, f"{side}_{part}")) for side in ("RIGHT", "LEFT"))
    assert mesh[right, 0].max() < mesh[head.NOSE_BASE, 0] < mesh[left, 0].min()
    assert len(right) == len(left)


@pytest.mark.parametrize(
    "name", [name for name in SETS if name.endswith(("_LIP", "_LID", "_TOP", "_BOTTOM"))]
)
def test_edges_run_from_the_subject_s_right_to_the_left(mesh: np.ndarray, name: str) -> None:
    assert (np.diff(mesh[list(getattr(head, name)), 0]) > 0).all()


def test_upper_is_above_lower_and_outside_is_outside(mesh: np.ndarray) -> None:
    for upper, lower in (
        (head.OUTER_UPPER_LIP, head.INNER_UPPER_LIP),
        (head.INNER_UPPER_LIP, head.INNER_LOWER_LIP),
        (head.INNER_LOWER_LIP, head.OUTER_LOWER_LIP),
        (head.RIGHT_UPPER_LID, head.RIGHT_LOWER_LID),
        (head.LEFT_UPPER_LID, head.LEFT_LOWER_LID),
        (head.RIGHT_BROW_TOP, head.RIGHT_BROW_BOTTOM),
        (head.LEFT_BROW_TOP, head.LEFT_BROW_BOTTOM),
    ):
        assert middle(mesh, upper)[1] < middle(mesh, lower)[1]
    for outer, inner in (
        (head.RIGHT_EYE_OUTER, head.RIGHT_EYE_INNER),
        (head.LEFT_EYE_OUTER, head.LEFT_EYE_INNER),
        (head.RIGHT_CORNER, head.INNER_RIGHT_CORNER),
        (head.LEFT_CORNER, head.INNER_LEFT_CORNER),
    ):
        away = mesh[[outer, inner], 0] - mesh[head.NOSE_BASE, 0]
        assert abs(away[0]) > abs(away[1])


@pytest.mark.parametrize(
    "name",
    ["INNER_LIPS", "RIGHT_EYE", "LEFT_EYE", "RIGHT_BROW", "LEFT_BROW", "FACE_OVAL", "NOSE_OUTLINE"],
)
def test_rings_go_round_once_without_crossing(name: str) -> None:
    ring = load_portrait("astronaut").mesh[list(getattr(head, name)), :2].astype(float)
    sides = np.diff(ring, axis=0, append=ring[:1])
    headings = np.arctan2(sides[:, 1], sides[:, 0])
    turns = (np.diff(headings, append=headings[:1]) + np.pi) % (2 * np.pi) - np.pi
    assert abs(turns.sum()) == pytest.approx(2 * np.pi)  # 0 for an eight, more for a star


def test_the_68_points_are_the_ibug_scheme_s(mesh: np.ndarray) -> None:
    points = mesh[list(head.MESH_TO_68), :2]
    assert points.shape == (68, 2)
    assert points[:17].argmax(axis=0)[1] == 8  # the chin is the jaw's lowest
    assert points[36:42].mean(axis=0)[0] < points[30, 0] < points[42:48].mean(axis=0)[0]
    assert points[17:27, 1].max() < points[36:48, 1].min() < points[33, 1] < points[51, 1] < points[57, 1]


def test_a_tilted_head_is_measured_along_its_own_axes() -> None:
    mesh = load_portrait("hopper").mesh
    turn = np.radians(20.0)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    tilted = mesh.copy()
    tilted[:, :2] = 1.7 * mesh[:, :2] @ rotation.T + [30, -12]
    tilted[:, 2] *= 1.7
    upright, turned = head.head_frame(mesh), head.head_frame(tilted)
    assert turned.eye_distance == pytest.approx(1.7 * upright.eye_distance)
    np.testing.assert_allclose(turned.to_head(tilted[:, :2]), upright.to_head(mesh[:, :2]), atol=1e-4)
    np.testing.assert_allclose(turned.to_pixels(turned.to_head(tilted[:, :2])), tilted[:, :2], atol=1e-3)


def test_the_head_s_axes_point_right_down_and_at_the_viewer(mesh: np.ndarray) -> None:
    frame = head.head_frame(mesh)
    here = frame.to_head(mesh[:, :2])
    assert here[head.RIGHT_EYE_OUTER, 0] < -0.3 and here[head.LEFT_EYE_OUTER, 0] > 0.3
    assert here[head.FOREHEAD, 1] < here[head.NOSE_BASE, 1] < 0 < here[head.CHIN, 1]


def test_distances_are_in_eye_distances_for_one_mesh_and_for_many() -> None:
    mesh = np.zeros((head.MESH_POINTS, 3), np.float32)
    mesh[33], mesh[263] = (100, 50, 0), (300, 50, 0)
    mesh[13], mesh[14] = (200, 200, 0), (200, 240, 30)
    mesh[61], mesh[291] = (150, 220, 0), (250, 220, 0)
    assert head.eye_distance(mesh) == pytest.approx(200)
    assert head.mouth_opening(mesh) == pytest.approx(0.2)  # in the picture: depth doesn't count
    assert head.mouth_width(mesh) == pytest.approx(0.5)
    several = np.stack([mesh, 2 * mesh])
    np.testing.assert_allclose(head.mouth_opening(several), [0.2, 0.2])
    np.testing.assert_allclose(head.eye_distance(several), [200, 400])


def test_smoothstep_is_level_at_both_ends() -> None:
    x = np.array([-1.0, 0.0, 0.5, 1.0, 3.0])
    np.testing.assert_array_equal(head.smoothstep(x), [0, 0, 0.5, 1, 1])
    assert head.smoothstep(np.array([0.001, 0.999])) == pytest.approx([0, 1], abs=1e-5)
