"""Curves over time as a picture: one panel under the other, drawn by matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musetalk.files import atomic_file

WIDTH, PANEL_HEIGHT = 1200, 190  # pixels
DPI = 100  # pixels per inch, which matplotlib counts in


class Panel(NamedTuple):
    """Curves (n,) that share an axis, each with its name; `rate` is in values per second."""

    title: str
    curves: dict[str, np.ndarray]
    rate: float


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Draws the panels under each other into a PNG, `WIDTH` pixels wide; gaps stand where a curve is NaN.

    Raises:
        OutputError: the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    size = WIDTH / DPI, PANEL_HEIGHT * len(panels) / DPI
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for name, curve in panel.curves.items():
            axes.plot(np.arange(len(curve)) / panel.rate, curve, label=name, linewidth=1.2)
        seconds = max(len(curve) for curve in panel.curves.values()) / panel.rate
        axes.set(xlim=(0, seconds))
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=len(panel.curves), frameon=False, fontsize=8
        )
    with atomic_file(path) as stream:
        FigureCanvasAgg(figure).print_png(stream)
