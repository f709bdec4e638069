"""What runs the networks: the protocol between the engine and torch or OpenVINO.

A runtime's latents stay where it computes: tensors on a device, or arrays. The engine hands them from one
call to the next and never looks into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from musetalk.config import VaeDecoder

if TYPE_CHECKING:
    import numpy as np

    from musetalk.engines.musetalk.region import Rectangle

LATENT_SIDE = 32  # a face of 256 pixels, 8 pixels to a latent
LATENT_CHANNELS = 4
PROMPT_LENGTH = 50  # steps × (layers + 1) of whisper-tiny

Latents = Any
"""(B, C, 32, 32) where a runtime computes."""
FaceDecoder = Callable[[Latents], Any]
"""(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1, where a runtime computes."""


class Runtime(Protocol):
    """Runs the UNet, a decoder and Whisper's encoder."""

    def inference(self) -> AbstractContextManager[object]:
        """What is held around computations."""
        ...

    def kept(self, latents: np.ndarray) -> Latents:
        """(n, C, 32, 32) float32 latents, to stay where they are needed."""
        ...

    def joined(self, latents: Sequence[Latents]) -> Latents:
        """One batch of several."""
        ...

    def predict(self, latents: Latents, prompts: np.ndarray) -> Latents:
        """The UNet's one step, once a `decoder` was made.

        Args:
            latents: (B, 8, 32, 32), masked then reference.
            prompts: (B, n, 384) float32 with positions added.

        Returns:
            (B, 4, 32, 32) scaled latents of the speaking face.
        """
        ...

    def decoder(
        self,
        decoder: VaeDecoder,
        rectangle: Rectangle | None,
        at_rest: Callable[[], Latents],
        *,
        optimise: bool,
    ) -> FaceDecoder:
        """What decodes faces, with everything it and the UNet need loaded.

        Args:
            decoder: the VAE's or TAESD's.
            rectangle: the part of the face that is to be decoded; None: all of it.
            at_rest: (n, 4, 32, 32) latents of generated faces, for statistics; asked once the UNet runs.
            optimise: whether torch compiles what will be called.

        Raises:
            EngineError: the runtime can't have one of the networks; DeviceError: memory is missing.
        """
        ...

    def images(self, decoded: Any) -> np.ndarray:
        """Decoded faces as (B, 3, 256, 256) float32 RGB around -1…1."""
        ...

    def levels(self, decoded: Any) -> np.ndarray:
        """Decoded faces as (B, 256, 256, 3) uint8 BGR."""
        ...

    def encode_audio(self, mel: np.ndarray) -> np.ndarray:
        """(80, 3000) float32 → (layers + 1, 1500, width) float32, whatever the other networks compute in."""
        ...
