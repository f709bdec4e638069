"""What a face's picture tells of its style: the light on it, its colours, its grain and its sharpness.

Teeth, tongue and cavity are painted in these, so that they belong to the picture: what is painted cleanly
into a grainy or a soft picture is seen to be painted. Nothing here knows where teeth are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from musetalk.faces.head import (
    CHEEKS,
    INNER_LOWER_LIP,
    INNER_UPPER_LIP,
    LEFT_EYE,
    LEFT_EYE_INNER,
    LEFT_EYE_OUTER,
    LIP_REDS,
    OUTER_LOWER_LIP,
    OUTER_UPPER_LIP,
    RIGHT_EYE,
    RIGHT_EYE_INNER,
    RIGHT_EYE_OUTER,
    eye_distance,
)

SAMPLE_RADIUS = 0.02  # eye distances, half the side of the patches that colours are taken from
EYE_SHARE = 0.22  # of an eye's width from its corners to the middle of its white
EYE_WHITE = 80  # percentile of a patch's luma beside the iris that its white is
SKIN_SHARE, WHITE_SHARE = 0.45, 0.55  # of the light on the teeth that the skin and the eyes' white tell
LIGHT = 50, 215  # luma of the light on the teeth, the least and the most
TOOTH_TINT = np.array([0.92, 0.98, 1.0], np.float32)  # BGR, of the light
OWN_TINT, SKIN_TINT = 0.66, 0.34  # shares of the teeth's own and of the skin's colour in theirs
TONGUE_RED, TONGUE_TINT = 0.42, 0.52  # shares of the lips' and of its own colour
TONGUE_COLOUR = np.array([0.50, 0.46, 0.80], np.float32)  # BGR, of the light
CAVITY_COLOUR = np.array([0.098, 0.084, 0.19], np.float32)  # BGR, of the light
FLAT_CAVITY, FLAT_TOOTH = 0.8, 0.15  # shares by which drawings have both lighter
LIGHTEST_TOOTH = 235  # of 255
FULL_COLOUR = 0.2  # saturation from which a picture counts as coloured
DARK_LINE = 0.72  # of the lips' colour, the lightest that the line between them is
GRAIN = 0.0140, 0.0089  # mean second difference, of the luma, below which a picture is flat, and by how much
SHARP_TURN = 1.8  # pixels over which edges of a sharp picture turn: softer ones are looked at smaller
GUM_LIP = 0.45  # share of the lips' colour in the gums', which else is the tongue's
GUM_LIGHT = 1.12  # of both
SIDE_LIGHT = 0.6  # of the light, the most that a way of an eye distance to the right changes
BANDS = 0.8, 1.6, 3.2  # pixels, deviations of the blurs between which grain is told
GRAIN_REACH = 0.07, 4  # half the side of the patches that tell it, eye distances and pixels at least
MOST_GRAIN = 0.05  # of the luma, in one band
TURN = 1.2, 20.0  # pixels over which painted edges turn, the least and the most
EDGE_REACHES = 5, 10, 20  # pixels round a contour where its edge is looked for, further if it is softer
EDGE_CONTRAST = 20  # luma that it must have
SHARPEST = 25  # percentile of the widths of a picture's edges that is what its lens does
MEASURED_WIDER = 0.6  # pixels that differences of pixels take an edge for wider
SHADED_EYE = 0.95  # of the skin's luma; eyes in the brows' or glasses' shadow say nothing of the teeth


class Palette(NamedTuple):
    """Colours of one face, BGR float32 0-255.

    Attributes:
        tooth, tongue, gum, lip, cavity: (3,) as lit at the front of the mouth.
        line: (3,) where closed lips meet.
        flatness: 0 for a photograph's skin, 1 for cel shading.
        side: share of the light that is added an eye distance to the right.
        grain: (3,) deviation of the skin's luma as a share of it, in the bands between `BANDS`, finest first.
        turn: pixels over which the picture's sharp edges turn.
    """

    tooth: np.ndarray
    tongue: np.ndarray
    gum: np.ndarray
    lip: np.ndarray
    cavity: np.ndarray
    line: np.ndarray
    flatness: float
    side: float
    grain: np.ndarray
    turn: float


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
    turn = _turn(picture, points)
    flatness = _flatness(picture, points, radius, max(1.0, turn / SHARP_TURN))
    tooth = level * TOOTH_TINT * (OWN_TINT + SKIN_TINT * skin / max(light, 1))
    tongue = TONGUE_RED * lip + TONGUE_TINT * level * TONGUE_COLOUR
    gum = GUM_LIGHT * (GUM_LIP * lip + (1 - GUM_LIP) * tongue)
    cavity = level * CAVITY_COLOUR * (1 + FLAT_CAVITY * flatness)
    colour = float(np.clip(np.ptp(np.stack([skin, lip]), axis=1).mean() / max(light, 1) / FULL_COLOUR, 0, 1))
    tooth *= 1 + FLAT_TOOTH * flatness
    return Palette(
        tooth=tooth * np.float32(min(1.0, LIGHTEST_TOOTH / float(tooth.max()))),
        tongue=_saturated(tongue, colour),
        gum=_saturated(gum, colour),
        lip=lip,
        cavity=_saturated(cavity, colour),
        line=_lip_line(picture, points, lip),
        flatness=flatness,
        side=_side_light(picture, points, radius),
        grain=_grain(picture, points),
        turn=turn,
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


def _flatness(picture: np.ndarray, points: np.ndarray, radius: int, softness: float) -> float:
    """1 for skin that is one colour, as drawings have it.

    A picture that is `softness` times softer than a sharp one is looked at as small as it would be sharp:
    a blurred photograph is no drawing.
    """
    import cv2

    reach = round(2 * max(radius, softness))
    grain = []
    for x, y in np.round(points[list(CHEEKS)]).astype(int):
        luma = _luma_round(picture, x, y, reach)
        if luma is not None:
            if softness > 1:
                sides = [max(3, round(side / softness)) for side in reversed(luma.shape)]
                luma = cv2.resize(luma, sides, interpolation=cv2.INTER_AREA)
            beside = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
            rough = float(np.abs(4 * luma[1:-1, 1:-1] - beside).mean())
            grain.append(rough / max(float(luma.mean()), 1))
    return float(np.clip((GRAIN[0] - np.median(grain)) / GRAIN[1], 0, 1)) if grain else 0.0


def _side_light(picture: np.ndarray, points: np.ndarray, radius: int) -> float:
    """How much of the light on the cheeks is added an eye distance to the picture's right."""
    changes = []
    for one, other in zip(CHEEKS[::2], CHEEKS[1::2], strict=True):
        lumas = [float(np.median(luminance(_patch(picture, points[[i]], radius)))) + 1 for i in (one, other)]
        way = float(np.linalg.norm(points[other] - points[one])) / float(eye_distance(points))
        changes.append(np.log(lumas[1] / lumas[0]) / max(way, SAMPLE_RADIUS))
    towards = 1 if points[CHEEKS[1], 0] >= points[CHEEKS[0], 0] else -1
    return float(np.clip(towards * np.median(changes), -SIDE_LIGHT, SIDE_LIGHT))


def _luma_round(picture: np.ndarray, x: int, y: int, reach: int) -> np.ndarray | None:
    """Luma of the square round a pixel, cut at the picture's edge; None if that leaves less than half."""
    patch = picture[max(y - reach, 0) : max(y + reach + 1, 0), max(x - reach, 0) : max(x + reach + 1, 0)]
    return luminance(patch.astype(np.float32)) if min(patch.shape[:2]) > reach else None


def bands_of(luma: np.ndarray) -> list[np.ndarray]:
    """What of a plane (h, w) float32 lies between the blurs of `BANDS`, the finest first."""
    import cv2

    blurred = [luma, *(cv2.GaussianBlur(luma, (0, 0), deviation) for deviation in BANDS)]
    return [fine - coarse for fine, coarse in pairwise(blurred)]


def _grain(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    reach = max(GRAIN_REACH[1], round(GRAIN_REACH[0] * float(eye_distance(points))))
    found = []
    for x, y in np.round(points[list(CHEEKS)]).astype(int):
        luma = _luma_round(picture, x, y, reach)
        if luma is not None:
            found.append([float(band.std()) / max(float(luma.mean()), 1) for band in bands_of(luma)])
    strengths = np.median(found, axis=0) if found else np.zeros(len(BANDS))
    return np.clip(strengths, 0, MOST_GRAIN).astype(np.float32)


def _turn(picture: np.ndarray, points: np.ndarray) -> float:
    """Pixels over which the sharper edges of eyes and lips turn from dark to light."""
    width = 0.0
    for reach in EDGE_REACHES:
        width = _edge_width(picture, points, reach)
        if width < reach:
            break
    return float(np.clip(width - MEASURED_WIDER, *TURN))


def _edge_width(picture: np.ndarray, points: np.ndarray, reach: int) -> float:
    """Contrast over slope of the sharper edges within `reach` of eyes and lips, pixels; 0 if none is seen."""
    widths = []
    contour = points[[*RIGHT_EYE, *LEFT_EYE, *OUTER_UPPER_LIP, *OUTER_LOWER_LIP]]
    for x, y in np.round(contour).astype(int):
        luma = _luma_round(picture, x, y, reach)
        if luma is not None and (contrast := float(np.ptp(luma))) > EDGE_CONTRAST:
            slope = max(np.abs(luma[2:] - luma[:-2]).max(), np.abs(luma[:, 2:] - luma[:, :-2]).max()) / 2
            widths.append(contrast / float(slope))
    return float(np.percentile(widths, SHARPEST)) if widths else 0.0
