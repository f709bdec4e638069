"""Whisper's encoder (Radford et al. 2022), every layer of which is read."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from musetalk.engines.musetalk.architectures.shapes import WhisperShape


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self._heads = heads

    def forward(self, steps: Tensor) -> Tensor:
        query, key, value = (
            project(steps).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and two linear layers, each beside a shortcut."""

    def __init__(self, shape: WhisperShape) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(shape.d_model, shape.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(shape.d_model)
        self.fc1 = nn.Linear(shape.d_model, shape.encoder_ffn_dim)
        self.fc2 = nn.Linear(shape.encoder_ffn_dim, shape.d_model)
        self.final_layer_norm = nn.LayerNorm(shape.d_model)

    def forward(self, steps: Tensor) -> Tensor:
        """(B, n, width) → (B, n, width)."""
        steps = steps + self.self_attn(self.self_attn_layer_norm(steps))
        return steps + self.fc2(gelu(self.fc1(self.final_layer_norm(steps))))


class WhisperEncoder(nn.Module):
    """Log-mel spectrograms to hidden states."""

    def __init__(self, shape: WhisperShape) -> None:
        super().__init__()
        self.shape = shape
        self.conv1 = nn.Conv1d(shape.num_mel_bins, shape.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(shape.d_model, shape.d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(shape.max_source_positions, shape.d_model)
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_layers))
        self.layer_norm = nn.LayerNorm(shape.d_model)

    def forward(self, mel: Tensor) -> list[Tensor]:
        """(B, 80, 3000) → layers + 1 hidden states (B, 1500, width), the first layer's input in front.

        The last one is behind the closing layer norm.
        """
        steps = gelu(self.conv2(gelu(self.conv1(mel)))).transpose(1, 2) + self.embed_positions.weight
        states = [steps]
        for layer in self.layers:
            states.append(layer(states[-1]))
        states[-1] = self.layer_norm(states[-1])
        return states
