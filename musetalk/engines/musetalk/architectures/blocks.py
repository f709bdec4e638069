"""Blocks that the UNet and the autoencoder are made of (Rombach et al. 2022, latent diffusion)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, pad, scaled_dot_product_attention, silu

TRANSFORMER_EPSILON = 1e-6  # of the group norms in front of attention


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut.

    Args:
        inputs, outputs: channels.
        groups: of the group norms.
        epsilon: of the group norms.
        time_width: of the time embedding; None where there is none.
    """

    time_emb_proj: nn.Linear | None
    conv_shortcut: nn.Conv2d | None

    def __init__(
        self, inputs: int, outputs: int, groups: int, epsilon: float, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, epsilon)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, epsilon)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W); the time embedding is in the first convolution's bias."""
        inner = self.conv1(silu(self.norm1(image)))
        inner = self.conv2(silu(self.norm2(inner)))
        shortcut = image if self.conv_shortcut is None else self.conv_shortcut(image)
        return shortcut + inner


class Downsampler(nn.Module):
    """A convolution of stride 2, padded on all sides, or below and on the right only."""

    def __init__(self, channels: int, *, all_sides: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if all_sides else 0)
        self._all_sides = all_sides

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H / 2, W / 2)."""
        return self.conv(image if self._all_sides else pad(image, (0, 1, 0, 1)))


class Upsampler(nn.Module):
    """Every pixel doubled, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2 H, 2 W)."""
        return self.conv(interpolate(image, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Attention of several heads (Vaswani et al. 2017), from (B, n, width) to (B, m, context)."""

    def __init__(self, width: int, context: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias)
        self.to_k = nn.Linear(context, width, bias)
        self.to_v = nn.Linear(context, width, bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self._heads = heads

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """(B, n, width)."""
        query, key, value = (
            projected.unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projected in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        seen = scaled_dot_product_attention(query, key, value)
        return self.to_out[0](seen.transpose(1, 2).flatten(2))


class ImageAttention(Attention):
    """Attention of one head among an image's pixels, beside a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, TRANSFORMER_EPSILON)

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) → (B, C, H, W)."""
        pixels = self.group_norm(image).flatten(2).transpose(1, 2)
        return image + super().forward(pixels, pixels).transpose(1, 2).unflatten(2, image.shape[2:])


class _GatedProjection(nn.Module):
    """Half of a linear layer's outputs, weighed by the GELU of the other half (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, tokens: Tensor) -> Tensor:
        values, gates = self.proj(tokens).chunk(2, dim=-1)
        return values * gelu(gates)


class _FeedForward(nn.Module):
    """Two linear layers; the second is number 2 in the checkpoints, behind a dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [_GatedProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net[2](self.net[0](tokens))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context, heads, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        own = self.norm1(tokens)
        tokens = self.attn1(own, own) + tokens
        tokens = self.attn2(self.norm2(tokens), context) + tokens
        return self.ff(self.norm3(tokens)) + tokens


class SpatialTransformer(nn.Module):
    """An image's pixels attend to each other and to the prompts, beside a shortcut."""

    def __init__(self, channels: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, TRANSFORMER_EPSILON)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(channels, context, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, image: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) and prompts (B, n, context) → (B, C, H, W)."""
        tokens = self.proj_in(self.norm(image)).flatten(2).transpose(1, 2)
        tokens = self.transformer_blocks[0](tokens, context)
        return image + self.proj_out(tokens.transpose(1, 2).unflatten(2, image.shape[2:]))


def blocks(*modules: Any) -> nn.ModuleList:
    """`modules` in a list, those that are None left out."""
    return nn.ModuleList([module for module in modules if module is not None])
