"""What a face detector and a label mapper are, and how one face is followed through a video.

A detector sees one frame at a time. For a video it is made with ``video=True`` and shown the frames in
order: it may then track instead of searching anew. Smoothing comes afterwards, over the whole track,
because only a filter that sees the future has no lag.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from musetalk.geometry import Box


@dataclass(frozen=True)
class Face:
    """One face in one frame, in pixels of the frame.

    Attributes:
        landmarks68: (68, 2) float32, iBUG order.
        detection: the detector's own tight box, hairline to chin; it may leave the frame.
        mesh: (478, 2) float32 MediaPipe mesh, or None from detectors that have none.
        mesh_z: (478,) float32 depth, smaller is nearer, on the scale of the pixels; None without mesh.
    """

    landmarks68: np.ndarray
    detection: Box
    mesh: np.ndarray | None = None
    mesh_z: np.ndarray | None = None


class FaceDetector(Protocol):
    """Finds faces."""

    name: str

    def detect(self, frame: np.ndarray) -> list[Face]:
        """The faces of `frame` (H, W, 3) uint8 BGR, largest first; an empty list where none is."""
        ...


class LabelMapper(Protocol):
    """Parses a face into classes."""

    name: str

    def label_map(self, frame: np.ndarray, face: Face, crop: Box) -> np.ndarray:
        """(512, 512) uint8 CelebAMask-HQ classes of `crop` of `frame` (H, W, 3) uint8 BGR.

        What lies beyond the frame is black to the parser, as it is to the reference's.
        """
        ...


def by_size(faces: Iterable[Face]) -> list[Face]:
    """`faces`, largest detection first."""
    return sorted(faces, key=lambda face: -_area(face.detection))


def _area(box: Box) -> int:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
