"""What the networks' configurations say of them: read, checked, and known before any framework is."""

from __future__ import annotations

from dataclasses import dataclass

from musetalk.engines.musetalk.architectures.settings import (
    Settings,
    kinds,
    positive,
    require,
    whole,
    wholes,
)

DOWN_KINDS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_KINDS = ("CrossAttnUpBlock2D", "UpBlock2D")
SCALING_FACTOR = 0.18215  # of Stable Diffusion 1's latents, where a configuration doesn't name it
POSITIONS = 1500  # encoder steps of 30 s


@dataclass(frozen=True)
class UNetShape:
    """What `musetalk.json` says, by the names it uses."""

    in_channels: int
    out_channels: int
    down_attends: tuple[bool, ...]
    up_attends: tuple[bool, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    heads: int
    groups: int
    epsilon: float

    @classmethod
    def read(cls, settings: Settings) -> UNetShape:
        """The shape that a configuration describes.

        Raises:
            ValueError: it describes a UNet of another kind.
        """
        require(
            settings,
            **{"act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "freq_shift": 0},
            **{"flip_sin_to_cos": True, "mid_block_scale_factor": 1, "use_linear_projection": False},
            **{"only_cross_attention": False, "dual_cross_attention": False, "num_attention_heads": None},
            **{"class_embed_type": None, "addition_embed_type": None, "time_embedding_type": "positional"},
            **{"mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_time_scale_shift": "default"},
            **{"conv_in_kernel": 3, "conv_out_kernel": 3, "transformer_layers_per_block": 1},
        )
        widths = wholes(settings, "block_out_channels")
        down = kinds(settings, "down_block_types", DOWN_KINDS, len(widths))
        up = kinds(settings, "up_block_types", UP_KINDS, len(widths))
        return cls(
            in_channels=whole(settings, "in_channels", 4),
            out_channels=whole(settings, "out_channels", 4),
            down_attends=tuple(kind.startswith("CrossAttn") for kind in down),
            up_attends=tuple(kind.startswith("CrossAttn") for kind in up),
            block_out_channels=widths,
            layers_per_block=whole(settings, "layers_per_block", 2),
            cross_attention_dim=whole(settings, "cross_attention_dim", 1280),
            heads=whole(settings, "attention_head_dim", 8),
            groups=whole(settings, "norm_num_groups", 32),
            epsilon=positive(settings, "norm_eps", 1e-5),
        )


@dataclass(frozen=True)
class AutoencoderShape:
    """What the VAE's `config.json` says, by the names it uses."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    scaling_factor: float

    @classmethod
    def read(cls, settings: Settings) -> AutoencoderShape:
        """The shape that a configuration describes.

        Raises:
            ValueError: it describes an autoencoder of another kind.
        """
        require(
            settings,
            **{"act_fn": "silu", "mid_block_add_attention": True, "shift_factor": 0.0},
            **{"use_quant_conv": True, "use_post_quant_conv": True},
        )
        widths = wholes(settings, "block_out_channels")
        kinds(settings, "down_block_types", ("DownEncoderBlock2D",), len(widths))
        kinds(settings, "up_block_types", ("UpDecoderBlock2D",), len(widths))
        return cls(
            in_channels=whole(settings, "in_channels", 3),
            out_channels=whole(settings, "out_channels", 3),
            latent_channels=whole(settings, "latent_channels", 4),
            block_out_channels=widths,
            layers_per_block=whole(settings, "layers_per_block", 1),
            groups=whole(settings, "norm_num_groups", 32),
            scaling_factor=positive(settings, "scaling_factor", SCALING_FACTOR),
        )


@dataclass(frozen=True)
class TinyDecoderShape:
    """What TAESD's `config.json` says of its decoder."""

    out_channels: int
    latent_channels: int
    widths: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def read(cls, settings: Settings) -> TinyDecoderShape:
        """The shape that a configuration describes.

        Raises:
            ValueError: it describes an autoencoder of another kind.
        """
        require(
            settings,
            **{"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2},
            **{"scaling_factor": 1.0, "shift_factor": 0.0},
        )
        widths, counts = (
            wholes(settings, "decoder_block_out_channels"),
            wholes(settings, "num_decoder_blocks"),
        )
        if len(widths) != len(counts):
            raise ValueError(f"num_decoder_blocks is {counts}, decoder_block_out_channels {widths}")
        out_channels = whole(settings, "out_channels", 3)
        return cls(out_channels, whole(settings, "latent_channels", 4), widths, counts)


@dataclass(frozen=True)
class WhisperShape:
    """What Whisper's `config.json` says of the encoder, by the names it uses."""

    d_model: int
    num_mel_bins: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    max_source_positions: int

    @classmethod
    def read(cls, settings: Settings) -> WhisperShape:
        """The shape that a configuration describes.

        Raises:
            ValueError: it describes something else.
        """
        require(settings, model_type="whisper", activation_function="gelu", scale_embedding=False)
        return cls(
            whole(settings, "d_model"),
            whole(settings, "num_mel_bins", 80),
            whole(settings, "encoder_layers"),
            whole(settings, "encoder_attention_heads"),
            whole(settings, "encoder_ffn_dim"),
            whole(settings, "max_source_positions", POSITIONS),
        )
