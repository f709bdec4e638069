"""Label maps drawn from landmarks: a face parser that needs no weights.

Only the classes that blend masks can use are drawn. The neck is a guess: a strip that hangs from the
jaw's corners along the face's own vertical, as far down as a collar usually is.
"""

from __future__ import annotations

import numpy as np

from musetalk.faces import labels
from musetalk.faces.base import Face
from musetalk.faces.head import (
    FACE_OVAL,
    INNER_LIPS,
    INNER_LOWER_LIP,
    INNER_UPPER_LIP,
    LEFT_BROW,
    LEFT_EYE,
    NOSE_OUTLINE,
    OUTER_LOWER_LIP,
    OUTER_UPPER_LIP,
    RIGHT_BROW,
    RIGHT_EYE,
)
from musetalk.geometry import Box

_NECK_LENGTH = 0.5  # of the distance from the nose's root to the chin
_NECK_NARROWING = 0.1  # of the neck's width, at either side
_SUBPIXEL_BITS = 4

_Polygons = tuple[tuple[int, tuple[int, ...]], ...]  # class, and indices of landmarks

_MESH_POLYGONS: _Polygons = (
    (labels.SKIN, FACE_OVAL),
    (labels.NOSE, NOSE_OUTLINE),
    (labels.BROWS[0], LEFT_BROW),
    (labels.BROWS[1], RIGHT_BROW),
    (labels.EYES[0], LEFT_EYE),
    (labels.EYES[1], RIGHT_EYE),
    (labels.UPPER_LIP, OUTER_UPPER_LIP[::-1] + INNER_UPPER_LIP),
    (labels.LOWER_LIP, OUTER_LOWER_LIP + INNER_LOWER_LIP[::-1]),
    (labels.MOUTH, INNER_LIPS),
)
_POINT_POLYGONS: _Polygons = (
    (labels.SKIN, (*range(17), *range(26, 16, -1))),
    (labels.NOSE, (27, 31, 32, 33, 34, 35)),
    (labels.EYES[0], tuple(range(42, 48))),
    (labels.EYES[1], tuple(range(36, 42))),
    (labels.UPPER_LIP, (*range(48, 55), *range(64, 59, -1))),
    (labels.LOWER_LIP, (*range(54, 60), 48, 60, 67, 66, 65, 64)),
    (labels.MOUTH, tuple(range(60, 68))),
)
_JAW_CORNERS = (4, 12)  # of the 68 points
_NOSE_ROOT, _CHIN = 27, 8


class LandmarkLabelMapper:
    """Draws label maps from the mesh, or from the 68 points where a detector has no mesh."""

    name = "landmarks"

    def label_map(self, frame: np.ndarray, face: Face, crop: Box) -> np.ndarray:
        """(512, 512) uint8 classes of `crop`; the frame's pixels are not looked at."""
        result = np.full((labels.LABEL_SIDE, labels.LABEL_SIDE), labels.BACKGROUND, dtype=np.uint8)
        _fill(result, labels.NECK, _on_map(_neck(face.landmarks68), crop))
        polygons = _POINT_POLYGONS if face.mesh is None else _MESH_POLYGONS
        on_map = _on_map(face.landmarks68 if face.mesh is None else face.mesh, crop)
        for label, indices in polygons:
            _fill(result, label, on_map[list(indices)])
        return result


def _on_map(points: np.ndarray, crop: Box) -> np.ndarray:
    """`points` (n, 2) of the frame in pixel centres of the label map."""
    scale = labels.LABEL_SIDE / (crop[2] - crop[0])
    return (points - np.array(crop[:2])) * scale - 0.5


def _neck(landmarks68: np.ndarray) -> np.ndarray:
    """A quadrilateral (4, 2) from the jaw's corners downwards."""
    corners = landmarks68[list(_JAW_CORNERS)]
    down = (landmarks68[_CHIN] - landmarks68[_NOSE_ROOT]) * (1 + _NECK_LENGTH)
    inwards = (corners[::-1] - corners) * _NECK_NARROWING
    top = corners + inwards
    return np.concatenate([top, top[::-1] + down])


def _fill(label_map: np.ndarray, label: int, polygon: np.ndarray) -> None:
    import cv2

    points = np.rint(polygon * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(label_map, [points], label, cv2.LINE_8, _SUBPIXEL_BITS)
