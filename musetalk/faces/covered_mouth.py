"""Whether something hides the mouth: a mask, a hand, a microphone.

The decision a reader would question: a weighted sum of edges and colours, not a network. What it weighs was
learnt by `training.covered_mouth` from some hundred faces of photographs, films and drawings, coloured and
grey, each as it is and with covers drawn on it (masks of paper and cloth, hands, microphones, cards). It is
asked for a warning only: what it takes for covered is worked on all the same.
"""

from __future__ import annotations

import cv2
import numpy as np

from musetalk.config import LITE_MODELS
from musetalk.faces.head import INNER_LIPS, LEFT_EYE_OUTER, OUTER_LOWER_LIP, OUTER_UPPER_LIP, RIGHT_EYE_OUTER
from musetalk.faces.second_look import set_upright

WEIGHTS = LITE_MODELS / "covered_mouth.npy"  # float32, the constant and a weight for each measure
COVERED = 0.0  # the score from which a mouth counts as covered

_SIDE = 48  # pixels of the mouth's picture
_WIDTH = 1.3  # its side, eye distances
_CELLS = 6  # along each side
_DIRECTIONS = 6  # of edges, within half a turn
_LIPS = OUTER_UPPER_LIP + OUTER_LOWER_LIP[-2:0:-1]
_AROUND = (1.2, 1.55)  # the lips' outline made larger: from where to where the skin around them is looked at
_UPPER_SKIN = (50, 280, 101, 330, 6, 197, 151, 118, 347)  # cheeks below the eyes, nose, forehead
_LOWER_SKIN = (205, 425, 57, 287, 199, 200, 152, 175, 214, 434)  # cheeks beside the mouth, chin
_PATCH = 0.05  # eye distances from a skin patch's middle to its edge
_COLOURLESS = 2.0  # levels; less on average and a picture is grey


def covered_score(frame: np.ndarray, mesh: np.ndarray) -> float:
    """How much more the mouth of a face looks covered than free.

    Args:
        frame: (H, W, 3) uint8 BGR.
        mesh: (478, 2) pixels.

    Returns:
        Logarithm of odds, moved so that `COVERED` parts the two.
    """
    constant, *weights = np.load(WEIGHTS)
    return float(constant + measures(frame, mesh) @ np.array(weights))


def measures(frame: np.ndarray, mesh: np.ndarray) -> np.ndarray:
    """(222,) what the score weighs: the mouth's edges, how strong they are, and its colours."""
    upright, placed = set_upright(frame, mesh)
    eyes = float(np.linalg.norm(placed[LEFT_EYE_OUTER] - placed[RIGHT_EYE_OUTER]))
    return np.concatenate([_edges(_mouth(upright, placed, eyes)), _colours(upright, placed, eyes)])


def _mouth(upright: np.ndarray, mesh: np.ndarray, eyes: float) -> np.ndarray:
    """The mouth's picture: (48, 48) float32 grey."""
    scale = _SIDE / (_WIDTH * eyes)
    middle = mesh[list(INNER_LIPS)].mean(axis=0)
    matrix = np.column_stack([scale * np.eye(2), _SIDE / 2 - scale * middle])
    flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = cv2.warpAffine(upright, matrix, (_SIDE, _SIDE), flags=flags)
    return cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.float32), (0, 0), 0.8)


def _edges(grey: np.ndarray) -> np.ndarray:
    """(217,) a histogram of the edges' directions in each cell, and how strong they are.

    Source: histograms of oriented gradients (Dalal and Triggs 2005).
    """
    across, down = (cv2.Sobel(grey, cv2.CV_32F, x, y, ksize=3) for x, y in ((1, 0), (0, 1)))
    strength = np.hypot(across, down)
    direction = np.mod(np.arctan2(down, across), np.pi) / np.pi * _DIRECTIONS
    apart = np.abs(direction[..., None] - np.arange(_DIRECTIONS))
    shares = np.maximum(1 - np.minimum(apart, _DIRECTIONS - apart), 0) * strength[..., None]
    cell = _SIDE // _CELLS
    sums = shares.reshape(_CELLS, cell, _CELLS, cell, _DIRECTIONS).sum(axis=(1, 3))
    return np.append(sums.ravel() / (np.linalg.norm(sums) + 1e-3), np.log1p(strength.mean()))


def _colours(upright: np.ndarray, mesh: np.ndarray, eyes: float) -> np.ndarray:
    """(5,) the lips against the skin around them, the lower face against the upper, and colour at all."""
    lab = cv2.cvtColor(upright, cv2.COLOR_BGR2LAB).astype(np.float32)
    outline = mesh[list(_LIPS)]
    middle = outline.mean(axis=0)
    inner, outer = (_filled(middle + (outline - middle) * grown, lab.shape) for grown in _AROUND)
    lips = _filled(outline, lab.shape) & ~_filled(mesh[list(INNER_LIPS)], lab.shape)
    lips_apart = _mean(lab[lips]) - _mean(lab[outer & ~inner])
    radius = max(round(_PATCH * eyes), 1)
    lower, upper = (_skin(lab, mesh[list(points)], radius) for points in (_LOWER_SKIN, _UPPER_SKIN))
    halves_apart = float(np.linalg.norm((lower - upper) * [0.5, 1, 1]))
    colour = np.abs(upright - upright.mean(axis=2, keepdims=True)).mean() >= _COLOURLESS
    return np.array([*lips_apart, halves_apart, float(colour)])


def _filled(outline: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool, True inside."""
    inside = np.zeros(shape[:2], np.uint8)
    cv2.fillPoly(inside, [np.round(outline).astype(np.int32)], 1)
    return inside.astype(bool)


def _skin(lab: np.ndarray, points: np.ndarray, radius: int) -> np.ndarray:
    """(3,) the mean colour of square patches around points."""
    corners = np.maximum(np.round(points).astype(int) - radius, 0)
    side = 2 * radius + 1
    return np.mean([_mean(lab[y : y + side, x : x + side].reshape(-1, 3)) for x, y in corners], axis=0)


def _mean(colours: np.ndarray) -> np.ndarray:
    """(3,) the mean of colours (n, 3); 0 of none."""
    return colours.mean(axis=0) if len(colours) else np.zeros(3, np.float32)
