"""Curves over time become a picture that shows them, and their gaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from musetalk.media.image import read_image
from musetalk.training.plots import PANEL_HEIGHT, WIDTH, Panel, draw_panels


def coloured(picture: np.ndarray) -> np.ndarray:
    """(W,) the pixels of each column that are neither paper, ink nor grid."""
    return (np.ptp(picture.astype(int), axis=-1) > 60).sum(axis=0)


def test_a_panel_for_each_set_of_curves_with_gaps_where_nothing_is_known(tmp_path: Path) -> None:
    wave = np.sin(np.arange(200) / 20)
    broken = wave.copy()
    broken[80:120] = np.nan
    panels = [Panel("a", {"x": wave, "y": -wave}, 25.0), Panel("b", {"x": broken}, 25.0)]
    panels.append(Panel("nothing known", {"x": np.full(200, np.nan)}, 25.0))
    draw_panels(panels, tmp_path / "curves.png")
    picture = read_image(tmp_path / "curves.png")
    assert picture.shape == (3 * PANEL_HEIGHT, WIDTH, 3)
    two, one, none = (rows[35:] for rows in np.split(picture, 3))  # below titles and legends
    middle = slice(WIDTH // 2 - 60, WIDTH // 2 + 60)
    assert (coloured(two)[middle] >= 2).all()
    assert not coloured(one)[middle].any() and coloured(one)[WIDTH // 5]
    assert not coloured(none).any()
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
