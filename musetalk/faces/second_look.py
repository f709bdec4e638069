"""A second look at what was taken for a face: another detector and the mesh again, on the face set upright.

A mesh looks like a face wherever it is laid, on hair, cloth or gravel too; its own shape tells nothing. On a
face the two agree to a few hundredths of the eyes' distance, elsewhere they don't. The upper face will
do: below a mask or a hand the mesh guesses, and what it guesses moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from musetalk.faces.base import Face
from musetalk.faces.head import CHIN, FOREHEAD, LEFT_BROW, LEFT_EYE, RIGHT_BROW, RIGHT_EYE

SIDE = 256  # pixels of the picture that is looked at
ROOM = 1.9  # its side over the face's
LEAST_SCORE = 0.65  # of the detector
MESH_APART = 0.04  # of the outer eye corners' distance, on average over the mesh or over its upper part
POINTS_APART = 0.3  # of it, at most over the detector's points
LEAST_INSIDE = 0.5  # of the mesh, within the frame
LEAST_EYES = 1.0  # pixels between the eye corners

# what nothing in front of the mouth hides: eyes, brows, forehead and the nose's root
_UPPER_FACE = [*RIGHT_EYE, *LEFT_EYE, *RIGHT_BROW, *LEFT_BROW, 168, 6, 197, 195, 122, 351, 10, 151, 9, 8]
_EYES = (33, 263)  # outer corners, right and left
_TEMPLES = (234, 454)
# what MediaPipe's detector gives first: the right and the left eye, the nose's tip, the mouth's middle
_DETECTOR_POINTS = ((33, 133, 159, 145), (362, 263, 386, 374), (1,), (13, 14))


def roll(mesh: np.ndarray) -> float:
    """Degrees by which the line of the eyes is turned clockwise in the picture, -180 to 180."""
    across, down = mesh[_EYES[1]] - mesh[_EYES[0]]
    return float(np.degrees(np.arctan2(down, across)))


class SecondLook:
    """Decides whether a mesh lies on a face.

    Args:
        meshes: finds meshes in a still picture.
    """

    def __init__(self, meshes: Callable[[np.ndarray], list[Face]]) -> None:
        self._meshes = meshes
        self._detector: Any = None

    def confirms(self, frame: np.ndarray, face: Face) -> bool:
        """Whether `face` of `frame` (H, W, 3) uint8 BGR is one."""
        assert face.mesh is not None
        height, width = frame.shape[:2]
        within = (face.mesh >= 0).all(axis=1) & (face.mesh < [width, height]).all(axis=1)
        if within.mean() < LEAST_INSIDE:
            return False
        upright, mesh = set_upright(frame, face.mesh)
        eyes = float(np.linalg.norm(mesh[_EYES[1]] - mesh[_EYES[0]]))
        return eyes >= LEAST_EYES and self._agrees(upright, mesh, eyes) and self._detects(upright, mesh, eyes)

    def _agrees(self, upright: np.ndarray, mesh: np.ndarray, eyes: float) -> bool:
        again = [face.mesh for face in self._meshes(upright) if face.mesh is not None]
        distances = [np.linalg.norm(other - mesh, axis=1) for other in again]
        apart = [min(each.mean(), each[_UPPER_FACE].mean()) for each in distances]
        return min(apart, default=np.inf) <= MESH_APART * eyes

    def _detects(self, upright: np.ndarray, mesh: np.ndarray, eyes: float) -> bool:
        """Whether the detector sees the face where the mesh is, and surer so than with it on its head.

        On a face that is upside down it takes the forehead for a chin, and the mesh agrees.
        """
        known = np.array([mesh[list(points)].mean(axis=0) for points in _DETECTOR_POINTS])
        scores = [
            score
            for score, points in self._detections(upright)
            if np.linalg.norm(points - known, axis=1).max() <= POINTS_APART * eyes
        ]
        overturned = [score for score, _ in self._detections(np.ascontiguousarray(upright[::-1, ::-1]))]
        return bool(scores) and max(scores) > max(overturned, default=0.0)

    def _detections(self, picture: np.ndarray) -> list[tuple[float, np.ndarray]]:
        """Score and points (4, 2) of what the detector finds in a square picture."""
        import cv2

        if self._detector is None:
            from mediapipe.python.solutions.face_detection import FaceDetection

            self._detector = FaceDetection(model_selection=0, min_detection_confidence=LEAST_SCORE)
        found = self._detector.process(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).detections or ()
        result = []
        for detection in found:
            points = detection.location_data.relative_keypoints[: len(_DETECTOR_POINTS)]
            result.append((detection.score[0], SIDE * np.array([(point.x, point.y) for point in points])))
        return result


def set_upright(frame: np.ndarray, mesh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A square picture of the face with level eyes, black beyond the frame, and the mesh in it."""
    import cv2

    middle = mesh[[FOREHEAD, CHIN, *_TEMPLES]].mean(axis=0)
    sides = [float(np.linalg.norm(mesh[a] - mesh[b])) for a, b in ((FOREHEAD, CHIN), _TEMPLES)]
    scale = SIDE / (ROOM * max(*sides, 1.0))
    angle = np.radians(-roll(mesh))
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.column_stack([turn, SIDE / 2 - turn @ middle])
    upright = cv2.warpAffine(
        frame, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    return upright, mesh @ turn.T + matrix[:, 2]
