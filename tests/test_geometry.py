"""Boxes against the reference's goldens; smoothing by what it must and must not change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from musetalk import geometry
from musetalk.geometry import NO_FACE, Box

GOLDENS = json.loads((Path(__file__).parent / "data" / "bbox.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS)
def test_reference_bbox_equals_the_reference(golden: dict) -> None:
    detection = golden["detection"] and tuple(golden["detection"])
    box = geometry.reference_bbox(np.array(golden["landmarks"]), detection, golden["bbox_shift"])
    assert box == tuple(golden["bbox"])


def test_reference_bbox_leaves_the_landmarks_alone() -> None:
    landmarks = np.array(GOLDENS[3]["landmarks"])
    before = landmarks.copy()
    geometry.reference_bbox(landmarks, (0, 0, 9, 9), 5)
    np.testing.assert_array_equal(landmarks, before)


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((10, 20, 30, 40), (10, 20, 30, 40)),
        ((-5, -6, 30, 40), (0, 0, 30, 40)),
        ((90, 70, 130, 140), (90, 70, 100, 80)),
        ((100, 0, 120, 10), NO_FACE),
        (NO_FACE, NO_FACE),
    ],
)
def test_clamp_box(bbox: Box, expected: Box) -> None:
    assert geometry.clamp_box(bbox, height=80, width=100) == expected


def test_chin_margin_ends_at_the_frame() -> None:
    assert geometry.add_chin_margin((1, 2, 3, 50), 10, height=80) == (1, 2, 3, 60)
    assert geometry.add_chin_margin((1, 2, 3, 75), 10, height=80) == (1, 2, 3, 80)
    assert geometry.add_chin_margin(NO_FACE, 10, height=80) == NO_FACE


def test_crop_box_is_a_square_around_the_box() -> None:
    assert geometry.crop_box((220, 120, 400, 330)) == (153, 68, 467, 382)


def test_the_crop_is_black_beyond_the_frame() -> None:
    frame = np.full((10, 12, 3), 9, np.uint8)
    crop = geometry.crop_frame(frame, (-2, -3, 14, 13))
    assert crop.shape == (16, 16, 3)
    np.testing.assert_array_equal(crop[3:13, 2:14], frame)
    assert int(crop.sum()) == int(frame.sum())
    assert not geometry.crop_frame(frame, (50, 50, 60, 60)).any()


def test_overlap() -> None:
    assert geometry.overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert geometry.overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert geometry.overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0


def test_smoothing_keeps_steady_motion() -> None:
    ramp = np.linspace([0.0, 5.0], [100.0, -20.0], 40)
    np.testing.assert_allclose(geometry.smooth_over_time(ramp, sigma=3), ramp, atol=1e-9)


def test_smoothing_has_no_lag() -> None:
    times = np.arange(200)
    wave = np.sin(times / 12)[:, None]
    smooth = geometry.smooth_over_time(wave, sigma=3)
    scores = [
        np.corrcoef(wave[20:-20, 0], np.roll(smooth[:, 0], shift)[20:-20])[0, 1] for shift in (-1, 0, 1)
    ]
    assert scores[1] == max(scores)
    np.testing.assert_allclose(geometry.smooth_over_time(wave[::-1], sigma=3)[::-1], smooth, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_smoothing_takes_short_tracks(count: int) -> None:
    track = np.arange(count, dtype=np.float32)[:, None]
    smooth = geometry.smooth_over_time(track, sigma=3)
    assert smooth.shape == track.shape
    assert smooth.dtype == np.float32
    np.testing.assert_allclose(smooth, track, atol=1e-5)


def _noisy_boxes(count: int, noise: float, seed: int = 0) -> list[Box]:
    rng = np.random.default_rng(seed)
    centre = np.stack([200 + 30 * np.sin(np.arange(count) / 25), 150 + np.arange(count) * 0.2], axis=1)
    half = np.array([50, 60])
    edges = np.hstack([centre - half, centre + half]) + rng.normal(0, noise, (count, 4))
    return [(a, b, c, d) for a, b, c, d in edges.round().astype(int).tolist()]


def test_smooth_boxes_take_off_jitter_and_follow_motion() -> None:
    truth = np.array(_noisy_boxes(300, 0.0), dtype=float)
    noisy = _noisy_boxes(300, 2.0)
    smooth = np.array(geometry.smooth_boxes(noisy), dtype=float)
    sizes = smooth[:, 2:] - smooth[:, :2]
    assert np.abs(smooth - truth).max() <= 3
    assert np.diff(sizes, axis=0).any(axis=1).sum() <= 30
    assert np.diff(smooth, 2, axis=0).std() < 0.2 * np.diff(np.array(noisy, dtype=float), 2, axis=0).std()


def test_smooth_boxes_do_not_lag() -> None:
    noisy = _noisy_boxes(200, 1.0)
    assert geometry.smooth_boxes(noisy[::-1])[::-1] == geometry.smooth_boxes(noisy)


def test_faceless_frames_and_cuts_separate_what_is_smoothed() -> None:
    left = [(10, 10, 60, 70)] * 20
    right = [(300, 10, 350, 70)] * 20
    boxes = [*left, NO_FACE, NO_FACE, *right, *left, NO_FACE]
    assert geometry.smooth_boxes(boxes) == boxes


def test_shots_end_at_gaps_and_cuts() -> None:
    near, far = (10, 10, 60, 70), (300, 10, 350, 70)
    boxes = [NO_FACE, near, near, far, NO_FACE, NO_FACE, far]
    assert list(geometry.shots(boxes)) == [slice(1, 3), slice(3, 4), slice(6, 7)]
    assert list(geometry.shots([NO_FACE, NO_FACE])) == []
    assert list(geometry.shots([])) == []
