"""The ping-pong cycle and the documented dict."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from musetalk.errors import CacheError
from musetalk.templates.template import LIST_KEYS, Template
from tests.conftest import make_template

CROPS = make_template(2).crop_boxes


def test_cycle_is_frames_forward_then_backward_as_references():
    template = make_template(3)
    assert [id(frame) for frame in template.frames[:3]] == [id(frame) for frame in template.frames[:2:-1]]
    assert [template.position(i, Fraction(25)) for i in range(9)] == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert template.unique_count == 3


def test_faceless_frame_keeps_its_place():
    template = make_template(4, faceless=(0, 2))
    assert [template.has_face(template.position(i, Fraction(60))) for i in range(8)] == [
        0,
        1,
        0,
        1,
        1,
        0,
        1,
        0,
    ]
    assert template.original_bbox == template.bboxes[1]


def test_dict_has_the_documented_keys_and_equal_lengths():
    data = make_template(2).to_dict()
    assert set(data) == {*LIST_KEYS, "original_bbox", "processed_at"}
    assert {len(data[key]) for key in LIST_KEYS} == {4}


@pytest.mark.parametrize("key", LIST_KEYS)
def test_missing_key_is_a_damaged_cache(key):
    data = make_template(2).to_dict()
    del data[key]
    with pytest.raises(CacheError):
        Template.from_dict(data)


def test_keys_beside_the_lists_may_be_absent():
    template = make_template(3, faceless=(0,))
    data = {key: value for key, value in template.to_dict().items() if key in LIST_KEYS}
    assert Template.from_dict(data).original_bbox == template.bboxes[1]


@pytest.mark.parametrize(
    "change",
    [
        {"coord_list_cycle": [(1, 2, 3)] * 4},
        {"coord_list_cycle": [(9, 9, 3, 3)] * 4},
        {"coord_list_cycle": [(0, 0, 10**6, 10**6)] * 4},
        {"mask_coords_list_cycle": [(x1 + 500, y1, x2 + 500, y2) for x1, y1, x2, y2 in CROPS]},
        {
            "coord_list_cycle": [(516, 12, 548, 36)] * 4,
            "mask_coords_list_cycle": [(x1 + 500, y1, x2 + 500, y2) for x1, y1, x2, y2 in CROPS],
        },
        {"frame_list_cycle": [np.zeros((0, 0, 3), np.uint8)] * 4},
        {"mask_list_cycle": []},
        {"frame_list_cycle": ["frame"] * 4},
        {"processed_at": "yesterday"},
        {"original_bbox": None},
    ],
)
def test_wrong_content_is_a_damaged_cache(change):
    with pytest.raises(CacheError):
        Template.from_dict({**make_template(2).to_dict(), **change})


def test_frames_of_different_sizes_are_a_damaged_cache():
    data = make_template(2).to_dict()
    frames = list(data["frame_list_cycle"])
    frames[1] = frames[1][:-1]
    with pytest.raises(CacheError):
        Template.from_dict({**data, "frame_list_cycle": frames})
