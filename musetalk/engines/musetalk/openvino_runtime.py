"""The networks through OpenVINO, on CPUs: arrays in, arrays out, and no torch once they are converted.

The decision a reader would question: nothing here imports torch but the decoding of a region, whose constants
are measured in it. Importing it takes longer than preparing both large networks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from musetalk.config import FACE_SIZE, RuntimeRequest, VaeDecoder
from musetalk.device import is_out_of_memory, out_of_memory, usable_cores
from musetalk.engines.musetalk.architectures.shapes import AutoencoderShape, TinyDecoderShape, UNetShape
from musetalk.engines.musetalk.networks import (
    Network,
    NetworkName,
    fold_upsampling,
    open_tiny_decoder,
    open_unet,
    open_vae,
    open_whisper_encoder,
    read_shape,
)
from musetalk.engines.musetalk.openvino_conversion import (
    Conversion,
    converted_path,
    decoder_conversion,
    region_conversion,
    tiny_conversion,
    unet_conversion,
    whisper_conversion,
)
from musetalk.engines.musetalk.region import Rectangle, RegionDecoder, full
from musetalk.engines.musetalk.runtime import LATENT_SIDE, PROMPT_LENGTH
from musetalk.engines.musetalk.tiny import TinyFaceDecoder
from musetalk.errors import EngineError, MuseTalkError
from musetalk.weights.files import MuseTalkFiles
from musetalk.whisper import MEL_FRAMES, N_MELS

if TYPE_CHECKING:
    from torch import Tensor

WORTHWHILE_BYTES = 1_000_000_000  # of weights; smaller networks run before they are converted


def choose_runtime(request: RuntimeRequest, device: str, weights: Path) -> bool:
    """Whether OpenVINO runs the networks.

    Raises:
        EngineError: it is asked for by name and can't.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if request == "auto":
        return installed and device == "cpu" and weights.stat().st_size >= WORTHWHILE_BYTES
    if request == "openvino" and device != "cpu":
        raise EngineError(
            f"runtime openvino runs on the CPU, not on {device}", "use --device cpu or --runtime torch"
        )
    if request == "openvino" and not installed:
        raise EngineError(
            "openvino is not installed 未安装openvino", "pip install openvino, or use --runtime torch"
        )
    return request == "openvino"


@contextlib.contextmanager
def _preparing(name: str) -> Iterator[None]:
    """Says which network can't be converted, kept or compiled."""
    try:
        yield
    except MuseTalkError:
        raise
    except (RuntimeError, MemoryError, OSError, TimeoutError, ImportError) as e:
        if is_out_of_memory(e):
            raise out_of_memory("cpu", f"preparing {name}") from e
        raise EngineError(f"{name} can't be prepared for OpenVINO: {e}", "use --runtime torch") from e


def _with_constants(path: Path, constants: Mapping[int, np.ndarray]) -> Any:
    """The converted network with some of its inputs, by position, settled."""
    import openvino
    from openvino import opset13

    model = openvino.Core().read_model(path)
    for position, parameter in enumerate(model.get_parameters()):
        if position in constants:
            parameter.output(0).replace(opset13.constant(constants[position]).output(0))
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


class CompiledNetwork:
    """A network that runs in OpenVINO; calls from several threads wait for each other.

    Args:
        conversion: the network, converted first where it isn't yet.
        dtype: "float32" or "bfloat16", the precision it computes in.
        constants: inputs, by position, that are the same at every call and no longer given.

    Raises:
        EngineError: the network can't be converted, kept or compiled; a DeviceError where memory is missing.
        WeightsError: its checkpoint can't be read.
    """

    def __init__(
        self, conversion: Conversion, dtype: str, constants: Mapping[int, np.ndarray] | None = None
    ) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": usable_cores(),
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        with _preparing(conversion.name):
            path = converted_path(conversion, half=dtype != "float32")
            import openvino

            model = _with_constants(path, constants or {})
            self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._lock = threading.Lock()

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """The network's output, float32."""
        with self._lock:
            return self._compiled(inputs)[0]

    def one_by_one(self, latents: np.ndarray) -> np.ndarray:
        """Each face alone: what a decoder works on then stays in the processor's cache."""
        return np.concatenate([self(latents[i : i + 1]) for i in range(len(latents))])


class OpenVinoRuntime:
    """A `Runtime` on the CPU; latents are float32 arrays.

    Args:
        files: the weight files.
        network: the engine's own networks by name, for what is measured in torch.
        dtype: "float32" or "bfloat16".

    Raises:
        WeightsError: a configuration is missing, damaged or of another network.
    """

    def __init__(self, files: MuseTalkFiles, network: Callable[[NetworkName], Network], dtype: str) -> None:
        self.dtype = dtype
        self._files = files
        self._network = network
        self._width = read_shape(UNetShape, files.unet_config).cross_attention_dim
        self._scale = read_shape(AutoencoderShape, files.vae_config).scaling_factor
        self._compiled: dict[str, CompiledNetwork] = {}
        self._lock = threading.Lock()

    def inference(self) -> contextlib.AbstractContextManager[object]:
        """Nothing is to be done around a computation."""
        return contextlib.nullcontext()

    def kept(self, latents: np.ndarray) -> np.ndarray:
        """(n, C, 32, 32) float32, as they are."""
        return latents

    def joined(self, latents: Sequence[np.ndarray]) -> np.ndarray:
        """One batch of several."""
        return np.concatenate(latents)

    def predict(self, latents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """The UNet's one step: (B, 8, 32, 32) latents and (B, n, 384) prompts → (B, 4, 32, 32)."""
        return self._compiled["unet"](np.ascontiguousarray(latents), prompts)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1."""
        return self._compiled["decoder"].one_by_one(latents / self._scale)

    def images(self, decoded: np.ndarray) -> np.ndarray:
        """(B, 3, 256, 256) float32 RGB around -1…1."""
        return decoded

    def levels(self, decoded: np.ndarray) -> np.ndarray:
        """(B, 256, 256, 3) uint8 BGR of faces around -1…1."""
        levels = np.rint((decoded / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(levels[:, ::-1].transpose(0, 2, 3, 1))

    def encode_audio(self, mel: np.ndarray) -> np.ndarray:
        """(80, 3000) float32 → (layers + 1, 1500, 384) float32."""
        self._prepare("whisper")
        return self._compiled["whisper"](mel[None])

    def decoder(
        self,
        decoder: VaeDecoder,
        rectangle: Rectangle | None,
        at_rest: Callable[[], np.ndarray],
        *,
        optimise: bool,
    ) -> Callable[[np.ndarray], np.ndarray]:
        """What decodes scaled latents, with everything it and the UNet need prepared; see `Runtime`."""
        if decoder == "tiny":
            self._prepare("unet")
            counts = read_shape(TinyDecoderShape, self._files.taesd_config).counts
            return TinyFaceDecoder(rectangle or full(FACE_SIZE), self._tiny, counts, LATENT_SIDE).decode
        if rectangle is None:
            self._prepare("unet", "decoder")
            return self.decode
        self._prepare("unet")
        vae = self._network("vae").load("cpu", self.dtype)
        region = RegionDecoder(vae, rectangle, _tensor_like(vae, at_rest() / self._scale), self._region)
        return lambda latents: region.decode(latents / self._scale)

    def _prepare(self, *names: str) -> None:
        """Compiles networks that aren't yet, side by side; those not yet converted one after the other."""
        with self._lock:
            missing = [name for name in names if name not in self._compiled]
            conversions = [self._conversion(name) for name in missing]
            for name, conversion in zip(missing, conversions, strict=True):
                with _preparing(name):
                    converted_path(conversion, half=self._precision(name) != "float32")
            with ThreadPoolExecutor(max(1, len(missing))) as pool:
                made = pool.map(
                    lambda name, conversion: CompiledNetwork(conversion, self._precision(name)),
                    missing,
                    conversions,
                )
                self._compiled.update(zip(missing, made, strict=True))

    def _precision(self, name: str) -> str:
        """Audio is encoded in float32: it is a thousandth of the work, and the lips hang on it."""
        return "float32" if name == "whisper" else self.dtype

    def _conversion(self, name: str) -> Conversion:
        files = self._files
        if name == "unet":
            sources, shape = [files.unet_config, files.unet_weights], (PROMPT_LENGTH, self._width)
            return unet_conversion(
                lambda: fold_upsampling(open_unet(files).load("cpu", "float32")), sources, shape
            )
        if name == "decoder":
            return decoder_conversion(self._float_vae, self._vae_sources)
        return whisper_conversion(
            lambda: open_whisper_encoder(files).load("cpu", "float32"),
            [files.whisper_config, files.whisper_weights],
            (N_MELS, MEL_FRAMES),
        )

    def _float_vae(self) -> Any:
        """A VAE of its own in float32, for conversions."""
        return fold_upsampling(open_vae(self._files).load("cpu", "float32"))

    @property
    def _vae_sources(self) -> list[Path]:
        return [self._files.vae_config, self._files.vae_weights]

    def _tiny(self, cuts: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        files = self._files
        conversion = tiny_conversion(
            lambda: open_tiny_decoder(files).load("cpu", "float32"),
            [files.taesd_config, files.taesd_weights],
            len(cuts),
        )
        return CompiledNetwork(conversion, self.dtype, {1: cuts}).one_by_one

    def _region(self, cuts: np.ndarray, affine: Tensor) -> Callable[[np.ndarray], np.ndarray]:
        conversion = region_conversion(self._float_vae, self._vae_sources, len(cuts), affine.shape[1])
        return CompiledNetwork(conversion, self.dtype, {1: cuts, 2: affine.numpy()}).one_by_one


def _tensor_like(module: Any, array: np.ndarray) -> Tensor:
    """The array as a tensor of a module's precision."""
    import torch

    return torch.from_numpy(array).to(next(module.parameters()).dtype)
