"""The rig: how each parameter moves the lower face, in the head's own frame.

A face has two sheets, one hanging on the upper lip and the skull, one on the lower lip and the jaw.
Both are smooth everywhere and agree beyond the mouth's corners, so lips part along a line instead of
tearing a mesh. Every movement is a displacement field per sheet, linear in its coefficient; the
coefficients are the ten public parameters plus the few products that speech needs (pressed lips undo
what opens them, puckered lips open in the middle only). Lengths are in eye distances.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from musetalk.engines.lite.parameters import (
    CHIN_GAIN,
    OPENING_GAIN,
    PARAMETER_INDEX,
    PUCKER_WIDTH_LOSS,
    WIDTH_GAIN,
    rig_opening,
)
from musetalk.faces.head import (
    CHIN,
    INNER_BOTTOM,
    INNER_LEFT_CORNER,
    INNER_LOWER_LIP,
    INNER_RIGHT_CORNER,
    INNER_TOP,
    INNER_UPPER_LIP,
    LEFT_CORNER,
    NOSE_BASE,
    OUTER_BOTTOM,
    OUTER_TOP,
    RIGHT_CORNER,
    HeadFrame,
    mouth_opening,
    mouth_width,
    smoothstep,
)

COEFFICIENTS = (
    "close",
    "jaw_lips",
    "jaw_chin",
    "lip_open",
    "upper_lip_raise",
    "lower_lip_drop",
    "lip_width",
    "pucker",
    "lip_press",
    "lip_tuck",
    "smile",
    "purse",
)
LIP_REACH = 0.62  # eye distances, half the span of the lip tables
LIP_SAMPLES = 249
LIP_BLUR, LIP_BLUR_RADIUS = 2.2, 6  # samples of a lip table over which its edge is smoothed
LIP_MARGIN = 0.006, 0.015  # eye distances, the least and the most
LARGEST_CUT = 0.2  # of an open portrait's gap that is cut away from each lip
BLEED = 1.5  # pixels over which teeth bleed into the lips' colour, more in video
UPPER_SHARE = 0.45  # of parted lips' gap that the upper lip closes
HIDDEN = 0.011  # eye distances of a gap between lips that neither a person nor a face mesh sees
HALF_MOUTH, UPPER_LIP, LOWER_LIP = 0.05, 0.02, 0.03  # eye distances, the least that a mesh is believed
TO_NOSE, TO_CHIN = 0.08, 0.25  # eye distances from the mouth, likewise
MOUTH_SCALES = 0.85, 1.05  # of a usual mouth's opening, the least and the most
SEEN = 0.08  # eye distances of opening from which little of it is hidden
TUCKED = 0.05  # eye distances that the lips part at most while the lower lip is at the upper teeth
PARTED = 0.10  # eye distances; what a mouth is open beyond is the jaw's doing, and mostly its to close
PRESSED_CHIN = 0.5  # of the chin's descent that pressed lips take away
TUCKED_CHIN = 0.5  # of it that a tucked lower lip takes away
TUCK_SHARE = 0.5  # of a tucked mouth's gap that each lip makes
PURSED_BY = 1.3  # of the pucker that makes the lips part in the middle only
CORNER_SHARE = 0.28  # of the jaw's opening that the mouth's corners follow
UPPER_LIFT = 0.13  # of the jaw's opening that the upper lip rises
SPREAD = {
    "jaw_lips": 0.022,
    "upper_lip_raise": 0.010,
    "lip_press": -0.004,
    "lip_tuck": -0.006,
    "smile": 0.010,
}
"""Eye distances that each corner goes out with other movements, so that a face mesh sees it stay."""
UPPER_ARCH, LOWER_ARCH = 2.4, 2.8  # exponents of how parting falls from the mouth's middle to its corners
HOLE_ARCH = 0.75  # the same exponent of rounded lips' narrower parting
BESIDE_REACH = 0.24  # eye distances beyond the corners over which movements fade
OVERLAP_SLOPE, OVERLAP = 2, 0.05  # how fast, and how far in eye distances, sheets overlap beyond the corners
CORNER_FADE = 0.05  # eye distances inside the corners over which what is between the lips fades in
# Eye distances into a sheet over which its movements fade.
WIDTH_REACH = 0.22  # of the corners' way sideways
SPREAD_REACH = 0.32  # of what other movements add to it
CHEEK_REACH = 0.36  # of the upper sheet's beside the corners
SMILE_REACH = 0.3  # of the lower sheet's when it smiles
CHIN_REACH, NECK_REACH = 0.55, 0.3  # of the chin's, to its sides and down the neck
PROTRUSION_REACH = 0.2  # of the lips' way forward, up and down
UPPER_LIP_REACH = 0.6  # the same of the upper lip's, of its height below the nose
LOWER_LIP_REACH = 0.45  # the same of the lower lip's, of its height above the chin
SKIN_BEGINS = 0.8  # of the lower lip's thickness: from there down the chin moves, not the lip
SKIN_REACH = 0.6  # of the lower lip's height above the chin until it is the chin alone
# The same of the red of a lip, of its thickness.
WIDE_RED, PRESSED_RED, TUCKED_RED = 1.6, 1.1, 0.9
PUCKERED_RED = 1.7, 1.6  # the upper and the lower lip
UPPER_PRESS_REACH = 0.01  # eye distances that an upper lip's press goes beyond it
THINNED = 0.12  # of a lip's depth that spread corners take from it
THICKENED = 0.28, 0.26  # of the upper and the lower lip's depth that a full pucker adds
PRESS = 0.010, 0.011  # eye distances that pressed lips roll in, the upper and the lower
TUCK = 0.006, 0.012  # eye distances that lips follow a tuck, the upper and the lower
PURSE = 0.35, 0.65  # of parted lips' gap that the upper and the lower lip move when rounded
SMILE = 0.05  # eye distances that the corners rise
PUCKER_STRETCH = 1.5  # exponent by which wider mouths narrow more
LARGEST_CURL = 0.12  # eye distances that a smile's corners are above its middle
ROUND_HOLE = 0.78  # of a usual mouth's half width where fully rounded lips still part
FLATTENED = 0.9  # of a smile's curl that a full pucker takes away
PROTRUSION = 0.05  # eye distances that a full pucker brings the lips forward
HABIT = 20  # percentile of a clip's openings that is its speaker's habit
NEAR_BY = 2  # frames to either side of one
NEARLY_STILL = 0.03  # eye distances of opening within which a clip's mouth is still and the mesh in doubt
LARGEST_SWING = 0.04  # eye distances
JAW_OF_OPENING = 0.8  # chin descent per opening of a speaking mouth
CHIN_SHARE = 0.55  # of the jaw's descent that the chin shows: the blend mask pins the jaw line beside it
USUAL_MOUTH = 0.52  # eye distances, outer width of a resting mouth


class Lips(NamedTuple):
    """The lips of one frame in the head's frame, eye distances.

    Attributes:
        grid: (LIP_SAMPLES,) right coordinates of the tables.
        upper, lower: (LIP_SAMPLES,) down coordinates of the inner lip edges.
        left, right: right coordinates of the corners, left < 0 < right.
        upper_thickness, lower_thickness: of the red part, at the middle.
        nose, chin: down coordinates of the nose's base (< 0) and of the chin.
        width: of the outer lips.
        share: of the gap that the upper lip closes.
        curl: how much higher the corners are than the middle of the closed lips' line.
        scale: opening of this mouth in units of a usual one's.
        margin: of an open mouth's lips that shows more teeth than lip.
    """

    grid: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    left: float
    right: float
    upper_thickness: float
    lower_thickness: float
    nose: float
    chin: float
    width: float
    share: float
    curl: float
    scale: float
    margin: float

    @property
    def seam(self) -> float:
        """Down coordinate of the closed lips' line at the middle."""
        return float(np.interp(0, self.grid, (1 - self.share) * self.upper + self.share * self.lower))


def _lip_table(points: np.ndarray, grid: np.ndarray) -> np.ndarray:
    order = np.argsort(points[:, 0], kind="stable")
    table = np.interp(grid, points[order, 0], points[order, 1])
    kernel = np.exp(-0.5 * (np.arange(-LIP_BLUR_RADIUS, LIP_BLUR_RADIUS + 1) / LIP_BLUR) ** 2)
    padded = np.pad(table, LIP_BLUR_RADIUS, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")


class OwnMotion(NamedTuple):
    """What a template's speaker does with the mouth in one frame, to be taken out.

    Attributes:
        swing: eye distances that the gap between the lips is wider in frames near by.
        parted: eye distances that the lips are parted out of habit, without the jaw.
        rest: (len(COEFFICIENTS),) field coefficients that bring jaw and corners back to rest.
    """

    swing: float
    parted: float
    rest: np.ndarray


STILL = OwnMotion(0.0, PARTED, np.zeros(len(COEFFICIENTS), np.float32))


def measure_lips(frame: HeadFrame, landmarks: np.ndarray, motion: OwnMotion = STILL) -> Lips:
    """The lips' shape from (478, 3) landmarks in pixels of a frame with its speaker's `motion`."""
    head = frame.to_head(landmarks[:, :2].astype(np.float64))
    grid = np.linspace(-LIP_REACH, LIP_REACH, LIP_SAMPLES)
    upper = _lip_table(head[list(INNER_UPPER_LIP)], grid)
    lower = _lip_table(head[list(INNER_LOWER_LIP)], grid)
    middle = (upper + lower) / 2
    gap = max(float((lower - upper).max()), 1e-6)
    parted = min(gap, motion.parted)
    left, right = head[INNER_RIGHT_CORNER], head[INNER_LEFT_CORNER]  # as one sees them
    along = 2 * (grid - left[0]) / (right[0] - left[0]) - 1
    widening = motion.swing / 2 * np.maximum(1 - along**2, 0)
    width = float(np.linalg.norm(head[LEFT_CORNER] - head[RIGHT_CORNER]))
    curl = float(np.interp(0, grid, middle) - (left[1] + right[1]) / 2)
    return Lips(
        grid=grid,
        upper=np.minimum(upper, middle) - widening,
        lower=np.maximum(lower, middle) + widening,
        left=float(min(left[0], -HALF_MOUTH)),
        right=float(max(right[0], HALF_MOUTH)),
        upper_thickness=float(max(head[INNER_TOP, 1] - head[OUTER_TOP, 1], UPPER_LIP)),
        lower_thickness=float(max(head[OUTER_BOTTOM, 1] - head[INNER_BOTTOM, 1], LOWER_LIP)),
        nose=float(min(head[NOSE_BASE, 1], -TO_NOSE)),
        chin=float(max(head[CHIN, 1], TO_CHIN)),
        width=width,
        share=UPPER_SHARE * parted / gap + UPPER_LIFT * (1 - parted / gap),
        curl=float(np.clip(curl, 0, LARGEST_CURL)),
        scale=float(np.clip(np.sqrt(width / USUAL_MOUTH), *MOUTH_SCALES)),
        margin=float(np.clip(BLEED / frame.eye_distance, *LIP_MARGIN)),
    )


def _hidden(gap: np.ndarray) -> np.ndarray:
    """How much wider than asked, eye distances, a gap must be for lips to be seen as parted."""
    return HIDDEN * (1 - np.exp(-gap / HIDDEN)) * np.exp(-gap / SEEN)


def coefficients(parameters: np.ndarray) -> np.ndarray:
    """Field coefficients (B, len(COEFFICIENTS)) float32 of rig parameters (B, 10).

    Pressed lips undo what parts them, while the jaw may stay down behind them; a tucked lower lip stays
    at the upper teeth, and it is the upper lip that uncovers these.
    """
    value = {name: parameters[:, i].astype(np.float32) for name, i in PARAMETER_INDEX.items()}
    apart, tuck = 1 - value["lip_press"], value["lip_tuck"]
    asked = rig_opening(parameters.astype(np.float32))
    gap = asked + apart * _hidden(asked)
    parted = apart * (gap / np.maximum(asked, 1e-6)) * (1 - tuck)
    tucked = tuck * np.minimum(gap, TUCKED)
    combined = {
        "close": np.ones(len(parameters), np.float32),
        "jaw_lips": value["jaw_open"] * parted,
        "jaw_chin": value["jaw_open"] * (1 - PRESSED_CHIN + PRESSED_CHIN * apart) * (1 - TUCKED_CHIN * tuck),
        "lip_open": value["lip_open"] * parted,
        "upper_lip_raise": value["upper_lip_raise"] * parted
        + TUCK_SHARE * tucked / OPENING_GAIN["upper_lip_raise"],
        "lower_lip_drop": value["lower_lip_drop"] * parted
        + TUCK_SHARE * tucked / OPENING_GAIN["lower_lip_drop"],
        "purse": gap * (1 - tuck) * np.minimum(PURSED_BY * value["pucker"], 1),
    }
    value |= combined
    return np.stack([value[name] for name in COEFFICIENTS], axis=1)


def own_motions(meshes: np.ndarray) -> list[OwnMotion]:
    """The speaker's own mouth motion in N consecutive frames, meshes (N, 478, 3) in pixels.

    Every frame's fields close the gap between the lips; what else speech has moved is the jaw and the
    corners. The clip's median width and habitual (20th percentile) opening count as the speaker's rest.
    Landmarks smoothed over time lag behind fast lips, and now and then take parted lips for shut ones; a
    gap as wide as the widest within two frames, or in the whole of a still clip, hides what they miss.
    """
    width, gap = mouth_width(meshes), mouth_opening(meshes)
    habit = float(np.percentile(gap, HABIT))
    rest = np.zeros((len(meshes), len(COEFFICIENTS)), np.float32)
    rest[:, COEFFICIENTS.index("lip_width")] = np.clip((np.median(width) - width) / WIDTH_GAIN, -1, 1)
    jaw = JAW_OF_OPENING * np.maximum(gap - habit, 0) / (CHIN_SHARE * CHIN_GAIN)
    rest[:, COEFFICIENTS.index("jaw_chin")] = -np.minimum(jaw, 1)
    swing = np.clip(_widest_near_by(gap) - gap, 0, LARGEST_SWING)
    return [OwnMotion(float(swing[i]), min(habit, PARTED), rest[i]) for i in range(len(meshes))]


def _widest_near_by(gaps: np.ndarray) -> np.ndarray:
    """The widest of the gaps (N,) within two frames of each; the 95th percentile at least if still."""
    widest = np.lib.stride_tricks.sliding_window_view(
        np.pad(gaps, NEAR_BY, mode="edge"), 2 * NEAR_BY + 1
    ).max(axis=1)
    low, high = np.percentile(gaps, [5, 95])
    return np.maximum(widest, high) if high - low < NEARLY_STILL else widest


class _Place(NamedTuple):
    """Where points lie on one sheet, eye distances unless said otherwise."""

    along: np.ndarray  # -1 at the left corner, 1 at the right, cut there; no unit
    arch: np.ndarray  # 1 at the middle of the mouth, 0 at and beyond the corners
    hole: np.ndarray  # the same for rounded lips, which part in the middle only
    beside: np.ndarray  # 1 up to the corners, fading beyond
    depth: np.ndarray  # from the sheet's lip edge into the sheet, not below 0
    gap: np.ndarray  # the portrait's own opening


def _place(lips: Lips, points: np.ndarray, upper: bool) -> _Place:
    right, down = points[..., 0], points[..., 1]
    middle = (lips.left + lips.right) / 2
    half = np.where(right < middle, middle - lips.left, lips.right - middle)
    along = (right - middle) / half
    beyond = np.maximum(np.abs(along) - 1, 0) * half
    along = np.clip(along, -1, 1)
    top = np.interp(right, lips.grid, lips.upper)
    bottom = np.interp(right, lips.grid, lips.lower)
    depth = top - down if upper else down - bottom
    arch = 1 - np.abs(along) ** (UPPER_ARCH if upper else LOWER_ARCH)
    reach = ROUND_HOLE / max(1.0, lips.width / USUAL_MOUTH)
    hole = np.maximum(1 - (along / reach) ** 2, 0) ** HOLE_ARCH
    beside = np.exp(-((beyond / BESIDE_REACH) ** 2))
    return _Place(along, arch, hole, beside, np.maximum(depth, 0), bottom - top)


def _fade(depth: np.ndarray, reach: float) -> np.ndarray:
    return np.exp(-((depth / reach) ** 2))


def _sideways(lips: Lips, place: _Place) -> dict[str, np.ndarray]:
    """Movements to the head's right, the same on both sheets."""
    corner = place.along * place.beside
    near, wide = _fade(place.depth, WIDTH_REACH), _fade(place.depth, SPREAD_REACH)
    stretched = max(1.0, lips.width / USUAL_MOUTH)
    spread = {name: reach * corner * wide for name, reach in SPREAD.items()}
    return spread | {
        "lip_width": WIDTH_GAIN / 2 * corner * near,
        "pucker": -PUCKER_WIDTH_LOSS / 2 * stretched**PUCKER_STRETCH * corner * near,
    }


def _flattened(lips: Lips, place: _Place) -> np.ndarray:
    """How far down rounded lips bring the raised corners of a smile."""
    return FLATTENED * lips.curl * place.along**2 * place.beside * _fade(place.depth, CHEEK_REACH)


def _upper_down(lips: Lips, place: _Place) -> dict[str, np.ndarray]:
    arch, depth = place.arch, place.depth
    philtrum = float(np.interp(0, lips.grid, lips.upper)) - lips.nose
    lip, cheek = _fade(depth, UPPER_LIP_REACH * philtrum), _fade(depth, CHEEK_REACH)
    corner = (1 - arch) * place.beside
    thickness = lips.upper_thickness
    jaw = OPENING_GAIN["jaw_open"] * lips.scale
    return {
        "close": lips.share * (place.gap + 2 * cut_margin(lips, place.gap)) * lip,
        "jaw_lips": jaw * (CORNER_SHARE * corner * cheek - UPPER_LIFT * arch * lip),
        "lip_open": -0.5 * OPENING_GAIN["lip_open"] * lips.scale * arch * lip,
        "upper_lip_raise": -OPENING_GAIN["upper_lip_raise"] * lips.scale * arch * lip,
        "lip_width": THINNED * depth * _fade(depth, WIDE_RED * thickness) * arch,
        "pucker": _flattened(lips, place)
        - THICKENED[0] * depth * _fade(depth, PUCKERED_RED[0] * thickness) * arch,
        "lip_press": PRESS[0]
        * (1 - place.along**4)
        * _fade(depth, PRESSED_RED * thickness + UPPER_PRESS_REACH),
        "lip_tuck": -TUCK[0] * arch * lip,
        "purse": -PURSE[0] * lips.scale * (place.hole - arch) * lip,
        "smile": -SMILE * place.along**2 * place.beside * cheek,
    }


def _lower_down(lips: Lips, place: _Place, points: np.ndarray) -> dict[str, np.ndarray]:
    arch, depth = place.arch, place.depth
    height = lips.chin - float(np.interp(0, lips.grid, lips.lower))
    below_lip = np.maximum(depth - SKIN_BEGINS * lips.lower_thickness, 0)
    lip, skin = _fade(depth, LOWER_LIP_REACH * height), smoothstep(below_lip / (SKIN_REACH * height))
    neck = _fade(np.maximum(points[..., 1] - lips.chin, 0), NECK_REACH)
    corner = (1 - arch) * place.beside
    thickness = lips.lower_thickness
    jaw = OPENING_GAIN["jaw_open"] * lips.scale
    return {
        "close": -(1 - lips.share) * (place.gap + 2 * cut_margin(lips, place.gap)) * lip,
        "jaw_lips": jaw * (CORNER_SHARE * corner + (1 - UPPER_LIFT) * arch) * (1 - skin),
        "jaw_chin": CHIN_SHARE * CHIN_GAIN * lips.scale * _fade(points[..., 0], CHIN_REACH) * skin * neck,
        "lip_open": 0.5 * OPENING_GAIN["lip_open"] * lips.scale * arch * lip,
        "lower_lip_drop": OPENING_GAIN["lower_lip_drop"] * lips.scale * arch * lip,
        "lip_width": -THINNED * depth * _fade(depth, WIDE_RED * thickness) * arch,
        "pucker": _flattened(lips, place)
        + THICKENED[1] * depth * _fade(depth, PUCKERED_RED[1] * thickness) * arch,
        "lip_press": -PRESS[1] * (1 - place.along**4) * _fade(depth, PRESSED_RED * thickness),
        "lip_tuck": -TUCK[1] * arch * _fade(depth, TUCKED_RED * thickness),
        "purse": PURSE[1] * lips.scale * (place.hole - arch) * lip,
        "smile": -SMILE * place.along**2 * place.beside * _fade(depth, SMILE_REACH),
    }


def movement_fields(frame: HeadFrame, lips: Lips, points: np.ndarray) -> np.ndarray:
    """Displacement in pixels per unit coefficient, of points (..., 2) in the head's frame.

    Returns (2, len(COEFFICIENTS), ..., 2) float32: upper sheet, lower sheet.
    """
    fields = np.zeros((2, len(COEFFICIENTS), *points.shape[:-1], 2), np.float32)
    for sheet, upper in enumerate((True, False)):
        place = _place(lips, points, upper)
        down = _upper_down(lips, place) if upper else _lower_down(lips, place, points)
        for name, field in down.items():
            fields[sheet, COEFFICIENTS.index(name), ..., 1] = field
        for name, field in _sideways(lips, place).items():
            fields[sheet, COEFFICIENTS.index(name), ..., 0] = field
    fields = (fields @ frame.axes.T).astype(np.float32)
    near = PROTRUSION * place.beside * np.exp(-((points[..., 1] / PROTRUSION_REACH) ** 2))
    fields[:, COEFFICIENTS.index("pucker")] += near[..., None] * frame.forward
    return fields


def cut_margin(lips: Lips, gap: np.ndarray) -> np.ndarray:
    """(...) of each lip of a portrait open by `gap` (...) that is cut away, because teeth shine through its
    edge, eye distances."""
    return np.minimum(lips.margin, LARGEST_CUT * gap)


def edge_distances(lips: Lips, points: np.ndarray) -> np.ndarray:
    """Distance of points (..., 2) from the cut inner lip edges into each sheet, (..., 2) float32.

    Eye distances; positive on the sheet, negative in the mouth and beyond it. Beside the mouth the
    sheets overlap more and more, so that no gap can open there.
    """
    right, down = points[..., 0], points[..., 1]
    beside = np.maximum(np.maximum(lips.left - right, right - lips.right), 0)
    distances = np.empty(points.shape, np.float32)
    step = lips.grid[1] - lips.grid[0]
    for sheet, (table, sign) in enumerate(((lips.upper, -1), (lips.lower, 1))):
        steepness = np.sqrt(1 + np.gradient(table, step) ** 2)
        edge = np.interp(right, lips.grid, table)
        distances[..., sheet] = sign * (down - edge) / np.interp(right, lips.grid, steepness)
    gap = np.interp(right, lips.grid, lips.lower - lips.upper)
    distances += (np.minimum(OVERLAP_SLOPE * beside, OVERLAP) - cut_margin(lips, gap))[..., None]
    return distances


def between_corners(lips: Lips, points: np.ndarray) -> np.ndarray:
    """1 for points (..., 2) between the mouth's corners, fading to 0 at them, (...) float32."""
    inside = np.minimum(points[..., 0] - lips.left, lips.right - points[..., 0])
    return np.clip(inside / CORNER_FADE, 0, 1).astype(np.float32)
