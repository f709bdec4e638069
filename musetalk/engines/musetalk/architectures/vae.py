"""The autoencoder of Stable Diffusion 1, and TAESD's small decoder of the same latents."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from musetalk.engines.musetalk.architectures.blocks import (
    TRANSFORMER_EPSILON,
    Downsampler,
    ImageAttention,
    ResidualBlock,
    Upsampler,
    blocks,
)
from musetalk.engines.musetalk.architectures.shapes import AutoencoderShape, TinyDecoderShape

CLAMP = 3.0  # TAESD's decoder squeezes latents between ±3


def _residual(shape: AutoencoderShape, inputs: int, outputs: int) -> ResidualBlock:
    return ResidualBlock(inputs, outputs, shape.groups, TRANSFORMER_EPSILON)


class MidBlock(nn.Module):
    """Attention between two residual blocks."""

    def __init__(self, shape: AutoencoderShape, channels: int) -> None:
        super().__init__()
        self.attentions = blocks(ImageAttention(channels, shape.groups))
        self.resnets = blocks(*(_residual(shape, channels, channels) for _ in range(2)))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](image)))


class DownBlock(nn.Module):
    """Residual blocks and, but for the last block, a downsampler."""

    def __init__(self, shape: AutoencoderShape, inputs: int, outputs: int, *, last: bool) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * shape.layers_per_block]
        self.resnets = blocks(*(_residual(shape, a, b) for a, b in pairwise(widths)))
        self.downsamplers = blocks(None if last else Downsampler(outputs, all_sides=False))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H / 2, W / 2)."""
        for layer in (*self.resnets, *self.downsamplers):
            image = layer(image)
        return image


class UpBlock(nn.Module):
    """Residual blocks, one more than on the way down, and, but for the last block, an upsampler."""

    def __init__(self, shape: AutoencoderShape, inputs: int, outputs: int, *, last: bool) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * (shape.layers_per_block + 1)]
        self.resnets = blocks(*(_residual(shape, a, b) for a, b in pairwise(widths)))
        self.upsamplers = blocks(None if last else Upsampler(outputs))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', 2 H, 2 W)."""
        for layer in (*self.resnets, *self.upsamplers):
            image = layer(image)
        return image


class Encoder(nn.Module):
    """Images to the moments of the latents' distribution."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        widths = shape.block_out_channels
        self.conv_in = nn.Conv2d(shape.in_channels, widths[0], 3, padding=1)
        ways = enumerate(pairwise((widths[0], *widths)))
        self.down_blocks = nn.ModuleList(
            DownBlock(shape, a, b, last=i == len(widths) - 1) for i, (a, b) in ways
        )
        self.mid_block = MidBlock(shape, widths[-1])
        self.conv_norm_out = nn.GroupNorm(shape.groups, widths[-1], TRANSFORMER_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * shape.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) around -1…1 → (B, 2 × latent channels, H / 8, W / 8)."""
        image = self.conv_in(image)
        for block in self.down_blocks:
            image = block(image)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(image))))


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        widths = tuple(reversed(shape.block_out_channels))
        self.conv_in = nn.Conv2d(shape.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(shape, widths[0])
        ways = enumerate(pairwise((widths[0], *widths)))
        self.up_blocks = nn.ModuleList(UpBlock(shape, a, b, last=i == len(widths) - 1) for i, (a, b) in ways)
        self.conv_norm_out = nn.GroupNorm(shape.groups, widths[-1], TRANSFORMER_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], shape.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent channels, H, W) → (B, 3, 8 H, 8 W) around -1…1."""
        image = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            image = block(image)
        return self.conv_out(silu(self.conv_norm_out(image)))


class Autoencoder(nn.Module):
    """Faces to latents and back."""

    def __init__(self, shape: AutoencoderShape) -> None:
        super().__init__()
        self.shape = shape
        channels = shape.latent_channels
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def posterior_means(self, images: Tensor) -> Tensor:
        """(B, 3, 256, 256) around -1…1 → (B, 4, 32, 32) unscaled latents, the means of their posterior."""
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, 32, 32) unscaled latents → (B, 3, 256, 256) RGB around -1…1."""
        return self.decoder(self.post_quant_conv(latents))


class TinyBlock(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        activation = nn.ReLU()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], activation, convolutions[1], activation, convolutions[2])

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return torch.relu(self.conv(image) + image)


class _TinyLayers(nn.Module):
    def __init__(self, shape: TinyDecoderShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(shape.latent_channels, shape.widths[0], 3, padding=1), nn.ReLU()]
        last = len(shape.widths) - 1
        for i, (width, count) in enumerate(zip(shape.widths, shape.counts, strict=True)):
            layers += [TinyBlock(width) for _ in range(count)]
            if i < last:
                layers.append(nn.Upsample(scale_factor=2.0))
            layers.append(
                nn.Conv2d(width, width if i < last else shape.out_channels, 3, padding=1, bias=i == last)
            )
        self.layers = nn.Sequential(*layers)


class TinyDecoder(nn.Module):
    """TAESD's decoder (Bohan 2023, github.com/madebyollin/taesd): convolutions and nothing else.

    It takes the latents as the UNet makes them, scaled.
    """

    def __init__(self, shape: TinyDecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.decoder = _TinyLayers(shape)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1."""
        return self.decoder.layers(self.squeezed(latents)) * 2 - 1

    def squeezed(self, latents: Tensor) -> Tensor:
        """Latents as the first layer takes them."""
        return torch.tanh(latents / CLAMP) * CLAMP

    def levels(self) -> list[list[nn.Module]]:
        """The layers of each resolution, the doubling to the next one at the end of each but the last."""
        found: list[list[nn.Module]] = [[]]
        for layer in self.decoder.layers:
            found[-1].append(layer)
            if isinstance(layer, nn.Upsample):
                found.append([])
        return found
