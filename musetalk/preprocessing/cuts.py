"""Where one shot of a clip ends and the next begins, seen in its pictures.

The decision a reader would question: a cut is a change that stands out from those around it, not a large one.
A shaken camera changes a picture more from frame to frame than many a cut does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

THUMBNAIL = 48  # pixels, side of the picture that is compared
LEAST_CHANGE = 3.0  # levels, on average
OUTSTANDING = 4.0  # times the changes around
AROUND = 8  # frames on each side


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """`frame` (H, W, 3) uint8 small enough to be kept and compared: (48, 48, 3)."""
    import cv2

    return cv2.resize(frame, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)


def find_cuts(thumbnails: Sequence[np.ndarray]) -> frozenset[int]:
    """Indices of the frames that begin another shot, from the thumbnails of all frames in their order.

    A flash of light counts as two; that costs the smoothing across it and nothing else.
    """
    changes = [
        float(np.abs(later.astype(np.int16) - earlier).mean()) for earlier, later in pairwise(thumbnails)
    ]
    return frozenset(i + 1 for i, change in enumerate(changes) if _stands_out(changes, i, change))


def _stands_out(changes: Sequence[float], index: int, change: float) -> bool:
    around = sorted([*changes[max(0, index - AROUND) : index], *changes[index + 1 : index + 1 + AROUND]])
    # the largest but one: another cut nearby hides none
    usual = around[-2] if len(around) > 1 else 0.0
    return change >= LEAST_CHANGE and change >= OUTSTANDING * usual
