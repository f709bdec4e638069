"""Fields invert, and pictures move by them."""

from __future__ import annotations

import numpy as np

from musetalk import warp

RECT = (10, 20, 110, 100)


def smooth_field(lattice: warp.Lattice) -> np.ndarray:
    x, y = lattice.nodes()[..., 0], lattice.nodes()[..., 1]
    bump = np.exp(-(((x - 60) / 22) ** 2) - ((y - 60) / 20) ** 2)
    return np.stack([2 * bump, 6 * bump], axis=-1).astype(np.float32)


def room_everywhere(lattice: warp.Lattice, pixels: float) -> np.ndarray:
    return np.full((lattice.rows, lattice.columns, 1), pixels, np.float32)


def test_nodes_are_the_centres_of_equal_cells() -> None:
    nodes = warp.Lattice(5, 4, RECT).nodes()
    assert nodes.shape == (4, 5, 2)
    np.testing.assert_allclose(nodes[0, :, 0], [19.5, 39.5, 59.5, 79.5, 99.5])
    np.testing.assert_allclose(nodes[:, 0, 1], [29.5, 49.5, 69.5, 89.5])


def test_a_point_moved_forward_is_found_again_by_the_inverse() -> None:
    lattice = warp.lattice_over(RECT)
    forward = smooth_field(lattice)
    back, _ = warp.invert(forward, room_everywhere(lattice, np.inf), lattice)
    backward = warp.enlarge(back, lattice, RECT)
    for x, y in ((60, 60), (50, 55), (70, 66)):
        bump = np.exp(-(((x - 60) / 22) ** 2) - ((y - 60) / 20) ** 2)
        moved_x, moved_y = x + 2 * bump, y + 6 * bump
        found = backward[round(moved_y) - RECT[1], round(moved_x) - RECT[0]]
        assert abs(round(moved_x) + found[0] - x) < 0.9
        assert abs(round(moved_y) + found[1] - y) < 0.9


def test_nodes_without_room_stay() -> None:
    lattice = warp.lattice_over(RECT)
    back, places = warp.invert(smooth_field(lattice), room_everywhere(lattice, 0), lattice)
    assert not back.any()
    np.testing.assert_array_equal(places, lattice.numbers())


def test_movement_keeps_its_direction_and_its_length_up_to_the_room() -> None:
    lattice = warp.lattice_over(RECT)
    free, _ = warp.invert(smooth_field(lattice), room_everywhere(lattice, np.inf), lattice)
    cut, _ = warp.invert(smooth_field(lattice), room_everywhere(lattice, 2), lattice)
    way, kept = np.linalg.norm(free, axis=-1), np.linalg.norm(cut, axis=-1)
    assert way.max() > 5
    assert kept.max() <= 2
    np.testing.assert_allclose(kept[way < 0.5], way[way < 0.5], rtol=0.01)
    np.testing.assert_allclose(cut * way[..., None], free * kept[..., None], atol=1e-4)


def test_a_part_is_enlarged_as_the_whole_is() -> None:
    lattice = warp.lattice_over(RECT)
    field = smooth_field(lattice)
    whole = warp.enlarge(field, lattice, RECT)
    part = warp.enlarge(field, lattice, (40, 50, 80, 70))
    np.testing.assert_allclose(part, whole[30:50, 30:70], atol=0.06)


def test_sampling_where_a_pixel_is_gives_the_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    grid = warp.pixel_grid((5, 6, 25, 20))
    np.testing.assert_array_equal(warp.sample(picture, grid), picture[6:20, 5:25])


def test_sampling_beside_a_pixel_shifts_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    grid = warp.pixel_grid((5, 6, 25, 20)) + np.array([3, -2], np.float32)
    np.testing.assert_array_equal(warp.sample(picture, grid, sharp=False), picture[4:18, 8:28])
