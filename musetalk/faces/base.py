"""What a face detector and a label mapper are, and how one face is followed through a video.

A detector sees one frame at a time. For a video it is made with ``video=True`` and shown the frames in
order: it may then track instead of searching anew. Smoothing comes afterwards, over the whole track,
because only a filter that sees the future has no lag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from musetalk.config import PreprocessingConfig
from musetalk.geometry import (
    NO_FACE,
    Box,
    add_chin_margin,
    clamp_box,
    overlap,
    reference_bbox,
    shots,
    smooth_boxes,
    smooth_over_time,
)

_LANDMARK_SIGMA = 1.5  # frames; takes off the detector's noise, leaves blinks and words


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


def track(detector: FaceDetector, frames: Iterable[np.ndarray]) -> Iterator[Face | None]:
    """The one face of each frame that the template follows, None where it isn't seen.

    The largest face is chosen first; from then on the face that overlaps it most, as long as one
    does, so that a passer-by who comes nearer to the camera doesn't take over.
    """
    previous: Face | None = None
    for frame in frames:
        faces = detector.detect(frame)
        face = _follow(faces, previous)
        previous = face or previous
        yield face


def _follow(faces: Sequence[Face], previous: Face | None) -> Face | None:
    if previous is not None:
        shared = [overlap(face.detection, previous.detection) for face in faces]
        if shared and max(shared) > 0:
            return faces[shared.index(max(shared))]
    return faces[0] if faces else None


def smooth_track(faces: Sequence[Face | None]) -> list[Face | None]:
    """The faces of consecutive video frames with the detector's noise filtered off, without lag.

    Frames without a face stay, and neither they nor cuts let one shot bleed into the next.
    """
    result = list(faces)
    for shot in shots([face.detection if face else NO_FACE for face in faces]):
        run = [face for face in faces[shot] if face is not None]
        landmarks = smooth_over_time(np.stack([face.landmarks68 for face in run]), _LANDMARK_SIGMA)
        meshes = _smooth([face.mesh for face in run])
        depths = _smooth([face.mesh_z for face in run])
        for i, face in enumerate(run):
            result[shot.start + i] = replace(face, landmarks68=landmarks[i], mesh=meshes[i], mesh_z=depths[i])
    return result


def _smooth(values: Sequence[np.ndarray | None]) -> Sequence[np.ndarray | None]:
    known = [value for value in values if value is not None]
    return list(smooth_over_time(np.stack(known), _LANDMARK_SIGMA)) if len(known) == len(values) else values


def face_boxes(
    faces: Sequence[Face | None],
    frame_size: tuple[int, int],
    config: PreprocessingConfig,
    extra_margin: int,
) -> list[Box]:
    """The box of each frame that the engine generates: the reference's, inside the frame.

    Args:
        faces: one per frame, None without a face.
        frame_size: height and width of the frames.
        config: gives `bbox_shift`.
        extra_margin: pixels added below the chin; 0 for MuseTalk 1.0.

    Several frames are taken for a video and their boxes smoothed over time.
    """
    height, width = frame_size
    boxes = [
        reference_bbox(face.landmarks68, face.detection, config.bbox_shift) if face else NO_FACE
        for face in faces
    ]
    steady = smooth_boxes(boxes) if len(boxes) > 1 else boxes
    inside = [clamp_box(box, height, width) for box in steady]
    return [add_chin_margin(box, extra_margin, height) for box in inside]


def _area(box: Box) -> int:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
