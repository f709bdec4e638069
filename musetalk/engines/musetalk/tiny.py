"""Decoding faces with TAESD's small decoder, all of them or the part that the blend mask uses.

The decision a reader would question: the tiny decoder always decodes a part where a part is enough, unless
told not to. It has no group norms, so that a part with the margin of its convolutions comes out exactly as
it does in the whole; nothing has to be judged as for the full decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from musetalk.engines.musetalk.region import Rectangle, cut, difference, full, placed

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SHARPNESS = 1e-6  # levels, of a face without any edge
BLOCK_REACH = 3  # pixels, of a block's three 3×3 convolutions


def plan_tiny_cuts(rectangle: Rectangle, counts: Sequence[int], side: int) -> np.ndarray:
    """What is cut out of the image in front of each level's convolution, and at the end.

    Args:
        rectangle: of the output, `side << (levels - 1)` pixels wide.
        counts: blocks of every level.
        side: of the latents, pixels.

    Returns:
        (levels + 1, 4) int64: top, bottom, left and right in the image as it is by then.
    """
    last = len(counts) - 1
    needed = [rectangle.grown(1, side << last)]  # the output convolution
    for level in range(last, -1, -1):
        taken = needed[0].grown(BLOCK_REACH * counts[level] + 1, side << level)
        needed.insert(0, taken if level == 0 else taken.halved())
    held, cuts = full(side), []
    for level, wanted in enumerate([needed[0], *(r.doubled() for r in needed[1:-1])]):
        cuts.append(wanted.within(held))
        held = wanted.doubled() if level < last else wanted
    return np.array([*cuts, rectangle.within(held)], np.int64)


def decode_tiny_cuts(decoder: Any, latents: Tensor, cuts: Iterable[Any]) -> Tensor:
    """(B, 4, 32, 32) scaled latents → (B, 3, h, w), the part of the 256² image that `cuts` leave."""
    edges = iter(cuts)
    image = decoder.squeezed(latents)
    for level in decoder.levels():
        image = cut(image, next(edges))
        for layer in level:
            image = layer(image)
    return cut(image, next(edges)) * 2 - 1


class TinyFaceDecoder:
    """Decodes a rectangle of faces.

    Args:
        rectangle: the part of the face that is wanted.
        decode_cuts: what decodes for the cuts given to it, tensors or arrays.
        counts: blocks of every level of the decoder.
        side: of the latents, pixels.
    """

    def __init__(
        self,
        rectangle: Rectangle,
        decode_cuts: Callable[[np.ndarray], Callable[[Any], Any]],
        counts: Sequence[int],
        side: int,
    ) -> None:
        self.rectangle = rectangle
        self._decode = decode_cuts(plan_tiny_cuts(rectangle, counts, side))

    def decode(self, latents: Any) -> Any:
        """(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1, black outside the rectangle."""
        return placed(self._decode(latents), self.rectangle)


def sharpness(images: np.ndarray, weights: np.ndarray) -> float:
    """Mean strength of edges among blended pixels: the absolute Laplacian of the luma, in levels.

    Args:
        images: (n, 3, 256, 256) float32 RGB around -1…1.
        weights: (256, 256) share of the generated face in each pixel.
    """
    luma = images.clip(-1, 1).mean(axis=1) * 127.5
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    edges = np.abs(around - 4 * luma[:, 1:-1, 1:-1])
    share = weights[1:-1, 1:-1]
    return float((edges * share).sum() / max(share.sum() * len(edges), 1.0))


def tiny_verdict(found: np.ndarray, exact: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """What a template's metadata says of the tiny decoder: levels of difference, share of the sharpness.

    Args:
        found, exact: (n, 3, 256, 256) float32 around -1…1, the same faces from the tiny and the full decoder.
        weights: (256, 256) share of the generated face in each pixel.
    """
    levels = asdict(difference(found, exact, weights))
    kept = sharpness(found, weights) / max(sharpness(exact, weights), LEAST_SHARPNESS)
    return {name: round(value, 3) for name, value in {**levels, "sharpness": kept}.items()}
