"""The three MuseTalk networks, from the official folder layout to modules ready to run.

The decision a reader would question: a checkpoint's tensors are never copied into a freshly initialised
module. The module is built on the meta device, the file is memory-mapped, keys and shapes are compared, and
the mapped tensors become the parameters; a tensor costs memory only when it is cast or used.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from musetalk.checkpoints import UNREADABLE, check_keys, materialise, read_tensors
from musetalk.device import limit_torch_threads
from musetalk.engines.musetalk.architectures.shapes import (
    AutoencoderShape,
    TinyDecoderShape,
    UNetShape,
    WhisperShape,
)
from musetalk.errors import WeightsError
from musetalk.weights.files import DOWNLOAD_COMMAND, MuseTalkFiles

if TYPE_CHECKING:
    from torch import Tensor, nn

NetworkName = Literal["unet", "vae", "whisper", "taesd"]
VAE_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
WHISPER_PREFIXES = ("model.encoder.", "encoder.")


def read_json(path: Path) -> dict[str, Any]:
    """A network's configuration.

    Raises:
        WeightsError: the file is missing or is no JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise WeightsError(f"{path} is missing 缺少模型配置", f"run {DOWNLOAD_COMMAND}") from e
    except (OSError, ValueError) as e:
        raise WeightsError(
            f"{path} is no JSON 模型配置损坏: {e}", f"delete it and run {DOWNLOAD_COMMAND}"
        ) from e
    if not isinstance(settings, dict):
        raise WeightsError(
            f"{path} holds no JSON object 模型配置损坏", f"delete it and run {DOWNLOAD_COMMAND}"
        )
    return settings


Shape = TypeVar("Shape", covariant=True)


class Readable(Protocol[Shape]):
    """A kind of network's shape."""

    def read(self, settings: Mapping[str, Any]) -> Shape:
        """The shape that a configuration describes; raises ValueError when it is of another kind."""
        ...


def read_shape(kind: Readable[Shape], path: Path) -> Shape:
    """What a configuration says of its network; no framework is asked.

    Raises:
        WeightsError: the file is missing, damaged or of another kind of network.
    """
    settings = read_json(path)
    try:
        return kind.read(settings)
    except (ValueError, TypeError) as e:
        raise _unbuildable(path, e) from e


def _unbuildable(settings: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{settings} describes no network that can be built 模型配置无效: {error}",
        f"delete it and run {DOWNLOAD_COMMAND}",
    )


def _on_meta(build: Callable[[], nn.Module], settings: Path) -> nn.Module:
    import torch

    try:
        with torch.device("meta"):
            return build()
    except (*UNREADABLE, ArithmeticError, NotImplementedError) as e:
        raise _unbuildable(settings, e) from e


class Network:
    """A module on the meta device and the checkpoint that fits it; `load` makes it run.

    Args:
        module: on the meta device.
        read: opens the checkpoint: tensors by the module's own keys, mapped, checked. Called at once, and
            again when the network is loaded after a `release`.
        prepare: what is done to the module once its weights are there.
    """

    def __init__(
        self,
        module: Any,
        read: Callable[[], Mapping[str, Tensor]],
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        self.module = module
        self._read = read
        self._tensors: Mapping[str, Tensor] | None = read()
        self._prepare = prepare
        self._loaded: Any = None
        self._lock = threading.Lock()

    def load(self, device: str, dtype: str) -> Any:
        """The module with its weights on `device` in `dtype`, for inference; the same one until `release`."""
        import torch

        if device == "cpu":
            limit_torch_threads()
        with self._lock:
            if self._loaded is None:
                loaded, tensors = copy.deepcopy(self.module), self._tensors or self._read()
                materialise(loaded, tensors, torch.device(device), getattr(torch, dtype))
                if self._prepare is not None:
                    self._prepare(loaded)
                self._loaded, self._tensors = loaded, None
            return self._loaded

    def release(self) -> None:
        """Gives the weights' memory back."""
        with self._lock:
            self._loaded = self._tensors = None


def _checked(
    module: nn.Module, read: Callable[[], Mapping[str, Tensor]], weights: Path, settings: Path
) -> Callable[[], Mapping[str, Tensor]]:
    """`read`, its tensors compared with the module each time."""

    def checked() -> Mapping[str, Tensor]:
        tensors = read()
        check_keys(module, tensors, weights, settings)
        return tensors

    return checked


def open_unet(files: MuseTalkFiles) -> Network:
    """The UNet, its checkpoint checked and not yet read.

    Raises:
        WeightsError: files missing, damaged, hostile or not of each other.
    """
    from musetalk.engines.musetalk.architectures.unet import UNet, fold_time_embedding

    shape = read_shape(UNetShape, files.unet_config)
    module = _on_meta(lambda: UNet(shape), files.unet_config)
    read = _checked(module, lambda: read_tensors(files.unet_weights), files.unet_weights, files.unet_config)
    return Network(module, read, fold_time_embedding)


def _current_vae_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of VAE checkpoints saved before diffusers renamed its attention, the official one among them."""
    renamed = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        block, _, projection = owner.rpartition(".")
        if block.rpartition(".")[0].endswith("mid_block.attentions") and projection in VAE_ATTENTION_NAMES:
            key = f"{block}.{VAE_ATTENTION_NAMES[projection]}.{name}"
        renamed[key] = tensor
    return renamed


def open_vae(files: MuseTalkFiles) -> Network:
    """The autoencoder, its checkpoint checked and not yet read.

    Raises:
        WeightsError: files missing, damaged, hostile or not of each other.
    """
    from musetalk.engines.musetalk.architectures.vae import Autoencoder

    shape = read_shape(AutoencoderShape, files.vae_config)
    module = _on_meta(lambda: Autoencoder(shape), files.vae_config)

    def current() -> Mapping[str, Tensor]:
        return _current_vae_keys(read_tensors(files.vae_weights))

    return Network(module, _checked(module, current, files.vae_weights, files.vae_config))


def open_tiny_decoder(files: MuseTalkFiles) -> Network:
    """TAESD's decoder, its checkpoint checked and not yet read; the encoder is left in the file.

    Raises:
        WeightsError: files missing, damaged, hostile or not of each other.
    """
    from musetalk.engines.musetalk.architectures.vae import TinyDecoder

    shape = read_shape(TinyDecoderShape, files.taesd_config)
    module = _on_meta(lambda: TinyDecoder(shape), files.taesd_config)

    def decoder() -> Mapping[str, Tensor]:
        tensors = read_tensors(files.taesd_weights)
        return {key: tensor for key, tensor in tensors.items() if not key.startswith("encoder.")}

    return Network(module, _checked(module, decoder, files.taesd_weights, files.taesd_config))


def _encoder_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in WHISPER_PREFIXES if any(key.startswith(p) for key in tensors)), "encoder.")
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def open_whisper_encoder(files: MuseTalkFiles) -> Network:
    """Whisper's encoder, its checkpoint checked and not yet read; the decoder is left in the file.

    Raises:
        WeightsError: files missing, damaged, hostile or not of each other.
    """
    from musetalk.engines.musetalk.architectures.whisper import WhisperEncoder

    shape = read_shape(WhisperShape, files.whisper_config)
    module = _on_meta(lambda: WhisperEncoder(shape), files.whisper_config)

    def encoder() -> Mapping[str, Tensor]:
        return _encoder_only(read_tensors(files.whisper_weights))

    return Network(module, _checked(module, encoder, files.whisper_weights, files.whisper_config))


def fold_upsampling(network: Any) -> Any:
    """Makes one convolution of each doubling of the pixels and the 3×3 convolution behind it.

    Of the nine pixels that the convolution sees after the doubling only four are different, so its weights
    add up to four 2×2 kernels, one for each pixel of a doubled one: 4/9 of the work, the same values. A
    transposed convolution of stride 2 is just that. Returns `network`.
    """
    from musetalk.engines.musetalk.architectures.blocks import Upsampler

    for block in network.modules():
        for index, upsampler in enumerate(getattr(block, "upsamplers", ())):
            if isinstance(upsampler, Upsampler):
                block.upsamplers[index] = _doubling(upsampler.conv)
    return network


def _doubling(convolution: Any) -> nn.Module:
    """What a 3×3 convolution of a picture with every pixel doubled is to the picture itself."""
    import torch

    class Doubling(torch.nn.ConvTranspose2d):
        def forward(self, image: Tensor, output_size: object = None) -> Tensor:  # type: ignore[override]
            return super().forward(image)

    weight = convolution.weight
    with torch.device("meta"):
        doubling = Doubling(weight.shape[1], weight.shape[0], 4, stride=2, padding=1)
    # rows: which of the three taps fall on one pixel; it reaches four of the larger picture along each axis
    taps = torch.tensor([[0, 0, 1.0], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    folded = torch.einsum("oirc,yr,xc->ioyx", weight.float(), taps, taps).to(weight.dtype)
    doubling.weight = torch.nn.Parameter(folded, requires_grad=False)
    doubling.bias = convolution.bias
    return doubling.eval()
