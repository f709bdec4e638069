"""Life for still portraits: one image becomes a short clip that breathes, sways and blinks.

The clip is made for the template's ping-pong cycle: every motion is a sum of cosines of whole half
periods, at rest at both ends, so that it runs forward and backward without a jolt. The head moves as a
whole and drags the background within a head's width along, which therefore never tears open; a few
pixels of bend in the background are seen less than any invented fill. Outside that region frames keep
the portrait's bytes. Face points move with the pixels, so no second detection is needed. Lengths are in
eye distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from musetalk import warp
from musetalk.errors import EngineError
from musetalk.faces.base import Face
from musetalk.faces.head import (
    CHIN,
    FOREHEAD,
    LEFT_BROW_BOTTOM,
    LEFT_BROW_TOP,
    LEFT_LOWER_LID,
    LEFT_UPPER_LID,
    MESH_TO_68,
    RIGHT_BROW_BOTTOM,
    RIGHT_BROW_TOP,
    RIGHT_LOWER_LID,
    RIGHT_UPPER_LID,
    SKIN_POINTS,
    HeadFrame,
    head_frame,
    smoothstep,
)
from musetalk.geometry import Box, bounding_box

IDLE_FPS = Fraction(25)  # frames per second
IDLE_FRAMES = 75  # 3 s, 6 s forward and back
SWAY = 0.022  # eye distances that the head shifts to a side
TILT = 0.016  # radians about the neck
TURN = 0.030  # eye distances that the nose's tip shifts against the head's edge, as in a turn of 3°
NOD = 0.6  # of the turn, up and down
BREATH = 0.008  # eye distances up and down
BROW_RAISE = 0.030  # eye distances
LATTICE_NODES = 96  # a side: brows need finer steps than a mouth's region
BLINK_FRAMES = 7  # from open to open
BLINK_TIMES = 0.36, 0.48  # of the clip, between which the blink falls
BLINK_HOLD = 1.15  # times shut at its middle; what is over 1 stays shut
NECK = 0.65  # eye distances from the chin down to the pivot of the tilt
WAVE_WEIGHTS = 0.5, 1.0  # of the cosines that make a motion, before they sum to 1
REGION = 2.6, 2.5  # half the moving region's width and height, of the longer half of the face
HEAD_WIDTH, HEAD_ABOVE, HEAD_BELOW = 1.2, 1.45, 1.0  # of half the face that moves as the head does
HEAD_FADE = 0.85  # of it over which the background follows less and less
HEAD_DEPTH = 1.3  # of half the face, squared, where a turn doesn't shift any more
BROW_REACH = 0.24, 0.11  # eye distances beside and above a brow's middle that follow it
BORDER_FADE = 0.5  # eye distances from the picture's border where nothing moves
EYES = (
    (RIGHT_UPPER_LID, RIGHT_LOWER_LID, RIGHT_BROW_BOTTOM),
    (LEFT_UPPER_LID, LEFT_LOWER_LID, LEFT_BROW_BOTTOM),
)
UPPER_LID_SHARE = 0.88  # of the eye's opening that the upper lid closes
LID_OVERLAP = 0.016  # eye distances that a shut lid goes beyond the mesh's lower lid, often too high
UNDER_EYE = 0.07  # eye distances below the eye whose skin also tells the lid's colour
LID_REACH = 0.12  # eye distances below the lower lid over which skin follows it
EYE_MARGIN = 0.30  # eye distances round an eye within which lids are drawn
CREASE = 1.4  # of the lash zone above the open lid's edge where the lid begins
MEET = 0.018  # eye distances from the eye's corners over which lids begin to part
LINEAR = 0.6  # of the way that skin follows in proportion, the rest smoothly
LASH_SHADE = 0.4  # of the lid's colour, what lashes along a shut lid are
LASHES = 0.009  # eye distances that the lashes of a shut lid are thick
LASH_ZONE = 0.04  # eye distances above an open lid's edge whose lashes a lowered lid hides
LID_RANGE = 0.12  # of its median colour that a lid gets lighter or darker with the skin round the eye
LID_BLUR = 0.04  # eye distances over which the skin round the eye is averaged
CORNER = 0.03  # eye distances from the eye's corners over which the lid fades in
LID_SHADE = 0.14  # of its light that a lid loses towards its edge


class IdlePose(NamedTuple):
    """How far one frame is from the portrait.

    Attributes:
        sway, breath, turn, nod: shifts in eye distances, to the head's right and down.
        tilt: radians, clockwise.
        brows: 0 to 1, raised.
        lids: 0 open to 1 shut.
    """

    sway: float
    breath: float
    turn: float
    nod: float
    tilt: float
    brows: float
    lids: float


def idle_poses(seed: int, count: int = IDLE_FRAMES) -> list[IdlePose]:
    """`count` poses of one smooth motion, at rest at the first and the last."""
    random = np.random.default_rng(seed)
    phase = np.linspace(0, 1, count)

    def wave(*half_periods: int) -> np.ndarray:
        weights = random.uniform(*WAVE_WEIGHTS, len(half_periods)) * random.choice([-1, 1], len(half_periods))
        curves = [np.cos(np.pi * n * phase) for n in half_periods]
        return np.tensordot(weights / np.abs(weights).sum(), np.array(curves), axes=1)

    sway, tilt, turn, nod = wave(1, 2), wave(1, 2), wave(1, 3), wave(2, 3)
    breath, brows = wave(2), np.maximum(wave(1, 2, 3), 0)
    shut = int(count * random.uniform(*BLINK_TIMES))
    from_shut = np.abs(np.arange(count) - shut) / (BLINK_FRAMES / 2)
    lids = np.clip(BLINK_HOLD * (1 - from_shut**2), 0, 1)
    columns = (SWAY * sway, BREATH * breath, TURN * turn, NOD * TURN * nod, TILT * tilt, brows, lids)
    return [IdlePose(*(float(value) for value in row)) for row in zip(*columns, strict=True)]


def idle_frames(
    frame: np.ndarray, face: Face, seed: int = 0, count: int = IDLE_FRAMES
) -> Iterator[tuple[np.ndarray, Face]]:
    """Frames (H, W, 3) uint8 BGR of a portrait that is alive, each with its face.

    Args:
        frame: the portrait, (H, W, 3) uint8 BGR.
        face: its face with a mesh.
        seed: of the motion; the same seed gives the same bytes.
        count: frames of the clip, to be played forward and backward.

    Raises:
        EngineError: the detector gave no mesh.
    """
    if face.mesh is None or face.mesh_z is None:
        raise EngineError(
            f"idle motion needs a face mesh, which {len(face.landmarks68)} points are not",
            "run preprocessing with --face_detector mediapipe",
        )
    mesh = np.column_stack([face.mesh, face.mesh_z]).astype(np.float64)
    head = head_frame(mesh)
    region = _moving_region(head, mesh, frame.shape[0], frame.shape[1])
    lattice = warp.Lattice(LATTICE_NODES, LATTICE_NODES, region)
    nodes = lattice.nodes().astype(np.float64)
    loose = _looseness(head, mesh, nodes, frame.shape[0], frame.shape[1])
    brows = _brow_weight(head, mesh, nodes)
    for pose in idle_poses(seed, count):
        moved = _sway(head, mesh, nodes, loose, brows, pose)
        yield (
            _render(frame, mesh, head, lattice, moved, pose),
            _moved_face(face, mesh, head, lattice, moved, pose),
        )


def _centre(mesh: np.ndarray) -> np.ndarray:
    return (mesh[FOREHEAD, :2] + mesh[CHIN, :2]) / 2


def _half_axes(mesh: np.ndarray, head: HeadFrame) -> np.ndarray:
    """(2,) half the face oval's width and height in eye distances."""
    points = head.to_head(mesh[:SKIN_POINTS, :2])
    return (points.max(axis=0) - points.min(axis=0)) / 2


def _moving_region(head: HeadFrame, mesh: np.ndarray, height: int, width: int) -> Box:
    reach = np.array(REGION) * _half_axes(mesh, head).max() * head.eye_distance
    low = np.clip(np.floor(_centre(mesh) - reach), 0, [width - 2, height - 2]).astype(int)
    high = np.clip(np.ceil(_centre(mesh) + reach), low + 2, [width, height]).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _looseness(head: HeadFrame, mesh: np.ndarray, points: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of the head's motion points (rows, columns, 2) follow, 0 to 1, (rows, columns)."""
    half = _half_axes(mesh, head)
    offset = head.to_head(points) - head.to_head(_centre(mesh))
    crown = offset[..., 1] < 0
    stretch = np.where(crown, HEAD_ABOVE, HEAD_BELOW)
    distance = np.hypot(offset[..., 0] / (HEAD_WIDTH * half[0]), offset[..., 1] / (stretch * half[1]))
    head_part = 1 - smoothstep((distance - 1) / HEAD_FADE)
    x, y = points[..., 0], points[..., 1]
    border = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y))
    return head_part * smoothstep(border / (BORDER_FADE * head.eye_distance))


def _sway(
    head: HeadFrame,
    mesh: np.ndarray,
    nodes: np.ndarray,
    loose: np.ndarray,
    brows: np.ndarray,
    pose: IdlePose,
) -> np.ndarray:
    """Forward displacement of nodes (rows, columns, 2), float32 pixels."""
    unit = head.axes / np.linalg.norm(head.axes, axis=0) * head.eye_distance
    pivot = mesh[CHIN, :2] + NECK * unit[:, 1]
    turn = np.array([[np.cos(pose.tilt), -np.sin(pose.tilt)], [np.sin(pose.tilt), np.cos(pose.tilt)]])
    tilted = (nodes - pivot) @ (turn - np.eye(2)).T
    half = _half_axes(mesh, head)
    offset = (head.to_head(nodes) - head.to_head(_centre(mesh))) / half
    depth = np.sqrt(np.maximum(1 - (offset**2).sum(axis=-1) / HEAD_DEPTH, 0))[..., None]
    shift = np.array([pose.sway, pose.breath]) + depth * np.array([pose.turn, pose.nod])
    lift = BROW_RAISE * pose.brows * brows[..., None] * head.axes[:, 1]
    return ((tilted + shift @ unit.T) * loose[..., None] - lift).astype(np.float32)


def _render(
    frame: np.ndarray,
    mesh: np.ndarray,
    head: HeadFrame,
    lattice: warp.Lattice,
    moved: np.ndarray,
    pose: IdlePose,
) -> np.ndarray:
    x1, y1, x2, y2 = lattice.rect
    still = frame.copy()
    for upper, lower, brow in EYES:
        points = mesh[:, :2]
        _close_eye(still, points[list(upper)], points[list(lower)], points[list(brow)], head, pose.lids)
    free = np.full((lattice.rows, lattice.columns, 1), np.inf, np.float32)
    back, _ = warp.invert(moved, free, lattice)
    places = warp.enlarge(back, lattice, lattice.rect) + warp.pixel_grid(lattice.rect)
    result = frame.copy()
    result[y1:y2, x1:x2] = warp.sample(still, places)
    return result


def _brow_weight(head: HeadFrame, mesh: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How much points (..., 2) follow the brows, 0 to 1."""
    here = head.to_head(points)
    weight = np.zeros(here.shape[:-1])
    for brow in (RIGHT_BROW_TOP, LEFT_BROW_TOP):
        middle = head.to_head(mesh[list(brow), :2]).mean(axis=0)
        weight = np.maximum(weight, np.exp(-(((here - middle) / np.array(BROW_REACH)) ** 2).sum(axis=-1)))
    return weight


def _around(points: np.ndarray, margin: float, picture: np.ndarray) -> Box:
    height, width = picture.shape[:2]
    low = np.clip(np.floor(points.min(axis=0) - margin), 0, [width - 2, height - 2]).astype(int)
    high = np.clip(np.ceil(points.max(axis=0) + margin), low + 2, [width, height]).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _close_eye(
    picture: np.ndarray,
    upper: np.ndarray,
    lower: np.ndarray,
    brow: np.ndarray,
    head: HeadFrame,
    shut: float,
) -> None:
    """Draws the lids over the eye, in place: the lower one moves, the upper one is painted.

    An open eye hides its lid: what shows above its edge are lashes and crease, which stretched over the eye
    would be a dark smear.

    Args:
        upper, lower: (9, 2) pixels of the lids' edges.
        brow: (5, 2) pixels of the brow's lower edge.
        shut: 0 open to 1 shut.
    """
    if shut <= 0:
        return
    rect = _around(np.concatenate([upper, lower]), EYE_MARGIN * head.eye_distance, picture)
    x1, y1, x2, y2 = rect
    grid = warp.pixel_grid(rect)
    right, down = np.moveaxis(head.to_head(grid.astype(np.float64)), -1, 0)
    top, bottom = (_lid_edge(head.to_head(edge), right) for edge in (upper, lower))
    ends = head.to_head(np.concatenate([upper, lower]))[:, 0]
    inside = np.minimum(right - ends.min(), ends.max() - right)
    gap = np.maximum(bottom - top, 0) * shut
    above, below = _lid_shares(inside, gap, shut)
    eye = picture[y1:y2, x1:x2].astype(np.float32)
    _raise_lid(eye, picture, grid, head, down - bottom + below, below)
    lid = _Lid(top, top + above, smoothstep(inside / CORNER) * smoothstep(gap / LASH_ZONE))
    colour = _lid_colour(picture, upper, lower, brow, head)
    skin = _skin_between(picture, head, np.stack([right, down], axis=-1), top, bottom)
    skin = np.clip(skin, (1 - LID_RANGE) * colour, (1 + LID_RANGE) * colour)
    _paint_lid(eye, down, lid, skin, colour * LASH_SHADE, head.eye_distance)
    picture[y1:y2, x1:x2] = np.clip(eye + 0.5, 0, 255).astype(np.uint8)


class _Lid(NamedTuple):
    """An upper lid over a rectangle of pixels, (h, w) each, eye distances.

    Attributes:
        top, edge: where its edge was in the open eye, and is now.
        share: 0 to 1, how much of it shows.
    """

    top: np.ndarray
    edge: np.ndarray
    share: np.ndarray


def _raise_lid(
    eye: np.ndarray,
    picture: np.ndarray,
    grid: np.ndarray,
    head: HeadFrame,
    depth: np.ndarray,
    below: np.ndarray,
) -> None:
    """Moves the lower lid up by `below` in `eye` (h, w, 3) float32, the pixels of `grid`; `depth` into it."""
    shift = -below * _follow(depth / LID_REACH)
    skin = warp.sample(picture, grid - (shift[..., None] * head.axes[:, 1]).astype(np.float32))
    covered = np.clip(depth * head.eye_distance + 0.5, 0, 1) * (np.abs(shift) > 0)
    eye += (skin - eye) * covered[..., None].astype(np.float32)


def _skin_between(
    picture: np.ndarray, head: HeadFrame, here: np.ndarray, top: np.ndarray, bottom: np.ndarray
) -> np.ndarray:
    """Skin from above the eye turning into skin from below it, at `here` (h, w, 2) in the head's frame."""
    import cv2

    right, down = here[..., 0], here[..., 1]
    way = np.clip((down - top) / np.maximum(bottom - top, LASH_ZONE), 0, 1)[..., None]
    parts = []
    for height in (top - 2 * LASH_ZONE, bottom + UNDER_EYE):
        places = head.to_pixels(np.stack([right, height], axis=-1)).astype(np.float32)
        skin = warp.sample(picture, places, sharp=False).astype(np.float32)
        parts.append(cv2.GaussianBlur(skin, (0, 0), LID_BLUR * head.eye_distance))
    return parts[0] * (1 - way) + parts[1] * way


def _paint_lid(
    eye: np.ndarray, down: np.ndarray, lid: _Lid, colour: np.ndarray, dark: np.ndarray, eye_distance: float
) -> None:
    """Paints the upper lid and its lashes into `eye` (h, w, 3) float32.

    Args:
        down: (h, w) the pixels' heights, eye distances.
        colour: (h, w, 3) of the lid's skin.
        dark: (3,) the lightest that lashes are.
    """
    lowered = np.clip((down - lid.top) / np.maximum(lid.edge - lid.top, 1e-3), 0, 1)
    skin = colour * (1 - LID_SHADE * lowered**2)[..., None]
    covered = lid.share * np.clip((lid.edge - down) * eye_distance + 0.5, 0, 1)
    covered *= smoothstep((down - lid.top) / LASH_ZONE + CREASE)
    eye += (skin - eye) * covered[..., None].astype(np.float32)
    lashes = lid.share * np.exp(-(((lid.edge - down) / LASHES) ** 2))
    eye += (np.minimum(eye, dark) - eye) * lashes[..., None].astype(np.float32)


def _lid_colour(
    picture: np.ndarray, upper: np.ndarray, lower: np.ndarray, brow: np.ndarray, head: HeadFrame
) -> np.ndarray:
    """The median colour (3,) of the skin above the eye, half way up to the brow, and below it."""
    under = lower + UNDER_EYE * head.axes[:, 1]
    places = np.concatenate([(upper[2:7] + brow) / 2, under[2:7]])
    return np.median(warp.sample(picture, places[None].astype(np.float32), sharp=False)[0], axis=0)


def _lid_edge(points: np.ndarray, right: np.ndarray) -> np.ndarray:
    order = np.argsort(points[:, 0], kind="stable")
    return np.interp(right, points[order, 0], points[order, 1])


def _lid_shares(inside: np.ndarray, gap: np.ndarray, shut: float) -> tuple[np.ndarray, np.ndarray]:
    """How far the upper lid comes down and the lower lid up, nothing beyond the eye's corners."""
    gap = gap * smoothstep(inside / MEET)
    overlap = LID_OVERLAP * smoothstep(gap / (2 * LID_OVERLAP)) * max(2 * shut - 1, 0)
    return UPPER_LID_SHARE * gap + overlap, (1 - UPPER_LID_SHARE) * gap


def _follow(away: np.ndarray) -> np.ndarray:
    """How much skin follows a lid's edge: all at 0, none from 1 on, nearly evenly between."""
    away = np.clip(away, 0, 1)
    return LINEAR * (1 - away) + (1 - LINEAR) * (1 - smoothstep(away))


def _moved_face(
    face: Face, mesh: np.ndarray, head: HeadFrame, lattice: warp.Lattice, moved: np.ndarray, pose: IdlePose
) -> Face:
    """The face with its points where the pixels went."""
    points = mesh[:, :2].copy()
    for upper, lower, _ in EYES:
        gap = mesh[list(lower), :2] - mesh[list(upper), :2]
        points[list(upper)] += UPPER_LID_SHARE * pose.lids * gap
        points[list(lower)] -= (1 - UPPER_LID_SHARE) * pose.lids * gap
    nodes = lattice.to_nodes(points)[None].astype(np.float32)
    shift = warp.sample(moved, nodes, sharp=False)[0]
    points = (points + shift).astype(np.float32)
    return replace(
        face, landmarks68=points[list(MESH_TO_68)], detection=bounding_box(points[:SKIN_POINTS]), mesh=points
    )
