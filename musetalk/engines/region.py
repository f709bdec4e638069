"""Decoding only the part of the face that the blend mask uses.

The VAE decoder's convolutions see a few pixels around each pixel, so a region with that margin decodes to
the same values, but for one thing: its group norms take their statistics over the whole image. The decision
a reader would question: in the cropped blocks those statistics are constants of the template, measured on
full decodes of it. They move a little with the mouth, so the result differs a little, and each template
judges whether little is little enough; see `RegionDecoder.difference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from musetalk.config import FACE_SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from musetalk.template import Template

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


def _cropped(image: Tensor, held: Rectangle, wanted: Rectangle) -> Tensor:
    rows = slice(wanted.top - held.top, wanted.bottom - held.top)
    return image[:, :, rows, wanted.left - held.left : wanted.right - held.left]


def _residual(block: Any, image: Tensor, normalise: Normalise) -> Tensor:
    from torch.nn.functional import silu

    inner = block.conv1(silu(normalise(block.norm1, image)))
    inner = block.conv2(silu(normalise(block.norm2, inner)))
    shortcut = image if block.conv_shortcut is None else block.conv_shortcut(image)
    return (shortcut + inner) / block.output_scale_factor


def decode_rectangle(vae: Any, latents: Tensor, rectangle: Rectangle, normalise: Normalise) -> Tensor:
    """(B, 4, 32, 32) unscaled latents → (B, 3, h, w) of the `rectangle` of the 256² image.

    `normalise` stands in for the group norms behind the first up block, which see a part of the image.
    """
    from torch.nn.functional import silu

    decoder = vae.decoder
    blocks = decoder.up_blocks
    crops = plan_crops(rectangle, [len(block.resnets) for block in blocks], latents.shape[-1])
    image = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    image = decoder.mid_block(decoder.conv_in(image))
    held = full(latents.shape[-1])
    for level, (block, needed) in enumerate(zip(blocks, crops, strict=True)):
        for done, resnet in enumerate(block.resnets):
            if level == 0:
                image = resnet(image, None)
                continue
            taken = needed.grown(2 * (len(block.resnets) - done), latents.shape[-1] << level)
            image, held = _residual(resnet, _cropped(image, held, taken), normalise), taken
        image, held = _cropped(image, held, needed), needed
        for upsampler in block.upsamplers or ():
            image, held = upsampler(image), held.doubled()
    image = decoder.conv_out(silu(normalise(decoder.conv_norm_out, image)))
    return _cropped(image, held, rectangle)


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
    """

    def __init__(self, vae: Any, rectangle: Rectangle, samples: Tensor) -> None:
        self.vae = vae
        self.rectangle = rectangle
        self._moments: dict[Any, tuple[Tensor, Tensor]] = {}
        decode_rectangle(vae, samples, full(FACE_SIZE), self._measured)
        self._affine = {norm: self._constants(norm) for norm in self._moments}

    @property
    def worthwhile(self) -> bool:
        """Whether the region is small enough to be worth its inexactness."""
        return self.rectangle.area < WORTHWHILE * FACE_SIZE**2

    def _measured(self, norm: Any, image: Tensor) -> Tensor:
        grouped = image.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        self._moments[norm] = (grouped.mean(dim=(0, 2)), grouped.var(dim=2, correction=0).mean(dim=0))
        return norm(image)

    def _constants(self, norm: Any) -> tuple[Tensor, Tensor]:
        """The norm with fixed statistics: x · scale + shift, per channel."""
        mean, variance = (
            moment.repeat_interleave(norm.num_channels // norm.num_groups) for moment in self._moments[norm]
        )
        scale = norm.weight.float() / (variance + norm.eps).sqrt()
        shift = norm.bias.float() - mean * scale
        return scale.to(norm.weight.dtype)[:, None, None], shift.to(norm.weight.dtype)[:, None, None]

    def _fixed(self, norm: Any, image: Tensor) -> Tensor:
        scale, shift = self._affine[norm]
        return image * scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, 32, 32) unscaled latents → (B, 3, 256, 256) RGB around -1…1, black outside the region."""
        part = decode_rectangle(self.vae, latents, self.rectangle, self._fixed)
        images = part.new_full((len(part), 3, FACE_SIZE, FACE_SIZE), -1)
        top, bottom, left, right = self.rectangle
        images[:, :, top:bottom, left:right] = part
        return images

    def difference(self, latents: Tensor, weights: np.ndarray) -> Difference:
        """What blended pixels differ by from a full decode.

        Args:
            latents: (n, 4, 32, 32) unscaled, others than the samples.
            weights: (256, 256) share of the generated face in each pixel.
        """
        exact = self.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)
        levels = (self.decode(latents).float().clamp(-1, 1) - exact).abs() * 127.5
        blended = levels.cpu().numpy()[:, :, weights > 0] * weights[weights > 0]
        return Difference(
            float(blended.mean()), float(np.percentile(blended, TAIL_PERCENTILE)), float(blended.max())
        )
