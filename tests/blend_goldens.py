"""Scenes that the reference masked and blended, recorded once: what masks and paste-back are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from musetalk.config import ParsingMode
from musetalk.geometry import Box

GOLDENS = np.load(Path(__file__).parent / "data" / "blending.npz")
SCENES = ("center", "left_edge", "bottom_edge", "odd")
MODES: tuple[tuple[ParsingMode, int], ...] = (("jaw", 90), ("jaw", 80), ("neck", 90), ("raw", 90))


def golden_box(name: str) -> Box:
    """A recorded box."""
    x1, y1, x2, y2 = GOLDENS[name].tolist()
    return x1, y1, x2, y2


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    """Between two pictures, levels of 255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())
