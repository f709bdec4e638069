"""MediaPipe's face mesh: the default detector, small enough to run anywhere.

The mesh has no box of its own, so its bounding box stands for the detection: it spans hairline to chin
and temple to temple, as the reference's S3FD boxes do. MediaPipe looks at the whole frame in 128²
pixels and misses faces that are very small or fill the frame; a still without a face is therefore
searched again on overlapping tiles and with a margin around it. What it finds is looked at a second time
before it is believed: in a video when a face is found, not while it is tracked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from musetalk.config import MEDIAPIPE_PACKAGE
from musetalk.errors import EngineError
from musetalk.faces.base import Face, by_size
from musetalk.faces.head import MESH_TO_68
from musetalk.faces.second_look import SecondLook
from musetalk.geometry import Box, bounding_box, overlap

log = logging.getLogger(__name__)
_STDERR = 2  # file descriptor
_MAX_FACES = 4
_MIN_FACE = 32  # pixels, the longer side of a detection worth a template; its mouth is 8 wide
_SEARCH_EVERY = 25  # frames of a video without a face between two thorough searches
_TILE_SHARES = (0.6, 0.3, 0.15)  # of the frame's longer side; a face is seen from 1/8 of a tile
_SAME_FACE = 0.3  # intersection over union of two detections of one face


class MediapipeDetector:
    """Face mesh of 478 points by MediaPipe FaceMesh with refined lips and irises.

    Args:
        video: track from frame to frame instead of searching each frame anew.

    Raises:
        EngineError: MediaPipe isn't installed.
    """

    name = "mediapipe"

    def __init__(self, video: bool = False) -> None:
        self._still = _FaceMesh(static=True)
        self._tracker = _FaceMesh(static=False) if video else None
        self._second_look = SecondLook(self._still.faces)
        self._last_box: Box | None = None
        self._missed = 0

    def detect(self, frame: np.ndarray) -> list[Face]:
        """The faces of `frame` (H, W, 3) uint8 BGR, largest first; in a video the one it follows."""
        if self._tracker is None:
            return self._seen(frame) or self._search(frame)
        faces = self._track(frame, self._tracker)
        self._missed = 0 if faces else self._missed + 1
        self._last_box = faces[0].detection if faces else self._last_box
        return faces

    def _track(self, frame: np.ndarray, tracker: _FaceMesh) -> list[Face]:
        """The tracker's face while it is the one followed, else a new search, nearby first.

        The tracker knows one face only, because looking for a second one costs a detection in
        every frame.
        """
        tracked = tracker.faces(frame)
        last = self._last_box
        if last is not None and any(overlap(face.detection, last) > _SAME_FACE for face in tracked):
            return tracked
        tracked = self._confirmed(frame, tracked)
        near = self._on_tile(frame, _grown(last)) if last is not None else self._seen(frame)
        if near or tracked:
            return near or tracked
        return self._search(frame) if self._missed % _SEARCH_EVERY == 0 else []

    def _seen(self, image: np.ndarray) -> list[Face]:
        """The faces of a still picture that a second look confirms."""
        return self._confirmed(image, self._still.faces(image))

    def _confirmed(self, image: np.ndarray, faces: list[Face]) -> list[Face]:
        return [face for face in faces if self._second_look.confirms(image, face)]

    def _search(self, frame: np.ndarray) -> list[Face]:
        """Faces too large or too small for a plain look at the whole frame."""
        height, width = frame.shape[:2]
        margin = max(height, width) // 2
        faces = self._on_tile(frame, (-margin, -margin, width + margin, height + margin))
        for share in _TILE_SHARES:
            if faces:
                break
            faces = _distinct(
                face for tile in _tiles(height, width, share) for face in self._on_tile(frame, tile)
            )
        return faces

    def _on_tile(self, frame: np.ndarray, tile: Box) -> list[Face]:
        """The faces found on `tile` alone, black where it leaves the frame, in pixels of the frame."""
        x1, y1, x2, y2 = tile
        inside = frame[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
        if not inside.size:
            return []
        image = np.zeros((y2 - y1, x2 - x1, 3), dtype=np.uint8)
        top, left = max(-y1, 0), max(-x1, 0)
        image[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return [_moved(face, x1, y1) for face in self._seen(image)]


class _FaceMesh:
    """MediaPipe's solution object, made when it is first needed."""

    def __init__(self, static: bool) -> None:
        self._static = static
        self._solution: Any = None

    def faces(self, frame: np.ndarray) -> list[Face]:
        import cv2

        rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if self._solution is None:
            self._solution = _make_solution(self._static)
        result = self._solution.process(rgb)
        height, width = frame.shape[:2]
        found = [_to_face(mesh.landmark, height, width) for mesh in result.multi_face_landmarks or ()]
        return by_size(face for face in found if _is_usable(face, height, width))


def _make_solution(static: bool) -> Any:
    try:
        from mediapipe.python.solutions.face_mesh import FaceMesh
    except ImportError as e:
        raise EngineError(
            f"mediapipe can't be imported: {e}", f"pip install --no-deps {MEDIAPIPE_PACKAGE} 请安装mediapipe"
        ) from e
    count = _MAX_FACES if static else 1
    return FaceMesh(static_image_mode=static, max_num_faces=count, refine_landmarks=True)


def _to_face(points: Iterable[Any], height: int, width: int) -> Face:
    """A face from MediaPipe's normalised points; its z has the scale of x."""
    mesh = np.array([(p.x * width, p.y * height, p.z * width) for p in points], dtype=np.float32)
    return face_of_mesh(mesh[:, :2].copy(), mesh[:, 2].copy())


def face_of_mesh(mesh: np.ndarray, mesh_z: np.ndarray) -> Face:
    """The face with this mesh (478, 2) and depth (478,), float32 pixels."""
    return Face(mesh[list(MESH_TO_68)], bounding_box(mesh), mesh, mesh_z)


def _is_usable(face: Face, height: int, width: int) -> bool:
    """Whether a face is large enough and its middle inside the frame."""
    x1, y1, x2, y2 = face.detection
    inside = 0 <= x1 + x2 <= 2 * width and 0 <= y1 + y2 <= 2 * height
    return inside and max(x2 - x1, y2 - y1) >= _MIN_FACE


def _moved(face: Face, x: int, y: int) -> Face:
    assert face.mesh is not None and face.mesh_z is not None
    return face_of_mesh(face.mesh + np.array([x, y], dtype=np.float32), face.mesh_z)


def _grown(box: Box) -> Box:
    """A box of twice the sides around the same middle."""
    x1, y1, x2, y2 = box
    half_width, half_height = (x2 - x1) // 2, (y2 - y1) // 2
    return x1 - half_width, y1 - half_height, x2 + half_width, y2 + half_height


def _tiles(height: int, width: int, share: float) -> Iterator[Box]:
    """Squares of `share` of the longer side that cover the frame, overlapping by half or more."""
    side = max(round(max(height, width) * share), 1)
    for y in _steps(height, side):
        for x in _steps(width, side):
            yield x, y, x + side, y + side


def _steps(length: int, side: int) -> list[int]:
    if side >= length:
        return [0]
    count = -(-2 * (length - side) // side) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _distinct(faces: Iterable[Face]) -> list[Face]:
    """`faces`, largest first, without repeats of one face seen on several tiles."""
    result: list[Face] = []
    for face in by_size(faces):
        if all(overlap(face.detection, other.detection) < _SAME_FACE for other in result):
            result.append(face)
    return result
