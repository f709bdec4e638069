"""Decoding a part of the face: exact where the statistics are, judged where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.engines.musetalk.region import (
    Difference,
    Rectangle,
    RegionDecoder,
    decode_cuts,
    difference,
    face_weights,
    full,
    plan_crops,
    plan_cuts,
    used_rectangle,
)
from musetalk.engines.musetalk.region import verdict as judged
from musetalk.templates.template import Template
from tests.conftest import make_template
from tests.engines.conftest import NEEDS_FULL

JAW = Rectangle(118, 250, 40, 230)


@pytest.fixture(scope="module")
def vae(tiny_models: Path) -> Any:
    from musetalk.engines.musetalk.networks import open_vae
    from musetalk.weights import files as weight_files
    from tests.engines.conftest import model_paths

    return open_vae(weight_files.find_files(model_paths(tiny_models))).load("cpu", "float32")


@pytest.fixture(scope="module")
def latents() -> Any:
    torch = pytest.importorskip("torch", reason=NEEDS_FULL)
    return torch.from_numpy(np.random.RandomState(4).randn(2, 4, 32, 32).astype(np.float32))


def test_a_whole_rectangle_is_the_decoder_itself(vae: Any, latents: Any) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_FULL)
    with torch.inference_mode():
        cuts = plan_cuts(full(256), [2, 2, 2, 2], 32).tolist()
        whole = decode_cuts(vae, latents, cuts, lambda norm, image: norm(image))
        torch.testing.assert_close(whole, vae.decode(latents))


@pytest.mark.parametrize("rectangle", [JAW, Rectangle(0, 40, 0, 256), Rectangle(255, 256, 255, 256)])
def test_with_its_own_statistics_a_region_is_exact(vae: Any, latents: Any, rectangle: Rectangle) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_FULL)
    with torch.inference_mode():
        found = RegionDecoder(vae, rectangle, latents[:1]).decode(latents[:1])
        expected = vae.decode(latents[:1])
    top, bottom, left, right = rectangle
    torch.testing.assert_close(
        found[..., top:bottom, left:right], expected[..., top:bottom, left:right], atol=1e-3, rtol=0
    )


def test_a_region_of_other_faces_differs_little_and_not_at_all_where_nothing_is_blended(
    vae: Any, latents: Any
) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_FULL)
    weights = np.zeros((256, 256), np.float32)
    weights[JAW.top : JAW.bottom, JAW.left : JAW.right] = 0.5
    with torch.inference_mode():
        region = RegionDecoder(vae, JAW, latents[:1])
        same = difference(region.decode(latents[:1]).numpy(), vae.decode(latents[:1]).numpy(), weights)
        exact, found = vae.decode(latents[1:] * 3).numpy(), region.decode(latents[1:] * 3).numpy()
    other = difference(found, exact, weights)
    assert same.harmless and same.largest < 0.1
    assert not other.harmless
    inside = np.abs(found.clip(-1, 1) - exact.clip(-1, 1))
    inside = inside[:, :, JAW.top : JAW.bottom, JAW.left : JAW.right] * 127.5 * 0.5
    assert other.mean == pytest.approx(inside.mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("rectangle", "mean", "harmless"), [(JAW, 0.1, True), (JAW, 0.6, False), (full(256), 0.1, False)]
)
def test_the_verdict_needs_little_difference_and_a_region_worth_it(
    rectangle: Rectangle, mean: float, harmless: bool
) -> None:
    verdict = judged(rectangle, Difference(mean, 1.23456, 9.0))
    assert verdict["harmless"] is harmless
    assert (verdict["mean"], verdict["tail"], verdict["largest"]) == (mean, 1.235, 9.0)
    assert verdict["share"] == pytest.approx(rectangle.area / 65536, abs=1e-3)


def test_limits_of_what_is_harmless() -> None:
    assert Difference(0.5, 4.0, 90.0).harmless
    assert not Difference(0.51, 1.0, 1.0).harmless
    assert not Difference(0.1, 4.1, 5.0).harmless


def test_crops_cover_what_the_convolutions_see_and_no_more() -> None:
    crops = plan_crops(Rectangle(120, 130, 120, 130), [3, 3, 3, 3], 32)
    assert crops[3] == Rectangle(119, 131, 119, 131)  # the output convolution
    assert crops[2] == Rectangle(56, 69, 56, 69)  # and 6 convolutions at 256², the upsampler's
    assert crops[1] == Rectangle(24, 38, 24, 38)  # and 6 at 128², the upsampler's
    assert crops[0] == Rectangle(8, 23, 8, 23)


def test_cuts_follow_the_rectangle_through_every_doubling() -> None:
    rectangle, held = Rectangle(120, 130, 60, 90), full(32)
    cuts = plan_cuts(rectangle, [3, 3, 3, 3], 32)
    for number, (top, bottom, left, right) in enumerate(cuts):
        height, width = held.bottom - held.top, held.right - held.left
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        held = Rectangle(held.top + top, held.top + bottom, held.left + left, held.left + right)
        held = held.doubled() if number in (0, 4, 8) else held  # behind the first up block's cut, then 4 each
    assert held == rectangle and len(cuts) == 14


def _masked_template() -> Template:
    base = make_template(2, (64, 64))
    x1, y1, x2, y2 = base.bboxes[0]
    left, top = base.crop_boxes[0][:2]
    masks = []
    for i in range(2):
        mask = np.zeros_like(base.masks[0])
        mask[(y1 + y2) // 2 - top : y2 - top, x1 - left : x2 - left - 8 * i] = 255
        masks.append(mask)
    return Template.from_frames(
        base.frames[:2], base.bboxes[:2], [np.zeros(1)] * 2, masks, base.crop_boxes[:2]
    )


def test_the_region_is_the_part_of_the_face_that_any_mask_uses() -> None:
    weights = face_weights(_masked_template())
    assert weights[:120].max() == 0 and weights[140:].min() == 1
    assert used_rectangle(weights) == Rectangle(125, 256, 0, 256)


def test_without_a_mask_everything_is_decoded() -> None:
    assert used_rectangle(np.zeros((256, 256), np.float32)) == full(256)
