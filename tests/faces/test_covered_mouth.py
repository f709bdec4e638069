"""Which mouths are hidden: portraits as they are, and with something drawn in front of the mouth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.config import REPOSITORY
from musetalk.faces.base import Face
from musetalk.faces.covered_mouth import COVERED, covered_score, measures
from musetalk.faces.head import CHIN, NOSE_BASE, eye_distance
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.media.image import read_image

PORTRAITS = sorted((REPOSITORY / "models" / "lite" / "portraits").glob("*.jpg"))
PHOTOGRAPHS = [path for path in PORTRAITS if path.stem in ("astronaut", "hopper")]
JAW = (93, 58, 172, 150, 176, 152, 400, 379, 397, 288, 323)

Cover = Callable[[np.ndarray, Face], None]


@pytest.fixture(scope="module")
def detector() -> MediapipeDetector:
    return MediapipeDetector()


def mask(frame: np.ndarray, face: Face) -> None:
    outline = np.vstack([face.mesh[list(JAW)], face.mesh[[345, 5, 116]]])
    cv2.fillPoly(frame, [outline.round().astype(np.int32)], (200, 150, 90))


def microphone(frame: np.ndarray, face: Face) -> None:
    eyes = float(eye_distance(face.mesh))
    middle = face.mesh[[NOSE_BASE, CHIN]].mean(axis=0)
    cv2.circle(frame, middle.round().astype(int).tolist(), round(0.45 * eyes), (35, 35, 38), -1, cv2.LINE_AA)


def hand(frame: np.ndarray, face: Face) -> None:
    eyes = float(eye_distance(face.mesh))
    x, y = face.mesh[[NOSE_BASE, CHIN]].mean(axis=0).round().astype(int)
    skin = np.median(frame[y - 5 : y + 5, x - round(0.5 * eyes) : x + round(0.5 * eyes)], axis=(0, 1))
    finger = round(0.2 * eyes)
    for i in range(-2, 3):
        line = (int(x - 0.7 * eyes), int(y + i * finger)), (int(x + 1.2 * eyes), int(y + (i - 1) * finger))
        cv2.line(frame, *line, (skin * 0.55).tolist(), finger, cv2.LINE_AA)
        cv2.line(frame, *line, (skin * 0.95).tolist(), round(0.75 * finger), cv2.LINE_AA)


@pytest.mark.parametrize("path", PORTRAITS, ids=lambda path: path.stem)
def test_a_free_mouth_is_not_called_covered(detector: MediapipeDetector, path: Path) -> None:
    frame = read_image(path)
    [face] = detector.detect(frame)
    for shown in (frame, np.repeat(frame.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)):
        assert covered_score(shown, face.mesh) < COVERED


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("cover", [mask, microphone, hand])
def test_a_face_whose_mouth_is_covered_is_found_and_known(
    detector: MediapipeDetector, path: Path, cover: Cover
) -> None:
    frame = read_image(path)
    [face] = detector.detect(frame)
    cover(frame, face)
    [found] = detector.detect(frame)
    assert covered_score(frame, found.mesh) > COVERED


@pytest.mark.parametrize("turns", [1, 2])
def test_the_measures_turn_with_the_face(detector: MediapipeDetector, portrait: Path, turns: int) -> None:
    frame = read_image(portrait)
    [face] = detector.detect(frame)
    height, width = frame.shape[:2]
    x, y = face.mesh.T
    turned = {1: (y, width - 1 - x), 2: (width - 1 - x, height - 1 - y)}[turns]
    expected = measures(frame, face.mesh)
    measured = measures(np.ascontiguousarray(np.rot90(frame, turns)), np.stack(turned, axis=1))
    assert np.abs(measured - expected).max() < 0.05 * np.abs(expected).max()
