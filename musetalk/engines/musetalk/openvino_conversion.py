"""The networks as OpenVINO's own files, on disk beside the weights.

The decision a reader would question: the converted networks are kept, as large as the weights. Converting
takes a minute of every request otherwise. The files carry a hash of what they were made from, appear under
their name only when whole, and one process converts while others wait.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from musetalk.files import remove_file, replace_file
from musetalk.weights.files import sampled_digest

log = logging.getLogger(__name__)

FOLDER = "openvino"  # beside the weights
LOCK_TIMEOUT = 600.0  # seconds that a process waits for another's conversion
GENERATION = 3  # of what is done to the networks before they are converted; converted anew when it changes
TRACED_SIDE = 32  # latents; the converted networks take what torch takes, tracing is quickest on one face


@dataclass(frozen=True)
class Conversion:
    """One network to convert.

    Attributes:
        name: of the files.
        sources: configuration and weights; the files' hash covers them.
        module: makes the torch module; called only when there is no converted network yet.
        examples: arrays to trace with, of the inputs' types.
        shapes: of the inputs, -1 for what may vary.
    """

    name: str
    sources: Sequence[Path]
    module: Callable[[], Any]
    examples: Sequence[np.ndarray]
    shapes: Sequence[Sequence[int]]


def _traced(conversion: Conversion) -> Any:
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes are constants on purpose; tracing is on its way out
        examples = tuple(torch.from_numpy(example) for example in conversion.examples)
        return torch.jit.trace(conversion.module(), examples, check_trace=False, strict=False)


def _convert(conversion: Conversion, target: Path, *, half: bool) -> None:
    import openvino

    log.info("converting %s for OpenVINO, once 首次运行，正在转换模型", conversion.name)
    inputs = [
        (list(shape), openvino.Type(example.dtype))
        for shape, example in zip(conversion.shapes, conversion.examples, strict=True)
    ]
    model = openvino.convert_model(_traced(conversion), input=inputs)
    unfinished = target.with_name(f"unfinished-{target.name}")
    try:
        openvino.save_model(model, unfinished, compress_to_fp16=half)
        replace_file(unfinished.with_suffix(".bin"), target.with_suffix(".bin"))
        replace_file(unfinished, target)
    finally:
        remove_file(unfinished)
        remove_file(unfinished.with_suffix(".bin"))


def converted_path(conversion: Conversion, *, half: bool) -> Path:
    """Where the converted network is, converting it first when it isn't there yet.

    Raises:
        RuntimeError, OSError: it can't be converted or kept.
    """
    import openvino
    from filelock import FileLock

    made_from = f"{sampled_digest(conversion.sources)} {openvino.__version__} {half} {GENERATION}"
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    folder = conversion.sources[-1].parent / FOLDER
    target = folder / f"{conversion.name}-{key}.xml"
    if not target.exists():
        folder.mkdir(exist_ok=True)
        with FileLock(folder / f"{target.stem}.lock", timeout=LOCK_TIMEOUT):
            if not target.exists():
                _convert(conversion, target, half=half)
    return target


def unet_conversion(
    module: Callable[[], Any], sources: Sequence[Path], prompt_shape: tuple[int, int]
) -> Conversion:
    """The UNet at timestep 0: latents (B, 8, 32, 32) and prompts (B, n, width) → (B, 4, 32, 32)."""

    side = TRACED_SIDE
    examples = [np.zeros((1, 8, side, side), np.float32), np.zeros((1, *prompt_shape), np.float32)]
    return Conversion("unet", sources, module, examples, [(-1, 8, side, side), (-1, -1, prompt_shape[1])])


def decoder_conversion(vae: Callable[[], Any], sources: Sequence[Path]) -> Conversion:
    """The VAE decoder: (B, 4, 32, 32) unscaled latents → (B, 3, 256, 256) around -1…1."""

    def wrapped() -> Any:
        from torch import nn

        loaded = vae()
        return nn.Sequential(loaded.post_quant_conv, loaded.decoder).eval()

    side = TRACED_SIDE
    return Conversion(
        "decoder", sources, wrapped, [np.zeros((1, 4, side, side), np.float32)], [(-1, 4, side, side)]
    )


def region_conversion(
    vae: Callable[[], Any], sources: Sequence[Path], cuts: int, channels: int
) -> Conversion:
    """`region.decode_cuts`: latents (B, 4, 32, 32), cuts (n, 4) and norms (2, c) → (B, 3, h, w)."""

    def wrapped() -> Any:
        from torch import nn

        from musetalk.engines.musetalk.region import decode_cuts, fixed_norms

        class Region(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vae = vae()

            def forward(self, latents: Any, edges: Any, affine: Any) -> Any:
                return decode_cuts(self.vae, latents, edges.unbind(0), fixed_norms(self.vae, affine))

        return Region().eval()

    side = TRACED_SIDE
    examples = [np.zeros((1, 4, side, side), np.float32), np.tile(np.array([0, 8, 0, 8]), (cuts, 1))]
    examples.append(np.zeros((2, channels), np.float32))
    return Conversion("region", sources, wrapped, examples, [(-1, 4, side, side), (cuts, 4), (2, channels)])


def tiny_conversion(decoder: Callable[[], Any], sources: Sequence[Path], cuts: int) -> Conversion:
    """`tiny.decode_tiny_cuts`: latents (B, 4, 32, 32) and cuts (n, 4) → (B, 3, h, w)."""

    def wrapped() -> Any:
        from torch import nn

        from musetalk.engines.musetalk.tiny import decode_tiny_cuts

        class Part(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tiny = decoder()

            def forward(self, latents: Any, edges: Any) -> Any:
                return decode_tiny_cuts(self.tiny, latents, edges.unbind(0))

        return Part().eval()

    side = TRACED_SIDE
    examples = [np.zeros((1, 4, side, side), np.float32), np.tile(np.array([0, 8, 0, 8]), (cuts, 1))]
    return Conversion("tiny", sources, wrapped, examples, [(-1, 4, side, side), (cuts, 4)])


def whisper_conversion(
    encoder: Callable[[], Any], sources: Sequence[Path], mel_shape: tuple[int, int]
) -> Conversion:
    """Whisper's encoder: (1, 80, 3000) log-mel → (layers + 1, 1500, width) hidden states."""

    def wrapped() -> Any:
        import torch

        class States(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = encoder()

            def forward(self, mel: Any) -> Any:
                return torch.cat(self.encoder(mel))

        return States().eval()

    return Conversion("whisper", sources, wrapped, [np.zeros((1, *mel_shape), np.float32)], [(1, *mel_shape)])
