"""Curves over time as a picture, drawn with OpenCV: reports need no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, PANEL_HEIGHT, MARGIN = 1200, 170, 46  # pixels
COLOURS = ((190, 90, 20), (30, 110, 230), (90, 160, 60), (150, 60, 150))  # BGR
INK, GRID = (60, 60, 60), (225, 225, 225)


class Panel(NamedTuple):
    """Curves (n,) that share an axis, each with its name; `rate` is in values per second."""

    title: str
    curves: dict[str, np.ndarray]
    rate: float


def draw_panels(panels: Sequence[Panel]) -> np.ndarray:
    """The panels under each other, (H, 1200, 3) uint8 BGR; gaps stand where a curve is NaN."""
    return np.vstack([_draw(panel) for panel in panels])


def _draw(panel: Panel) -> np.ndarray:
    image = np.full((PANEL_HEIGHT, WIDTH, 3), 255, np.uint8)
    known = np.concatenate([curve[np.isfinite(curve)] for curve in panel.curves.values()] or [np.zeros(1)])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    seconds = max(len(curve) for curve in panel.curves.values()) / panel.rate
    _axis(image, panel.title, low, high, seconds)
    for i, (name, curve) in enumerate(panel.curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        _line(image, curve, (low, high), seconds * panel.rate, colour)
        _text(image, name, (WIDTH - 130, 16 + 16 * i), colour)
    return image


def _axis(image: np.ndarray, title: str, low: float, high: float, seconds: float) -> None:
    import cv2

    for second in range(int(seconds) + 1):
        x = MARGIN + round(second / max(seconds, 1e-9) * (WIDTH - 2 * MARGIN))
        cv2.line(image, (x, 24), (x, PANEL_HEIGHT - 20), GRID, 1)
        if second % max(1, int(seconds) // 12) == 0:
            _text(image, f"{second} s", (x - 8, PANEL_HEIGHT - 6), INK)
    _text(image, title, (MARGIN, 16), INK)
    _text(image, f"{high:.2f}", (4, 32), INK)
    _text(image, f"{low:.2f}", (4, PANEL_HEIGHT - 20), INK)


def _text(image: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    import cv2

    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)


def _line(
    image: np.ndarray,
    curve: np.ndarray,
    limits: tuple[float, float],
    length: float,
    colour: tuple[int, int, int],
) -> None:
    import cv2

    low, high = limits
    x = MARGIN + np.arange(len(curve)) / length * (WIDTH - 2 * MARGIN)
    y = PANEL_HEIGHT - 22 - (curve - low) / max(high - low, 1e-9) * (PANEL_HEIGHT - 50)
    known = np.isfinite(curve)
    for run in np.split(np.arange(len(curve)), np.flatnonzero(np.diff(known.astype(int))) + 1):
        if len(run) and known[run[0]]:
            points = np.stack([x[run], y[run]], 1).round().astype(np.int32)
            cv2.polylines(image, [points], False, colour, 1, cv2.LINE_AA)
