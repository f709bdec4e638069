"""One face followed through a template's pictures: which it is, where, and the boxes that are generated.

The decision a reader would question: all frames are held at once. The cache that is made of them holds
them at once too, and boxes can be smoothed without lag only when the whole clip has been seen.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from musetalk.config import MAX_TEMPLATE_BYTES, EngineConfig, EngineName, PreprocessingConfig
from musetalk.engines.base import FaceFrame
from musetalk.errors import InputError, NoFaceError
from musetalk.faces.base import Face, FaceDetector
from musetalk.geometry import (
    NO_FACE,
    Box,
    add_chin_margin,
    clamp_box,
    crop_box,
    follow_over_time,
    overlap,
    reference_bbox,
    shots,
    smooth_boxes,
    smooth_over_time,
)
from musetalk.preprocessing.cuts import find_cuts, thumbnail
from musetalk.preprocessing.source import SourceFrames, progress
from musetalk.templates.template import Template
from musetalk.templates.timeline import Timeline

log = logging.getLogger(__name__)

_LANDMARK_SIGMA = 1.5  # frames; takes off the detector's noise, leaves blinks and words
# what counts as the detector's noise, of the landmarks' root mean square distance from their middle:
# some three times what MediaPipe shows on a head at rest
SHORTEST_SHOWN = Fraction(1, 5)  # seconds that a face is seen at least, coming from nowhere
SETTLING = 4  # frames of a new shot in which a tracker may still be on its way from the last one's face
TRIED_TURNED = 3  # frames of a clip without a face that are turned in search of one
LOOKED_AT = 8  # faces of a clip whose mouths are looked at for what covers them
COVERED_SHARE = 0.25  # of those, from which it is said
_EYE_CORNERS = (36, 45)  # of the 68 points, the outer ones, right and left
_BRIDGE = [28, 29, 30]  # of the 68 points: the nose's middle and its neighbours on the bridge
_PLACE = 0.010
_TURN = 0.006
_SHAPE = 0.012


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


def without_flashes(faces: Sequence[Face | None], shortest: int) -> list[Face | None]:
    """`faces` without those that come out of nowhere and are gone again within `shortest` frames."""
    result = list(faces)
    start = 0
    for seen, run in itertools.groupby(faces, key=lambda face: face is not None):
        end = start + len(list(run))
        if seen and start > 0 and end < len(faces) and end - start < shortest:
            result[start:end] = [None] * (end - start)
        start = end
    return result


def looked_at_anew(
    faces: Sequence[Face | None],
    frames: Sequence[np.ndarray],
    cuts: Collection[int],
    detect: Callable[[np.ndarray], Sequence[Face]],
) -> list[Face | None]:
    """`faces` with those right behind a cut, where a tracker comes too late, found without one.

    Args:
        cuts: indices of the frames that begin another shot.
        detect: finds the faces of a picture on its own.
    """
    result = list(faces)
    for cut, end in pairwise([*sorted(cuts), len(faces)]):
        settled = min(cut + SETTLING, end - 1)
        for i in range(cut, min(cut + SETTLING, end)):
            if faces[i] is not None:
                result[i] = _follow(detect(frames[i]), faces[settled])
    return result


def _turns_to_upright(faces: Sequence[Face | None]) -> int:
    """Quarter turns anticlockwise that set the first face upright, within half of one."""
    face = next((face for face in faces if face is not None), None)
    if face is None:
        return 0
    across, down = face.landmarks68[_EYE_CORNERS[1]] - face.landmarks68[_EYE_CORNERS[0]]
    return round(math.degrees(math.atan2(down, across)) / 90) % 4


def _turns_to_a_face(
    faces: Sequence[Face | None],
    frames: Sequence[np.ndarray],
    settings: PreprocessingConfig,
    engine: EngineName,
    device: str,
) -> int:
    """Quarter turns anticlockwise that show a face in `frames`, where none was found; 0 where none do."""
    from musetalk.faces.choice import create_detector

    if not frames or any(face is not None for face in faces):
        return 0
    detector = create_detector(settings.face_detector, engine, device, video=False)
    for frame in frames[:: -(-len(frames) // TRIED_TURNED)]:
        for turns in (2, 1, 3):
            if detector.detect(np.ascontiguousarray(np.rot90(frame, turns))):
                return turns
    return 0


def _turn_all(frames: list[np.ndarray], turns: int) -> None:
    """Turns each frame in its place, so that they are held once."""
    for i, frame in enumerate(frames):
        frames[i] = np.ascontiguousarray(np.rot90(frame, turns))


def smooth_track(faces: Sequence[Face | None], cuts: Collection[int] = ()) -> list[Face | None]:
    """The faces of consecutive video frames with the detector's noise filtered off, without lag.

    Where a head is, how large and how turned, is filtered apart from its shape, and fast motion of either is
    followed. Frames without a face stay, and neither they nor cuts let one shot bleed into the next.

    Args:
        cuts: indices of the frames that begin another shot.
    """
    result = list(faces)
    for shot in shots([face.detection if face else NO_FACE for face in faces], cuts):
        run = [face for face in faces[shot] if face is not None]
        landmarks = _steady(np.stack([face.landmarks68 for face in run]))
        known = [face.mesh for face in run if face.mesh is not None]
        meshes = _steady(np.stack(known)) if len(known) == len(run) else [face.mesh for face in run]
        depths = _smooth([face.mesh_z for face in run])
        for i, face in enumerate(run):
            result[shot.start + i] = replace(face, landmarks68=landmarks[i], mesh=meshes[i], mesh_z=depths[i])
    return result


def _steady(points: np.ndarray) -> np.ndarray:
    """Landmarks (T, n, 2) of one shot without noise: place, size with turn, and shape, each filtered."""
    plane = points.astype(np.float64).view(np.complex128)[..., 0]
    place = plane.mean(axis=1)
    centred = plane - place[:, None]
    mean = centred.mean(axis=0)
    size = float(np.sqrt((np.abs(mean) ** 2).mean()))
    # least squares: the one complex factor that turns and scales the mean shape onto each frame's
    turn = (centred @ mean.conj()) / len(mean) / max(size, 1e-6) ** 2
    turn[turn == 0] = 1  # of a shape that is a point
    shape = centred / turn[:, None]
    place, turn = (
        _filtered(track[:, None], noise)[:, 0] for track, noise in ((place, _PLACE * size), (turn, _TURN))
    )
    steady = _filtered(shape, _SHAPE * size) * turn[:, None] + place[:, None]
    return np.stack([steady.real, steady.imag], axis=-1).astype(points.dtype)


def _filtered(track: np.ndarray, noise: float) -> np.ndarray:
    """A complex track (T, n) followed over time; `noise` is the length of what counts as noise."""
    values = np.ascontiguousarray(track).view(np.float64)
    return follow_over_time(values, _LANDMARK_SIGMA, noise / np.sqrt(2)).view(np.complex128)


def _smooth(values: Sequence[np.ndarray | None]) -> Sequence[np.ndarray | None]:
    known = [value for value in values if value is not None]
    return list(smooth_over_time(np.stack(known), _LANDMARK_SIGMA)) if len(known) == len(values) else values


def face_boxes(
    faces: Sequence[Face | None],
    frame_size: tuple[int, int],
    config: PreprocessingConfig,
    extra_margin: int,
    cuts: Collection[int] = (),
) -> list[Box]:
    """The box of each frame that the engine generates: the reference's, inside the frame.

    Args:
        faces: one per frame, None without a face.
        frame_size: height and width of the frames.
        config: gives `bbox_shift`.
        extra_margin: pixels added below the chin; 0 for MuseTalk 1.0.
        cuts: indices of the frames that begin another shot.

    Several frames are taken for a video and their boxes smoothed over time.
    """
    height, width = frame_size
    boxes = [
        reference_bbox(face.landmarks68, face.detection, config.bbox_shift) if face else NO_FACE
        for face in faces
    ]
    steady = smooth_boxes(boxes, cuts) if len(boxes) > 1 else boxes
    inside = [clamp_box(box, height, width) for box in steady]
    return [add_chin_margin(box, extra_margin, height) for box in inside]


def sensible_shifts(faces: Sequence[Face | None]) -> tuple[int, int]:
    """The least and the largest `bbox_shift` that leave the box on the face, in whole pixels.

    The box's upper edge may go as far as the nose's middle would go to its neighbours on the bridge.

    Source: MuseTalk, musetalk/utils/preprocessing.py, get_landmark_and_bbox: the range that it prints.
    """
    bridges = np.array([face.landmarks68[_BRIDGE, 1] for face in faces if face is not None])
    if not len(bridges):
        return 0, 0
    above, middle, below = bridges.mean(axis=0)
    return -max(round(float(below - middle)), 0), max(round(float(middle - above)), 0)


def _usable_settings(
    settings: PreprocessingConfig, shifts: tuple[int, int], engine: EngineName
) -> PreprocessingConfig:
    """`settings`; a `bbox_shift` that leaves the face is said, and kept within for lite."""
    low, high = shifts
    if low <= settings.bbox_shift <= high:
        return settings
    kept = min(max(settings.bbox_shift, low), high) if engine == "lite" else settings.bbox_shift
    log.warning(
        "bbox_shift %d moves the box out of the face, sensible are %d to %d 建议范围%s",
        settings.bbox_shift,
        low,
        high,
        f"; {kept} is taken" if kept != settings.bbox_shift else "",
    )
    return replace(settings, bbox_shift=kept)


@dataclass(frozen=True)
class TemplateSource:
    """The frames of a template with the face that it follows.

    Attributes:
        frames: (H, W, 3) uint8 BGR, all of one size.
        faces: the followed face per frame, smoothed over time; None where it isn't seen.
        bboxes: the boxes that the engine generates; `NO_FACE` without a face.
        timeline: the clip's own time; None of pictures.
        shifts: the least and the largest sensible `bbox_shift`.
        turn: quarter turns anticlockwise that bring the frames back to how the source shows them.
    """

    frames: list[np.ndarray]
    faces: Sequence[Face | None]
    bboxes: list[Box]
    timeline: Timeline | None
    shifts: tuple[int, int]
    turn: int

    @property
    def faced(self) -> list[int]:
        """Indices of the frames with a usable face."""
        return [i for i, bbox in enumerate(self.bboxes) if bbox != NO_FACE]

    def face(self, index: int) -> Face:
        """The face of a frame that has one."""
        face = self.faces[index]
        assert face is not None, "a box comes from a face"
        return face

    def covered_mouth(self) -> float | None:
        """The share of faces, of some spread over the clip, whose mouth is hidden; None without meshes."""
        from musetalk.faces.covered_mouth import COVERED, covered_score

        looked_at = self.faced[:: -(-len(self.faced) // LOOKED_AT)]
        meshes = [(i, mesh) for i in looked_at if (mesh := self.face(i).mesh) is not None]
        covered = [covered_score(self.frames[i], mesh) > COVERED for i, mesh in meshes]
        return sum(covered) / len(covered) if covered else None

    def face_frame(self, index: int) -> FaceFrame:
        """What an engine encodes of a frame with a face."""
        face = self.face(index)
        landmarks = face.landmarks68 if face.mesh is None else face.mesh
        return FaceFrame(self.frames[index], self.bboxes[index], landmarks, face.mesh_z)

    def template(self, latents: dict[int, Any], masks: Sequence[np.ndarray]) -> Template:
        """The finished template over its ping-pong cycle."""
        crops = [NO_FACE if bbox == NO_FACE else crop_box(bbox) for bbox in self.bboxes]
        every = [latents.get(i) for i in range(len(self.frames))]
        return Template.from_frames(self.frames, self.bboxes, every, masks, crops, self.timeline, self.turn)


def _held(read: SourceFrames, frames: list[np.ndarray], thumbnails: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames that are `read`, each also kept in `frames` and, small, in `thumbnails`."""
    for frame in read:
        if frames and frame.shape != frames[0].shape:
            raise InputError(f"the images in {read.source} differ in size", "make them all the same size")
        frames.append(frame)
        thumbnails.append(thumbnail(frame))
        if len(frames) * frame.nbytes > MAX_TEMPLATE_BYTES:
            raise read.too_large(len(frames), frame.shape)
        yield frame


def find_faces(
    source: Path,
    settings: PreprocessingConfig,
    engine: EngineName,
    config: EngineConfig,
    device: str,
    cancel: threading.Event | None = None,
) -> TemplateSource:
    """Reads a template's source and follows its largest face.

    Raises:
        CancelledRun: `cancel` was set.
        InputError: the source can't be read, is too long, or its frames differ in size.
        NoFaceError: no frame shows a usable face.
    """
    from musetalk.faces.choice import create_detector
    from musetalk.preprocessing.idle_motion import IDLE_FPS, idle_frames

    read = SourceFrames(source, settings)
    moving = read.moving
    detector = create_detector(settings.face_detector, engine, device, moving)
    frames: list[np.ndarray] = []
    thumbnails: list[np.ndarray] = []
    held = _held(read, frames, thumbnails)
    found = list(track(detector, progress(held, read.total, "detect 检测", cancel)))
    turns = _turns_to_upright(found) or _turns_to_a_face(found, frames, settings, engine, device)
    if turns:
        log.warning("the face in %s is turned, it is worked on upright 人脸已转正处理", source)
        _turn_all(frames, turns)
        upright = create_detector(settings.face_detector, engine, device, moving)
        found = list(track(upright, progress(frames, len(frames), "detect 检测", cancel)))
    cuts = find_cuts(thumbnails)
    if cuts:
        alone = create_detector(settings.face_detector, engine, device, video=False)
        found = looked_at_anew(found, frames, cuts, alone.detect)
    timeline = read.timeline()
    if timeline is not None:
        found = without_flashes(found, round(SHORTEST_SHOWN * timeline.fps))
    faces = smooth_track(found, cuts) if moving else found
    if settings.idle_motion:
        if moving:
            log.warning(
                "idle motion is for single images, %s moves by itself 视频模板忽略 --idle_motion", source
            )
        elif faces[0] is not None:
            frames, faces = map(list, zip(*idle_frames(frames[0], faces[0]), strict=True))
            timeline = Timeline.even(len(frames), IDLE_FPS)
    margin = 0 if (engine, config.models.version) == ("musetalk", "v1") else settings.extra_margin
    shifts = sensible_shifts(faces)
    settings = _usable_settings(settings, shifts, engine)
    bboxes = face_boxes(faces, frames[0].shape[:2], settings, margin, cuts)
    result = TemplateSource(frames, faces, bboxes, timeline, shifts, -turns % 4)
    if not result.faced:
        raise NoFaceError(
            f"ValueError: 未检测到有效面部 (no usable face in {source})",
            "检查模板图片质量，调整bbox_shift参数 (use a clear, frontal face, at least 64 pixels wide)",
        )
    return result
