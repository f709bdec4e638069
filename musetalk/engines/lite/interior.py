"""The inside of the mouth: cavity, teeth and tongue, painted in the light and style of the face.

Upper teeth hang on the skull and lower teeth on the jaw, so lips uncover them instead of stretching
them; teeth that the portrait itself shows are kept as they are and only continued where lips hid them.
Layers are painted once per template frame; an output frame moves and shades them. Lengths are in eye
distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from musetalk.engines.lite.palette import SHARP_TURN, Palette, bands_of, luminance, measure_palette
from musetalk.engines.lite.rig import Lips
from musetalk.faces.head import eye_distance, smoothstep

if TYPE_CHECKING:
    from musetalk.geometry import Box

UPPER_EDGE = 0.021  # below the closed lips' line
LOWER_EDGE = 0.018
TOOTH_ROUNDING = 0.004, 0.012  # eye distances that a tooth's edge rises at its inner and its outer side
ROW_END = 0.02  # eye distances over which a row ends
WEDGE = 0.02  # eye distances above the edge over which the gaps between teeth get narrow
GAP_WIDTH = 0.0035, 0.6  # of the dark between teeth, the least in eye distances and in pixels
GAP_SHADE = 0.12, 0.14  # of the light that it takes anywhere, and more at the edge
GAP_SEEN = 0.004, 0.35  # eye distances a pixel, and share, that tell how much of a gap small pictures show
BEHIND, FLAT_BEHIND = 0.70, 0.35  # of the light that the last tooth loses, in a photograph and in a drawing
BULGE, TOOTH_EDGE = 0.12, 0.10  # shares of the light that a tooth's sides and edge lose
NECK_SHADE = 0.10  # share of the light that a tooth loses up to the gum
EDGE_REACH = 0.008  # eye distances above a tooth's edge that are darker
UNEVEN = np.array([[0.2, -0.7, 0.5, -0.3, 0.8], [-0.4, 0.6, -0.2, 0.9, -0.6]], np.float32)
"""How teeth differ from their twins on the other side, by side and tooth, in units of the next two."""
UNEVEN_EDGE, UNEVEN_SHADE = 0.0016, 0.022  # eye distances, and share of the light
GLEAM = 0.16  # share of white that light adds where it shines on a tooth
GLEAM_PLACE, GLEAM_SIZE = (0.3, 0.5), (0.3, 0.22)  # half widths towards the light and crowns above the edge
PAPILLA = 0.38  # of a crown that the gum comes down between teeth
GUM_TURN = 0.004  # eye distances over which teeth become gum
GUM_ROUND, GUM_RIM = 0.25, 0.02  # of the light that gum loses near a tooth, and eye distances of it
LOWER_SHADE = 0.86  # of the upper teeth's colour that the lower have
FRONT = 0.21, 0.08  # eye distances from the middle where the front teeth end, and over which
BRIGHT = 0.62, 1.12  # of a painted tooth's and of the lips' luma: what is brighter may be a tooth
BRIGHT_RANGE = 0.2  # of that luma over which it becomes one
PALE = 0.42, 0.70, 0.01  # saturation of a tooth: the most, the most of the lips', and what is added to it
PALE_RANGE = 0.06  # saturation over which it isn't one any more
OWN_BLUR = 0.7  # pixels
OWN_EDGE = 97  # percentile of own teeth's heights that is their edge
OWN_TEETH_AREA = 0.002  # square eye distances that count as teeth shown
OWN_TEETH_FRAMES = 0.8  # of a video's frames
WARM_SHADOW = (0.34, 0.22, 0.0)  # BGR; how much more blue and green shadows lose than red
PUCKER_SHADE = 0.55  # of the light on the teeth that fully rounded lips take
LIT_GAP = 0.045  # eye distances between the lips that let all light in
SLIT_LIGHT = 0.3  # of it that enters the narrowest gap
CAVITY_LIGHT = 0.55, 0.75, 0.05  # of the cavity: deep in, more at the lower lip, and eye distances above it
LIP_SHADOW, LIP_SHADOW_REACH = 0.4, 0.007  # of the light under the upper lip's edge, and eye distances of it
DEEP_REACH = 0.10  # eye distances of the upper lip's shadow on what lies deep in the mouth
TEETH_REACH = 0.045  # eye distances of it on the upper teeth
SHADOW = 0.6  # of the light that the darkest shadow leaves
RIM_LIGHT, RIM_SHADE = 0.75, 0.62  # how much of the rim is seen, and of the lips' colour that it has
RIM_ENDS = 5  # times its width
RIM = 0.008  # eye distances of lip that are seen from inside above the lower lip
TONGUE_TOP = 0.030  # below the closed lips' line with the jaw shut
TONGUE_HEIGHT, TONGUE_HALF = 0.12, 0.225  # eye distances: of its round top, and half its width
TONGUE_EDGE = 0.010  # eye distances over which it ends, at least
TONGUE_SHADE, TONGUE_LIGHT = 0.40, 0.66  # of the light at its edge, and what its round top gathers more
TONGUE_SLOPE = 1.5  # how soon
GROOVE, GROOVE_WIDTH = 0.16, 0.016  # of the light that its groove loses, and eye distances of half of it
WET = 0.20  # share of white that light adds where it shines on a tongue
WET_PLACE, WET_SIZE = (0.36, 0.62), (0.22, 0.16)  # of half its width and of its height
WET_BROKEN = 0.5  # share of a gleam that the tongue's grain breaks up
TIP_TOP = 0.004  # eye distances below the closed lips' line of a tip that is up
TIP_HEIGHT, TIP_HALF = 0.06, 0.145  # eye distances: of its round end, and half its width
TIP_SOON = 3  # how much sooner than it is up it is there
TIP_WAY = 0.085  # eye distances that it comes up from below
TIP_UNDERSIDE = 0.45, 0.14  # of the light that it has lost, eye distances down from its end
TEETH_GRAIN, TONGUE_GRAIN = 0.6, 0.9  # of the skin's grain
NOISE_SIDE = 256  # pixels of the noise that grain is made of


class Row(NamedTuple):
    """A row of teeth from the middle outwards, the same on both sides, eye distances.

    Attributes:
        borders: (n + 1) ways from the middle, foreshortened by the arch.
        crowns: (n) heights up to the gum.
        shorter: (n) by which edges are above the longest's.
        pointed: (n) by which an edge rises to both sides of its point.
        shades: (n) of the light; canines are darker than their neighbours.
        arch: eye distances that the edges rise, by the square of the way from the middle.
    """

    borders: tuple[float, ...]
    crowns: tuple[float, ...]
    shorter: tuple[float, ...]
    pointed: tuple[float, ...]
    shades: tuple[float, ...]
    arch: float


UPPER_ROW = Row(
    (0.0, 0.086, 0.152, 0.208, 0.25, 0.285),
    (0.106, 0.094, 0.104, 0.088, 0.08),
    (0.0, 0.006, 0.001, 0.007, 0.010),
    (0.0, 0.001, 0.007, 0.005, 0.003),
    (1.0, 0.96, 0.89, 0.9, 0.84),
    0.4,
)
LOWER_ROW = Row(
    (0.0, 0.056, 0.112, 0.166, 0.212, 0.25),
    (0.082, 0.084, 0.094, 0.08, 0.075),
    (0.0, 0.001, 0.0, 0.006, 0.010),
    (0.0, 0.0, 0.006, 0.004, 0.003),
    (1.0, 0.98, 0.91, 0.88, 0.82),
    -0.12,
)


class Look(NamedTuple):
    """What the inside of one template's mouth looks like.

    Attributes:
        palette: its colours.
        edge: eye distances from the closed lips' line down to the upper teeth's edge.
        owned: 1 where the portrait shows its own teeth, else 0.
    """

    palette: Palette
    edge: float
    owned: float


class Layers(NamedTuple):
    """Layers over one rectangle of the picture.

    Attributes:
        upper_teeth, lower_teeth, tongue, tip: premultiplied BGRA float32 (h, w, 4); the tongue's tip is up.
        front: (h, w) float32, 1 over the front teeth, fading to 0 towards the molars.
    """

    upper_teeth: np.ndarray
    lower_teeth: np.ndarray
    tongue: np.ndarray
    tip: np.ndarray
    front: np.ndarray


class Pose(NamedTuple):
    """What of the mouth's inside has moved in one output frame.

    Attributes:
        upper_shift, jaw_shift, tongue_shift, tip_shift: (2,) pixels by which upper teeth, lower teeth, the
            tongue and its tip have moved; the upper teeth only behind rounded lips, whose way forward
            covers them.
        tip_up: 0 to 1, how far the tongue's tip is up.
        tuck: 0 to 1, how far the lower lip lies behind the upper teeth.
        pucker: 0 to 1, how deep the teeth lie behind rounded lips.
    """

    upper_shift: np.ndarray
    jaw_shift: np.ndarray
    tongue_shift: np.ndarray
    tip_shift: np.ndarray
    tip_up: float
    tuck: float
    pucker: float


def _soft(distance: np.ndarray, pixel: float) -> np.ndarray:
    return np.clip(distance / pixel + 0.5, 0, 1)


@cache
def _noise() -> tuple[np.ndarray, ...]:
    """Noise of deviation 1 in each of the palette's bands, (`NOISE_SIDE`, `NOISE_SIDE`) float32."""
    drawn = np.random.default_rng(0).standard_normal((NOISE_SIDE, NOISE_SIDE)).astype(np.float32)
    return tuple(band / band.std() for band in bands_of(drawn))


def _grain(shape: tuple[int, ...], palette: Palette) -> np.ndarray:
    """(h, w) float32 of a picture's grain as a share of the luma."""
    rows, columns = (np.arange(side) % NOISE_SIDE for side in shape)
    bands = zip(palette.grain, _noise(), strict=True)
    return sum(np.float32(strength) * band[rows[:, None], columns] for strength, band in bands)


class _Canvas(NamedTuple):
    """The rectangle that layers are painted on, in a usual mouth's size, all float32 (h, w)."""

    right: np.ndarray  # eye distances from the middle
    down: np.ndarray  # eye distances below the closed lips' line
    light: np.ndarray  # of a usual face's, 1 at the middle
    grain: np.ndarray  # of the picture, share of the luma
    pixel: float  # eye distances, of a sharp picture that would show as much
    turn: float  # eye distances over which painted edges turn


class _Teeth(NamedTuple):
    """Where points lie on a row of teeth."""

    number: np.ndarray  # of the tooth, 0 at the middle
    right_side: np.ndarray  # 1 to the right of the middle, else 0
    across: np.ndarray  # -1 at the tooth's inner side, 1 at its outer
    half: np.ndarray  # eye distances, half the tooth's width
    height: np.ndarray  # eye distances above the tooth's edge
    crown: np.ndarray  # eye distances, height of the tooth up to the gum
    lateral: np.ndarray  # 0 at the middle of the row, 1 at its end


def _teeth(right: np.ndarray, down: np.ndarray, row: Row, flatness: float) -> _Teeth:
    side, limits = np.abs(right), np.array(row.borders, np.float32)
    number = np.zeros(side.shape, np.int8)
    for limit in limits[1:-1]:
        number += side >= limit
    half = (np.diff(limits) / 2)[number]
    across = np.clip((side - ((limits[1:] + limits[:-1]) / 2)[number]) / half, -1, 1)
    right_side = (right > 0).astype(np.int8)
    shorter, pointed, crowns = (np.array(each, np.float32) for each in (row.shorter, row.pointed, row.crowns))
    square = across * across
    own = np.where(across > 0, *np.array(TOOTH_ROUNDING[::-1], np.float32)) * square * square
    own += (shorter + UNEVEN_EDGE * UNEVEN)[right_side, number] + pointed[number] * np.abs(across)
    height = -(down + row.arch * (side * side) + np.float32(1 - flatness) * own)
    crown = crowns[number]
    return _Teeth(number, right_side, across, half, height, crown, np.clip(side / limits[-1], 0, 1))


def _tooth_light(teeth: _Teeth, row: Row, flatness: float, pixel: float) -> np.ndarray:
    """The share of the light that each point of a row of teeth throws back."""
    drawn, height = np.float32(1 - flatness), np.maximum(teeth.height, 0)
    wedge = np.exp(-height / WEDGE)
    width = max(GAP_WIDTH[0], GAP_WIDTH[1] * pixel)
    seam = np.exp(-(((1 - np.abs(teeth.across)) * teeth.half / width) ** 2))
    gap = (GAP_SHADE[0] + GAP_SHADE[1] * wedge) * seam * min(1.0, GAP_SEEN[0] / pixel + GAP_SEEN[1])
    shade = (np.array(row.shades, np.float32) + UNEVEN_SHADE * UNEVEN)[teeth.right_side, teeth.number]
    bulge = 1 - drawn * BULGE * teeth.across**2
    edge = 1 - drawn * TOOTH_EDGE * np.exp(-((height / EDGE_REACH) ** 2))
    neck = 1 - drawn * NECK_SHADE * np.minimum(height / teeth.crown, 1) ** 2
    return (1 - drawn * (1 - shade)) * bulge * edge * neck * (1 - drawn * gap)


def _gleam(teeth: _Teeth, palette: Palette) -> np.ndarray:
    """The share of white that light adds to a row of teeth, on the side of each that is turned to it."""
    outwards = np.where(teeth.right_side == 1, np.float32(1), np.float32(-1))
    across = (teeth.across * outwards - np.float32(np.sign(palette.side) * GLEAM_PLACE[0])) / GLEAM_SIZE[0]
    up = (teeth.height / teeth.crown - GLEAM_PLACE[1]) / GLEAM_SIZE[1]
    strength = np.float32(GLEAM * (1 - palette.flatness)) * (1 - teeth.lateral)
    return strength * np.exp(-(across * across) - up * up)


def _row(canvas: _Canvas, down: np.ndarray, row: Row, colour: np.ndarray, palette: Palette) -> np.ndarray:
    """A row of teeth hanging from its gum above; `down` is 0 at its edge, negative above."""
    teeth = _teeth(canvas.right, down, row, palette.flatness)
    alpha = _soft(teeth.height, canvas.turn) * _soft(row.borders[-1] - np.abs(canvas.right), ROW_END)
    lost = BEHIND + (FLAT_BEHIND - BEHIND) * palette.flatness
    light = canvas.light * (1 - np.float32(lost) * teeth.lateral**2) * (1 + TEETH_GRAIN * canvas.grain)
    picture = _lit(light * _tooth_light(teeth, row, palette.flatness, canvas.pixel), colour)
    picture += three_planes(_gleam(teeth, palette)) * (palette.tooth - picture * (palette.tooth / 255))
    above = teeth.height - teeth.crown * (1 - PAPILLA * np.abs(teeth.across) ** 3)
    gum = np.float32(1 - palette.flatness) * _soft(above, max(GUM_TURN, canvas.turn))
    if gum.any():
        round_ = 1 - GUM_ROUND * np.exp(np.maximum(above, 0) * (-1 / GUM_RIM))
        picture += three_planes(gum) * (_lit(light * round_, palette.gum) - picture)
    return _layer(picture, alpha)


def _layer(picture: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Premultiplied BGRA float32 of a picture (h, w, 3) and its alpha (h, w)."""
    import cv2

    lit = np.clip(picture, 0, 255) * three_planes(alpha)
    return cv2.merge([*cv2.split(lit), alpha])


def _lit(light: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A picture (h, w, 3) of one `colour` in `light` (h, w), which is red where it is weak."""
    return _warm(light) * colour


def _own_teeth(picture: np.ndarray, distances: np.ndarray, palette: Palette, pixel: float) -> np.ndarray:
    """Alpha of the teeth that the picture shows between its lips."""
    import cv2

    inside = np.clip(-distances.max(axis=-1) / pixel - 0.5, 0, 1)
    colours = picture.astype(np.float32)
    bright = luminance(colours)
    threshold = max(BRIGHT[0] * float(luminance(palette.tooth)), BRIGHT[1] * float(luminance(palette.lip)))
    saturation = np.ptp(colours, axis=-1) / np.maximum(colours.max(axis=-1), 1)
    lip_saturation = float(np.ptp(palette.lip) / max(palette.lip.max(), 1))
    pale = np.clip((min(PALE[0], PALE[1] * lip_saturation + PALE[2]) - saturation) / PALE_RANGE + 0.5, 0, 1)
    alpha = inside * pale * np.clip((bright - threshold) / (BRIGHT_RANGE * threshold) + 0.5, 0, 1)
    return cv2.GaussianBlur(alpha.astype(np.float32), (0, 0), OWN_BLUR) * np.clip(inside * 2, 0, 1)


def look_at_mouth(
    picture: np.ndarray, landmarks: np.ndarray, distances: np.ndarray, head: np.ndarray, rect: Box, lips: Lips
) -> Look:
    """The look of the mouth in one frame.

    Args:
        picture: (H, W, 3) uint8 BGR.
        landmarks: (478, 2+) in its pixels.
        distances: (h, w, 2) float32 of the pixels of `rect` from the inner lip edges.
        head: (h, w, 2), the pixels of `rect` in the head's frame.
        rect: (x1, y1, x2, y2) around the mouth.
        lips: measured on the same frame.
    """
    palette = measure_palette(picture, landmarks)
    x1, y1, x2, y2 = rect
    pixel = 1 / float(eye_distance(landmarks[:, :2]))
    own = _own_teeth(picture[y1:y2, x1:x2], distances, palette, pixel)
    edge = UPPER_EDGE * lips.scale
    if own.sum() * pixel * pixel < OWN_TEETH_AREA or not (own > 0.5).any():
        return Look(palette, edge, 0.0)
    colour = np.average(picture[y1:y2, x1:x2].reshape(-1, 3), axis=0, weights=own.ravel())
    edge = max(edge, float(np.percentile(head[..., 1][own > 0.5], OWN_EDGE)) - lips.seam)
    return Look(palette._replace(tooth=colour.astype(np.float32)), edge, 1.0)


def common_look(looks: Sequence[Look]) -> Look:
    """The median of frames' looks, so that colours and teeth don't flicker in a video.

    Teeth that not nearly all frames show are a speaker's, not the portrait's: they are painted.
    """
    owned = float(np.mean([look.owned for look in looks])) >= OWN_TEETH_FRAMES
    alike = [look for look in looks if (look.owned > 0) == owned] or list(looks)
    middles = [np.median(values, axis=0) for values in zip(*(look.palette for look in alike), strict=True)]
    colours: list[Any] = [middle.astype(np.float32) if middle.ndim else float(middle) for middle in middles]
    return Look(Palette(*colours), float(np.median([look.edge for look in alike])), float(owned))


def paint_layers(
    picture: np.ndarray, head: np.ndarray, distances: np.ndarray, lips: Lips, look: Look, pixel: float
) -> Layers:
    """The layers over a rectangle around the mouth, everything where it is with the mouth shut.

    Args:
        picture: (h, w, 3) uint8 BGR, the rectangle's own pixels.
        head: (h, w, 2) float32, its pixels in the head's frame.
        distances: (h, w, 2) float32, of its pixels from the inner lip edges.
        pixel: eye distances per pixel.
    """
    canvas, palette = _canvas(head, lips, look.palette, pixel), look.palette
    upper = _row(canvas, canvas.down - look.edge / lips.scale, UPPER_ROW, palette.tooth, palette)
    if look.owned:
        own = _own_teeth(picture, distances, palette, pixel)
        upper = _over(np.dstack([picture * own[..., None], own]).astype(np.float32), upper)
    lower = _row(canvas, LOWER_EDGE - canvas.down, LOWER_ROW, LOWER_SHADE * palette.tooth, palette)
    front = np.clip((FRONT[0] - np.abs(canvas.right)) / FRONT[1], 0, 1)
    return Layers(upper, lower, _tongue(canvas, palette), _tip(canvas, palette), front)


def _canvas(head: np.ndarray, lips: Lips, palette: Palette, pixel: float) -> _Canvas:
    right = head[..., 0] / np.float32(lips.scale)
    down = (head[..., 1] - np.float32(lips.seam)) / np.float32(lips.scale)
    light = 1 + np.float32(palette.side) * right
    turn = palette.turn * pixel / lips.scale
    return _Canvas(right, down, light, _grain(right.shape, palette), turn / SHARP_TURN, turn)


def _tongue(canvas: _Canvas, palette: Palette) -> np.ndarray:
    """The tongue's back as it lies in the mouth, its groove and its wet gleam."""
    height, side = (canvas.down - TONGUE_TOP) / TONGUE_HEIGHT, canvas.right / TONGUE_HALF
    distance = _within_dome(height, side)
    alpha = _soft(distance * TONGUE_HEIGHT, max(canvas.turn, TONGUE_EDGE))
    groove = GROOVE * (1 - palette.flatness) * np.exp(-((canvas.right / GROOVE_WIDTH) ** 2))
    light = (TONGUE_SHADE + TONGUE_LIGHT * smoothstep(distance * TONGUE_SLOPE)) * (1 - groove)
    return _layer(_wet(canvas, light, height, side, palette), alpha)


def _tip(canvas: _Canvas, palette: Palette) -> np.ndarray:
    """The tongue's tip where it touches the upper teeth from behind."""
    height, side = (canvas.down - TIP_TOP) / TIP_HEIGHT, canvas.right / TIP_HALF
    distance = _within_dome(height, side)
    alpha = _soft(distance * TIP_HEIGHT, max(canvas.turn, TONGUE_EDGE))
    lost, way = TIP_UNDERSIDE
    light = 1 - lost * smoothstep((canvas.down - TIP_TOP) / way)
    light *= TONGUE_SHADE + (1 - TONGUE_SHADE) * smoothstep(2 * TONGUE_SLOPE * distance)
    return _layer(_wet(canvas, light, height, side, palette), alpha)


def _within_dome(height: np.ndarray, side: np.ndarray) -> np.ndarray:
    """1 on the axis of a round-topped shape below its top, 0 at its edge."""
    below_top = np.minimum(height - 1, 0)
    return 1 - np.sqrt(side * side + below_top * below_top)


def _wet(
    canvas: _Canvas, light: np.ndarray, height: np.ndarray, side: np.ndarray, palette: Palette
) -> np.ndarray:
    """A tongue's picture in `light`, and what gleams on it, broken up by its own grain."""
    grain = TONGUE_GRAIN * canvas.grain
    picture = _lit(light * canvas.light * (1 + grain), palette.tongue)
    across, up = (np.abs(side) - WET_PLACE[0]) / WET_SIZE[0], (height - WET_PLACE[1]) / WET_SIZE[1]
    broken = np.clip(1 + grain * (WET_BROKEN / max(float(grain.std()), 1e-6)), 0, 2)
    gleam = np.float32(WET * (1 - palette.flatness)) * np.exp(-(across * across) - up * up) * broken
    return picture + three_planes(gleam) * (palette.tooth - picture)


def _over(front: np.ndarray, back: np.ndarray) -> np.ndarray:
    return front + back * (1 - front[..., 3:])


def _shifted(layer: np.ndarray, window: tuple[slice, slice], shift: np.ndarray) -> np.ndarray:
    import cv2

    rows, columns = window
    if not shift.any():
        return layer[rows, columns]
    matrix = np.array([[1, 0, columns.start - shift[0]], [0, 1, rows.start - shift[1]]], np.float64)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return cv2.warpAffine(layer, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def paint(
    layers: Layers,
    palette: Palette,
    window: tuple[slice, slice],
    into_upper: np.ndarray,
    into_lower: np.ndarray,
    pose: Pose,
) -> tuple[np.ndarray, np.ndarray]:
    """The open mouth's inside over a window of the layers' rectangle.

    Args:
        window: (rows, columns) inside the layers' rectangle.
        into_upper, into_lower: (h, w) float32 distances from the moved lips' inner edges into each
            sheet, eye distances, negative in the mouth.
        pose: how teeth, jaw, tongue and lower lip stand.

    Returns:
        (h, w, 3) float32 BGR, and (h, w) the alpha of the upper front teeth, which a tucked lip lies behind.
    """
    above_lower = np.maximum(-into_lower, 0)
    lit, more, reach = CAVITY_LIGHT
    picture = tinted(lit + more * np.exp(above_lower * (-1 / reach)), palette.cavity)
    light = (1 - PUCKER_SHADE * pose.pucker) * (
        1 - LIP_SHADOW * np.exp(np.minimum(into_upper, 0) * (1 / LIP_SHADOW_REACH))
    )
    light *= np.clip((into_upper + into_lower) * (-1 / LIT_GAP), SLIT_LIGHT, 1)
    shade = _depth_shade(into_upper, light, DEEP_REACH)
    picture = _lit_over(_shifted(layers.tongue, window, pose.tongue_shift), shade, picture)
    picture = _lit_over(_shifted(layers.lower_teeth, window, pose.jaw_shift), shade, picture)
    if pose.tip_up > 0:
        tip = _shifted(layers.tip, window, pose.tip_shift) * np.float32(min(TIP_SOON * pose.tip_up, 1))
        picture = _lit_over(tip, _depth_shade(into_upper, light, TEETH_REACH), picture)
    upper = _shifted(layers.upper_teeth, window, pose.upper_shift)
    picture = _lit_over(upper, _depth_shade(into_upper, light, TEETH_REACH), picture)
    rim = RIM_LIGHT * (1 - pose.tuck) * np.exp(-(np.minimum(above_lower * (1 / RIM), RIM_ENDS) ** 2))
    picture *= three_planes(1 - rim)
    picture += tinted(rim, RIM_SHADE * palette.lip)
    return picture, upper[..., 3] * layers.front[window]


def three_planes(plane: np.ndarray) -> np.ndarray:
    """A plane (h, w) as (h, w, 3): arithmetic on equal shapes is several times faster than broadcasting."""
    import cv2

    return cv2.merge((plane, plane, plane))


def tinted(plane: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """`colour` (3,) as strong as a plane (h, w) says, (h, w, 3)."""
    import cv2

    return cv2.merge([plane * float(value) for value in colour])


def _lit_over(layer: np.ndarray, shade: np.ndarray, back: np.ndarray) -> np.ndarray:
    """`back` with a premultiplied BGRA layer over it, lit by `shade` (h, w, 3)."""
    import cv2

    blue, green, red, alpha = cv2.split(layer)
    lit = cv2.merge((blue, green, red)) * shade
    return lit + back * three_planes(1 - alpha)


def _depth_shade(into_upper: np.ndarray, light: np.ndarray, reach: float) -> np.ndarray:
    """Light (h, w, 3) under the upper lip's shadow, which is red with light that came through flesh."""
    x = np.clip(into_upper * (-1 / reach), 0, 1)
    return _warm((SHADOW + (1 - SHADOW) * x * (2 - x)) * light)


def _warm(light: np.ndarray) -> np.ndarray:
    """Light (h, w) by colour, (h, w, 3): shadows in the mouth are red with what came through flesh."""
    import cv2

    return cv2.merge([light * (1 - loss + loss * light) for loss in WARM_SHADOW])
