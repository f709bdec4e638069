"""MuseTalk's UNet: Stable Diffusion 1's, with audio in the text's place, run at timestep 0 alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from musetalk.engines.musetalk.architectures.blocks import (
    Downsampler,
    ResidualBlock,
    SpatialTransformer,
    Upsampler,
    blocks,
)
from musetalk.engines.musetalk.architectures.shapes import UNetShape


class _Parts:
    """Makes the blocks of one UNet."""

    def __init__(self, shape: UNetShape) -> None:
        self.shape = shape
        self.time_width = 4 * shape.block_out_channels[0]

    def residual(self, inputs: int, outputs: int) -> ResidualBlock:
        return ResidualBlock(inputs, outputs, self.shape.groups, self.shape.epsilon, self.time_width)

    def attention(self, channels: int) -> SpatialTransformer:
        shape = self.shape
        return SpatialTransformer(channels, shape.cross_attention_dim, shape.heads, shape.groups)


class DownBlock(nn.Module):
    """Residual blocks, each with attention behind it where the block attends, and a downsampler."""

    def __init__(self, parts: _Parts, inputs: int, outputs: int, *, attends: bool, last: bool) -> None:
        super().__init__()
        count = parts.shape.layers_per_block
        widths = [inputs, *[outputs] * count]
        self.resnets = blocks(*(parts.residual(a, b) for a, b in pairwise(widths)))
        self.attentions = blocks(*(parts.attention(outputs) for _ in range(count if attends else 0)))
        self.downsamplers = blocks(None if last else Downsampler(outputs, all_sides=True))

    def forward(self, image: Tensor, prompts: Tensor) -> list[Tensor]:
        """(B, C, H, W) → what each layer gives, the downsampler's at the end."""
        given = []
        for number, resnet in enumerate(self.resnets):
            image = resnet(image)
            if len(self.attentions):
                image = self.attentions[number](image, prompts)
            given.append(image)
        return [*given, *(downsampler(image) for downsampler in self.downsamplers)]


class MidBlock(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, parts: _Parts, channels: int) -> None:
        super().__init__()
        self.attentions = blocks(parts.attention(channels))
        self.resnets = blocks(parts.residual(channels, channels), parts.residual(channels, channels))

    def forward(self, image: Tensor, prompts: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](image), prompts))


class UpBlock(nn.Module):
    """Residual blocks over what the way down left, each with attention where the block attends."""

    def __init__(
        self, parts: _Parts, inputs: int, outputs: int, left: list[int], *, attends: bool, last: bool
    ) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * (len(left) - 1)]
        self.resnets = blocks(
            *(parts.residual(width + beside, outputs) for width, beside in zip(widths, left, strict=True))
        )
        self.attentions = blocks(*(parts.attention(outputs) for _ in range(len(left) if attends else 0)))
        self.upsamplers = blocks(None if last else Upsampler(outputs))

    def forward(self, image: Tensor, left: list[Tensor], prompts: Tensor) -> Tensor:
        """(B, C, H, W), and the last of `left`, which are taken away → (B, C', 2 H, 2 W)."""
        for number, resnet in enumerate(self.resnets):
            image = resnet(torch.cat([image, left.pop()], dim=1))
            if len(self.attentions):
                image = self.attentions[number](image, prompts)
        for upsampler in self.upsamplers:
            image = upsampler(image)
        return image


def _way_down(parts: _Parts) -> nn.ModuleList:
    shape, widths = parts.shape, parts.shape.block_out_channels
    ways = zip(pairwise((widths[0], *widths)), shape.down_attends, strict=True)
    last = len(widths) - 1
    return nn.ModuleList(
        DownBlock(parts, inputs, outputs, attends=attends, last=number == last)
        for number, ((inputs, outputs), attends) in enumerate(ways)
    )


def _way_up(parts: _Parts) -> nn.ModuleList:
    shape, widths = parts.shape, parts.shape.block_out_channels
    last, layers = len(widths) - 1, shape.layers_per_block
    left = [widths[0]]  # channels of what the way down leaves, in order
    for number, width in enumerate(widths):
        left += [width] * (layers + (number < last))
    ways = zip(pairwise((widths[-1], *reversed(widths))), shape.up_attends, strict=True)
    made = nn.ModuleList()
    for number, ((inputs, outputs), attends) in enumerate(ways):
        beside = [left.pop() for _ in range(layers + 1)]
        made.append(UpBlock(parts, inputs, outputs, beside, attends=attends, last=number == last))
    return made


class _TimeEmbedding(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, code: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(code)))


class UNet(nn.Module):
    """One step from a face's latents to those of the speaking face, at timestep 0.

    The time embedding counts once `fold_time_embedding` has made it part of the weights.
    """

    time_embedding: _TimeEmbedding | None

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        self.shape = shape
        parts, widths = _Parts(shape), shape.block_out_channels
        self.conv_in = nn.Conv2d(shape.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _TimeEmbedding(widths[0], parts.time_width)
        self.down_blocks = _way_down(parts)
        self.mid_block = MidBlock(parts, widths[-1])
        self.up_blocks = _way_up(parts)
        self.conv_norm_out = nn.GroupNorm(shape.groups, widths[0], shape.epsilon)
        self.conv_out = nn.Conv2d(widths[0], shape.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, prompts: Tensor) -> Tensor:
        """(B, 8, 32, 32) latents and (B, n, 384) prompts → (B, 4, 32, 32) latents."""
        image = self.conv_in(latents)
        left = [image]
        for down in self.down_blocks:
            left += down(image, prompts)
            image = left[-1]
        image = self.mid_block(image, prompts)
        for up in self.up_blocks:
            image = up(image, left, prompts)
        return self.conv_out(silu(self.conv_norm_out(image)))


def fold_time_embedding(unet: UNet) -> None:
    """Makes timestep 0, the only one MuseTalk runs, a constant of the UNet.

    The code of timestep 0 is 1 for the cosines, which come first, and 0 for the sines. Everything that hangs
    on it ends in one vector added behind each residual block's first convolution; it moves into that
    convolution's bias and the layers that made it are dropped.
    """
    embed = unet.time_embedding
    if embed is None:
        return
    with torch.no_grad():
        code = torch.zeros(1, embed.linear_1.in_features).to(embed.linear_1.weight)
        code[:, : code.shape[1] // 2] = 1
        embedding = silu(embed(code))
        for block in unet.modules():
            if isinstance(block, ResidualBlock) and block.time_emb_proj is not None:
                shift = block.time_emb_proj(embedding)[0]
                block.conv1.bias = nn.Parameter(block.conv1.bias + shift, requires_grad=False)
                block.time_emb_proj = None
    unet.time_embedding = None
