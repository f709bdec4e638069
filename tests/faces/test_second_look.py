"""What is a face and what isn't: portraits, and meshes laid where none is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musetalk.config import REPOSITORY
from musetalk.faces.mediapipe import MediapipeDetector, face_of_mesh
from musetalk.faces.second_look import SecondLook, roll
from musetalk.media.image import read_image

PORTRAITS = sorted((REPOSITORY / "models" / "lite" / "portraits").glob("*.jpg"))


@pytest.fixture(scope="module")
def detector() -> MediapipeDetector:
    return MediapipeDetector()


@pytest.mark.parametrize("path", PORTRAITS, ids=lambda path: path.stem)
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_faces_are_confirmed_however_they_are_turned(detector, path: Path, turns: int) -> None:
    frame = read_image(path)
    [face] = detector.detect(frame)
    height, width = frame.shape[:2]
    x, y = face.mesh.T
    placed = {0: (x, y), 1: (y, width - 1 - x), 2: (width - 1 - x, height - 1 - y), 3: (height - 1 - y, x)}
    turned = face_of_mesh(np.stack(placed[turns], axis=1).astype(np.float32), face.mesh_z)
    look = SecondLook(detector._still.faces)
    assert look.confirms(np.ascontiguousarray(np.rot90(frame, turns)), turned)
    assert abs((roll(turned.mesh) - roll(face.mesh) + 90 * turns + 180) % 360 - 180) < 1


@pytest.mark.parametrize("path", PORTRAITS, ids=lambda path: path.stem)
@pytest.mark.parametrize("shift", [(0, 0.9), (0, -0.8), (0.9, 0.6), (0, 0.35)])
def test_a_mesh_on_neck_hair_or_cloth_is_none(detector, path: Path, shift: tuple[float, float]) -> None:
    frame = read_image(path)
    [face] = detector.detect(frame)
    x1, y1, x2, y2 = face.detection
    moved = face.mesh + np.float32([shift[0] * (x2 - x1), shift[1] * (y2 - y1)])
    assert not SecondLook(detector._still.faces).confirms(frame, face_of_mesh(moved, face.mesh_z))


@pytest.mark.parametrize("path", PORTRAITS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rows", [400, None])
def test_no_upright_face_is_found_in_a_picture_on_its_head(detector, path: Path, rows: int | None) -> None:
    frame = np.ascontiguousarray(np.rot90(read_image(path)[:rows], 2))
    assert all(abs(roll(face.mesh)) > 90 for face in detector.detect(frame))


def test_an_upright_mesh_on_an_upside_down_face_is_none(detector, portrait: Path) -> None:
    frame = read_image(portrait)
    [face] = detector.detect(frame)
    x1, y1, x2, y2 = face.detection
    upside_down = frame.copy()
    upside_down[y1:y2, x1:x2] = frame[y1:y2, x1:x2][::-1, ::-1]
    assert not SecondLook(detector._still.faces).confirms(upside_down, face)


def test_a_mesh_mostly_outside_the_frame_is_none(detector, portrait: Path) -> None:
    frame = read_image(portrait)
    [face] = detector.detect(frame)
    x1, _, x2, _ = face.detection
    cut = frame[:, round(x1 + 0.6 * (x2 - x1)) :]
    moved = face.mesh - np.float32([round(x1 + 0.6 * (x2 - x1)), 0])
    assert not SecondLook(detector._still.faces).confirms(cut, face_of_mesh(moved, face.mesh_z))


@pytest.mark.parametrize("seed", range(3))
def test_clouds_of_noise_hold_no_face(detector, seed: int) -> None:
    import cv2

    noise = np.random.default_rng(seed).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    clouds = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 6), None, 0, 255, cv2.NORM_MINMAX)
    assert detector.detect(clouds) == []
