"""Backward warps from forward displacement fields on a coarse lattice.

Fields are kept on a lattice of about sixty nodes a side, because they are smooth: inverting there and
enlarging the result costs a tenth of working per pixel and differs by hundredths of a pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

INVERSION_STEPS = 5
NODES = 48  # a side, at most
CELL = 3  # pixels, at least
NO_ROOM = 1e-6  # square pixels, what counts as none


class Lattice(NamedTuple):
    """Nodes at the centres of equal cells over a rectangle of a picture, as `cv2.resize` places them.

    Attributes:
        columns, rows: number of nodes.
        rect: (x1, y1, x2, y2) pixels of the picture.
    """

    columns: int
    rows: int
    rect: tuple[int, int, int, int]

    @property
    def cell(self) -> np.ndarray:
        """(2,) float32 pixels between nodes, x and y."""
        x1, y1, x2, y2 = self.rect
        return np.array([(x2 - x1) / self.columns, (y2 - y1) / self.rows], np.float32)

    def nodes(self) -> np.ndarray:
        """(rows, columns, 2) float32 pixel coordinates in the picture."""
        return (self.numbers() + 0.5) * self.cell - 0.5 + np.array(self.rect[:2], np.float32)

    def to_nodes(self, points: np.ndarray) -> np.ndarray:
        """Pixel coordinates (..., 2) as fractional node numbers."""
        return (points - np.array(self.rect[:2], np.float32) + 0.5) / self.cell - 0.5

    def numbers(self) -> np.ndarray:
        """(rows, columns, 2) float32 node numbers: column, row."""
        x, y = np.meshgrid(np.arange(self.columns), np.arange(self.rows))
        return np.stack([x, y], axis=-1).astype(np.float32)


def lattice_over(rect: tuple[int, int, int, int]) -> Lattice:
    """The lattice for a picture's rectangle (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = rect
    columns, rows = (int(np.clip(side // CELL, 2, NODES)) for side in (x2 - x1, y2 - y1))
    return Lattice(columns, rows, rect)


def invert(forward: np.ndarray, room: np.ndarray, lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
    """The displacement b with b(y) = -forward(y + b(y)), by fixed-point iteration, cut to `room`.

    What is much shorter than the room stays as it is, so that small movements pass close to places that
    must not move; what is longer becomes as long as the room.

    Args:
        forward: (rows, columns, 2) float32 pixels, of slope below one.
        room: (rows, columns, 1) float32 pixels that places may move, 0 where nothing may.

    Returns:
        (rows, columns, 2) float32 pixels from a place in the result to its place in the source, and
        that place as node numbers.
    """
    cell, start = lattice.cell, lattice.numbers()
    in_cells = forward / cell
    places = start - in_cells
    for _ in range(INVERSION_STEPS - 1):
        places = start - sample(in_cells, places, sharp=False)
    steps = (places - start) * cell
    over = (steps * steps).sum(axis=-1, keepdims=True) / np.maximum(room * room, NO_ROOM)
    steps *= (room > 0) / np.sqrt(np.sqrt(1 + over * over))
    return steps, start + steps / cell


def enlarge(field: np.ndarray, lattice: Lattice, rect: tuple[int, int, int, int]) -> np.ndarray:
    """A lattice field at every pixel of `rect`, within the lattice's, float32 (h, w, channels)."""
    import cv2

    x1, y1, x2, y2 = rect
    size = (x2 - x1, y2 - y1)
    if rect == lattice.rect:
        return cv2.resize(field, size, interpolation=cv2.INTER_LINEAR)
    cell_x, cell_y = (float(value) for value in lattice.cell)
    left, top = x1 - lattice.rect[0] + 0.5, y1 - lattice.rect[1] + 0.5
    to_node = np.array([[1 / cell_x, 0, left / cell_x - 0.5], [0, 1 / cell_y, top / cell_y - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(field, to_node, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def reduce(picture: np.ndarray, lattice: Lattice) -> np.ndarray:
    """A float32 picture (h, w) averaged over the lattice's cells, (rows, columns, 1)."""
    import cv2

    x1, y1, x2, y2 = lattice.rect
    size = (lattice.columns, lattice.rows)
    return cv2.resize(picture[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)[..., None]


def pixel_grid(rect: tuple[int, int, int, int]) -> np.ndarray:
    """(h, w, 2) float32 coordinates of the pixels of `rect` (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = rect
    x = np.arange(x1, x2, dtype=np.float32)
    y = np.arange(y1, y2, dtype=np.float32)
    return np.stack(np.meshgrid(x, y), axis=-1)


def sample(picture: np.ndarray, places: np.ndarray, sharp: bool = True) -> np.ndarray:
    """`picture` at float32 pixel `places` (h, w, 2); bicubic when sharp, else bilinear."""
    import cv2

    interpolation = cv2.INTER_CUBIC if sharp else cv2.INTER_LINEAR
    places_hold_both: Any = None
    return cv2.remap(picture, places, places_hold_both, interpolation, borderMode=cv2.BORDER_REPLICATE)
