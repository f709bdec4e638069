"""Following one face through a video, smoothing it, and the boxes that come of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musetalk.compositor import FrameCompositor
from musetalk.config import EngineConfig, PreprocessingConfig
from musetalk.faces.base import Face, by_size
from musetalk.faces.head import OUTER_LOWER_LIP, OUTER_UPPER_LIP, eye_distance
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.geometry import NO_FACE, Box
from musetalk.media.image import read_image
from musetalk.preprocessing.following import face_boxes, find_faces, smooth_track, track, without_flashes
from musetalk.preprocessing.preprocessor import EnhancedMuseTalkPreprocessor

FRAME = np.zeros((200, 300, 3), np.uint8)


def _face(x: float, y: float, side: float = 60.0, mesh: bool = True) -> Face:
    """A face whose 68 points fill a square; the nose's middle lies in its middle."""
    points = np.random.default_rng(0).random((68, 2)) * 0.8 + 0.1
    points[0], points[16], points[8], points[29] = (0, 0.5), (1, 0.5), (0.5, 1), (0.5, 0.5)
    landmarks = (points * side + [x, y]).astype(np.float32)
    box = (int(x), int(y), int(x + side), int(y + side))
    grid = (np.random.default_rng(1).random((478, 2)) * side + [x, y]).astype(np.float32)
    return Face(landmarks, box, grid if mesh else None, grid[:, 0] if mesh else None)


class _Scripted:
    """A detector that answers what it is told."""

    name = "scripted"

    def __init__(self, answers: Sequence[list[Face]]) -> None:
        self._answers = iter(answers)

    def detect(self, frame: np.ndarray) -> list[Face]:
        return by_size(next(self._answers))


def _followed(answers: Sequence[list[Face]]) -> list[Box | None]:
    faces = track(_Scripted(answers), [FRAME] * len(answers))
    return [face.detection if face else None for face in faces]


def test_the_largest_face_is_followed() -> None:
    small, large = _face(10, 10, 40), _face(100, 20, 80)
    assert _followed([[small, large]]) == [large.detection]


def test_a_larger_passer_by_does_not_take_over() -> None:
    first, moved, passer = _face(100, 20, 60), _face(104, 22, 60), _face(10, 10, 90)
    assert _followed([[first], [moved, passer], [], [moved, passer]]) == [
        first.detection,
        moved.detection,
        None,
        moved.detection,
    ]


def test_another_face_is_followed_once_the_first_has_gone() -> None:
    first, other = _face(100, 20, 60), _face(10, 10, 60)
    assert _followed([[first], [other]]) == [first.detection, other.detection]


def test_smoothing_takes_noise_off_and_keeps_gaps() -> None:
    rng = np.random.default_rng(0)
    faces = [_face(100 + dx, 50 + dy) for dx, dy in rng.normal(0, 0.1, (60, 2))]
    smooth = smooth_track([*faces[:30], None, *faces[30:]])
    assert [i for i, face in enumerate(smooth) if face is None] == [30]
    before = np.stack([face.mesh[0] for face in faces if face.mesh is not None])
    after = np.stack([face.mesh[0] for face in smooth if face is not None and face.mesh is not None])
    assert np.diff(after, 2, axis=0).std() < 0.3 * np.diff(before, 2, axis=0).std()
    assert all(face.mesh_z is not None and face.mesh_z.shape == (478,) for face in smooth if face)


def test_shots_do_not_bleed_into_each_other() -> None:
    left, right = [_face(20, 50)] * 10, [_face(200, 50)] * 10
    smooth = smooth_track([*left, None, *right, *left])
    for before, after in zip([*left, None, *right, *left], smooth, strict=True):
        if before is None or after is None:
            assert before is after
        else:
            np.testing.assert_allclose(after.landmarks68, before.landmarks68, atol=1e-3)


def _strayed(course: np.ndarray) -> float:
    """Pixels that smoothed landmarks are off, at most, of a head that moves on `course` (T, 2)."""
    faces = [_face(100 + dx, 50 + dy) for dx, dy in course]
    smooth = [face for face in smooth_track(faces) if face is not None]
    pairs = zip(faces, smooth, strict=True)
    return max(float(np.abs(after.landmarks68 - before.landmarks68).max()) for before, after in pairs)


@pytest.mark.parametrize("hertz", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pixels", [3, 14])
def test_a_shaken_head_is_followed(hertz: int, pixels: int) -> None:
    """At 25 frames per second and 60 pixels of face: a fifth of its own mouth's height at most."""
    angle = 2 * np.pi * hertz * np.arange(50) / 25
    assert _strayed(pixels * np.stack([np.sin(angle), np.cos(angle) / 2], axis=1)) < 0.8


def test_a_sudden_start_and_stop_are_followed() -> None:
    course = np.zeros((60, 2))
    course[20:30, 0] = np.linspace(0, 60, 10)
    course[30:, 0] = 60
    assert _strayed(course) < 1.0


@pytest.mark.parametrize("shift", [3, 12, 25])
def test_a_cut_between_places_close_to_each_other_is_kept(shift: int) -> None:
    first, second = [_face(100, 50)] * 12, [_face(100 + shift, 50 + shift)] * 12
    smooth = smooth_track([*first, *second], frozenset({12}))
    boxes = face_boxes(smooth, (200, 300), PreprocessingConfig(), 0, frozenset({12}))
    assert boxes[:12] == [(100, 50, 160, 110)] * 12
    assert boxes[12:] == [(100 + shift, 50 + shift, 160 + shift, 110 + shift)] * 12
    for face, known in zip(smooth, [*first, *second], strict=True):
        assert face is not None
        np.testing.assert_allclose(face.landmarks68, known.landmarks68, atol=1e-3)


def test_faces_without_a_mesh_are_smoothed_too() -> None:
    smooth = smooth_track([_face(100, 50, mesh=False)] * 5)
    assert all(face is not None and face.mesh is None and face.mesh_z is None for face in smooth)


def test_boxes_lie_in_the_frame_and_follow_the_settings() -> None:
    face = _face(20, 100)
    settings = PreprocessingConfig(bbox_shift=0)
    assert face_boxes([face], (200, 300), settings, 0) == [(20, 100, 80, 160)]
    assert face_boxes([face], (200, 300), settings, 10) == [(20, 100, 80, 170)]
    assert face_boxes([face], (165, 300), settings, 10) == [(20, 100, 80, 165)]
    assert face_boxes([face], (200, 70), settings, 0) == [(20, 100, 70, 160)]
    shifted = face_boxes([face], (200, 300), PreprocessingConfig(bbox_shift=5), 0)
    assert shifted == [(20, 110, 80, 160)]


def test_faceless_frames_keep_their_place() -> None:
    faces = [None, _face(20, 100), None, _face(20, 100)]
    boxes = face_boxes(faces, (200, 300), PreprocessingConfig(), 0)
    assert boxes == [NO_FACE, (20, 100, 80, 160), NO_FACE, (20, 100, 80, 160)]


@pytest.mark.parametrize(("shift", "warned"), [(0, False), (5, False), (-5, False), (40, True), (-300, True)])
def test_a_shift_beyond_the_face_is_said_and_kept_on_it_for_lite(
    tmp_path: Path, portrait: Path, caplog: pytest.LogCaptureFixture, shift: int, warned: bool
) -> None:
    preprocessor = EnhancedMuseTalkPreprocessor(tmp_path, config=EngineConfig(engine="lite"))
    with caplog.at_level(logging.WARNING):
        metadata = preprocessor.preprocess_template("t", portrait, bbox_shift=shift)
    low, high = metadata["bbox_shift_range"]
    assert low < 0 < high and (f"{low} to {high}" in caplog.text) is warned
    [face] = MediapipeDetector().detect(read_image(portrait))
    assert face.mesh is not None
    lips = face.mesh[[*OUTER_UPPER_LIP, *OUTER_LOWER_LIP]]
    x1, y1, x2, y2 = metadata["bbox"]
    assert (lips > [x1, y1]).all() and (lips < [x2, y2]).all()
    above, middle, below = face.landmarks68[28:31, 1]
    assert (low, high) == (-round(float(below - middle)), round(float(middle - above)))


def test_faces_that_flash_up_are_none() -> None:
    face = _face(100, 50)
    seen = [face] * 4 + [None] * 3 + [face] * 2 + [None] * 2 + [face] * 6 + [None] + [face]
    kept = without_flashes(seen, 5)
    assert [one is None for one in kept] == [False] * 4 + [True] * 7 + [False] * 6 + [True, False]
    assert without_flashes([face, face], 5) == [face, face]
    assert without_flashes([], 5) == []


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_on_its_side_or_head_is_worked_on_upright_and_shown_turned(
    tmp_path: Path, portrait: Path, turns: int
) -> None:
    preprocessor = EnhancedMuseTalkPreprocessor(tmp_path / "c", config=EngineConfig(engine="lite"))
    upright = read_image(portrait)[:400]
    turned = np.ascontiguousarray(np.rot90(upright, turns))
    for name, frame in (("u", upright), ("t", turned)):
        Image.fromarray(frame[:, :, ::-1]).save(tmp_path / f"{name}.png")
        preprocessor.preprocess_template(name, tmp_path / f"{name}.png")
    (plain, _), (template, metadata) = (preprocessor.store.load(name) for name in "ut")
    assert metadata["turned"] == 90 * turns and metadata["frame_size"] == [turned.shape[1], turned.shape[0]]
    np.testing.assert_allclose(template.bboxes[0], plain.bboxes[0], atol=2)
    np.testing.assert_array_equal(FrameCompositor(template).compose_bgr(0, None), turned)
    x1, y1, x2, y2 = template.bboxes[0]
    face = np.zeros((y2 - y1, x2 - x1, 3), np.uint8)
    shown = FrameCompositor(template).compose_bgr(0, face)
    changed = np.rot90(np.abs(shown.astype(int) - turned).max(axis=2) > 0, -turns)
    rows, columns = np.nonzero(changed)
    assert len(rows) and y1 <= rows.min() and rows.max() < y2 and x1 <= columns.min() and columns.max() < x2


def zoom_cut(portrait: Path, folder: Path, zoom: float) -> list[np.ndarray]:
    """Ten frames of a portrait from afar and ten from near, both around its face, as numbered pictures."""
    image = Image.open(portrait).convert("RGB")
    x1, y1, x2, y2 = MediapipeDetector().detect(read_image(portrait))[0].detection
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    folder.mkdir()
    frames = []
    for i in range(20):
        half = 1.5 * (y2 - y1) / (zoom if i >= 10 else 1)
        drift = 0.4 * (i % 10)
        box = (x - half + drift, y - half, x + half + drift, y + half)
        shown = image.transform((320, 320), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
        shown.save(folder / f"{i:02}.png")
        frames.append(np.asarray(shown)[:, :, ::-1])
    return frames


@pytest.mark.parametrize("zoom", [1.4, 1.8])
def test_the_face_behind_a_zoom_is_found_in_its_first_frame(
    tmp_path: Path, portrait: Path, zoom: float
) -> None:
    frames = zoom_cut(portrait, tmp_path / "frames", zoom)
    found = find_faces(tmp_path / "frames", PreprocessingConfig(), "lite", EngineConfig(), "cpu")
    for i in (10, 11, 12):
        [alone] = MediapipeDetector().detect(np.ascontiguousarray(frames[i]))
        apart = np.linalg.norm(found.face(i).mesh - alone.mesh, axis=1).mean()
        assert apart < 0.06 * eye_distance(alone.mesh), i
