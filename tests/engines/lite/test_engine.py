"""The lite engine from face meshes to faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musetalk.compositor import paste_back
from musetalk.engines.base import FaceFrame
from musetalk.engines.lite.engine import LiteEngine
from musetalk.engines.lite.parameters import PARAMETER_INDEX, RIG_PARAMETERS
from musetalk.errors import CacheError, EngineError
from musetalk.geometry import NO_FACE
from musetalk.templates.template import Template
from tests.engines.lite.face_meshes import Portrait, load_portrait

FACES = ("astronaut", "charcoal_man", "drawn_girl", "hopper", "painted_woman", "rendered_man")


def prompts(**values: float) -> np.ndarray:
    result = np.zeros((1, len(RIG_PARAMETERS)), np.float32)
    for name, value in values.items():
        result[0, PARAMETER_INDEX[name]] = value
    return result


def engine() -> LiteEngine:
    return LiteEngine(Path("unused"))


def face_frame(portrait: Portrait) -> FaceFrame:
    return FaceFrame(portrait.frame, portrait.bbox, portrait.mesh[:, :2], portrait.mesh[:, 2])


def template_of(portrait: Portrait, count: int = 1) -> Template:
    frames = [portrait.frame.copy() for _ in range(count)]
    latents = list(engine().encode([face_frame(portrait)] * count))
    boxes, masks, crops = [portrait.bbox] * count, [portrait.mask] * count, [portrait.crop_box] * count
    return Template.from_frames(frames, boxes, latents, masks, crops)


def generated(portrait: Portrait, **values: float) -> np.ndarray:
    return engine().open(template_of(portrait)).generate(prompts(**values), [0])[0]


def mouth_of(portrait: Portrait, face: np.ndarray) -> np.ndarray:
    """A strip through the middle of the mouth, nose to chin, (h, 3) float."""
    x = round(float(portrait.mesh[13, 0])) - portrait.bbox[0]
    top, bottom = round(float(portrait.mesh[2, 1])), round(float(portrait.mesh[152, 1]))
    return face[top - portrait.bbox[1] : bottom - portrait.bbox[1], x].astype(float)


def test_latents_are_small_and_in_the_box_s_coordinates() -> None:
    portrait = load_portrait("hopper")
    (latent,) = engine().encode([face_frame(portrait)])
    assert latent.dtype == np.float32
    assert latent.nbytes <= 6 * 1024
    np.testing.assert_allclose(latent[:, :2] + np.array(portrait.bbox[:2]), portrait.mesh[:, :2], atol=1e-3)


def test_a_detector_without_a_mesh_is_refused() -> None:
    portrait = load_portrait("hopper")
    points = FaceFrame(portrait.frame, portrait.bbox, portrait.mesh[:68, :2], None)
    with pytest.raises(EngineError, match="478"):
        list(engine().encode([points]))


@pytest.mark.parametrize(
    "latent",
    [
        np.zeros((1, 8, 32, 32), np.float32),
        np.zeros((478, 3), np.float32),
        np.full((478, 3), np.nan, np.float32),
        "mesh",
    ],
    ids=["of another engine", "without extent", "not finite", "no array"],
)
def test_a_template_with_other_latents_is_refused(latent: object) -> None:
    portrait = load_portrait("hopper")
    template = Template.from_frames(
        [portrait.frame], [portrait.bbox], [latent], [portrait.mask], [portrait.crop_box]
    )
    with pytest.raises(CacheError):
        engine().open(template)


@pytest.mark.parametrize("name", FACES)
def test_faces_have_the_box_s_size_and_the_portrait_s_pixels_where_nothing_moves(name: str) -> None:
    portrait = load_portrait(name)
    x1, y1, x2, y2 = portrait.bbox
    face = generated(portrait, jaw_open=1.0, lip_width=1.0)
    own = portrait.frame[y1:y2, x1:x2]
    assert face.shape == own.shape
    difference = np.abs(face.astype(int) - own).max(axis=-1)
    assert difference[portrait.mask == 0].max() <= 1
    assert difference[portrait.mask < 200].max() <= 16
    assert difference.max() > 60


@pytest.mark.parametrize("name", ["hopper", "drawn_girl", "rendered_man"])
def test_an_open_jaw_shows_a_dark_mouth_and_a_shut_one_doesn_t(name: str) -> None:
    portrait = load_portrait(name)
    shut, wide = generated(portrait), generated(portrait, jaw_open=1.0)
    dark = 45 if name == "rendered_man" else 60
    assert (mouth_of(portrait, wide).max(axis=1) < dark).sum() >= 4
    assert (mouth_of(portrait, wide).max(axis=1) < dark).sum() > (
        mouth_of(portrait, shut).max(axis=1) < dark
    ).sum()


def test_a_smile_with_teeth_closes() -> None:
    portrait = load_portrait("astronaut")
    x1, y1, x2, y2 = portrait.bbox
    own = mouth_of(portrait, portrait.frame[y1:y2, x1:x2])
    shut = mouth_of(portrait, generated(portrait, lip_press=1.0))

    def pale(strip: np.ndarray) -> int:
        return int(((strip.min(axis=1) > 170) & (np.ptp(strip, axis=1) < 45)).sum())

    assert pale(own) >= 3
    assert pale(shut) == 0


def test_zero_leaves_a_closed_portrait_nearly_alone() -> None:
    portrait = load_portrait("hopper")
    x1, y1, x2, y2 = portrait.bbox
    difference = np.abs(generated(portrait).astype(int) - portrait.frame[y1:y2, x1:x2])
    assert difference.mean() < 1.0


def test_the_blended_frame_keeps_the_template_outside_the_mask() -> None:
    portrait = load_portrait("hopper")
    face = generated(portrait, jaw_open=1.0)
    frame = paste_back(portrait.frame, face, portrait.bbox, portrait.mask, portrait.crop_box)
    outside = np.ones(frame.shape[:2], bool)
    x1, y1, x2, y2 = portrait.crop_box
    outside[y1:y2, x1:x2] = portrait.mask == 0
    np.testing.assert_array_equal(frame[outside], portrait.frame[outside])


def test_batches_give_the_same_bytes_as_single_frames() -> None:
    template = template_of(load_portrait("astronaut"), count=2)
    rows = np.random.default_rng(3).uniform(0, 1, (4, len(RIG_PARAMETERS))).astype(np.float32)
    together = engine().open(template).generate(rows, [0, 1, 2, 3])
    alone = engine().open(template)
    for i in (3, 1, 0, 2):
        np.testing.assert_array_equal(alone.generate(rows[i : i + 1], [i])[0], together[i])


def test_values_beyond_the_range_are_cut_to_it() -> None:
    portrait = load_portrait("hopper")
    np.testing.assert_array_equal(
        generated(portrait, jaw_open=7.0, lip_width=-9.0), generated(portrait, jaw_open=1.0, lip_width=-1.0)
    )


def test_long_templates_keep_few_prepared_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(load_portrait("astronaut"), count=6)
    generator = engine().open(template)
    generator.generate(prompts(jaw_open=0.5), [0])
    monkeypatch.setattr("musetalk.engines.lite.engine.KEPT_BYTES", 3 * generator.kept_bytes)
    one = generator.kept_bytes
    for index in range(len(template)):
        generator.generate(prompts(jaw_open=0.5), [index])
    assert generator.kept_bytes == pytest.approx(3 * one, rel=0.05)


def test_frames_without_a_face_are_skipped_when_opening() -> None:
    portrait = load_portrait("astronaut")
    (latent,) = engine().encode([face_frame(portrait)])
    empty = np.zeros((0, 0), np.uint8)
    template = Template.from_frames(
        [portrait.frame, portrait.frame.copy()],
        [portrait.bbox, NO_FACE],
        [latent, None],
        [portrait.mask, empty],
        [portrait.crop_box, NO_FACE],
    )
    assert len(engine().open(template).generate(prompts(jaw_open=0.3), [0])) == 1


def test_a_large_face_is_warped_smaller_and_a_tiny_one_at_its_own_size() -> None:
    import cv2

    portrait = load_portrait("hopper")
    for scale, side in ((8.0, 1024), (0.2, None)):
        frame = cv2.resize(portrait.frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        bbox = tuple(round(value * scale) for value in portrait.bbox)
        size = (bbox[2] - bbox[0], bbox[3] - bbox[1])
        mask = cv2.resize(portrait.mask, size)
        scaled = Portrait(frame, (portrait.mesh * scale).astype(np.float32), bbox, mask, bbox)
        face = generated(scaled, jaw_open=0.8)
        assert max(face.shape[:2]) == (side or max(size))
