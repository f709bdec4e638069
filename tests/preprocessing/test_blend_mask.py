"""Blend masks against the reference's goldens."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.config import ParsingMode
from musetalk.preprocessing.blend_mask import prepare_mask
from tests.blend_goldens import GOLDENS, MODES, SCENES, golden_box, largest_difference


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("mode", "cheek"), MODES)
def test_masks_and_their_boxes_are_the_reference_s(scene: str, mode: ParsingMode, cheek: int) -> None:
    name, label_map = f"{scene}_{mode}_c{cheek}", GOLDENS[f"{scene}_label"]
    before = label_map.copy()
    mask, crop = prepare_mask(label_map, golden_box(f"{scene}_box"), mode, cheek, cheek)
    assert crop == golden_box(f"{name}_cropbox")
    assert largest_difference(mask, GOLDENS[f"{name}_mask"]) <= 1
    np.testing.assert_array_equal(label_map, before)
