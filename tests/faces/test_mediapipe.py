"""MediaPipe on a real portrait: small, large, cut off, several and moving faces."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.faces.base import Face
from musetalk.faces.head import INNER_LIPS, LEFT_EYE, MESH_TO_68, RIGHT_EYE
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.geometry import overlap
from musetalk.preprocessing.following import track


@pytest.fixture(scope="module")
def detector() -> MediapipeDetector:
    return MediapipeDetector()


@pytest.fixture
def image(portrait: Path) -> np.ndarray:
    frame = cv2.imread(str(portrait))
    assert frame is not None
    return frame


def _middle(face: Face, indices: tuple[int, ...]) -> np.ndarray:
    assert face.mesh is not None
    return face.mesh[list(indices)].mean(axis=0)


def test_a_portrait_has_one_face(detector: MediapipeDetector, image: np.ndarray) -> None:
    [face] = detector.detect(image)
    assert face.mesh is not None and face.mesh_z is not None
    assert face.mesh.shape == (478, 2) and face.mesh.dtype == np.float32
    assert face.mesh_z.shape == (478,) and face.mesh_z.dtype == np.float32
    np.testing.assert_array_equal(face.landmarks68, face.mesh[list(MESH_TO_68)])
    right_eye, left_eye, mouth = (_middle(face, part) for part in (RIGHT_EYE, LEFT_EYE, INNER_LIPS))
    assert right_eye[0] < mouth[0] < left_eye[0]
    assert mouth[1] > max(right_eye[1], left_eye[1])
    assert 60 < face.detection[2] - face.detection[0] < 130


def test_same_input_same_points(detector: MediapipeDetector, image: np.ndarray) -> None:
    [first], [second] = detector.detect(image), MediapipeDetector().detect(image)
    np.testing.assert_array_equal(first.landmarks68, second.landmarks68)


def test_68_points_follow_the_ibug_order(detector: MediapipeDetector, image: np.ndarray) -> None:
    [face] = detector.detect(image)
    points = face.landmarks68
    assert points[:17, 0].argmin() <= 1 and points[:17, 0].argmax() >= 15
    assert points[:, 1].argmax() in (7, 8, 9)
    assert (np.diff(points[27:31, 1]) > 0).all()
    assert (np.diff(points[48:55, 0]) > 0).all()
    thirds = (points[28:31, 1] - points[27, 1]) / (points[30, 1] - points[27, 1])
    np.testing.assert_allclose(thirds, [1 / 3, 2 / 3, 1], atol=0.15)


def test_a_small_face_in_a_large_picture(detector: MediapipeDetector, image: np.ndarray) -> None:
    [near] = detector.detect(image)
    picture = np.full((1400, 2400, 3), 90, np.uint8)
    picture[1000:1350, 1900:2250] = cv2.resize(image, (350, 350), interpolation=cv2.INTER_AREA)
    [face] = detector.detect(picture)
    expected = near.landmarks68 * (350 / 512) + [1900, 1000]
    assert np.abs(face.landmarks68 - expected).mean() < 2


def test_a_face_that_fills_the_picture(detector: MediapipeDetector, image: np.ndarray) -> None:
    [near] = detector.detect(image)
    x1, y1, x2, y2 = near.detection
    close = cv2.resize(image[y1 : y2 + 2, x1:x2], None, fx=5, fy=5, interpolation=cv2.INTER_CUBIC)
    [face] = detector.detect(close)
    expected = (near.landmarks68 - [x1, y1]) * 5
    assert np.abs(face.landmarks68 - expected).mean() < 0.05 * close.shape[1]


def test_the_largest_of_several_comes_first(detector: MediapipeDetector, image: np.ndarray) -> None:
    upper = image[:256, 100:356]
    wide = np.full((256, 512, 3), 90, np.uint8)
    wide[:, 256:] = upper
    wide[28:228, 28:228] = cv2.resize(upper, (200, 200), interpolation=cv2.INTER_AREA)
    large, small = detector.detect(wide)
    assert large.detection[0] > 256 > small.detection[0]


@pytest.mark.parametrize("side", [1, 17, 300])
def test_nothing_where_no_face_is(detector: MediapipeDetector, side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    assert detector.detect(noise) == []


def _clip(image: np.ndarray, shifts: list[int | None]) -> list[np.ndarray]:
    """The portrait moved to the right by each shift; a grey frame for None."""
    grey = np.full_like(image, 128)
    return [grey if shift is None else np.roll(image, shift, axis=1) for shift in shifts]


def test_a_video_is_tracked_through_a_gap(image: np.ndarray) -> None:
    shifts: list[int | None] = [*range(0, 40, 2), *[None] * 5, *range(120, 140, 2)]
    faces = list(track(MediapipeDetector(video=True), _clip(image, shifts)))
    assert [face is None for face in faces] == [shift is None for shift in shifts]
    [still] = MediapipeDetector().detect(image)
    for face, shift in zip(faces, shifts, strict=True):
        if face is not None and shift is not None:
            assert np.abs(face.landmarks68 - still.landmarks68 - [shift, 0]).mean() < 2


def test_a_video_keeps_to_its_face_beside_another(image: np.ndarray) -> None:
    [still] = MediapipeDetector().detect(image)
    smaller = cv2.resize(image[: still.detection[3] + 40], None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
    frames = []
    for i in range(12):
        wide = np.full((512, 1024, 3), 90, np.uint8)
        wide[:, 512:] = image if i else 90
        wide[20 : 20 + smaller.shape[0], : smaller.shape[1]] = smaller
        frames.append(wide)
    faces = list(track(MediapipeDetector(video=True), frames))
    assert all(face is not None and face.detection[0] < 512 for face in faces)
    boxes = [face.detection for face in faces if face is not None]
    assert all(overlap(box, boxes[0]) > 0.8 for box in boxes)
