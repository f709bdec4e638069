"""The mouth's inside follows the face's light and style."""

from __future__ import annotations

import numpy as np

from musetalk import warp
from musetalk.engines.lite import interior, rig
from musetalk.faces.head import INNER_LIPS, head_frame
from tests.engines.lite.face_meshes import load_portrait

REST = interior.Pose(np.zeros(2), np.zeros(2), np.zeros(2), 0.0, 0.0)


def painted(name: str, brightness: float = 1.0) -> tuple[interior.Palette, interior.Layers, np.ndarray]:
    portrait = load_portrait(name)
    frame = (portrait.frame * brightness).astype(np.uint8)
    head = head_frame(portrait.mesh)
    lips = rig.measure_lips(head, portrait.mesh)
    inner = portrait.mesh[INNER_LIPS, :2]
    low, high = np.floor(inner.min(axis=0)).astype(int), np.floor(inner.max(axis=0)).astype(int)
    rect = (int(low[0]) - 8, int(low[1]) - 8, int(high[0]) + 8, int(high[1]) + 40)
    here = head.to_head(warp.pixel_grid(rect)).astype(np.float32)
    distances = rig.edge_distances(lips, here)
    picture = frame[rect[1] : rect[3], rect[0] : rect[2]]
    look = interior.look_at_mouth(frame, portrait.mesh, distances, here, rect, lips)
    layers = interior.paint_layers(picture, here, distances, lips, look, 1 / head.eye_distance)
    return look.palette, layers, picture


def test_teeth_are_brighter_than_the_cavity_and_never_pure_white() -> None:
    for name in ("hopper", "rendered_man", "painted_woman", "charcoal_man", "drawn_girl"):
        palette, _, _ = painted(name)
        tooth, cavity = interior.luminance(palette.tooth), interior.luminance(palette.cavity)
        assert 4 * cavity < tooth <= 236


def test_a_darker_picture_has_darker_teeth() -> None:
    light, _, _ = painted("hopper")
    dark, _, _ = painted("hopper", brightness=0.5)
    assert interior.luminance(dark.tooth) < 0.7 * interior.luminance(light.tooth)


def test_a_grey_picture_has_a_grey_tongue() -> None:
    coloured, _, _ = painted("hopper")
    grey, _, _ = painted("charcoal_man")
    assert np.ptp(coloured.tongue) > 20
    assert np.ptp(grey.tongue) < 0.35 * np.ptp(coloured.tongue)


def test_drawings_are_flat_and_photographs_are_not() -> None:
    assert painted("drawn_girl")[0].flatness > 0.8
    assert painted("hopper")[0].flatness < 0.2


def test_a_portrait_s_own_teeth_are_kept() -> None:
    portrait = load_portrait("astronaut")
    _, layers, picture = painted("astronaut")
    x, y = ((portrait.mesh[13, :2] + portrait.mesh[14, :2]) / 2).astype(int)
    low = np.floor(portrait.mesh[INNER_LIPS, :2].min(axis=0)).astype(int) - 8
    row, column = y - low[1], x - low[0]
    np.testing.assert_allclose(layers.upper_teeth[row, column, :3], picture[row, column], atol=12)
    assert layers.upper_teeth[row, column, 3] > 0.95


def test_a_video_s_look_is_the_median_of_its_frames() -> None:
    palette, _, _ = painted("hopper")
    dark = palette._replace(tooth=palette.tooth * 0.5)
    look = interior.common_look([interior.Look(p, 0.03, 0.0) for p in (palette, dark, palette)])
    np.testing.assert_allclose(look.palette.tooth, palette.tooth)


def test_teeth_that_only_some_frames_show_are_painted() -> None:
    palette, _, _ = painted("hopper")
    shown = [interior.Look(palette, 0.05, 1.0)] * 2 + [interior.Look(palette, 0.03, 0.0)] * 3
    look = interior.common_look(shown)
    assert not look.owned
    assert look.edge == 0.03


def test_layers_are_premultiplied_within_range() -> None:
    _, layers, _ = painted("hopper")
    for layer in layers[:3]:
        assert layer.dtype == np.float32
        assert layer[..., 3].min() >= 0
        assert layer[..., 3].max() <= 1
        assert (layer[..., :3] <= 255 * layer[..., 3:] + 1e-3).all()


def inside(face: str, pose: interior.Pose = REST, gap: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """The mouth's inside and its front teeth's alpha, half way between lips `gap` eye distances apart."""
    palette, layers, picture = painted(face)
    height, width = picture.shape[:2]
    half = np.full((height, width), -gap / 2, np.float32)
    return interior.paint(layers, palette, (slice(0, height), slice(0, width)), half, half, pose)


def test_lower_teeth_go_with_the_jaw_and_upper_teeth_stay() -> None:
    _, layers, _ = painted("hopper")
    rest, _ = inside("hopper")
    moved, teeth = inside("hopper", REST._replace(jaw_shift=np.array([0.0, 12.0])))
    changed = np.abs(moved - rest).max(axis=-1) > 1
    assert changed.any()
    assert not changed[layers.upper_teeth[..., 3] == 1].any()
    assert teeth.max() == 1


def brightest_tooth(gap: float, pose: interior.Pose = REST) -> float:
    """Luma of the lightest pixel half way between lips that are `gap` eye distances apart."""
    return float(interior.luminance(inside("hopper", pose, gap)[0]).max())


def test_teeth_are_darker_between_nearly_shut_lips_and_behind_rounded_ones() -> None:
    wide = brightest_tooth(0.12)
    assert brightest_tooth(0.01) < 0.6 * wide
    assert brightest_tooth(0.12, REST._replace(pucker=1.0)) < 0.7 * wide


def test_rounded_lips_hide_teeth_that_hang_low() -> None:
    _, shown = inside("astronaut")
    _, hidden = inside("astronaut", REST._replace(upper_shift=np.array([0.0, -3.0])))
    middle = shown.shape[1] // 2
    assert np.flatnonzero(shown[:, middle] > 0.5).max() - np.flatnonzero(hidden[:, middle] > 0.5).max() == 3
