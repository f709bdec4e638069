"""A MuseTalk engine whose networks are random numbers, made on the device and nowhere else.

The decision a reader would question: the weights are scaled so that activations neither die nor overflow,
instead of being zeros. A card that multiplies zeros draws less power and clocks higher than one at work.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musetalk.config import EngineConfig, ModelPaths
from musetalk.engines.musetalk.architectures.shapes import (
    AutoencoderShape,
    TinyDecoderShape,
    UNetShape,
    WhisperShape,
)
from musetalk.engines.musetalk.engine import MuseTalkEngine
from musetalk.engines.musetalk.networks import Network, NetworkName
from musetalk.tools.random_weights import SIZES, NetworkSizes
from musetalk.weights.files import find_files

if TYPE_CHECKING:
    from torch import Tensor, nn

SEED = 5


class RandomEngine(MuseTalkEngine):
    """An engine of official (or very small) shapes without weight files.

    Args:
        folder: takes the networks' configurations, a few kilobytes.
        size: "full" or "tiny", of `musetalk.tools.random_weights`.
        config: precision, batch size, decoder; runs in torch whatever it says.
        device: resolved.
    """

    def __init__(self, folder: Path, size: str, config: EngineConfig, device: str) -> None:
        self._sizes = SIZES[size]
        models = _write_configurations(folder, self._sizes)
        config = dataclasses.replace(config, engine="musetalk", runtime="torch", models=models)
        super().__init__(find_files(models), config, device)

    def open_network(self, name: NetworkName) -> Network:
        """A network of random numbers."""
        import torch

        with torch.device("meta"):
            module, prepare = _built(name, self._sizes)
        return Network(module, lambda: _random_tensors(module, self.device, self.dtype), prepare)


def _write_configurations(folder: Path, sizes: NetworkSizes) -> ModelPaths:
    """The layout of a models folder whose weight files are empty."""
    for name, settings in dataclasses.asdict(sizes).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "unet" / "unet.pth").touch()
    for name in ("vae", "taesd"):
        (folder / name / "diffusion_pytorch_model.safetensors").touch()
    (folder / "whisper" / "model.safetensors").touch()
    return ModelPaths(
        unet_config=folder / "unet" / "config.json",
        unet_model_path=folder / "unet" / "unet.pth",
        vae_type=str(folder / "vae"),
        whisper_dir=folder / "whisper",
        taesd_dir=folder / "taesd",
    )


def _built(name: NetworkName, sizes: NetworkSizes) -> tuple[nn.Module, Callable[[Any], None] | None]:
    from musetalk.engines.musetalk.architectures.unet import UNet, fold_time_embedding
    from musetalk.engines.musetalk.architectures.vae import Autoencoder, TinyDecoder
    from musetalk.engines.musetalk.architectures.whisper import WhisperEncoder

    if name == "unet":
        return UNet(UNetShape.read(sizes.unet)), fold_time_embedding
    if name == "vae":
        return Autoencoder(AutoencoderShape.read(sizes.vae)), None
    if name == "taesd":
        return TinyDecoder(TinyDecoderShape.read(sizes.taesd)), None
    return WhisperEncoder(WhisperShape.read(sizes.whisper)), None


def _random_tensors(module: nn.Module, device: str, dtype: str) -> dict[str, Tensor]:
    """Matrices that keep the size of what goes through them, norms of one, biases of zero."""
    import torch

    generator = torch.Generator(device).manual_seed(SEED)
    made = {}
    for name, meta in module.state_dict().items():
        tensor = torch.empty(meta.shape, device=device, dtype=getattr(torch, dtype))
        if meta.dim() > 1:
            tensor.normal_(0, 1 / math.sqrt(math.prod(meta.shape[1:])), generator=generator)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        made[name] = tensor
    return made
