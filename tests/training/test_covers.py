"""What is drawn in front of mouths hides them, leaves the rest alone, and is the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.faces.base import Face
from musetalk.faces.head import FOREHEAD, INNER_LIPS
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.media.image import read_image
from musetalk.tools.demo import PORTRAIT
from musetalk.training.covers import COVERS, REPEATS, covered, place_of


@pytest.fixture(scope="module")
def seen() -> tuple[np.ndarray, Face]:
    picture = np.ascontiguousarray(read_image(PORTRAIT)[::3, ::3])
    return picture, MediapipeDetector().detect(picture)[0]


@pytest.mark.parametrize("name", COVERS)
def test_a_cover_hides_the_mouth_and_leaves_brow_and_corners(seen, name):
    picture, face = seen
    place = place_of(face.mesh)
    drawn = COVERS[name](picture, place, np.random.default_rng(0))
    changed = (drawn != picture).any(axis=2)
    x, y = np.round(face.mesh[list(INNER_LIPS)]).astype(int).T
    brow = np.round(face.mesh[FOREHEAD]).astype(int)
    assert drawn.dtype == np.uint8 and drawn.shape == picture.shape
    assert changed[y, x].mean() > 0.9
    assert not changed[: brow[1]].any() and not changed[:20, :20].any()


def test_covers_are_the_same_for_a_seed_and_differ_by_it(seen):
    picture, face = seen
    one, again, other = (list(covered(picture, face.mesh, seed)) for seed in (1, 1, 2))
    assert [name for name, _ in one] == [name for name in COVERS for _ in range(REPEATS)]
    assert all((a == b).all() for (_, a), (_, b) in zip(one, again, strict=True))
    assert all((a != b).any() for (_, a), (_, b) in zip(one, other, strict=True))
    assert (one[0][1] != one[1][1]).any(), "a cover isn't drawn alike twice"
