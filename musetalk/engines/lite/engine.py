"""The lite engine: a portrait's own pixels, moved by the rig, with a painted mouth interior.

What it caches per template frame is only the face mesh, because fields and layers are made from frame
and mesh faster than they could be read from disk; a generator keeps the few it used last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from musetalk import warp
from musetalk.config import EngineName
from musetalk.engines.base import FaceFrame
from musetalk.engines.lite import interior, rig
from musetalk.engines.lite.parameters import CHIN_GAIN, HIGH, LOW, PARAMETER_INDEX, articulated
from musetalk.errors import CacheError, EngineError
from musetalk.faces.head import (
    INNER_LOWER_LIP,
    INNER_UPPER_LIP,
    MESH_POINTS,
    HeadFrame,
    eye_distance,
    head_frame,
)

if TYPE_CHECKING:
    from musetalk.engines.lite.speech import MouthListener, MouthNetwork, SpeechState
    from musetalk.geometry import Box
    from musetalk.templates.template import Template

WORKING_SIDE = 1024  # pixels; larger face boxes are made smaller before they are warped
KEPT_BYTES = 48 << 20  # of prepared frames: a few hundred small faces or three of the largest
JAW_GAIN = 0.95 * CHIN_GAIN  # eye distances that the lower teeth descend at jaw_open 1
TONGUE_SHARE = 0.20  # of the jaw's way that the tongue's back goes
ROUNDED_EDGE = 0.02  # eye distances that the upper teeth show at most below fully rounded lips
TONGUE_RISE = 0.035  # eye distances at tongue_up 1
LOOKED_AT = 7  # template frames, about, that tell what the mouth's inside looks like
FULL_MASK = 200  # of 255; above it at most a fifth of the template shows through, too little to be seen
PRESSED = 0.018  # eye distances of overlap that draw the line between lips in full
LINE_WIDTH = 0.007  # eye distances
LINE_STRENGTH = 0.65
MOUTH_BESIDE, MOUTH_ABOVE, MOUTH_BELOW = 0.12, 0.16, 0.46  # eye distances that an open mouth may reach beyond
OPENING_MARGIN = 0.015, 1.5  # eye distances and lattice cells round the moved lips that are composed
EDGE_REST = 0.018  # eye distances inside the blend mask's edge where nothing moves
EDGE_SLOPE = 0.85  # of the way to the blend mask's edge that pixels may move; more would smear


@dataclass(frozen=True)
class PreparedFace:
    """Everything about one template frame that does not depend on the sound.

    Attributes:
        measured: its picture and geometry.
        lattice: over the part of the picture that may move.
        fields: (2, coefficients, rows, columns, 2) pixels, of both sheets at the lattice's nodes.
        room: (rows, columns, 1) pixels that nodes may move.
        node_distances: (rows, columns, 2) from the inner lip edges.
        pixels: (h, w, 2) coordinates of the lattice's rectangle.
        between: (h, w) 1 between the mouth's corners, over the mouth's rectangle.
        contour: (2, 11, 2) pixels of the upper and the lower inner lip.
        look, layers: of the mouth's inside.
    """

    measured: MeasuredFace
    lattice: warp.Lattice
    fields: np.ndarray
    room: np.ndarray
    node_distances: np.ndarray
    pixels: np.ndarray
    between: np.ndarray
    contour: np.ndarray
    look: interior.Look
    layers: interior.Layers

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        measured = self.measured
        of_measured = (measured.picture, measured.here, measured.distances)
        own = (self.fields, self.room, self.node_distances, self.pixels, self.between)
        arrays = (*own, *of_measured, *self.layers)
        return sum(array.nbytes for array in arrays)


class LiteEngine:
    """The lite engine; see `musetalk.engines.base.Engine`.

    Args:
        models_dir: the folder with the mouth network's weights (models/lite).
    """

    name: EngineName = "lite"
    device = "cpu"
    dtype = "float32"
    fingerprint = "lite-mesh478-1"

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir

    def encode(self, faces: Iterable[FaceFrame]) -> Iterator[np.ndarray]:
        """The face mesh per frame: (478, 3) float32 pixels from the box's upper left corner.

        Raises:
            EngineError: the detector gave 68 points instead of a mesh.
        """
        for face in faces:
            if len(face.landmarks) != MESH_POINTS or face.landmarks_z is None:
                raise EngineError(
                    f"the lite engine needs a face mesh of {MESH_POINTS} points, got {len(face.landmarks)}",
                    "run preprocessing with --face_detector mediapipe",
                )
            corner = np.array(face.bbox[:2], np.float32)
            yield np.column_stack([face.landmarks - corner, face.landmarks_z]).astype(np.float32)

    def listen(self, fps: Fraction, *, live: bool = False, state: SpeechState | None = None) -> MouthListener:
        """A listener whose prompts are rig parameters (k, 10) float32; see `parameters.RIG_PARAMETERS`."""
        return self._mouth_network.listen(fps, live=live, state=state)

    def articulate(self, audio_prompts: np.ndarray, articulation: float) -> np.ndarray:
        """Rig parameters (B, 10) with the mouth's movements `articulation` times as large."""
        return articulated(audio_prompts, articulation)

    @cached_property
    def _mouth_network(self) -> MouthNetwork:
        from musetalk.engines.lite.speech import MouthNetwork

        return MouthNetwork(self.models_dir)

    def open(self, template: Template) -> LiteGenerator:
        """A generator on `template`.

        Raises:
            CacheError: its latents are not face meshes.
        """
        for position in sorted(set(template.unique)):
            latent = template.latents[position]
            if template.has_face(position) and not _is_mesh(latent):
                raise CacheError(
                    f"frame {position} of the template holds no face mesh 模板缓存不是由 lite 引擎生成",
                    "run preprocessing again with --engine lite 请用 --engine lite 重新预处理",
                )
        return LiteGenerator(template)


def _is_mesh(latent: object) -> bool:
    """Whether a latent is a face mesh whose eyes are apart, as every detected one is."""
    if not isinstance(latent, np.ndarray) or latent.shape != (MESH_POINTS, 3):
        return False
    return bool(np.isfinite(latent).all() and eye_distance(latent[:, :2]) > 1)


class LiteGenerator:
    """Faces of one template from rig parameters; see `musetalk.engines.base.Generator`."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._motions = _own_motions(template)
        self._look: interior.Look | None = None
        self._prepared: OrderedDict[int, PreparedFace] = OrderedDict()
        self._preparing = threading.Lock()

    def generate(self, rig_parameters: np.ndarray, indices: Sequence[int]) -> list[np.ndarray]:
        """Faces (h, w, 3) uint8 BGR of the frames' boxes for rig parameters (B, 10)."""
        parameters = np.clip(np.asarray(rig_parameters, np.float32), LOW, HIGH)
        coefficients = rig.coefficients(parameters)
        faces = []
        for i, index in enumerate(indices):
            position = self._template.unique[index % len(self._template)]
            rest = self._motions[position].rest
            with self._preparing:
                face = self._face(position)
            faces.append(render(face, parameters[i], coefficients[i] + rest))
        return faces

    def _face(self, position: int) -> PreparedFace:
        if position in self._prepared:
            self._prepared.move_to_end(position)
            return self._prepared[position]
        template = self._template
        mask = _mask_in_box(
            template.masks[position], template.crop_boxes[position], template.bboxes[position]
        )
        self._look = self._look or self._common_look()
        face = prepare_face(self._measure(position), mask, self._look)
        self._prepared[position] = face
        while len(self._prepared) > 1 and self.kept_bytes > KEPT_BYTES:
            self._prepared.popitem(last=False)
        return face

    @property
    def kept_bytes(self) -> int:
        """Size of the prepared template frames that are kept, at most `KEPT_BYTES` or one frame."""
        return sum(face.nbytes for face in list(self._prepared.values()))

    def _measure(self, position: int) -> MeasuredFace:
        template = self._template
        return measure_face(
            template.frames[position],
            template.bboxes[position],
            template.latents[position],
            self._motions[position],
        )

    def _common_look(self) -> interior.Look:
        """The look of the mouth's inside over frames spread through the template."""
        positions = list(self._motions)
        chosen = positions[:: max(1, len(positions) // LOOKED_AT)]
        looks = [
            interior.look_at_mouth(
                face.picture, face.landmarks, face.distances, face.here, face.mouth, face.lips
            )
            for face in map(self._measure, chosen)
        ]
        return interior.common_look(looks)


def _own_motions(template: Template) -> dict[int, rig.OwnMotion]:
    """The speaker's own motion at each cycle position that shows a face; none in a still."""
    positions = [i for i in sorted(set(template.unique)) if template.has_face(i)]
    if len(positions) < 2:
        return dict.fromkeys(positions, rig.STILL)
    motions = rig.own_motions(np.stack([template.latents[i] for i in positions]))
    return dict(zip(positions, motions, strict=True))


@dataclass(frozen=True)
class MeasuredFace:
    """A frame's face at working size with the geometry of its lips.

    Attributes:
        picture: (h, w, 3) uint8 BGR, the face's box.
        landmarks: (478, 3) its pixels.
        frame, lips: the head's axes and the lips in them.
        mouth: the rectangle that the open mouth may ever cover.
        here: (h, w, 2) the rectangle's pixels in the head's frame.
        distances: (h, w, 2) float32 of the rectangle's pixels from the inner lip edges.
    """

    picture: np.ndarray
    landmarks: np.ndarray
    frame: HeadFrame
    lips: rig.Lips
    mouth: Box
    here: np.ndarray
    distances: np.ndarray


def measure_face(frame: np.ndarray, bbox: Box, mesh: np.ndarray, motion: rig.OwnMotion) -> MeasuredFace:
    """The face of a frame (H, W, 3) with its box, mesh (478, 3) and its speaker's own motion."""
    picture, landmarks = _working_picture(frame, bbox, mesh)
    head = head_frame(landmarks)
    lips = rig.measure_lips(head, landmarks, motion)
    mouth = _mouth_rect(head, lips, (0, 0, picture.shape[1], picture.shape[0]))
    here = head.to_head(warp.pixel_grid(mouth)).astype(np.float32)
    return MeasuredFace(picture, landmarks, head, lips, mouth, here, rig.edge_distances(lips, here))


def prepare_face(measured: MeasuredFace, mask_in_box: np.ndarray, look: interior.Look) -> PreparedFace:
    """What `render` needs of a frame: fields, layers and where the blend mask lets pixels move.

    Args:
        mask_in_box: (h, w) uint8, the blend mask over the face's box, at any size.
        look: the look of the mouth's inside, one for the whole template.
    """
    picture, head, lips, mouth = measured.picture, measured.frame, measured.lips, measured.mouth
    room, rect = _room(mask_in_box, picture.shape[1], picture.shape[0], head.eye_distance)
    lattice = warp.lattice_over(rect)
    nodes = head.to_head(lattice.nodes())
    own = picture[mouth[1] : mouth[3], mouth[0] : mouth[2]]
    pixel = 1 / head.eye_distance
    return PreparedFace(
        measured=measured,
        lattice=lattice,
        fields=rig.movement_fields(head, lips, nodes),
        room=warp.reduce(room, lattice),
        node_distances=rig.edge_distances(lips, nodes),
        pixels=warp.pixel_grid(rect),
        between=rig.between_corners(lips, measured.here),
        contour=measured.landmarks[[INNER_UPPER_LIP, INNER_LOWER_LIP], :2].astype(np.float32),
        look=look,
        layers=interior.paint_layers(own, measured.here, measured.distances, lips, look, pixel),
    )


def _working_picture(frame: np.ndarray, bbox: Box, mesh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import cv2

    x1, y1, x2, y2 = bbox
    picture = frame[y1:y2, x1:x2]
    scale = min(1.0, WORKING_SIDE / max(picture.shape[:2]))
    if scale == 1.0:
        return picture, mesh.astype(np.float64)
    size = (round((x2 - x1) * scale), round((y2 - y1) * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), mesh.astype(np.float64) * scale


def _mouth_rect(head: HeadFrame, lips: rig.Lips, rect: Box) -> Box:
    """The pixels of `rect` that the open mouth may ever cover."""
    seam = float(np.interp(0, lips.grid, lips.upper))
    right = np.array([lips.left - MOUTH_BESIDE, lips.right + MOUTH_BESIDE])
    down = np.array([seam - MOUTH_ABOVE, seam + MOUTH_BELOW])
    corners = head.to_pixels(np.stack(np.meshgrid(right, down), axis=-1).reshape(-1, 2))
    return _whole_rect(corners.min(axis=0), corners.max(axis=0) + 1, rect)


def _whole_rect(low: np.ndarray, high: np.ndarray, within: Box) -> Box:
    """The whole pixels around `low` to `high`, inside `within` and at least 2 × 2."""
    start, end = np.array(within[:2]), np.array(within[2:])
    first = np.clip(np.floor(low).astype(int), start, end - 2)
    last = np.clip(np.ceil(high).astype(int), first + 2, end)
    return int(first[0]), int(first[1]), int(last[0]), int(last[1])


def _mask_in_box(mask: np.ndarray, crop_box: Box, bbox: Box) -> np.ndarray:
    """The blend mask over the face's box alone, 0 where it doesn't reach."""
    x1, y1, x2, y2 = bbox
    inside = np.zeros((y2 - y1, x2 - x1), np.uint8)
    left, top = crop_box[0] - x1, crop_box[1] - y1
    rows = slice(max(top, 0), max(min(top + mask.shape[0], y2 - y1), 0))
    columns = slice(max(left, 0), max(min(left + mask.shape[1], x2 - x1), 0))
    inside[rows, columns] = mask[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    return inside


def _room(mask: np.ndarray, width: int, height: int, eye_distance: float) -> tuple[np.ndarray, Box]:
    """How far pixels may move, float32 (height, width) pixels, and the rectangle where they may at all.

    0 from where the mask is at most `FULL_MASK` outwards: what it blends half and half with the template's
    own pixels must not have moved against them.
    """
    import cv2

    full = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA) > FULL_MASK
    depth = cv2.distanceTransform(np.pad(full.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    rows, columns = np.flatnonzero(full.any(axis=1)), np.flatnonzero(full.any(axis=0))
    everything = (0, 0, width, height)
    if not len(rows):
        return depth, everything
    low, high = np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1])
    return EDGE_SLOPE * np.maximum(depth - EDGE_REST * eye_distance, 0), _whole_rect(low, high, everything)


def render(face: PreparedFace, parameters: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """The face with its mouth in the shape of `parameters` (10,): (h, w, 3) uint8 BGR."""
    sheets = np.tensordot(coefficients, face.fields, axes=([0], [1]))
    upper, upper_places = warp.invert(sheets[0], face.room, face.lattice)
    lower, lower_places = warp.invert(sheets[1], face.room, face.lattice)
    above = warp.sample(face.node_distances, upper_places, sharp=False)[..., :1]
    below = warp.sample(face.node_distances, lower_places, sharp=False)[..., 1:]
    merged = np.where(above >= below, upper, lower)
    x1, y1, x2, y2 = face.lattice.rect
    result = face.measured.picture.copy()
    places = warp.enlarge(merged, face.lattice, face.lattice.rect) + face.pixels
    result[y1:y2, x1:x2] = warp.sample(face.measured.picture, places)
    _draw_mouth(result, face, parameters, _opening_rect(face, sheets), upper, lower)
    return result


def _draw_mouth(
    result: np.ndarray,
    face: PreparedFace,
    parameters: np.ndarray,
    rect: Box,
    upper: np.ndarray,
    lower: np.ndarray,
) -> None:
    """Composes both lips and what is between them into `result`, within `rect`."""
    x1, y1, x2, y2 = rect
    grid, corner = warp.pixel_grid(rect), np.array(face.measured.mouth[:2], np.float32)
    from_upper = warp.enlarge(upper, face.lattice, rect) + grid
    from_lower = warp.enlarge(lower, face.lattice, rect) + grid
    into_upper = warp.sample(face.measured.distances[..., 0], from_upper - corner, sharp=False)
    into_lower = warp.sample(face.measured.distances[..., 1], from_lower - corner, sharp=False)
    between = warp.sample(face.between, from_lower - corner, sharp=False)
    left, top = face.measured.mouth[:2]
    window = slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)
    pose = _pose(face, parameters)
    inside, teeth = interior.paint(face.layers, face.look.palette, window, into_upper, into_lower, pose)
    eye_distance = face.measured.frame.eye_distance
    shown_upper, shown_lower = _shares(into_upper * eye_distance, into_lower * eye_distance)
    shown_lower *= 1 - pose.tuck * teeth * (1 - shown_upper)
    line = _contact_line(into_upper, into_lower, between)
    upper_skin = warp.sample(face.measured.picture, from_upper).astype(np.float32)
    lower_skin = warp.sample(face.measured.picture, from_lower).astype(np.float32)
    mixed = inside * interior.three_planes((1 - shown_upper - shown_lower) * (1 - line))
    mixed += upper_skin * interior.three_planes(shown_upper * (1 - line))
    mixed += lower_skin * interior.three_planes(shown_lower * (1 - line))
    mixed += interior.tinted(line, face.look.palette.line) + 0.5
    result[y1:y2, x1:x2] = np.clip(mixed, 0, 255).astype(np.uint8)


def _pose(face: PreparedFace, parameters: np.ndarray) -> interior.Pose:
    value = {name: float(parameters[i]) for name, i in PARAMETER_INDEX.items()}
    down = face.measured.frame.axes[:, 1]
    jaw = down * JAW_GAIN * face.measured.lips.scale * value["jaw_open"]
    tongue = TONGUE_SHARE * jaw - down * TONGUE_RISE * value["tongue_up"]
    upper = -down * value["pucker"] * max(face.look.edge - ROUNDED_EDGE, 0)
    up = value["tongue_up"]
    tip = TONGUE_SHARE * jaw * (1 - up) + down * (1 - up) * interior.TIP_WAY * face.measured.lips.scale
    return interior.Pose(upper, jaw, tongue, tip, up, value["lip_tuck"], value["pucker"])


def _shares(into_upper: np.ndarray, into_lower: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel shows the upper and the lower sheet, from depths in pixels."""
    upper, lower = np.clip(into_upper + 0.5, 0, 1), np.clip(into_lower + 0.5, 0, 1)
    front = np.clip((into_upper - into_lower) / 2 + 0.5, 0, 1)
    return upper * (1 - lower * (1 - front)), lower * (1 - upper * front)


def _contact_line(into_upper: np.ndarray, into_lower: np.ndarray, between: np.ndarray) -> np.ndarray:
    """How dark the line is where lips press together, 0 to 1: their overlap hides the portrait's own."""
    pressed = np.clip((into_upper + into_lower) / PRESSED, 0, 1)
    across = np.clip((into_upper - into_lower) / (2 * LINE_WIDTH), -5, 5)
    return LINE_STRENGTH * between * pressed * np.exp(-(across**2))


def _opening_rect(face: PreparedFace, sheets: np.ndarray) -> Box:
    """The pixels around both inner lips where `sheets` (2, rows, columns, 2) take them."""
    nodes = face.lattice.to_nodes(face.contour)
    moved = face.contour + np.concatenate(
        [warp.sample(sheet, nodes[i : i + 1], sharp=False) for i, sheet in enumerate(sheets)]
    )
    of_eyes, of_cell = OPENING_MARGIN
    margin = of_eyes * face.measured.frame.eye_distance + of_cell * float(face.lattice.cell.max())
    mouth, lattice = np.array(face.measured.mouth), np.array(face.lattice.rect)
    x1, y1 = np.maximum(mouth[:2], lattice[:2]).tolist()
    x2, y2 = np.minimum(mouth[2:], lattice[2:]).tolist()
    low, high = moved.min(axis=(0, 1)) - margin, moved.max(axis=(0, 1)) + margin
    return _whole_rect(low, high, (x1, y1, max(x2, x1 + 2), max(y2, y1 + 2)))
