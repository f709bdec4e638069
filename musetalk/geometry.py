"""Boxes, the reference's face box, and smoothing over time.

Boxes are whole pixels with exclusive right and lower edges, as the reference stores them in template
caches. Its box is not the detector's: it reaches from the chin to as far above the middle of the nose
as the chin lies below, so that the nose stays in the same place of the crop whatever the hairline is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

Box = tuple[int, int, int, int]

NO_FACE: Box = (0, 0, 0, 0)  # a frame without a face keeps its place with this box
CROP_EXPANSION = 1.5  # crop box over face box, both measured by the longer side
_NOSE_MIDDLE = 29  # of the 68 points; the reference's "half face" line
_CUT_SHIFT = 0.5  # a face that moves further than this times its side between two frames is another shot


def reference_bbox(landmarks68: np.ndarray, detection: Box | None, bbox_shift: int) -> Box:
    """The reference's face box, before it is cut to the frame.

    Args:
        landmarks68: (68, 2) pixels; cut to whole numbers towards zero, as the reference does.
        detection: the detector's own box; None where no face was detected.
        bbox_shift: pixels by which the nose's middle, and with it the upper edge, is moved down.

    Returns:
        The box; `detection` where the landmarks are degenerate or leave the frame on the left;
        `NO_FACE` without a detection.

    Source: MuseTalk, musetalk/utils/preprocessing.py, get_landmark_and_bbox.
    """
    if detection is None:
        return NO_FACE
    points = landmarks68.astype(np.int32)
    points[_NOSE_MIDDLE, 1] += bbox_shift
    x1, _ = points.min(axis=0).tolist()
    x2, y2 = points.max(axis=0).tolist()
    middle = int(points[_NOSE_MIDDLE, 1])
    y1 = max(0, middle - (y2 - middle))
    if y2 <= y1 or x2 <= x1 or x1 < 0:
        return detection
    return x1, y1, x2, y2


def add_chin_margin(bbox: Box, extra_margin: int, height: int) -> Box:
    """`bbox` made taller at the chin by `extra_margin` pixels, within the frame, as MuseTalk 1.5 does."""
    if bbox == NO_FACE:
        return NO_FACE
    x1, y1, x2, y2 = bbox
    return x1, y1, x2, min(y2 + extra_margin, height)


def clamp_box(bbox: Box, height: int, width: int) -> Box:
    """The part of `bbox` inside a frame of `height` × `width`; `NO_FACE` where none is."""
    x1, y1, x2, y2 = bbox
    inside = (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else NO_FACE


def crop_box(bbox: Box, expand: float = CROP_EXPANSION) -> Box:
    """The square around `bbox` that is parsed and masked; it may reach beyond the frame.

    Source: MuseTalk, musetalk/utils/blending.py, get_crop_box.
    """
    x1, y1, x2, y2 = bbox
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    half = int(max(x2 - x1, y2 - y1) // 2 * expand)
    return x - half, y - half, x + half, y + half


def crop_frame(frame: np.ndarray, crop: Box) -> np.ndarray:
    """The pixels (h, w, 3) of `crop`, black where it reaches beyond the frame."""
    x1, y1, x2, y2 = crop
    height, width = frame.shape[:2]
    result = np.zeros((y2 - y1, x2 - x1, 3), dtype=np.uint8)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left < right and top < bottom:
        result[top - y1 : bottom - y1, left - x1 : right - x1] = frame[top:bottom, left:right]
    return result


def bounding_box(points: np.ndarray) -> Box:
    """The smallest box of whole pixels that holds `points` (n, 2)."""
    x1, y1 = np.floor(points.min(axis=0)).astype(int).tolist()
    x2, y2 = np.ceil(points.max(axis=0)).astype(int).tolist()
    return x1, y1, x2, y2


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def smooth_over_time(track: np.ndarray, sigma: float) -> np.ndarray:
    """`track` (T, …) filtered along its first axis by a Gaussian of `sigma` frames, without lag.

    The ends are continued by point reflection, so that a steady motion passes unchanged.
    """
    count = len(track)
    radius = min(round(3 * sigma), count - 1)
    if radius < 1:
        return track.copy()
    head = 2 * track[:1] - track[radius:0:-1]
    tail = 2 * track[-1:] - track[-2 : -radius - 2 : -1]
    padded = np.concatenate([head, track, tail]).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    smooth = sum(weight * padded[i : i + count] for i, weight in enumerate(weights))
    return np.asarray(smooth, dtype=track.dtype)


def follow_over_time(track: np.ndarray, sigma: float, noise: float) -> np.ndarray:
    """`smooth_over_time` whose band widens with the speed of what is filtered, without lag.

    Where `track` (T, …) strays from its smooth course by no more than noise does, the smooth course is
    taken; the further it strays, the more of the track itself, as in a shake or a jump.

    Args:
        sigma: frames, of the Gaussian where nothing moves fast.
        noise: in the track's unit, the root mean square over its values of what counts as noise.

    Source: the local Wiener filter of Lee, "Digital image enhancement and noise filtering by use of local
    statistics", PAMI 1980, along time.
    """
    smooth = smooth_over_time(track, sigma)
    strayed = ((track - smooth).reshape(len(track), -1) ** 2).mean(axis=1)
    energy = smooth_over_time(strayed, _ENERGY_SIGMA)
    own = np.maximum(energy - noise**2, 0) / np.maximum(energy, np.finfo(np.float64).tiny)
    own = own.reshape(-1, *[1] * (track.ndim - 1))
    return np.asarray(own * track + (1 - own) * smooth, dtype=track.dtype)


def shots(boxes: Sequence[Box], cuts: Collection[int] = ()) -> Iterator[slice]:
    """The longest runs of `boxes` that show one face in motion: no faceless frame, no cut inside.

    Args:
        cuts: indices at which another shot begins, whatever the boxes say.
    """
    start = 0
    for i, box in enumerate(boxes):
        if i > start and (box == NO_FACE or i in cuts or _is_cut(boxes[i - 1], box)):
            yield slice(start, i)
            start = i
        if box == NO_FACE:
            start = i + 1
    if start < len(boxes):
        yield slice(start, len(boxes))


def _is_cut(before: Box, after: Box) -> bool:
    shift = max(abs((after[i] + after[i + 2]) - (before[i] + before[i + 2])) / 2 for i in (0, 1))
    side = max(before[2] - before[0], before[3] - before[1])
    growth = max(after[2] - after[0], after[3] - after[1]) / side
    return shift > _CUT_SHIFT * side or not 1 / (1 + _CUT_SHIFT) < growth < 1 + _CUT_SHIFT


def smooth_boxes(
    boxes: Sequence[Box],
    cuts: Collection[int] = (),
    centre_sigma: float = 3.0,
    size_sigma: float = 12.0,
) -> list[Box]:
    """Face boxes of consecutive video frames without their jitter and without lag.

    Centre and size are filtered apart, in frames: a head moves faster than its size changes. Both follow
    what is faster than that. Whole pixels are then held until the smooth value has left them by more than
    `_HOLD`, so that an edge resting between two pixels doesn't flicker. `NO_FACE` entries stay and separate
    what is smoothed, as `cuts` do, the indices at which another shot begins.
    """
    result = list(boxes)
    for shot in shots(boxes, cuts):
        edges = np.array(boxes[shot], dtype=np.float64)
        sizes = edges[:, 2:] - edges[:, :2]
        side = sizes.mean()
        centre = follow_over_time((edges[:, :2] + edges[:, 2:]) / 2, centre_sigma, _CENTRE_NOISE * side)
        size = np.maximum(_hold(follow_over_time(sizes, size_sigma, _SIZE_NOISE * side)), 1)
        corner = _hold(centre - size / 2)
        for i, edge in enumerate(np.hstack([corner, corner + size]).astype(int).tolist()):
            result[shot.start + i] = (edge[0], edge[1], edge[2], edge[3])
    return result


_HOLD = 0.75  # pixels
_ENERGY_SIGMA = 1.5  # frames over which a track's straying is judged
_CENTRE_NOISE = 0.015  # of a box's side: what detectors and whole pixels move its centre
_SIZE_NOISE = 0.05  # of a box's side: a chin that speaks is no head that comes nearer


def _hold(track: np.ndarray) -> np.ndarray:
    """`track` (T, d) as whole numbers that change only when the value has left them by `_HOLD`.

    Holding makes a change late; holding from the end backwards makes it early. Where the two differ
    the rounded value decides, so that changes come in time.
    """
    late, early = _held(track), _held(track[::-1])[::-1]
    return np.where(late == early, late, np.rint(track))


def _held(track: np.ndarray) -> np.ndarray:
    held = np.rint(track)
    for i in range(1, len(held)):
        stay = np.abs(track[i] - held[i - 1]) <= _HOLD
        held[i] = np.where(stay, held[i - 1], held[i])
    return held
