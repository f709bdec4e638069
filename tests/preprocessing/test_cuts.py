"""Cuts in clips made for it: of one picture, seen by a camera that moves as the test wants it to."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.preprocessing.cuts import find_cuts, thumbnail


@pytest.fixture
def scene(portrait: Path) -> np.ndarray:
    picture = cv2.imread(str(portrait))
    assert picture is not None
    return cv2.copyMakeBorder(picture, 100, 100, 100, 100, cv2.BORDER_REFLECT)


def seen(scene: np.ndarray, course: np.ndarray, light: np.ndarray | None = None) -> frozenset[int]:
    """The cuts found where a camera of 400 x 400 pixels looks at `scene` from `course` (T, 2), in pixels."""
    noise = np.random.default_rng(0)
    thumbnails = []
    for i, (x, y) in enumerate(course):
        moved = cv2.warpAffine(scene, np.float32([[1, 0, -x - 150], [0, 1, -y - 150]]), (400, 400))
        level = 0 if light is None else light[i]
        frame = moved + noise.normal(level, 2, moved.shape)
        thumbnails.append(thumbnail(frame.clip(0, 255).astype(np.uint8)))
    return find_cuts(thumbnails)


@pytest.mark.parametrize("jump", [(45, 45), (20, 0), (0, 12), (-60, 30)])
def test_a_jump_of_a_still_camera_is_a_cut(scene: np.ndarray, jump: tuple[int, int]) -> None:
    course = np.zeros((40, 2))
    course[17:] = jump
    assert seen(scene, course) == {17}


def test_two_cuts_close_to_each_other_are_two(scene: np.ndarray) -> None:
    course = np.zeros((40, 2))
    course[17:], course[22:] = (40, 0), (-10, 30)
    assert seen(scene, course) == {17, 22}


def test_a_cut_in_a_pan_is_found(scene: np.ndarray) -> None:
    course = np.linspace((-60, 0), (0, 20), 60)
    course[31:] += (70, 0)
    assert seen(scene, course) == {31}


@pytest.mark.parametrize("hertz", [1, 2, 3, 5, 8])
def test_a_shaken_camera_cuts_nowhere(scene: np.ndarray, hertz: int) -> None:
    angle = 2 * np.pi * hertz * np.arange(75) / 25
    assert not seen(scene, 14 * np.stack([np.sin(angle), np.cos(angle) / 2], axis=1))


def test_pans_stills_fades_and_repeated_frames_cut_nowhere(scene: np.ndarray) -> None:
    still = np.zeros((50, 2))
    assert not seen(scene, still)
    assert not seen(scene, np.linspace((-80, -20), (80, 20), 50))
    assert not seen(scene, np.cumsum(np.random.default_rng(1).normal(0, 3, (50, 2)), axis=0))
    assert not seen(scene, still, light=np.linspace(0, -150, 50))
    assert not seen(scene, np.repeat(np.linspace((-80, 0), (80, 0), 16), 3, axis=0))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_short_clips(scene: np.ndarray, count: int) -> None:
    assert not seen(scene, np.zeros((count, 2)))
