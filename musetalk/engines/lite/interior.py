"""The inside of the mouth: cavity, teeth and tongue, painted in the light and style of the face.

Upper teeth hang on the skull and lower teeth on the jaw, so lips uncover them instead of stretching
them; teeth that the portrait itself shows are kept as they are and only continued where lips hid them.
Layers are painted once per template frame; an output frame moves and shades them. Lengths are in eye
distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from musetalk.engines.lite.rig import Lips
from musetalk.faces.head import (
    CHEEKS,
    INNER_LOWER_LIP,
    INNER_UPPER_LIP,
    LEFT_EYE_INNER,
    LEFT_EYE_OUTER,
    LIP_REDS,
    RIGHT_EYE_INNER,
    RIGHT_EYE_OUTER,
    eye_distance,
    smoothstep,
)

if TYPE_CHECKING:
    from musetalk.geometry import Box

SAMPLE_RADIUS = 0.02  # eye distances, half the side of the patches that colours are taken from
EYE_SHARE = 0.22  # of an eye's width from its corners to the middle of its white
EYE_WHITE = 80  # percentile of a patch's luma beside the iris that its white is
SKIN_SHARE, WHITE_SHARE = 0.45, 0.55  # of the light on the teeth that the skin and the eyes' white tell
LIGHT = 50, 215  # luma of the light on the teeth, the least and the most
TOOTH_TINT = np.array([0.92, 0.98, 1.0], np.float32)  # BGR, of the light
OWN_TINT, SKIN_TINT = 0.66, 0.34  # shares of the teeth's own and of the skin's colour in theirs
TONGUE_RED, TONGUE_TINT = 0.42, 0.52  # shares of the lips' and of its own colour
TONGUE_COLOUR = np.array([0.50, 0.46, 0.80], np.float32)  # BGR, of the light
CAVITY_COLOUR = np.array([0.085, 0.075, 0.16], np.float32)  # BGR, of the light
FLAT_CAVITY, FLAT_TOOTH = 0.8, 0.15  # shares by which drawings have both lighter
LIGHTEST_TOOTH = 235  # of 255
FULL_COLOUR = 0.2  # saturation from which a picture counts as coloured
DARK_LINE = 0.72  # of the lips' colour, the lightest that the line between them is
GRAIN = 2.2, 1.4  # mean second difference of luma below which a picture is flat, and by how much altogether
UPPER_TEETH = (0.0, 0.086, 0.152, 0.208, 0.25, 0.285)  # borders from the middle, foreshortened by the arch
LOWER_TEETH = (0.0, 0.056, 0.112, 0.166, 0.212, 0.25)
UPPER_EDGE = 0.021  # below the closed lips' line
LOWER_EDGE = 0.018
TOOTH_SHADES = np.array((1.0, 0.95, 0.87, 0.88, 0.82), np.float32)  # canines are darker than their neighbours
TEETH_ARCH = 0.4  # eye distances that a row's edge rises, by the square of the way from the middle
TOOTH_ROUNDING = 0.010  # eye distances that a tooth's edge rises at its sides
TOOTH_STEP = 0.004  # eye distances that every second tooth is shorter
ROW_END = 0.02  # eye distances over which a row ends
WEDGE = 0.02  # eye distances above the edge over which the gaps between teeth get narrow
GAP_WIDTH = 0.0035, 0.6  # of the dark between teeth, the least in eye distances and in pixels
GAP_SHADE = 0.12, 0.14  # of the light that it takes anywhere, and more at the edge
GAP_SEEN = 0.004, 0.35  # eye distances a pixel, and share, that tell how much of a gap small pictures show
BEHIND = 0.70  # of the light that the last tooth loses
BULGE, TOOTH_EDGE = 0.12, 0.10  # shares of the light that a tooth's sides and edge lose
EDGE_REACH = 0.008  # eye distances above a tooth's edge that are darker
LOWER_SHADE = 0.86  # of the upper teeth's colour that the lower have
FRONT = 0.21, 0.08  # eye distances from the middle where the front teeth end, and over which
BLUR = 1.6  # pixels over which painted edges turn, as a lens would have it
SHADED_EYE = 0.95  # of the skin's luma; eyes in the brows' or glasses' shadow say nothing of the teeth
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
TONGUE_HEIGHT, TONGUE_HALF = 0.12, 0.20  # eye distances: of its round top, and half its width
TONGUE_EDGE = 0.022  # eye distances over which it ends, at least
TONGUE_SHADE, TONGUE_LIGHT = 0.42, 0.58  # of the light at its edge, and what its round top gathers more
TONGUE_SLOPE = 1.6  # how soon
GROOVE, GROOVE_WIDTH = 0.12, 0.02  # of the light that its groove loses, and eye distances of half of it
TONGUE_TOP = 0.048  # below the closed lips' line with the jaw shut


class Palette(NamedTuple):
    """Colours of one face, BGR float32 0-255.

    Attributes:
        tooth, tongue, lip, cavity: (3,) as lit at the front of the mouth.
        line: (3,) where closed lips meet.
        flatness: 0 for a photograph's skin, 1 for cel shading.
    """

    tooth: np.ndarray
    tongue: np.ndarray
    lip: np.ndarray
    cavity: np.ndarray
    line: np.ndarray
    flatness: float


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
        upper_teeth, lower_teeth, tongue: premultiplied BGRA float32 (h, w, 4).
        front: (h, w) float32, 1 over the front teeth, fading to 0 towards the molars.
    """

    upper_teeth: np.ndarray
    lower_teeth: np.ndarray
    tongue: np.ndarray
    front: np.ndarray


class Pose(NamedTuple):
    """What of the mouth's inside has moved in one output frame.

    Attributes:
        upper_shift, jaw_shift, tongue_shift: (2,) pixels by which upper teeth, lower teeth and tongue
            have moved; the upper teeth only behind rounded lips, whose way forward covers them.
        tuck: 0 to 1, how far the lower lip lies behind the upper teeth.
        pucker: 0 to 1, how deep the teeth lie behind rounded lips.
    """

    upper_shift: np.ndarray
    jaw_shift: np.ndarray
    tongue_shift: np.ndarray
    tuck: float
    pucker: float


def _patch(picture: np.ndarray, points: np.ndarray, radius: int) -> np.ndarray:
    height, width = picture.shape[:2]
    patches = []
    for x, y in np.round(points).astype(int):
        x, y = int(np.clip(x, radius, width - 1 - radius)), int(np.clip(y, radius, height - 1 - radius))
        patches.append(picture[y - radius : y + radius + 1, x - radius : x + radius + 1].reshape(-1, 3))
    return np.concatenate(patches).astype(np.float32)


def luminance(colour: np.ndarray) -> np.ndarray:
    """BT.601 luma of BGR colours (..., 3)."""
    return colour @ np.array([0.114, 0.587, 0.299], np.float32)


def measure_palette(picture: np.ndarray, landmarks: np.ndarray) -> Palette:
    """The palette of a face (H, W, 3) uint8 BGR with (478, 2+) landmarks in its pixels."""
    points = landmarks[:, :2]
    radius = max(1, round(float(eye_distance(points)) * SAMPLE_RADIUS))
    skin = np.median(_patch(picture, points[list(CHEEKS)], radius), axis=0)
    lip = np.median(_patch(picture, points[list(LIP_REDS)], radius), axis=0)
    light = float(luminance(skin))
    white = max(_eye_white(picture, points, radius), SHADED_EYE * light)
    level = float(np.clip(SKIN_SHARE * light + WHITE_SHARE * white, *LIGHT))
    flatness = _flatness(picture, points, radius)
    tooth = level * TOOTH_TINT * (OWN_TINT + SKIN_TINT * skin / max(light, 1))
    tongue = TONGUE_RED * lip + TONGUE_TINT * level * TONGUE_COLOUR
    cavity = level * CAVITY_COLOUR * (1 + FLAT_CAVITY * flatness)
    colour = float(np.clip(np.ptp(np.stack([skin, lip]), axis=1).mean() / max(light, 1) / FULL_COLOUR, 0, 1))
    return Palette(
        tooth=np.minimum(tooth * (1 + FLAT_TOOTH * flatness), LIGHTEST_TOOTH),
        tongue=_saturated(tongue, colour),
        lip=lip,
        cavity=_saturated(cavity, colour),
        line=_lip_line(picture, points, lip),
        flatness=flatness,
    )


def _saturated(colour: np.ndarray, saturation: float) -> np.ndarray:
    grey = luminance(colour)
    return grey + saturation * (colour - grey)


def _eye_white(picture: np.ndarray, points: np.ndarray, radius: int) -> float:
    """The luma of the brighter eye's white, which tells the light on the teeth."""
    levels = []
    for outer, inner in ((RIGHT_EYE_OUTER, RIGHT_EYE_INNER), (LEFT_EYE_OUTER, LEFT_EYE_INNER)):
        beside_iris = [
            (1 - EYE_SHARE) * points[outer] + EYE_SHARE * points[inner],
            EYE_SHARE * points[outer] + (1 - EYE_SHARE) * points[inner],
        ]
        levels.append(np.percentile(luminance(_patch(picture, np.stack(beside_iris), radius)), EYE_WHITE))
    return float(max(levels))


def _lip_line(picture: np.ndarray, points: np.ndarray, lip: np.ndarray) -> np.ndarray:
    """The colour of the line where lips meet: what is darkest there, not lighter than lips in shadow."""
    seam = _patch(picture, (points[list(INNER_UPPER_LIP[2:9])] + points[list(INNER_LOWER_LIP[2:9])]) / 2, 1)
    dark = np.median(seam[np.argsort(luminance(seam))[: len(seam) // 3]], axis=0)
    return np.minimum(dark, DARK_LINE * lip)


def _flatness(picture: np.ndarray, points: np.ndarray, radius: int) -> float:
    grain = []
    for x, y in np.round(points[list(CHEEKS)]).astype(int):
        patch = luminance(
            picture[max(y - 2 * radius, 0) : y + 2 * radius, max(x - 2 * radius, 0) : x + 2 * radius]
        )
        if min(patch.shape) >= 3:
            second = (
                patch[1:-1, 1:-1] * 4
                - patch[:-2, 1:-1]
                - patch[2:, 1:-1]
                - patch[1:-1, :-2]
                - patch[1:-1, 2:]
            )
            grain.append(float(np.abs(second).mean()))
    return float(np.clip((GRAIN[0] - np.median(grain)) / GRAIN[1], 0, 1)) if grain else 0.0


def _soft(distance: np.ndarray, pixel: float) -> np.ndarray:
    return np.clip(distance / pixel + 0.5, 0, 1)


def _row(
    right: np.ndarray,
    down: np.ndarray,
    borders: tuple[float, ...],
    pixel: float,
    flatness: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and shade of a row of teeth hanging from above; `down` is 0 at the edge, negative above."""
    side = np.abs(right)
    arch = TEETH_ARCH * side**2
    limits = np.array(borders, np.float32)
    tooth = np.clip(np.searchsorted(limits, side.ravel(), side="right") - 1, 0, len(limits) - 2)
    tooth = tooth.reshape(side.shape)
    middle = ((limits[1:] + limits[:-1]) / 2)[tooth]
    half = (np.diff(limits) / 2)[tooth]
    across = np.abs(side - middle) / half
    rounding = (1 - flatness) * (TOOTH_ROUNDING * across**4 + TOOTH_STEP * (tooth % 2))
    edge = -(down + arch + rounding)
    alpha = _soft(edge, BLUR * pixel) * _soft(limits[-1] - side, ROW_END)
    wedge = np.exp(-np.maximum(edge, 0) / WEDGE)
    seam = np.exp(-((((1 - across) * half) / max(GAP_WIDTH[0], GAP_WIDTH[1] * pixel)) ** 2))
    gap = (
        (GAP_SHADE[0] + GAP_SHADE[1] * wedge)
        * (1 - flatness)
        * seam
        * min(1.0, GAP_SEEN[0] / pixel + GAP_SEEN[1])
    )
    lateral = 1 - BEHIND * np.clip(side / limits[-1], 0, 1) ** 2.0
    bulge = 1 - BULGE * (1 - flatness) * across**2
    rim = 1 - TOOTH_EDGE * (1 - flatness) * np.exp(-((edge / EDGE_REACH) ** 2))
    tooth_shade = 1 - (1 - flatness) * (1 - TOOTH_SHADES[tooth])
    return alpha, lateral * bulge * rim * tooth_shade * (1 - gap)


def _layer(colour: np.ndarray, shade: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    layer = np.empty((*alpha.shape, 4), np.float32)
    layer[..., :3] = colour * (shade * alpha)[..., None]
    layer[..., 3] = alpha
    return layer


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
    palettes = zip(*(look.palette for look in alike), strict=True)
    palette = Palette(*(np.median(np.stack(values), axis=0) for values in palettes))
    return Look(palette, float(np.median([look.edge for look in alike])), float(owned))


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
    size, palette = lips.scale, look.palette
    right, down = head[..., 0] / size, (head[..., 1] - lips.seam) / size
    alpha, shade = _row(right, down - look.edge / size, UPPER_TEETH, pixel / size, palette.flatness)
    upper = _layer(palette.tooth, shade, alpha)
    if look.owned:
        own = _own_teeth(picture, distances, palette, pixel)
        upper = _over(np.dstack([picture * own[..., None], own]).astype(np.float32), upper)
    alpha, shade = _row(right, LOWER_EDGE - down, LOWER_TEETH, pixel / size, palette.flatness)
    lower = _layer(palette.tooth * LOWER_SHADE, shade, alpha)
    front = np.clip((FRONT[0] - np.abs(right)) / FRONT[1], 0, 1).astype(np.float32)
    return Layers(upper, lower, _tongue(right, down, palette, pixel / size), front)


def _tongue(right: np.ndarray, down: np.ndarray, palette: Palette, pixel: float) -> np.ndarray:
    height = (down - TONGUE_TOP) / TONGUE_HEIGHT
    side = right / TONGUE_HALF
    distance = 1 - np.sqrt(side**2 + np.minimum(height - 1, 0) ** 2)
    alpha = _soft(distance * TONGUE_HEIGHT, max(pixel, TONGUE_EDGE))
    round_ = smoothstep(distance * TONGUE_SLOPE)
    groove = 1 - GROOVE * (1 - palette.flatness) * np.exp(-((right / GROOVE_WIDTH) ** 2))
    return _layer(palette.tongue, (TONGUE_SHADE + TONGUE_LIGHT * round_) * groove, alpha)


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
    import cv2

    x = np.clip(into_upper * (-1 / reach), 0, 1)
    shade = (SHADOW + (1 - SHADOW) * x * (2 - x)) * light
    return cv2.merge([shade * (1 - loss + loss * shade) for loss in WARM_SHADOW])
