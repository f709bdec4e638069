"""Label maps drawn from landmarks, looked at where they must hold on a real face."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from musetalk.faces import labels
from musetalk.faces.base import Face
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.faces.parsing import LandmarkLabelMapper
from musetalk.geometry import Box


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> tuple[np.ndarray, Face]:
    from tests.conftest import PORTRAIT

    frame = cv2.imread(str(PORTRAIT))
    assert frame is not None
    [face] = MediapipeDetector().detect(frame)
    return frame, face


def _crop(face: Face) -> Box:
    x1, y1, x2, y2 = face.detection
    half = round(0.75 * max(x2 - x1, y2 - y1))
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    return x - half, y - half, x + half, y + half


def _label_at(label_map: np.ndarray, crop: Box, point: np.ndarray) -> int:
    column, row = ((point - crop[:2]) * labels.LABEL_SIDE / (crop[2] - crop[0])).astype(int)
    return int(label_map[row, column])


@pytest.mark.parametrize("with_mesh", [True, False])
def test_parts_lie_where_the_landmarks_say(found: tuple[np.ndarray, Face], with_mesh: bool) -> None:
    frame, face = found
    if not with_mesh:
        face = replace(face, mesh=None, mesh_z=None)
    crop = _crop(face)
    label_map = LandmarkLabelMapper().label_map(frame, face, crop)
    points = face.landmarks68
    assert label_map.shape == (512, 512) and label_map.dtype == np.uint8
    assert _label_at(label_map, crop, points[36:42].mean(axis=0)) == labels.EYES[1]
    assert _label_at(label_map, crop, points[42:48].mean(axis=0)) == labels.EYES[0]
    assert _label_at(label_map, crop, (points[29] + points[30]) / 2) == labels.NOSE
    assert _label_at(label_map, crop, (points[51] + points[62]) / 2) == labels.UPPER_LIP
    assert _label_at(label_map, crop, (points[57] + points[66]) / 2) == labels.LOWER_LIP
    assert _label_at(label_map, crop, (points[62] + points[66]) / 2) == labels.MOUTH
    assert _label_at(label_map, crop, (points[8] + points[57]) / 2) == labels.SKIN
    down = points[8] - points[57]
    assert _label_at(label_map, crop, points[8] + down * 0.7) == labels.NECK
    assert label_map[0, 0] == label_map[0, -1] == labels.BACKGROUND


def test_a_face_beyond_the_crop_leaves_it_empty(found: tuple[np.ndarray, Face]) -> None:
    frame, face = found
    away = replace(face, landmarks68=face.landmarks68 + 9000, mesh=None)
    assert not LandmarkLabelMapper().label_map(frame, away, _crop(face)).any()
