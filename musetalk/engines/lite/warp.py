"""Backward warps from forward displacement fields on a coarse lattice.

Fields are kept on a lattice of about sixty nodes a side, because they are smooth: inverting there and
enlarging the result costs a tenth of working per pixel and differs by hundredths of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

INVERSION_STEPS = 6


class Lattice(NamedTuple):
    """Nodes at the centres of equal cells over a picture, as `cv2.resize` places them.

    Attributes:
        columns, rows: number of nodes.
        width, height: pixels of the picture.
    """

    columns: int
    rows: int
    width: int
    height: int

    @property
    def cell(self) -> np.ndarray:
        """(2,) float32 pixels between nodes, x and y."""
        return np.array([self.width / self.columns, self.height / self.rows], np.float32)

    def nodes(self) -> np.ndarray:
        """(rows, columns, 2) float32 pixel coordinates."""
        x = (np.arange(self.columns, dtype=np.float32) + 0.5) * self.cell[0] - 0.5
        y = (np.arange(self.rows, dtype=np.float32) + 0.5) * self.cell[1] - 0.5
        return np.stack(np.meshgrid(x, y), axis=-1)


def invert(forward: np.ndarray, lattice: Lattice) -> np.ndarray:
    """The displacement b with b(y) = -forward(y + b(y)), by fixed-point iteration.

    Args:
        forward: (rows, columns, 2) float32 pixels, of slope below one.

    Returns:
        (rows, columns, 2) float32 pixels: from a place in the result to its place in the source.
    """
    import cv2

    per_node = 1 / lattice.cell
    start = np.stack(
        np.meshgrid(np.arange(lattice.columns), np.arange(lattice.rows)), axis=-1
    ).astype(np.float32)
    forward = np.ascontiguousarray(forward * per_node)
    places = start - forward
    for _ in range(INVERSION_STEPS - 1):
        moved = cv2.remap(forward, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        places = start - moved
    return (places - start) * lattice.cell


def enlarge(field: np.ndarray, lattice: Lattice, rect: tuple[int, int, int, int]) -> np.ndarray:
    """A lattice field at every pixel of `rect` (x1, y1, x2, y2), float32 (h, w, channels)."""
    import cv2

    x1, y1, x2, y2 = rect
    if rect == (0, 0, lattice.width, lattice.height):
        return cv2.resize(field, (x2, y2), interpolation=cv2.INTER_LINEAR)
    cell_x, cell_y = (float(value) for value in lattice.cell)
    to_node = np.array(
        [[1 / cell_x, 0, (x1 + 0.5) / cell_x - 0.5], [0, 1 / cell_y, (y1 + 0.5) / cell_y - 0.5]]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (x2 - x1, y2 - y1)
    return cv2.warpAffine(field, to_node, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


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
    return cv2.remap(picture, places, None, interpolation, borderMode=cv2.BORDER_REPLICATE)
