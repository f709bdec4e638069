"""The mouth's inside follows the face's light and style."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from musetalk import warp
from musetalk.engines.lite import interior, palette, rig
from musetalk.faces.head import INNER_LIPS, head_frame
from tests.engines.lite.face_meshes import load_portrait

REST = interior.Pose(*np.zeros((4, 2)), tip_up=0.0, tuck=0.0, pucker=0.0)


def painted(
    name: str,
    brightness: float = 1.0,
    change: Callable[[np.ndarray], np.ndarray] = np.asarray,
    above: int = 8,
) -> tuple[palette.Palette, interior.Layers, np.ndarray]:
    portrait = load_portrait(name)
    frame = change((portrait.frame * brightness).astype(np.uint8))
    head = head_frame(portrait.mesh)
    lips = rig.measure_lips(head, portrait.mesh)
    inner = portrait.mesh[INNER_LIPS, :2]
    low, high = np.floor(inner.min(axis=0)).astype(int), np.floor(inner.max(axis=0)).astype(int)
    rect = (int(low[0]) - 8, int(low[1]) - above, int(high[0]) + 8, int(high[1]) + 40)
    here = head.to_head(warp.pixel_grid(rect)).astype(np.float32)
    distances = rig.edge_distances(lips, here)
    picture = frame[rect[1] : rect[3], rect[0] : rect[2]]
    look = interior.look_at_mouth(frame, portrait.mesh, distances, here, rect, lips)
    layers = interior.paint_layers(picture, here, distances, lips, look, 1 / head.eye_distance)
    return look.palette, layers, picture


def test_teeth_are_brighter_than_the_cavity_and_never_pure_white() -> None:
    for name in ("hopper", "rendered_man", "painted_woman", "charcoal_man", "drawn_girl"):
        colours, _, _ = painted(name)
        tooth, cavity = palette.luminance(colours.tooth), palette.luminance(colours.cavity)
        assert 4 * cavity < tooth <= 236


def test_a_darker_picture_has_darker_teeth() -> None:
    light, _, _ = painted("hopper")
    dark, _, _ = painted("hopper", brightness=0.5)
    assert palette.luminance(dark.tooth) < 0.7 * palette.luminance(light.tooth)


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
    colours, _, _ = painted("hopper")
    dark = colours._replace(tooth=colours.tooth * 0.5)
    look = interior.common_look([interior.Look(p, 0.03, 0.0) for p in (colours, dark, colours)])
    np.testing.assert_allclose(look.palette.tooth, colours.tooth)


def test_teeth_that_only_some_frames_show_are_painted() -> None:
    colours, _, _ = painted("hopper")
    shown = [interior.Look(colours, 0.05, 1.0)] * 2 + [interior.Look(colours, 0.03, 0.0)] * 3
    look = interior.common_look(shown)
    assert not look.owned
    assert look.edge == 0.03


def test_layers_are_premultiplied_within_range() -> None:
    _, layers, _ = painted("hopper")
    for layer in layers[:4]:
        assert layer.dtype == np.float32
        assert layer[..., 3].min() >= 0
        assert layer[..., 3].max() <= 1
        assert (layer[..., :3] <= 255 * layer[..., 3:] + 1e-3).all()


def inside(face: str, pose: interior.Pose = REST, gap: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """The mouth's inside and its front teeth's alpha, half way between lips `gap` eye distances apart."""
    colours, layers, picture = painted(face)
    height, width = picture.shape[:2]
    half = np.full((height, width), -gap / 2, np.float32)
    return interior.paint(layers, colours, (slice(0, height), slice(0, width)), half, half, pose)


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
    return float(palette.luminance(inside("hopper", pose, gap)[0]).max())


def test_teeth_are_darker_between_nearly_shut_lips_and_behind_rounded_ones() -> None:
    wide = brightest_tooth(0.12)
    assert brightest_tooth(0.01) < 0.6 * wide
    assert brightest_tooth(0.12, REST._replace(pucker=1.0)) < 0.7 * wide


def test_rounded_lips_hide_teeth_that_hang_low() -> None:
    _, shown = inside("astronaut")
    _, hidden = inside("astronaut", REST._replace(upper_shift=np.array([0.0, -3.0])))
    middle = shown.shape[1] // 2
    assert np.flatnonzero(shown[:, middle] > 0.5).max() - np.flatnonzero(hidden[:, middle] > 0.5).max() == 3


def test_the_tongue_s_tip_is_seen_below_the_upper_teeth_only_when_it_is_up() -> None:
    _, layers, _ = painted("hopper")
    down, _ = inside("hopper")
    up, _ = inside("hopper", REST._replace(tip_up=1.0))
    changed = np.abs(up - down).max(axis=-1) > 5
    assert changed[(layers.tip[..., 3] == 1) & (layers.upper_teeth[..., 3] == 0)].mean() > 0.9
    assert not changed[layers.upper_teeth[..., 3] == 1].any()


def blurred(frame: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(frame, (0, 0), 2.5)


def steepest(layer: np.ndarray) -> float:
    return float(np.abs(np.diff(layer[..., 3], axis=0)).max())


def test_what_is_painted_into_a_soft_picture_is_soft() -> None:
    sharp, of_sharp, _ = painted("hopper")
    soft, of_soft, _ = painted("hopper", change=blurred)
    assert soft.turn > 1.5 * sharp.turn
    assert steepest(of_soft.upper_teeth) < 0.75 * steepest(of_sharp.upper_teeth)


def grainy(frame: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 12, frame.shape[:2])
    return np.clip(frame + noise[..., None], 0, 255).astype(np.uint8)


def test_what_is_painted_into_a_grainy_picture_has_grain() -> None:
    def roughness(layers: interior.Layers) -> float:
        whole = (layers.tongue[..., 3] > 0.99) & (layers.tip[..., 3] > 0.99)
        return float(np.abs(cv2.Laplacian(layers.tongue[..., 2], cv2.CV_32F))[whole].mean())

    clean, grained = (painted("rendered_man", change=change)[1] for change in (blurred, grainy))
    assert roughness(grained) > 2 * roughness(clean)


def lit_from_the_left(frame: np.ndarray) -> np.ndarray:
    return (frame * np.linspace(1.0, 0.4, frame.shape[1])[:, None]).astype(np.uint8)


def test_teeth_are_lit_from_where_the_face_is() -> None:
    colours, layers, _ = painted("drawn_girl", change=lit_from_the_left)
    teeth = palette.luminance(layers.upper_teeth[..., :3]) * (layers.upper_teeth[..., 3] > 0.99)
    columns = teeth.max(axis=0)
    assert colours.side < -0.1
    assert columns[8:16].mean() > 1.08 * columns[-16:-8].mean()


def test_the_lightest_teeth_keep_their_hue() -> None:
    colours, _, _ = painted("drawn_girl")
    dim, _, _ = painted("drawn_girl", brightness=0.6)
    assert colours.tooth.max() > 230
    np.testing.assert_allclose(colours.tooth / colours.tooth.max(), dim.tooth / dim.tooth.max(), atol=0.02)


def test_gum_is_above_the_teeth_and_comes_down_between_them() -> None:
    colours, layers, _ = painted("rendered_man", above=30)
    redness = layers.upper_teeth[..., 2] / np.maximum(layers.upper_teeth[..., 1], 1)
    pink = redness > (colours.gum[2] / colours.gum[1] + colours.tooth[2] / colours.tooth[1]) / 2
    pink &= layers.upper_teeth[..., 3] > 0.99
    lowest = np.array([np.flatnonzero(column).max(initial=0) for column in pink.T])
    edge = np.flatnonzero((layers.upper_teeth[..., 3] > 0.5).any(axis=1)).max()
    middle = len(lowest) // 2
    assert pink[0, middle - 20 : middle + 20].all()
    assert lowest.max() < edge - 8
    near_middle = lowest[middle - 20 : middle + 20]
    assert near_middle.max() - near_middle.min() >= 4


def test_a_blurred_photograph_is_no_drawing() -> None:
    assert painted("hopper", change=blurred)[0].flatness < 0.2


def test_a_drawing_is_one_at_any_size() -> None:
    assert painted("drawn_girl", change=lambda frame: cv2.GaussianBlur(frame, (0, 0), 1.5))[0].flatness > 0.6
