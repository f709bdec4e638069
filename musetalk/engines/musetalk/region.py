"""Decoding only the part of the face that the blend mask uses.

The VAE decoder's convolutions see a few pixels around each pixel, so a region with that margin decodes to
the same values, but for one thing: its group norms take their statistics over the whole image. The decision
a reader would question: in the cropped blocks those statistics are constants of the template, measured on
full decodes of it. They move a little with the mouth, so the result differs a little, and preprocessing
judges for each template whether little is little enough; see `difference` and `verdict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from musetalk.config import FACE_SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from musetalk.templates.template import Template

RESIZE_MARGIN = 3  # pixels of the 256² face that resizing to the box may reach beyond the mask
MEAN_LIMIT = 0.5  # levels, mean difference of blended pixels that a template may show
TAIL_LIMIT = 4.0  # levels, at the percentile below
TAIL_PERCENTILE = 99.9
WORTHWHILE = 0.85  # share of the full decoder's pixels above which a region isn't worth it

Normalise = Callable[[Any, "Tensor"], "Tensor"]


class Rectangle(NamedTuple):
    """Rows and columns of an image, ends exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, pixels: int, side: int) -> Rectangle:
        """The rectangle with `pixels` more on every side, inside an image of `side`²."""
        return Rectangle(
            max(0, self.top - pixels),
            min(side, self.bottom + pixels),
            max(0, self.left - pixels),
            min(side, self.right + pixels),
        )

    def halved(self) -> Rectangle:
        """The rectangle, at half the resolution, that covers this one."""
        return Rectangle(self.top // 2, -(-self.bottom // 2), self.left // 2, -(-self.right // 2))

    def doubled(self) -> Rectangle:
        """This rectangle at twice the resolution."""
        return Rectangle(*(2 * edge for edge in self))

    def within(self, other: Rectangle) -> list[int]:
        """Top, bottom, left and right in an image that shows `other` alone."""
        return [
            self.top - other.top,
            self.bottom - other.top,
            self.left - other.left,
            self.right - other.left,
        ]

    @property
    def area(self) -> int:
        """Pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


def full(side: int) -> Rectangle:
    """All of an image of `side`² pixels."""
    return Rectangle(0, side, 0, side)


def face_weights(template: Template) -> np.ndarray:
    """(256, 256) float32: how much of each pixel of the generated face reaches a frame at most, 0…1.

    The blend masks inside the face boxes, brought to the face's size; the largest over all frames.
    """
    import cv2

    weights = np.zeros((FACE_SIZE, FACE_SIZE), np.float32)
    for position in sorted(set(template.unique)):
        if not template.has_face(position):
            continue
        x1, y1, x2, y2 = template.bboxes[position]
        left, top = template.crop_boxes[position][:2]
        mask = template.masks[position][y1 - top : y2 - top, x1 - left : x2 - left]
        inside = cv2.resize(mask, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)
        weights = np.maximum(weights, inside.astype(np.float32) / 255)
    return weights


def used_rectangle(weights: np.ndarray) -> Rectangle:
    """The rectangle of the face that frames use, with the margin that resizing needs."""
    rows, columns = np.flatnonzero(weights.any(axis=1)), np.flatnonzero(weights.any(axis=0))
    if not len(rows):
        return full(FACE_SIZE)
    rectangle = Rectangle(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    return rectangle.grown(RESIZE_MARGIN, FACE_SIZE)


def plan_crops(rectangle: Rectangle, resnets: Sequence[int], side: int) -> list[Rectangle]:
    """What must come out of each up block's residual blocks for `rectangle` of the output to be right.

    Args:
        rectangle: of the output, `side << (blocks - 1)` pixels wide.
        resnets: how many residual blocks (two 3×3 convolutions each) every up block has.
        side: of the first block's input, pixels.
    """
    last = len(resnets) - 1
    needed = [rectangle.grown(1, side << last)]  # the output convolution
    for level in range(last, 0, -1):
        taken = needed[0].grown(2 * resnets[level], side << level)
        needed.insert(0, taken.grown(1, side << level).halved())  # the upsampler's convolution
    return needed


def plan_cuts(rectangle: Rectangle, resnets: Sequence[int], side: int) -> np.ndarray:
    """What is cut out of the image on its way through the up blocks, in order; see `plan_crops`.

    Each residual block behind the first up block takes no more than the rest of its up block needs, each
    upsampler and the output convolution likewise, and the last cut leaves `rectangle`.

    Returns:
        (n, 4) int64: top, bottom, left and right in the image as the cut before left it.
    """
    wanted = []
    for level, needed in enumerate(plan_crops(rectangle, resnets, side)):
        blocks_left = range(resnets[level] if level else 0, 0, -1)
        wanted += [(level, needed.grown(2 * count, side << level)) for count in blocks_left]
        wanted.append((level, needed))
    held, cuts = full(side), []
    for (level, part), (after, _) in pairwise([*wanted, (len(resnets) - 1, rectangle)]):
        cuts.append(part.within(held))
        held = part.doubled() if after > level else part
    return np.array([*cuts, rectangle.within(held)], np.int64)


def cut(image: Tensor, edges: Any) -> Tensor:
    """Rows and columns of (B, C, H, W) between `edges`: top, bottom, left, right."""
    top, bottom, left, right = edges
    return image[:, :, top:bottom, left:right]


def _residual(block: Any, image: Tensor, normalise: Normalise) -> Tensor:
    from torch.nn.functional import silu

    inner = block.conv1(silu(normalise(block.norm1, image)))
    inner = block.conv2(silu(normalise(block.norm2, inner)))
    shortcut = image if block.conv_shortcut is None else block.conv_shortcut(image)
    return shortcut + inner


def decode_cuts(vae: Any, latents: Tensor, cuts: Iterable[Any], normalise: Normalise) -> Tensor:
    """(B, 4, 32, 32) unscaled latents → (B, 3, h, w), the part of the 256² image that `cuts` leave.

    `normalise` stands in for the group norms behind the first up block, which see a part of the image.
    """
    from torch.nn.functional import silu

    decoder, cuts = vae.decoder, iter(cuts)
    image = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for level, block in enumerate(decoder.up_blocks):
        for resnet in block.resnets:
            image = resnet(image) if level == 0 else _residual(resnet, cut(image, next(cuts)), normalise)
        image = cut(image, next(cuts))
        for upsampler in block.upsamplers:
            image = upsampler(image)
    image = decoder.conv_out(silu(normalise(decoder.conv_norm_out, image)))
    return cut(image, next(cuts))


def _resnets(vae: Any) -> list[int]:
    return [len(block.resnets) for block in vae.decoder.up_blocks]


def cropped_norms(vae: Any) -> list[Any]:
    """The group norms that see a part of the image, in the order of decoding."""
    resnets = (resnet for block in vae.decoder.up_blocks[1:] for resnet in block.resnets)
    return [*(norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2)), vae.decoder.conv_norm_out]


def fixed_norms(vae: Any, affine: Tensor) -> Normalise:
    """Group norms with fixed statistics: x · scale + shift, per channel.

    Args:
        affine: (2, n) scales and shifts of all channels of `cropped_norms`, one after the other.
    """
    norms = cropped_norms(vae)
    parts = affine[:, :, None, None].split([norm.num_channels for norm in norms], dim=1)
    constants = dict(zip(norms, parts, strict=True))

    def normalise(norm: Any, image: Tensor) -> Tensor:
        scale, shift = constants[norm]
        return image * scale + shift

    return normalise


def decoder_of_cuts(vae: Any, cuts: np.ndarray, affine: Tensor) -> Callable[[Tensor], Tensor]:
    """`decode_cuts` with everything but the latents settled, in the precision of `vae`."""
    normalise, edges = fixed_norms(vae, affine.to(vae.post_quant_conv.weight.dtype)), cuts.tolist()
    return lambda latents: decode_cuts(vae, latents, edges, normalise)


def optimised_region(vae: Any, cuts: np.ndarray, affine: Tensor) -> Callable[[Tensor], Tensor]:
    """`decoder_of_cuts`, compiled by torch: the decoder's own forward isn't what a region calls."""
    import torch

    return torch.compile(decoder_of_cuts(vae, cuts, affine))


def measure_norms(vae: Any, samples: Tensor) -> Tensor:
    """(2, n) float32 for `fixed_norms`, from full decodes of `samples` (B, 4, 32, 32), unscaled."""
    import torch

    found = []

    def measured(norm: Any, image: Tensor) -> Tensor:
        grouped = image.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        mean, variance = grouped.mean(dim=(0, 2)), grouped.var(dim=2, correction=0).mean(dim=0)
        width = norm.num_channels // norm.num_groups
        scale = norm.weight.float() / (variance + norm.eps).sqrt().repeat_interleave(width)
        found.append(torch.stack([scale, norm.bias.float() - mean.repeat_interleave(width) * scale]))
        return norm(image)

    decode_cuts(vae, samples, plan_cuts(full(FACE_SIZE), _resnets(vae), samples.shape[-1]), measured)
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class Difference:
    """How far region decoding is from full decoding, in levels of blended pixels."""

    mean: float
    tail: float
    largest: float

    @property
    def harmless(self) -> bool:
        """Whether a template that shows this may use region decoding."""
        return self.mean <= MEAN_LIMIT and self.tail <= TAIL_LIMIT


class RegionDecoder:
    """Decodes the region of one template's faces.

    Args:
        vae: loaded.
        rectangle: the part of the face that the template uses.
        samples: (n, 4, 32, 32) unscaled latents of its generated faces, decoded in full for statistics.
        compiled: makes a quicker `decode_cuts` for these cuts and norms (float32); None: torch does it.
    """

    def __init__(
        self,
        vae: Any,
        rectangle: Rectangle,
        samples: Tensor,
        compiled: Callable[[np.ndarray, Tensor], Callable[[Any], Any]] | None = None,
    ) -> None:
        self.rectangle = rectangle
        cuts = plan_cuts(rectangle, _resnets(vae), samples.shape[-1])
        affine = measure_norms(vae, samples)
        if compiled is not None:
            self._decode = compiled(cuts, affine)
        else:
            self._decode = decoder_of_cuts(vae, cuts, affine)

    def decode(self, latents: Any) -> Any:
        """(B, 4, 32, 32) unscaled latents → (B, 3, 256, 256) RGB around -1…1, black outside the region.

        Arrays where what was compiled takes arrays, tensors otherwise.
        """
        return placed(self._decode(latents), self.rectangle)


def placed(part: Any, rectangle: Rectangle) -> Any:
    """(B, 3, h, w), the face's `rectangle` → (B, 3, 256, 256), black around it; tensors or arrays."""
    if rectangle == full(FACE_SIZE):
        return part
    shape = len(part), 3, FACE_SIZE, FACE_SIZE
    images = np.full(shape, -1, part.dtype) if isinstance(part, np.ndarray) else part.new_full(shape, -1)
    top, bottom, left, right = rectangle
    images[:, :, top:bottom, left:right] = part
    return images


def verdict(rectangle: Rectangle, differs: Difference) -> dict[str, Any]:
    """What a template's metadata says of decoding a region: levels, and whether it may be used.

    A region nearly as large as the face isn't worth its inexactness.
    """
    share = rectangle.area / FACE_SIZE**2
    levels = {name: round(value, 3) for name, value in asdict(differs).items()}
    return {"harmless": differs.harmless and share < WORTHWHILE, "share": round(share, 3), **levels}


def difference(found: np.ndarray, exact: np.ndarray, weights: np.ndarray) -> Difference:
    """What blended pixels differ by.

    Args:
        found, exact: (n, 3, 256, 256) float32 around -1…1, decoded in part and in full.
        weights: (256, 256) share of the generated face in each pixel.
    """
    levels = np.abs(found.clip(-1, 1) - exact.clip(-1, 1)) * 127.5
    blended = levels[:, :, weights > 0] * weights[weights > 0]
    return Difference(
        float(blended.mean()), float(np.percentile(blended, TAIL_PERCENTILE)), float(blended.max())
    )
