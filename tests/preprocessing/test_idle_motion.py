"""A still portrait comes alive, smoothly, and its face points go along."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.errors import EngineError
from musetalk.faces.base import Face
from musetalk.faces.head import MESH_TO_68, SKIN_POINTS
from musetalk.geometry import bounding_box
from musetalk.preprocessing.idle_motion import idle_frames, idle_poses
from tests.engines.lite.face_meshes import load_portrait

COUNT = 24


def portrait_face(name: str = "astronaut") -> tuple[np.ndarray, Face]:
    portrait = load_portrait(name)
    points = portrait.mesh[:, :2]
    face = Face(points[list(MESH_TO_68)], bounding_box(points[:SKIN_POINTS]), points, portrait.mesh[:, 2])
    return portrait.frame, face


@pytest.fixture(scope="module")
def clip() -> list[tuple[np.ndarray, Face]]:
    return list(idle_frames(*portrait_face(), seed=5, count=COUNT))


def eye_opening(face: Face) -> float:
    assert face.mesh is not None
    return float(np.linalg.norm(face.mesh[159] - face.mesh[145]))


@pytest.mark.parametrize("seed", range(5))
def test_motion_rests_at_both_ends_so_that_it_can_turn_round(seed: int) -> None:
    poses = np.array(idle_poses(seed))
    steps = np.abs(np.diff(poses, axis=0))
    span = np.ptp(poses, axis=0)
    assert (steps[0] <= 0.01 * span + 1e-9).all()
    assert (steps[-1] <= 0.01 * span + 1e-9).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_clip_blinks_once_and_fully(seed: int) -> None:
    lids = np.array([pose.lids for pose in idle_poses(seed)])
    assert lids.max() == 1
    assert lids[0] == lids[-1] == 0
    starts = np.flatnonzero((lids[1:] > 0) & (lids[:-1] == 0))
    assert len(starts) == 1


def test_frames_keep_the_portrait_s_size_and_move(clip: list[tuple[np.ndarray, Face]]) -> None:
    frame, _ = portrait_face()
    assert len(clip) == COUNT
    assert all(moving.shape == frame.shape and moving.dtype == np.uint8 for moving, _ in clip)
    first, last = clip[0][0].astype(int), clip[-1][0].astype(int)
    assert np.abs(first - last).mean() > 0.5


def test_the_picture_s_border_never_moves(clip: list[tuple[np.ndarray, Face]]) -> None:
    frame, _ = portrait_face()
    for moving, _ in clip:
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            np.testing.assert_array_equal(moving[edge], frame[edge])


def test_the_same_seed_gives_the_same_bytes_and_another_doesn_t(clip: list[tuple[np.ndarray, Face]]) -> None:
    again = next(iter(idle_frames(*portrait_face(), seed=5, count=COUNT)))
    other = next(iter(idle_frames(*portrait_face(), seed=6, count=COUNT)))
    np.testing.assert_array_equal(again[0], clip[0][0])
    assert (other[0] != clip[0][0]).any()


def test_points_shut_the_eyes_in_the_blink(clip: list[tuple[np.ndarray, Face]]) -> None:
    openings = [eye_opening(face) for _, face in clip]
    assert min(openings) < 0.25 * openings[0]


def test_points_follow_the_pixels(clip: list[tuple[np.ndarray, Face]]) -> None:
    import cv2

    frame, still = portrait_face()
    moving, face = clip[0]
    assert face.mesh is not None and still.mesh is not None
    for point in (1, 61, 291, 133, 362):
        x, y = np.round(still.mesh[point]).astype(int)
        patch = frame[y - 12 : y + 13, x - 12 : x + 13]
        around = moving[y - 20 : y + 21, x - 20 : x + 21]
        score = cv2.matchTemplate(around, patch, cv2.TM_CCOEFF_NORMED)
        row, column = np.unravel_index(np.argmax(score), score.shape)
        seen = np.array([column - 8, row - 8])
        np.testing.assert_allclose(face.mesh[point] - still.mesh[point], seen, atol=1.1)


def test_the_68_points_and_the_box_are_the_mesh_s(clip: list[tuple[np.ndarray, Face]]) -> None:
    for _, face in clip:
        assert face.mesh is not None
        np.testing.assert_array_equal(face.landmarks68, face.mesh[list(MESH_TO_68)])
        assert face.detection == bounding_box(face.mesh[:SKIN_POINTS])


def test_a_face_without_a_mesh_is_refused() -> None:
    frame, face = portrait_face()
    with pytest.raises(EngineError, match="mesh"):
        next(idle_frames(frame, Face(face.landmarks68, face.detection)))


def test_a_shut_eye_shows_no_white() -> None:
    frame, face = portrait_face("rendered_man")
    frames = list(idle_frames(frame, face, seed=0))
    shut = int(np.argmax([pose.lids for pose in idle_poses(0)]))
    assert face.mesh is not None

    def brightest(moving: np.ndarray, eye: Face) -> float:
        assert eye.mesh is not None
        x1, y1 = np.floor(eye.mesh[[33, 159, 145, 133]].min(axis=0)).astype(int)
        x2, y2 = np.ceil(eye.mesh[[33, 159, 145, 133]].max(axis=0)).astype(int)
        return float(np.percentile(moving[y1 - 2 : y2 + 3, x1 : x2 + 1].min(axis=-1), 97))

    assert brightest(frame, face) > 100
    assert brightest(*frames[shut]) < 95
