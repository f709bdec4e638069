"""Things in front of a mouth, drawn on pictures of faces: masks, cloths, hands, microphones and cards.

The decision a reader would question: they are drawn, not photographed. What tells a covered mouth is that
nothing of lips is seen where the mesh says they are, and a drawing hides them as well. Lengths are in eye
distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from musetalk.faces.head import INNER_LIPS, LEFT_EYE_OUTER, RIGHT_EYE_OUTER, eye_distance

REPEATS = 2  # of each cover on each face
EDGE = 0.012  # of a cover, over which it ends
LIGHT_REACH = 0.25  # blur of the picture's own light
LIGHT_RANGE = 0.5, 1.4  # of it, around its median under the cover
MASK_FOLDS = np.array([-0.22, 0.0, 0.22])  # below the mouth
MASK_COLOURS = ((215, 190, 150), (40, 38, 36), (160, 200, 150), (235, 232, 228))  # BGR, of paper
CLOTH_COLOURS = (
    *((40, 40, 200), (120, 40, 20), (30, 30, 30), (200, 200, 210), (60, 120, 60)),
    *((170, 190, 220), (90, 90, 110), (150, 120, 200), (120, 160, 210)),
)
CARD_COLOURS = ((240, 240, 240), (25, 25, 28), (60, 60, 190), (200, 150, 80), (230, 225, 200))
BALL_TONES = (25, 45, 120, 170)  # grey levels of a microphone
JAW = (93, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 323)  # right to left
MASK_TOPS = (195, 5, 4, 197)  # points of the nose that a mask may end at
SKIN = (50, 280, 151, 9, 108, 337, 205, 425)  # cheeks and forehead
JAW_ROOM = 1.06  # of the jaw, measured from the face's middle


class Place(NamedTuple):
    """A face in its picture.

    Attributes:
        mesh: (478, 2) pixels.
        mouth: (2,) its middle.
        right, down: (2,) of length one, along the eyes and across.
        eyes: pixels between the eyes' outer corners.
    """

    mesh: np.ndarray
    mouth: np.ndarray
    right: np.ndarray
    down: np.ndarray
    eyes: float


def place_of(mesh: np.ndarray) -> Place:
    """Where a face (478, 2) is."""
    eyes = float(eye_distance(mesh))
    right = (mesh[LEFT_EYE_OUTER] - mesh[RIGHT_EYE_OUTER]) / eyes
    return Place(mesh, mesh[list(INNER_LIPS)].mean(axis=0), right, np.array([-right[1], right[0]]), eyes)


Cover = Callable[[np.ndarray, Place, np.random.Generator], np.ndarray]
"""A picture (H, W, 3) uint8 BGR and a face in it → the picture with something in front of the mouth."""


def _along(shape: Sequence[int], origin: np.ndarray, way: np.ndarray, unit: float) -> np.ndarray:
    """(H, W) how far pixels lie from `origin` along `way`, in `unit` pixels."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((x - origin[0]) * way[0] + (y - origin[1]) * way[1]) / unit


def _inside(shape: Sequence[int], outline: np.ndarray, softness: float) -> np.ndarray:
    """(H, W) 1 inside an outline (n, 2), 0 outside, over `softness` pixels."""
    filled = np.zeros(shape[:2], np.float32)
    cv2.fillPoly(filled, [np.round(outline).astype(np.int32)], 1.0)
    return cv2.GaussianBlur(filled, (0, 0), max(softness, 0.6))


def _line(shape: Sequence[int], ends: Sequence[np.ndarray], width: float) -> np.ndarray:
    """(H, W) 1 on a thick line with round ends, 0 elsewhere."""
    drawn = np.zeros(shape[:2], np.float32)
    one, other = (np.round(end).astype(int).tolist() for end in ends)
    cv2.line(drawn, one, other, 1.0, max(2, round(width)), cv2.LINE_AA)
    return drawn


def _laid_over(picture: np.ndarray, cover: np.ndarray, share: np.ndarray) -> np.ndarray:
    mixed = picture * (1 - share[..., None]) + cover * share[..., None]
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _own_light(picture: np.ndarray, share: np.ndarray, eyes: float) -> np.ndarray:
    """(H, W, 1) the picture's light where something lies on it, 1 in the middle."""
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.float32)
    light = cv2.GaussianBlur(grey, (0, 0), max(LIGHT_REACH * eyes, 1))
    under = light[share > 0.5]
    return np.clip(light / max(float(np.median(under)) if under.size else 1.0, 1.0), *LIGHT_RANGE)[..., None]


def _grain(shape: Sequence[int], rng: np.random.Generator, strength: float, softness: float) -> np.ndarray:
    """(H, W, 1) noise."""
    drawn = rng.normal(0, strength, shape[:2]).astype(np.float32)
    return cv2.GaussianBlur(drawn, (0, 0), max(softness, 0.5))[..., None]


def _lower_face(place: Place, rng: np.random.Generator) -> np.ndarray:
    """(n, 2) the outline of a mask from ear to ear."""
    mesh = place.mesh
    middle = mesh.mean(axis=0)
    jaw = middle + (mesh[list(JAW)] - middle) * JAW_ROOM
    left, right = (mesh[[one, other]].mean(axis=0) for one, other in ((454, 323), (234, 93)))
    cheeks = [mesh[[one, other]].mean(axis=0) for one, other in ((346, 280), (117, 50))]
    return np.array([right, *jaw, left, cheeks[0], mesh[rng.choice(MASK_TOPS)], cheeks[1]])


def mask(picture: np.ndarray, place: Place, rng: np.random.Generator) -> np.ndarray:
    """A paper mask with three folds."""
    share = _inside(picture.shape, _lower_face(place, rng), EDGE * place.eyes)
    down = _along(picture.shape, place.mouth, place.down, place.eyes)
    folds = sum(np.exp(-(((down - at) / 0.02) ** 2)) for at in MASK_FOLDS + rng.normal(0, 0.02, 3))
    colour = np.array(MASK_COLOURS[rng.integers(len(MASK_COLOURS))]) * rng.uniform(0.75, 1)
    paper = colour * (1 - 0.22 * folds[..., None]) + _grain(picture.shape, rng, 4, 0.01 * place.eyes)
    return _laid_over(picture, paper * _own_light(picture, share, place.eyes), share)


def cloth(picture: np.ndarray, place: Place, rng: np.random.Generator) -> np.ndarray:
    """A scarf or a cloth mask: plain, striped or chequered, with folds."""
    outline, eyes = _lower_face(place, rng), place.eyes
    share = _inside(picture.shape, outline, EDGE * eyes)
    colour = np.array(CLOTH_COLOURS[rng.integers(len(CLOTH_COLOURS))])
    woven = colour * (_pattern(picture.shape, place, rng) * _folds(picture.shape, place, rng))[..., None]
    woven = woven + _grain(picture.shape, rng, 60, 0.03 * eyes)
    return _laid_over(picture, woven * _own_light(picture, share, eyes), share)


def _pattern(shape: Sequence[int], place: Place, rng: np.random.Generator) -> np.ndarray:
    """(H, W) around 1: nothing, stripes or squares."""
    across, down = (_along(shape, place.mouth, way, place.eyes) for way in (place.right, place.down))
    kind, often = rng.integers(3), rng.uniform(15, 40)
    if kind == 0:
        return np.ones(shape[:2])
    if kind == 1:
        return 1 + 0.15 * np.sin(often * (down + 0.3 * across))
    return 1 + 0.3 * (np.sin(often * across) * np.sin(often * down) > 0.2)


def _folds(shape: Sequence[int], place: Place, rng: np.random.Generator) -> np.ndarray:
    """(H, W) 1 less the shade of four folds from cheek to cheek."""
    light = np.ones(shape[:2], np.float32)
    for begin, end in rng.uniform(-0.4, 0.5, (4, 2)):
        ends = (
            place.mouth + place.eyes * (side * place.right + height * place.down)
            for side, height in ((-0.7, begin), (0.7, end))
        )
        fold = _line(shape, list(ends), 0.03 * place.eyes)
        light *= 1 - 0.3 * cv2.GaussianBlur(fold, (0, 0), max(0.03 * place.eyes, 0.8))
    return light


def hand(picture: np.ndarray, place: Place, rng: np.random.Generator) -> np.ndarray:
    """Four fingers of the face's own skin across the mouth."""
    height, width = picture.shape[:2]
    x, y = np.clip(np.round(place.mesh[list(SKIN)]).astype(int), 0, [width - 1, height - 1]).T
    skin = np.median(picture[y, x], axis=0)
    angle, side = rng.uniform(-0.6, 0.6) * rng.choice([1, 1, 2]), rng.choice([-1, 1])
    way = side * (place.right * np.cos(angle) + place.down * np.sin(angle))
    thick = rng.uniform(0.17, 0.24)
    for finger in (-1.5, -0.5, 0.5, 1.5):
        at = place.mouth + place.eyes * 0.95 * thick * finger * np.array([-way[1], way[0]])
        tip = at - place.eyes * rng.uniform(0.4, 0.6) * way
        picture = _finger(picture, tip, way, thick * place.eyes, skin * rng.uniform(0.92, 1.05), place, rng)
    return picture


def _finger(
    picture: np.ndarray,
    tip: np.ndarray,
    way: np.ndarray,
    thick: float,
    skin: np.ndarray,
    place: Place,
    rng: np.random.Generator,
) -> np.ndarray:
    """One finger from its tip onwards, round, with a nail and creases at its joints."""
    along = _along(picture.shape, tip, way, place.eyes)
    aside = _along(picture.shape, tip, np.array([-way[1], way[0]]), thick / 2)
    light = 1.05 - 0.35 * np.clip(np.abs(aside), 0, 1) ** 2.2
    light = light * (1 - sum(0.12 * np.exp(-(((along - joint) / 0.03) ** 2)) for joint in (0.45, 0.52, 0.85)))
    light[(np.abs(aside) < 0.6) & (along > -0.02) & (along < 0.13)] *= 1.05
    flesh = skin * light[..., None] + _grain(picture.shape, rng, 12, 0.01 * place.eyes)
    drawn = _line(picture.shape, [tip, tip + 2.2 * place.eyes * way], thick)
    return _laid_over(picture, flesh, cv2.GaussianBlur(drawn, (0, 0), max(0.01 * place.eyes, 0.5)))


def microphone(picture: np.ndarray, place: Place, rng: np.random.Generator) -> np.ndarray:
    """A ball of wire on a stick."""
    eyes, radius = place.eyes, place.eyes * rng.uniform(0.36, 0.5)
    middle = place.mouth + eyes * (
        place.right * rng.uniform(-0.12, 0.12) + place.down * rng.uniform(-0.02, 0.16)
    )
    end = middle + 2.4 * eyes * (place.down + place.right * rng.uniform(-0.8, 0.8))
    stick = _line(picture.shape, [middle, end], 0.8 * radius)
    picture = _laid_over(picture, np.full(picture.shape, rng.choice([20.0, 40.0, 90.0])), stick)
    across, down = (_along(picture.shape, middle, way, radius) for way in (place.right, place.down))
    square = across**2 + down**2
    facing = 0.5 * np.sqrt(np.clip(1 - square, 0, 1)) - 0.4 * across - 0.5 * down
    wire = 1 + 0.25 * np.sin(25 * across + 3 * down) * np.sin(25 * down)
    ball = rng.choice(BALL_TONES) * (0.35 + 0.75 * np.clip(facing, 0, 1.2)) * wire
    ball = ball[..., None] + rng.normal(0, 3, (*square.shape, 1))
    return _laid_over(
        picture, ball, cv2.GaussianBlur((square < 1).astype(np.float32), (0, 0), max(EDGE * eyes, 0.7))
    )


def card(picture: np.ndarray, place: Place, rng: np.random.Generator) -> np.ndarray:
    """A card, a phone or a cup: one colour, darker towards its sides."""
    eyes, angle = place.eyes, rng.uniform(-0.3, 0.3)
    right = place.right * np.cos(angle) + place.down * np.sin(angle)
    down = np.array([-right[1], right[0]])
    middle = place.mouth + eyes * rng.uniform(0, 0.3) * down
    half, up = eyes * rng.uniform(0.45, 0.8), eyes * rng.uniform(0.45, 0.7)
    corners = ((-half, -up), (half, -up), (0.9 * half, 1.6 * up), (-0.9 * half, 1.6 * up))
    outline = np.array([middle + x * right + y * down for x, y in corners])
    round_ = 1.05 - 0.3 * np.clip(np.abs(_along(picture.shape, middle, right, half)), 0, 1) ** 2
    colour = np.array(CARD_COLOURS[rng.integers(len(CARD_COLOURS))])
    face = colour * round_[..., None] + rng.normal(0, 2, (*picture.shape[:2], 1))
    return _laid_over(picture, face, _inside(picture.shape, outline, EDGE * eyes))


COVERS: dict[str, Cover] = {
    "mask": mask,
    "cloth": cloth,
    "hand": hand,
    "microphone": microphone,
    "card": card,
}


def covered(picture: np.ndarray, mesh: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """The picture with each cover in turn, `REPEATS` of it, and the cover's name.

    Args:
        picture: (H, W, 3) uint8 BGR.
        mesh: (478, 2) pixels, of the face whose mouth is covered.
    """
    place = place_of(mesh)
    for number, (name, draw) in enumerate(COVERS.items()):
        for repeat in range(REPEATS):
            yield name, draw(picture, place, np.random.default_rng([seed, number, repeat]))
