"""The picture page shows every shape of every portrait."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from musetalk.errors import NoFaceError
from musetalk.tools import portrait_sheet
from tests.engines.lite.face_meshes import PORTRAITS

SIDE = 96


def test_a_row_per_portrait_and_a_column_per_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    output = tmp_path / "page.png"
    names = [str(PORTRAITS / f"{name}.jpg") for name in ("hopper", "astronaut")]
    monkeypatch.setattr(sys, "argv", ["portrait_sheet", str(output), *names, "--side", str(SIDE)])
    portrait_sheet.main()
    page = cv2.imdecode(np.frombuffer(output.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    columns = 1 + len(portrait_sheet.SHAPES)
    assert page.shape == (portrait_sheet.LABEL_HEIGHT + 2 * SIDE, columns * SIDE, 3)
    cells = page[portrait_sheet.LABEL_HEIGHT :].reshape(2, SIDE, columns, SIDE, 3).swapaxes(1, 2)
    for row in cells.astype(int):
        changes = [np.abs(cell - row[1]).mean() for cell in row[2:]]
        assert max(changes) == changes[2], "the widest opening, a, changes most"


def test_shapes_are_within_the_rig_s_ranges() -> None:
    for shape in portrait_sheet.SHAPES.values():
        for parameter, value in zip(
            portrait_sheet.RIG_PARAMETERS, portrait_sheet.parameters_of(shape), strict=True
        ):
            assert parameter.low <= value <= parameter.high


def test_a_picture_without_a_face_is_refused() -> None:
    engine = portrait_sheet.LiteEngine(Path("unused"))
    with pytest.raises(NoFaceError):
        portrait_sheet.portrait_template(np.full((128, 128, 3), 90, np.uint8), engine)
