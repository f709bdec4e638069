"""S3FD face boxes and 2DFAN4 landmarks through the face-alignment package, from local files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from musetalk.checkpoints import check_keys, load_strictly, read_tensors
from musetalk.errors import EngineError
from musetalk.faces.base import Face, by_size
from musetalk.geometry import Box


class S3fdBoxes:
    """The face boxes that the reference's rule refers to.

    Raises:
        EngineError: face-alignment isn't installed.
        WeightsError: the weights are missing, damaged or of another network.
    """

    def __init__(self, weights: Path, device: str) -> None:
        try:
            from face_alignment.detection.sfd.net_s3fd import s3fd
            from face_alignment.detection.sfd.sfd_detector import SFDDetector
        except ImportError as e:
            raise not_installed(e) from e
        check_keys(s3fd(), read_tensors(weights), weights)
        self._detector = SFDDetector(device, str(weights))

    def boxes(self, frame: np.ndarray) -> list[Box]:
        """The faces of `frame` (H, W, 3) uint8 BGR, surest first, not beyond its left and upper edges."""
        rgb = np.ascontiguousarray(frame[:, :, ::-1])
        return [to_box(row) for row in self._detector.detect_from_image(rgb)]


def to_box(row: np.ndarray) -> Box:
    """Whole pixels of a detection (x1, y1, x2, y2, score), cut as the reference cuts them."""
    x1, y1, x2, y2 = np.clip(row[:4], 0, None).astype(int).tolist()
    return x1, y1, x2, y2


def not_installed(cause: ImportError) -> EngineError:
    """The error for face-alignment's absence."""
    return EngineError(
        f"face-alignment can't be imported: {cause}",
        "run make install-full, or use --face_detector mediapipe 请安装或改用mediapipe",
    )


class S3fdDetector:
    """S3FD boxes with 2DFAN4's 68 landmarks (Bulat and Tzimiropoulos 2017).

    Raises:
        EngineError: face-alignment isn't installed.
        WeightsError: weights are missing, damaged or of another network.
    """

    name = "s3fd"

    def __init__(self, s3fd_weights: Path, landmark_weights: Path, device: str) -> None:
        self._alignment = _make_alignment(s3fd_weights, landmark_weights, device)

    def detect(self, frame: np.ndarray) -> list[Face]:
        """The faces of `frame` (H, W, 3) uint8 BGR, largest first."""
        rgb = np.ascontiguousarray(frame[:, :, ::-1])
        found = list(self._alignment.face_detector.detect_from_image(rgb))
        if not found:
            return []
        landmarks = self._alignment.get_landmarks_from_image(rgb, found)
        return by_size(
            Face(points.astype(np.float32), to_box(row)) for points, row in zip(landmarks, found, strict=True)
        )


def _make_alignment(s3fd_weights: Path, landmark_weights: Path, device: str) -> Any:
    """face-alignment's object with both networks from local files; by itself it would download them."""
    try:
        from face_alignment.api import FaceAlignment, LandmarksType
        from face_alignment.detection.sfd.net_s3fd import s3fd
        from face_alignment.models import FAN
    except ImportError as e:
        raise not_installed(e) from e

    class LocalAlignment(FaceAlignment):
        """Takes 2DFAN4 from `landmark_weights`."""

        def _load_native(self, network_name: str, network_size: int, device: str, dtype: Any) -> Any:
            network = FAN(network_size)
            load_strictly(network, read_tensors(landmark_weights), landmark_weights)
            return network.to(device, dtype=dtype).eval()

    check_keys(s3fd(), read_tensors(s3fd_weights), s3fd_weights)
    detector = {"path_to_detector": str(s3fd_weights)}
    return LocalAlignment(LandmarksType.TWO_D, device=device, face_detector_kwargs=detector, compile=False)
