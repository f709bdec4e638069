"""The networks in torch, on any device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from musetalk.config import FACE_SIZE, VaeDecoder
from musetalk.engines.musetalk.networks import Network, NetworkName
from musetalk.engines.musetalk.region import Rectangle, RegionDecoder, full, optimised_region
from musetalk.engines.musetalk.runtime import LATENT_SIDE
from musetalk.engines.musetalk.tiny import TinyFaceDecoder, decode_tiny_cuts

if TYPE_CHECKING:
    from torch import Tensor


class TorchRuntime:
    """A `Runtime` in torch; latents are tensors on the device, in the running precision.

    Args:
        network: the engine's networks by name, opened.
        device: resolved, e.g. "cpu", "cuda:0".
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        WeightsError: a checkpoint is damaged, hostile or of another network.
    """

    def __init__(self, network: Callable[[NetworkName], Network], device: str, dtype: str) -> None:
        import torch

        self.device = device
        self.dtype = dtype
        self._type = getattr(torch, dtype)
        self._network = network
        self._scale = network("vae").module.shape.scaling_factor
        self._optimised: set[Any] = set()  # modules that torch compiles; once each, for all templates
        network("unet")

    def inference(self) -> contextlib.AbstractContextManager[object]:
        """Computes without what training would need."""
        import torch

        return torch.inference_mode()

    def kept(self, latents: np.ndarray) -> Tensor:
        """(n, C, 32, 32) float32, put onto the device."""
        return self._sent(latents).to(self._type)

    def joined(self, latents: Sequence[Tensor]) -> Tensor:
        """One batch of several."""
        import torch

        return torch.cat(list(latents))

    def predict(self, latents: Tensor, prompts: np.ndarray) -> Tensor:
        """The UNet's one step: (B, 8, 32, 32) latents and (B, n, 384) prompts → (B, 4, 32, 32)."""
        return self._load("unet")(latents, self._sent(prompts).to(latents.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1."""
        return self._load("vae").decode(latents / self._scale)

    def images(self, decoded: Tensor) -> np.ndarray:
        """(B, 3, 256, 256) float32 RGB around -1…1."""
        return decoded.float().cpu().numpy()

    def levels(self, decoded: Tensor) -> np.ndarray:
        """(B, 256, 256, 3) uint8 BGR of faces around -1…1."""
        import torch

        levels = (decoded.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return levels.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def encode_audio(self, mel: np.ndarray) -> np.ndarray:
        """(80, 3000) float32 → (layers + 1, 1500, 384) float32.

        Always computed in float32: it is a thousandth of the work, and the lips hang on it.
        """
        import torch

        encoder = self._network("whisper").load(self.device, "float32")
        with torch.inference_mode():
            return torch.cat(encoder(torch.from_numpy(mel)[None].to(self.device))).cpu().numpy()

    def decoder(
        self,
        decoder: VaeDecoder,
        rectangle: Rectangle | None,
        at_rest: Callable[[], Tensor],
        *,
        optimise: bool,
    ) -> Callable[[Tensor], Tensor]:
        """What decodes scaled latents, with everything it and the UNet need loaded; see `Runtime`."""
        self._optimise(self._load("unet"), optimise)
        if decoder == "tiny":
            counts = self._network("taesd").module.shape.counts
            decode_cuts = functools.partial(self._tiny, optimise=optimise)
            return TinyFaceDecoder(rectangle or full(FACE_SIZE), decode_cuts, counts, LATENT_SIDE).decode
        vae = self._load("vae")
        if rectangle is None:
            self._optimise(vae.decoder, optimise)
            return self.decode
        quicker = functools.partial(optimised_region, vae) if optimise else None
        region = RegionDecoder(vae, rectangle, at_rest() / self._scale, quicker)
        return lambda latents: region.decode(latents / self._scale)

    def _load(self, name: NetworkName) -> Any:
        return self._network(name).load(self.device, self.dtype)

    def _optimise(self, module: Any, optimise: bool) -> None:
        """Has torch compile a module, once for all templates."""
        if optimise and module not in self._optimised:
            module.compile()
            self._optimised.add(module)

    def _tiny(self, cuts: np.ndarray, *, optimise: bool) -> Callable[[Tensor], Tensor]:
        import torch

        decode = functools.partial(decode_tiny_cuts, self._load("taesd"), cuts=cuts.tolist())
        return torch.compile(decode) if optimise else decode

    def _sent(self, array: np.ndarray) -> Tensor:
        """The array on the device, on its way while the next steps are prepared."""
        import torch

        tensor = torch.from_numpy(array)
        if self.device.startswith("cuda"):
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
