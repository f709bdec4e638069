"""Blends against the reference's goldens, planes against a conversion of the whole frame."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from musetalk.compositor import FrameCompositor, paste_back
from musetalk.config import ParsingMode
from musetalk.errors import CacheError
from musetalk.geometry import Box
from musetalk.templates.template import Template
from tests.blend_goldens import GOLDENS, MODES, SCENES, golden_box, largest_difference
from tests.conftest import make_template


def _expected(scene: str, name: str) -> np.ndarray:
    """The reference's blended frame; stored is only what differs from the scene's image."""
    frame = GOLDENS[f"{scene}_image"].copy()
    x1, y1, x2, y2 = GOLDENS[f"{name}_changed"]
    frame[y1:y2, x1:x2] = GOLDENS[f"{name}_out"]
    return frame


def _full_conversion(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return cv2.cvtColor(even, cv2.COLOR_BGR2YUV_I420)


def _scene_template(scene: str, mode: ParsingMode, cheek: int) -> Template:
    bbox, name = golden_box(f"{scene}_box"), f"{scene}_{mode}_c{cheek}"
    mask, crop = GOLDENS[f"{name}_mask"], golden_box(f"{name}_cropbox")
    return Template.from_frames([GOLDENS[f"{scene}_image"]], [bbox], [None], [mask], [crop])


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("mode", "cheek"), MODES)
def test_faces_are_pasted_as_the_reference_does(scene: str, mode: ParsingMode, cheek: int) -> None:
    name, bbox = f"{scene}_{mode}_c{cheek}", golden_box(f"{scene}_box")
    image, face = GOLDENS[f"{scene}_image"], GOLDENS[f"{scene}_face"]
    mask, crop = GOLDENS[f"{name}_mask"], golden_box(f"{name}_cropbox")
    before = image.copy()
    assert largest_difference(paste_back(image, face, bbox, mask, crop), _expected(scene, name)) <= 1
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("mode", "cheek"), MODES)
def test_composed_frames_are_the_pasted_ones(scene: str, mode: ParsingMode, cheek: int) -> None:
    template, face = _scene_template(scene, mode, cheek), GOLDENS[f"{scene}_face"]
    compositor = FrameCompositor(template)
    expected = _expected(scene, f"{scene}_{mode}_c{cheek}")
    buffer = np.full(compositor.buffer_shape, 77, np.uint8)
    planes = compositor.compose_i420(1, face, buffer)
    assert planes is buffer
    assert largest_difference(compositor.compose_bgr(0, face), expected) <= 1
    assert largest_difference(planes, _full_conversion(expected)) <= 1


@pytest.mark.parametrize("scene", SCENES)
def test_without_a_face_the_template_frame_passes(scene: str) -> None:
    template = _scene_template(scene, "jaw", 90)
    compositor = FrameCompositor(template)
    buffer = compositor.compose_i420(0, GOLDENS[f"{scene}_face"], np.empty(compositor.buffer_shape, np.uint8))
    compositor.compose_i420(0, None, buffer)
    np.testing.assert_array_equal(buffer, _full_conversion(template.frames[0]))
    frame = compositor.compose_bgr(0, None)
    np.testing.assert_array_equal(frame, template.frames[0])
    assert frame is not template.frames[0]


def test_faceless_frames_take_no_face() -> None:
    template = make_template(2, faceless=(1,))
    face = np.full((64, 64, 3), 255, np.uint8)
    np.testing.assert_array_equal(FrameCompositor(template).compose_bgr(1, face), template.frames[1])


def test_pixels_outside_the_mask_and_the_box_are_untouched() -> None:
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    bbox, crop = (40, 30, 100, 100), (20, 15, 120, 115)
    mask = np.where(rng.random((100, 100)) < 0.5, 0, rng.integers(1, 256, (100, 100))).astype(np.uint8)
    mask[:40] = 0
    result = paste_back(frame, rng.integers(0, 256, (256, 256, 3), dtype=np.uint8), bbox, mask, crop)
    touched = np.zeros(frame.shape[:2], bool)
    touched[30:100, 40:100] = mask[15:85, 20:80] > 0
    np.testing.assert_array_equal(result[~touched], frame[~touched])
    assert (result[touched] != frame[touched]).any()


def test_full_and_half_masks_blend_by_weight() -> None:
    frame = np.full((60, 60, 3), 100, np.uint8)
    face = np.full((20, 20, 3), 200, np.uint8)
    mask = np.zeros((30, 30), np.uint8)
    mask[5:25, 5:15], mask[5:25, 15:25] = 255, 51
    result = paste_back(frame, face, (20, 20, 40, 40), mask, (15, 15, 45, 45))
    assert (result[20:40, 20:30] == 200).all()
    assert (result[20:40, 30:40] == 120).all()


@pytest.mark.parametrize("bbox", [(-20, -10, 40, 60), (50, 40, 130, 120)])
def test_boxes_that_leave_the_frame_are_cut(bbox: Box) -> None:
    rng = np.random.default_rng(2)
    frame = rng.integers(0, 256, (81, 101, 3), dtype=np.uint8)
    x1, y1, x2, y2 = bbox
    face = rng.integers(0, 256, (y2 - y1, x2 - x1, 3), dtype=np.uint8)
    mask = np.full((y2 - y1, x2 - x1), 255, np.uint8)
    template = Template.from_frames([frame], [bbox], [None], [mask], [bbox])
    wide = np.pad(frame, ((60, 60), (60, 60), (0, 0)))
    wide[y1 + 60 : y2 + 60, x1 + 60 : x2 + 60] = face
    expected = wide[60:-60, 60:-60]
    compositor = FrameCompositor(template)
    np.testing.assert_array_equal(compositor.compose_bgr(0, face), expected)
    planes = compositor.compose_i420(0, face, np.empty(compositor.buffer_shape, np.uint8))
    assert largest_difference(planes, _full_conversion(expected)) <= 1


def test_the_cycle_runs_forward_and_backward() -> None:
    template = make_template(3)
    compositor = FrameCompositor(template)
    for position, shown in enumerate((0, 1, 2, 2, 1, 0)):
        np.testing.assert_array_equal(compositor.compose_bgr(position, None), template.frames[shown])


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("size", [(64, 48), (63, 48), (64, 47)])
def test_a_turned_template_is_shown_turned(turn: int, size: tuple[int, int]) -> None:
    import dataclasses

    import cv2

    plain = make_template(2, size)
    turned = dataclasses.replace(plain, turn=turn)
    face = np.full((10, 10, 3), 200, np.uint8)
    expected = np.rot90(FrameCompositor(plain).compose_bgr(1, face), turn)
    compositor = FrameCompositor(turned)
    np.testing.assert_array_equal(compositor.compose_bgr(1, face), expected)
    assert turned.frame_size == expected.shape[1::-1]
    height, width = expected.shape[:2]
    even = cv2.copyMakeBorder(expected, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    out = np.empty(compositor.buffer_shape, np.uint8)
    np.testing.assert_array_equal(
        compositor.compose_i420(1, face, out), cv2.cvtColor(even, cv2.COLOR_BGR2YUV_I420)
    )
    assert Template.from_dict(turned.to_dict()).turn == turn


@pytest.mark.parametrize("turn", [4, -1, "1", None, 0.5])
def test_a_turn_that_is_none_is_a_damaged_cache(turn: object) -> None:
    with pytest.raises(CacheError):
        Template.from_dict({**make_template(2).to_dict(), "turn": turn})
