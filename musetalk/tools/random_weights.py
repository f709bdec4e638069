"""Random MuseTalk weights in the official folder layout: for tests, timing and trying an installation.

The decision a reader would question: nothing here can make a usable video. The networks are untrained; they
have the official shapes (`full`) or very small ones (`tiny`), so that everything around training can be
run, measured and tested where the 3.8 GB of official weights are not at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musetalk.config import Version
from musetalk.weights.files import UNET_FILES

VAE_SEED, UNET_SEED, WHISPER_SEED, TAESD_SEED = 11, 12, 21, 31  # added to --seed


@dataclass(frozen=True)
class NetworkSizes:
    """Configurations of the networks, as their JSON files hold them."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    whisper: dict[str, Any]
    taesd: dict[str, Any]


def _unet(widths: list[int], layers: int, groups: int) -> dict[str, Any]:
    attended = len(widths) - 1
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * attended + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attended,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": 384,
        "attention_head_dim": 8,
        "norm_num_groups": groups,
    }


def _vae(widths: list[int], layers: int, groups: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "sample_size": 256,
        "scaling_factor": 0.18215,
    }


def _taesd(width: int, counts: list[int]) -> dict[str, Any]:
    widths = [width] * len(counts)
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "act_fn": "relu",
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "num_encoder_blocks": counts[::-1],
        "num_decoder_blocks": counts,
        "upsampling_scaling_factor": 2,
        "scaling_factor": 1.0,
    }


def _whisper(layers: int, ffn: int, decoder: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "d_model": 384,
        "encoder_layers": layers,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": ffn,
        "num_mel_bins": 80,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
        **decoder,
    }


_TINY_DECODER = {
    "decoder_layers": 1,
    "decoder_attention_heads": 1,
    "decoder_ffn_dim": 8,
    "max_target_positions": 4,
    "vocab_size": 32,
}
_FULL_DECODER = {
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "max_target_positions": 448,
    "vocab_size": 51_865,
}
SIZES = {
    "full": NetworkSizes(
        unet=_unet([320, 640, 1280, 1280], 2, 32),
        vae=_vae([128, 256, 512, 512], 2, 32),
        whisper=_whisper(4, 1536, _FULL_DECODER),
        taesd=_taesd(64, [3, 3, 3, 1]),
    ),
    "tiny": NetworkSizes(
        unet=_unet([32, 64, 64], 1, 8),
        vae=_vae([32, 32, 32, 32], 1, 8),
        whisper=_whisper(1, 64, _TINY_DECODER),
        taesd=_taesd(16, [1, 1, 1, 1]),
    ),
}


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def write_unet(folder: Path, settings: dict[str, Any], version: Version, seed: int) -> None:
    """The UNet's two files of one MuseTalk version."""
    import torch
    from diffusers import UNet2DConditionModel

    config_path, weights_path = (folder / Path(name).relative_to("models") for name in UNET_FILES[version])
    torch.manual_seed(seed)
    _write_json(config_path, settings)
    torch.save(UNet2DConditionModel.from_config(settings).state_dict(), weights_path)


def write_vae(folder: Path, settings: dict[str, Any], seed: int) -> None:
    """The VAE's two files."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    _write_json(folder / "sd-vae" / "config.json", settings)
    tensors = AutoencoderKL.from_config(settings).state_dict()
    save_file(tensors, folder / "sd-vae" / "diffusion_pytorch_model.safetensors")


def write_whisper(folder: Path, settings: dict[str, Any], seed: int) -> None:
    """Whisper's two files, with a decoder that the engine leaves alone."""
    import torch
    from safetensors.torch import save_file
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(seed)
    _write_json(folder / "whisper" / "config.json", settings)
    tensors = WhisperModel(WhisperConfig(**settings)).state_dict()
    save_file(tensors, folder / "whisper" / "model.safetensors")


def write_taesd(folder: Path, settings: dict[str, Any], seed: int) -> None:
    """The tiny autoencoder's two files, with an encoder that the engine leaves alone."""
    import torch
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    _write_json(folder / "taesd" / "config.json", settings)
    tensors = AutoencoderTiny.from_config(settings).state_dict()
    save_file(tensors, folder / "taesd" / "diffusion_pytorch_model.safetensors")


def write_random_weights(folder: Path, size: str = "tiny", seed: int = 0, version: Version = "v15") -> None:
    """Fills `folder` (a models/ folder) with random networks.

    Args:
        folder: made when missing; files of the same names are replaced.
        size: "full", 3.8 GB, or "tiny", 20 MB.
        seed: the same seed makes the same weights.
        version: whose UNet file names are used.
    """
    sizes = SIZES[size]
    write_vae(folder, sizes.vae, seed + VAE_SEED)
    write_unet(folder, sizes.unet, version, seed + UNET_SEED)
    write_whisper(folder, sizes.whisper, seed + WHISPER_SEED)
    write_taesd(folder, sizes.taesd, seed + TAESD_SEED)


def main(arguments: list[str] | None = None) -> int:
    """The command line: writes the weights, says where."""
    parser = argparse.ArgumentParser(prog="python -m musetalk.tools.random_weights", description=__doc__)
    parser.add_argument("folder", type=Path, help="the models folder to fill")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--version", choices=sorted(UNET_FILES), default="v15")
    options = parser.parse_args(arguments)
    write_random_weights(options.folder, options.size, options.seed, options.version)
    sys.stdout.write(
        json.dumps({"success": True, "folder": str(options.folder), "size": options.size}) + "\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
