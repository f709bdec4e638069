"""Pictures of measurements: stages over time, and costs as curves.

Drawn on figures of their own, not through pyplot, so that no window system is ever asked for.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from musetalk.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Interval = tuple[float, float]

STAGE_COLOURS = {
    "load": "#8c8c8c",
    "features": "#4c78a8",
    "generate": "#e45756",
    "composite": "#72b7b2",
    "encode": "#f2a53b",
}
RESOLUTION = 2000  # gaps narrower than this part of the run can't be seen and aren't drawn
DPI = 110


def merged(intervals: Sequence[Interval], gap: float) -> list[Interval]:
    """`intervals` in order, those closer than `gap` seconds made one."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start - result[-1][1] < gap:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def draw_stages(intervals: Mapping[str, Sequence[Interval]], title: str, path: Path) -> Path | None:
    """A Gantt picture: each stage's (start, end) seconds of work as bars over the run's time.

    Returns:
        The PNG's path; None, with a warning, where matplotlib isn't installed.
    """
    figure = _figure(1.2 + 0.5 * len(intervals))
    if figure is None:
        return None
    axes = figure.add_subplot()
    end = max((interval[1] for stage in intervals.values() for interval in stage), default=1.0)
    names = [name for name in STAGE_COLOURS if name in intervals]
    for row, name in enumerate(names):
        bars = merged(intervals[name], end / RESOLUTION)
        busy = sum(stop - start for start, stop in intervals[name])
        spans = [(start, stop - start) for start, stop in bars]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=STAGE_COLOURS[name])
        axes.text(end * 1.01, row, f"{busy / end:.0%}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, end), xlabel="seconds since the request", title=title)
    return _save(figure, path)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str, str],
    path: Path,
    ticks: Mapping[float, str],
    y_scale: Literal["linear", "log"] = "linear",
) -> Path | None:
    """Named curves of (x, y) points over a logarithmic x axis.

    Args:
        labels: title, x axis, y axis.
        ticks: what to write at which x.
        y_scale: "linear" from 0, for what should be flat; "log" for what grows with x.
    """
    figure = _figure(4.0)
    if figure is None:
        return None
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    title, x_label, y_label = labels
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale=y_scale)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.minorticks_off()
    if y_scale == "linear":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, path)


def _figure(height: float) -> Figure | None:
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no chart: matplotlib is not installed 未安装matplotlib")
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(9.0, height), dpi=DPI, layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png")
    return path
