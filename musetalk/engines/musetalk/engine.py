"""The MuseTalk engine: VAE latents of the face, one UNet step on them, VAE decoding.

The decision a reader would question: `encode` takes the mean of the VAE's posterior where the reference
draws a sample, so that one template always gives one cache and one video.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from musetalk.config import FACE_SIZE, MAX_BATCH_SIZE, EngineConfig, EngineName
from musetalk.device import is_out_of_memory, limit_torch_threads, memory_needed, out_of_memory
from musetalk.engines.base import FaceFrame, Generator
from musetalk.engines.musetalk.openvino_runtime import (
    WORTHWHILE_BYTES,
    CompiledNetwork,
    Conversion,
    choose_runtime,
    decoder_conversion,
    region_conversion,
    tiny_conversion,
    unet_conversion,
)
from musetalk.engines.musetalk.region import (
    Rectangle,
    RegionDecoder,
    difference,
    face_weights,
    full,
    optimised_region,
    used_rectangle,
    verdict,
)
from musetalk.engines.musetalk.tiny import TinyFaceDecoder, decode_tiny_cuts, tiny_verdict
from musetalk.errors import CacheError, DeviceError, EngineError, WeightsError
from musetalk.weights.files import MuseTalkFiles, latents_fingerprint, sampled_digest
from musetalk.whisper import N_MELS, PromptListener, PromptState

if TYPE_CHECKING:
    from torch import Tensor

    from musetalk.engines.musetalk.networks import Network
    from musetalk.templates.template import Template

Result = TypeVar("Result")
NetworkName = Literal["unet", "vae", "whisper", "taesd"]
FaceDecoder = Callable[["Tensor"], "Tensor"]
"""(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1."""
log = logging.getLogger(__name__)

LATENT_SIDE = 32  # a face of 256 pixels, 8 pixels to a latent
LATENT_CHANNELS = 4
CPU_BATCH = 4  # faces; on a CPU more at once are no faster, and each takes 0.2 GB
PROMPT_LENGTH = 50  # steps × (layers + 1) of whisper-tiny
REGION_SAMPLES = 2  # frames of a template that region decoding is measured on


def sinusoidal_positions(length: int, width: int) -> np.ndarray:
    """(length, width) float32 position code: sin and cos interleaved, wavelengths 2π … 10000·2π.

    Vaswani and others 2017, section 3.5.
    """
    position = np.arange(length, dtype=np.float32)[:, None]
    frequency = np.exp(np.arange(0, width, 2, dtype=np.float32) * np.float32(-math.log(10_000) / width))
    code = np.empty((length, width), np.float32)
    code[:, 0::2] = np.sin(position * frequency)
    code[:, 1::2] = np.cos(position * frequency)
    return code


def face_crop(frame: np.ndarray, bbox: Sequence[int]) -> np.ndarray:
    """(256, 256, 3) uint8 BGR: the frame's bbox, resized as the reference does (Lanczos, 8×8 taps)."""
    import cv2

    x1, y1, x2, y2 = bbox
    crop = np.ascontiguousarray(frame[y1:y2, x1:x2])
    return cv2.resize(crop, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_LANCZOS4)


def running_dtype(device: str, *, half: bool) -> str:
    """Name of the precision to run in: half means fp16 on CUDA and bf16 on CPUs that compute in it."""
    if not half:
        return "float32"
    if device.startswith("cuda"):
        return "float16"
    import torch

    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native and torch.backends.mkldnn.is_available() else "float32"


class BatchLimit:
    """The largest batch that is worth it on a device; halved, and once said, when an allocator fails.

    Args:
        device: named in messages.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.size = CPU_BATCH if device == "cpu" else MAX_BATCH_SIZE
        self._said = False

    def run(self, work: Callable[[slice], Iterable[Result]], count: int) -> list[Result]:
        """`work` over `count` items in consecutive parts, its results in order.

        Raises:
            DeviceError: a single item doesn't fit.
        """
        results: list[Result] = []
        while len(results) < count:
            size = min(self.size, count - len(results))
            made = self._attempt(work, slice(len(results), len(results) + size))
            if made is None:
                self._halve(size)
            else:
                results.extend(made)
        return results

    def _attempt(self, work: Callable[[slice], Iterable[Result]], part: slice) -> list[Result] | None:
        """The results of one part; None when they don't fit, and nothing of the attempt is held any more."""
        try:
            return list(work(part))
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            if part.stop - part.start == 1:
                raise out_of_memory(self.device, "at batch size 1") from e
            return None

    def _halve(self, size: int) -> None:
        if not self._said:
            log.warning(
                "⚠️ out of memory on %s, going on with smaller batches 内存不足，减小批量继续", self.device
            )
        self._said = True
        self.size = size // 2
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


class MuseTalkEngine:
    """MuseTalk 1.0 or 1.5 on one device; an `Engine`.

    Checkpoints are checked when it is made and read when they are first needed: encoding a template
    touches the VAE only, judging it the UNet too.
    """

    name: EngineName = "musetalk"

    def __init__(self, files: MuseTalkFiles, engine_config: EngineConfig, device: str) -> None:
        """Opens the UNet and the VAE.

        Args:
            files: the weight files; all present.
            engine_config: precision, batch size and runtime.
            device: resolved, e.g. "cpu", "cuda:0".

        Raises:
            WeightsError: a file is damaged, hostile, or doesn't fit the others.
        """
        if device == "cpu":
            limit_torch_threads()
        self.device = device
        self.dtype = running_dtype(device, half=engine_config.fp16)
        self.fingerprint = latents_fingerprint(files)
        self.vae_decoder = engine_config.vae_decoder
        self._mixed_limit = BatchLimit(device)
        self._config = engine_config
        self._files = files
        self._unet = self.open_network("unet")
        self._vae = self.open_network("vae")
        self._check_fit()
        self._openvino = choose_runtime(engine_config.runtime, device, files.unet_weights)
        self._compiled_unet: CompiledNetwork | None = None  # once a template was opened, if at all
        self._compiled_decoder: CompiledNetwork | None = None
        self._optimised: set[Any] = set()  # modules that torch compiles; once each, for all templates

    def open_network(self, name: NetworkName) -> Network:
        """One of the engine's networks, checked and not yet loaded.

        Raises:
            WeightsError: its files are damaged, hostile or not of each other.
        """
        from musetalk.engines.musetalk import networks

        openers = {
            "unet": networks.open_unet,
            "vae": networks.open_vae,
            "whisper": networks.open_whisper_encoder,
            "taesd": networks.open_tiny_decoder,
        }
        return openers[name](self._files)

    def _check_fit(self) -> None:
        unet, vae = self._unet.module.shape, self._vae.module.shape
        side = FACE_SIZE >> (len(vae.block_out_channels) - 1)
        if (vae.latent_channels, side) != (LATENT_CHANNELS, LATENT_SIDE):
            raise WeightsError(
                f"{self._files.vae_config} is another VAE VAE不符, its latents are "
                f"{vae.latent_channels}×{side}², not {LATENT_CHANNELS}×{LATENT_SIDE}²",
                "use the official sd-vae-ft-mse (--vae_type)",
            )
        if (unet.in_channels, unet.out_channels) != (2 * LATENT_CHANNELS, LATENT_CHANNELS):
            raise WeightsError(
                f"{self._files.unet_config} is no MuseTalk UNet: {unet.in_channels} channels in, "
                f"{unet.out_channels} out 不是MuseTalk模型",
                "use musetalk.json of the official weights (--unet_config)",
            )

    @functools.cached_property
    def _whisper(self) -> Network:
        network = self.open_network("whisper")
        whisper, width = network.module.shape, self._unet.module.shape.cross_attention_dim
        if (whisper.d_model, whisper.num_mel_bins) != (width, N_MELS):
            raise WeightsError(
                f"{self._files.whisper_config} is another Whisper: width {whisper.d_model}, "
                f"{whisper.num_mel_bins} mel bins; the UNet wants {width} and {N_MELS} Whisper模型不符",
                "use the official whisper-tiny (--whisper_dir)",
            )
        return network

    @property
    def prompt_width(self) -> int:
        """Channels of an audio prompt."""
        return self._unet.module.shape.cross_attention_dim

    def encode(self, faces: Iterable[FaceFrame]) -> Iterator[np.ndarray]:
        """(1, 8, 32, 32) float32 per face: masked latents, then reference latents, scaled means.

        Raises:
            DeviceError: the VAE or a single face doesn't fit into memory.
        """
        with memory_needed(self.device, "loading the VAE"):
            self._vae.load(self.device, self.dtype)
        limit = BatchLimit(self.device)
        crops = (face_crop(face.frame, face.bbox) for face in faces)
        while batch := list(itertools.islice(crops, self._config.batch_size)):
            yield from limit.run(functools.partial(self._encode, np.stack(batch)), len(batch))

    def _encode(self, crops: np.ndarray, part: slice) -> np.ndarray:
        """(B, 256, 256, 3) uint8 BGR → (part of B, 1, 8, 32, 32) float32."""
        import torch

        vae = self._vae.load(self.device, self.dtype)
        with torch.inference_mode():
            rgb = torch.from_numpy(crops[part]).to(self.device).flip(-1).permute(0, 3, 1, 2)
            rgb = rgb.contiguous().float() / 255  # channels-last group norms lose digits on flat areas
            masked = rgb.clone()
            masked[:, :, FACE_SIZE // 2 :] = 0
            images = (torch.cat([masked, rgb]) - 0.5) / 0.5
            means = vae.posterior_means(images.to(getattr(torch, self.dtype))).float()
            means = means * vae.shape.scaling_factor
            return torch.cat(means.chunk(2), dim=1)[:, None].contiguous().cpu().numpy()

    def listen(
        self, fps: Fraction, *, live: bool = False, state: PromptState | None = None
    ) -> PromptListener:
        """A listener whose prompts are (k, 10 × (layers + 1), 384) float32 blocks, one per video frame."""
        return PromptListener(self._encode_audio, fps, live=live, state=state)

    def _encode_audio(self, mel: np.ndarray) -> np.ndarray:
        """(80, 3000) float32 → (layers + 1, 1500, 384) float32.

        Always computed in float32: it is a thousandth of the work, and the lips hang on it.
        """
        import torch

        with torch.inference_mode(), memory_needed(self.device, "encoding audio"):
            encoder = self._whisper.load(self.device, "float32")
            features = torch.from_numpy(mel)[None].to(self.device)
            return torch.cat(encoder(features)).cpu().numpy()

    def generate_mixed(
        self, requests: Sequence[tuple[Generator, np.ndarray, Sequence[int]]]
    ) -> list[list[np.ndarray]]:
        """Faces of several templates, in common batches; for each request what its generator would give.

        Raises:
            DeviceError: a single frame doesn't fit into memory.
        """
        faces = [
            (cast(MuseTalkGenerator, generator), prompts[i : i + 1], [index])
            for generator, prompts, indices in requests
            for i, index in enumerate(indices)
        ]
        made = iter(self._mixed_limit.run(lambda part: self.speaking(faces[part]), len(faces)))
        return [[next(made) for _ in indices] for _, _, indices in requests]

    def speaking(self, parts: Sequence[tuple[MuseTalkGenerator, np.ndarray, Sequence[int]]]) -> np.ndarray:
        """(B, 256, 256, 3) uint8 BGR faces of all parts, from one batch through the UNet."""
        import torch

        with torch.inference_mode():
            conditions = [generator.conditions(prompts, indices) for generator, prompts, indices in parts]
            latents, prompts = (torch.cat(tensors) for tensors in zip(*conditions, strict=True))
            predicted = self.predict_latents(latents, prompts)
            images = torch.cat([decode(part) for decode, part in _by_decoder(parts, predicted)])
            levels = (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
            return levels.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def predict_latents(self, latents: Tensor, prompts: Tensor) -> Tensor:
        """The UNet's one step.

        Args:
            latents: (B, 8, 32, 32), masked then reference, on the device in the running precision.
            prompts: (B, n, 384) with positions added, likewise.

        Returns:
            (B, 4, 32, 32) latents of the speaking face.
        """
        if self._compiled_unet is not None:
            return _through(self._compiled_unet, latents, prompts).to(latents.dtype)
        unet = self._unet.load(self.device, self.dtype)
        return unet(latents, prompts)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, 4, 32, 32) scaled latents → (B, 3, 256, 256) RGB around -1…1."""
        unscaled = self.unscaled(latents)
        if self._compiled_decoder is not None:
            return _one_by_one(self._compiled_decoder, unscaled)
        return self._vae.load(self.device, self.dtype).decode(unscaled)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE's decoder takes them."""
        return latents / self._vae.module.shape.scaling_factor

    def open(self, template: Template) -> MuseTalkGenerator:
        """Loads the networks and puts the template's latents on the device.

        Raises:
            CacheError: the template holds no MuseTalk latents.
            WeightsError: a checkpoint can't be read.
            EngineError: the runtime that was asked for can't run.
            DeviceError: the networks don't fit into memory.
        """
        with memory_needed(self.device, "loading the networks"):
            return self._opened(template)

    def _opened(self, template: Template) -> MuseTalkGenerator:
        generator = MuseTalkGenerator(self, template)
        wish = self._config.vae_region
        harmless = self.vae_decoder == "tiny" or self._found_harmless(template.region_verdict)
        wanted = wish == "on" or (wish == "auto" and harmless)
        rectangle = used_rectangle(face_weights(template)) if wanted else None
        generator.decode = self._face_decoder(generator, rectangle, optimise=self._compiles)
        self._let_go()
        return generator

    @property
    def _compiles(self) -> bool:
        return self._config.compile and self.device.startswith("cuda")

    def _found_harmless(self, verdict: object) -> bool:
        """Whether preprocessing judged region decoding harmless with these very networks and precision."""
        if isinstance(verdict, dict) and verdict.get("networks") == self._judged_with:
            return verdict.get("harmless") is True
        if self._is_large:
            log.info("region decoding was not judged with these networks; see --force_refresh")
        return False

    @property
    def _judged_with(self) -> str:
        files = self._files
        weights = [files.taesd_weights] if self.vae_decoder == "tiny" else [files.unet_weights]
        return f"{sampled_digest([*weights, files.vae_weights])[:16]} {self.dtype}"

    @property
    def _is_large(self) -> bool:
        return self._files.unet_weights.stat().st_size >= WORTHWHILE_BYTES

    def judge(self, template: Template) -> dict[str, Any]:
        """What the decoder that was asked for costs this template in looks, as its metadata holds it.

        The template's own faces are decoded both ways: in part and in full, with statistics of other faces,
        those that the UNet makes of them in silence; or by the tiny decoder and the full one. Decoding in
        part isn't judged where `vae_region` is "off" or for networks too small to gain by it, and nothing is
        where the memory for it is missing.

        Raises:
            CacheError, WeightsError, EngineError: as `open`.
        """
        tiny = self.vae_decoder == "tiny"
        if not tiny and (self._config.vae_region == "off" or not self._is_large):
            return {}
        try:
            with memory_needed(self.device, "judging decoders"):
                found = self._tiny_verdict(template) if tiny else self._region_verdict(template)
        except DeviceError as e:
            log.warning("⚠️ %s, decoders are not judged 不评估解码器", e)
            return {}
        finally:
            self._let_go()
        return {"vae_decoder" if tiny else "vae_region": {**found, "networks": self._judged_with}}

    def _region_verdict(self, template: Template) -> dict[str, Any]:
        weights, generator = face_weights(template), MuseTalkGenerator(self, template)
        rectangle = used_rectangle(weights)
        part, whole = (self._face_decoder(generator, r, full_decoder=True) for r in (rectangle, None))
        differs = difference(*generator.own_faces_by(part, whole), weights)
        found = verdict(rectangle, differs)
        log.info("decoding %.0f %% of the face differs by %s", 100 * found["share"], differs)
        return found

    def _tiny_verdict(self, template: Template) -> dict[str, Any]:
        weights, generator = face_weights(template), MuseTalkGenerator(self, template)
        tiny, whole = (self._face_decoder(generator, None, full_decoder=full_) for full_ in (False, True))
        found = tiny_verdict(*generator.own_faces_by(tiny, whole), weights)
        log.warning(
            "⚠️ the tiny decoder's faces differ by %.1f levels on average, %.1f at the 99.9th percentile, and "
            "keep %.0f %% of the sharpness 小型解码器画质略降",
            *(found["mean"], found["tail"], 100 * found["sharpness"]),
        )
        return {"decoder": "tiny", **found}

    def _face_decoder(
        self,
        generator: MuseTalkGenerator,
        rectangle: Rectangle | None,
        *,
        full_decoder: bool = False,
        optimise: bool = False,
    ) -> FaceDecoder:
        """What decodes faces, with everything it and the UNet need loaded or compiled.

        torch takes OpenVINO's place where that can't be had and needn't.

        Args:
            rectangle: the part of the face that is to be decoded; None: all of it.
            full_decoder: the VAE's, whichever was asked for.
            optimise: whether torch compiles what will be called.
        """
        try:
            self._load_unet(optimise)
            if self.vae_decoder == "tiny" and not full_decoder:
                return self._tiny(rectangle or full(FACE_SIZE), optimise).decode
            if rectangle is None:
                self._load_decoder(optimise)
                return self.decode_latents
            region = self._region(generator, rectangle, optimise)
            return lambda latents: region.decode(self.unscaled(latents))
        except DeviceError:
            raise
        except EngineError as e:
            if not self._openvino or self._config.runtime == "openvino":
                raise
            log.warning("⚠️ %s; going on with torch", e)
            self._openvino, self._compiled_unet, self._compiled_decoder = False, None, None
            return self._face_decoder(generator, rectangle, full_decoder=full_decoder, optimise=optimise)

    def _let_go(self) -> None:
        """Gives back networks that were loaded only to make those that run."""
        if self._openvino:
            self._vae.release()

    def _load_unet(self, optimise: bool) -> None:
        if not self._openvino:
            self._optimise(self._unet.load(self.device, self.dtype), optimise)
        elif self._compiled_unet is None:
            self._compiled_unet = CompiledNetwork(self._unet_conversion(), self.dtype)

    def _load_decoder(self, optimise: bool) -> None:
        if not self._openvino:
            self._optimise(self._vae.load(self.device, self.dtype).decoder, optimise)
        elif self._compiled_decoder is None:
            conversion = decoder_conversion(self._float_vae, self._vae_sources)
            self._compiled_decoder = CompiledNetwork(conversion, self.dtype)

    def _optimise(self, module: Any, optimise: bool) -> None:
        """Has torch compile a module, once for all templates."""
        if optimise and module not in self._optimised:
            module.compile()
            self._optimised.add(module)

    def _tiny(self, rectangle: Rectangle, optimise: bool) -> TinyFaceDecoder:
        counts = self._taesd.module.shape.counts
        if self._openvino:
            return TinyFaceDecoder(rectangle, self._compiled_tiny, counts, LATENT_SIDE)
        import torch

        decoder = self._taesd.load(self.device, self.dtype)

        def decode_cuts(cuts: np.ndarray) -> Callable[[Tensor], Tensor]:
            edges = cuts.tolist()
            decode = functools.partial(decode_tiny_cuts, decoder, cuts=edges)
            return torch.compile(decode) if optimise else decode

        return TinyFaceDecoder(rectangle, decode_cuts, counts, LATENT_SIDE)

    def _compiled_tiny(self, cuts: np.ndarray) -> Callable[[Tensor], Tensor]:
        sources = [self._files.taesd_config, self._files.taesd_weights]
        conversion = tiny_conversion(lambda: self._taesd.load("cpu", "float32"), sources, len(cuts))
        return functools.partial(_one_by_one, CompiledNetwork(conversion, self.dtype, {1: cuts}))

    @functools.cached_property
    def _taesd(self) -> Network:
        network = self.open_network("taesd")
        shape = network.module.shape
        if (shape.latent_channels, len(shape.widths)) != (LATENT_CHANNELS, 4):
            raise WeightsError(
                f"{self._files.taesd_config} is another decoder: {shape.latent_channels} channels, "
                f"{len(shape.widths)} levels 解码器不符",
                "use the official madebyollin/taesd (--taesd_dir)",
            )
        return network

    def _region(self, generator: MuseTalkGenerator, rectangle: Rectangle, optimise: bool) -> RegionDecoder:
        import torch

        vae = self._vae.load(self.device, self.dtype)
        quicker = self._compiled_region if self._openvino else None
        if optimise and not self._openvino:
            quicker = functools.partial(optimised_region, vae)
        with torch.inference_mode():
            samples = self.unscaled(generator.faces_at_rest())
            return RegionDecoder(vae, rectangle, samples, quicker)

    def _compiled_region(self, cuts: np.ndarray, affine: Tensor) -> Callable[[Tensor], Tensor]:
        conversion = region_conversion(self._float_vae, self._vae_sources, len(cuts), affine.shape[1])
        constants = {1: cuts, 2: affine.numpy()}
        return functools.partial(_one_by_one, CompiledNetwork(conversion, self.dtype, constants))

    def _unet_conversion(self) -> Conversion:
        from musetalk.engines.musetalk.networks import fold_upsampling, open_unet

        return unet_conversion(
            lambda: fold_upsampling(open_unet(self._files).load("cpu", "float32")),
            [self._files.unet_config, self._files.unet_weights],
            (PROMPT_LENGTH, self.prompt_width),
        )

    def _float_vae(self) -> Any:
        """A VAE of its own in float32, for conversions."""
        from musetalk.engines.musetalk.networks import fold_upsampling, open_vae

        return fold_upsampling(open_vae(self._files).load("cpu", "float32"))

    @property
    def _vae_sources(self) -> list[Path]:
        return [self._files.vae_config, self._files.vae_weights]


def _by_decoder(
    parts: Sequence[tuple[MuseTalkGenerator, np.ndarray, Sequence[int]]], predicted: Tensor
) -> Iterator[tuple[FaceDecoder, Tensor]]:
    """Neighbouring latents that one decoder decodes, with it."""
    counts = ((generator.decode, len(indices)) for generator, _, indices in parts)
    start = 0
    for decode, run in itertools.groupby(counts, key=lambda entry: entry[0]):
        count = sum(number for _, number in run)
        yield decode, predicted[start : start + count]
        start += count


def _through(network: CompiledNetwork, *tensors: Tensor) -> Tensor:
    """The network's output, float32 whatever it computes in."""
    import torch

    return torch.from_numpy(network(*(tensor.float().contiguous().numpy() for tensor in tensors)))


def _one_by_one(network: CompiledNetwork, latents: Tensor) -> Tensor:
    """Decodes each face alone: what a decoder works on then stays in the processor's cache."""
    import torch

    return torch.cat([_through(network, latent) for latent in latents.split(1)])


def stack_latents(template: Template) -> tuple[np.ndarray, dict[int, int]]:
    """The template's distinct latents, (n, 8, 32, 32) float32, and the row of each cycle position.

    Raises:
        CacheError: they are no MuseTalk latents, or no frame has a face.
    """
    rows: list[np.ndarray] = []
    row_of: dict[int, int] = {}
    for position, first in enumerate(template.unique):
        if not template.has_face(position):
            continue
        if first not in row_of:
            latents = np.asarray(template.latents[position])
            if (
                latents.shape != (1, 2 * LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
                or latents.dtype.kind != "f"
            ):
                raise CacheError(
                    f"the template holds no MuseTalk latents 缓存与引擎不符: {latents.dtype} {latents.shape}",
                    "run preprocessing again with --engine musetalk 请重新运行预处理",
                )
            row_of[first] = len(rows)
            rows.append(latents[0].astype(np.float32))
        row_of[position] = row_of[first]
    if not rows:
        raise CacheError(
            "no frame of the template shows a face 模板中没有任何面部",
            "run preprocessing again, with another picture 请更换图片并重新预处理",
        )
    return np.stack(rows), row_of


class MuseTalkGenerator:
    """Speaking faces of one template; a `Generator`.

    Args:
        engine: with its networks loaded.
        template: whose latents stay on the device, each distinct frame's once.
    """

    def __init__(self, engine: MuseTalkEngine, template: Template) -> None:
        import torch

        self.engine = engine
        self.limit = BatchLimit(engine.device)
        latents, self._row_of = stack_latents(template)
        self._latents = torch.from_numpy(latents).to(engine.device, getattr(torch, engine.dtype))
        self.decode: FaceDecoder = engine.decode_latents

    def own_faces_by(self, *decoders: FaceDecoder) -> tuple[Tensor, Tensor]:
        """A few of the template's frames, (n, 3, 256, 256) around -1…1, as two decoders decode them."""
        import torch

        with torch.inference_mode():
            first, second = (decode(self.own_faces()) for decode in decoders)
        return first, second

    def own_faces(self) -> Tensor:
        """(n, 4, 32, 32) scaled latents of a few of the template's frames."""
        return self._few()[:, LATENT_CHANNELS:]

    def faces_at_rest(self) -> Tensor:
        """(n, 4, 32, 32) scaled latents of the same frames as the UNet makes them in silence."""
        latents = self._few()
        silence = sinusoidal_positions(PROMPT_LENGTH, self.engine.prompt_width)
        prompts = self._sent(np.repeat(silence[None], len(latents), axis=0))
        return self.engine.predict_latents(latents, prompts.to(latents.dtype))

    def _few(self) -> Tensor:
        return self._latents[:: max(1, len(self._latents) // REGION_SAMPLES)][:REGION_SAMPLES]

    def generate(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> list[np.ndarray]:
        """(256, 256, 3) uint8 BGR faces.

        Args:
            audio_prompts: (B, n, 384) float32.
            indices: B cycle positions, each with a face.

        Raises:
            DeviceError: a single frame doesn't fit into memory.
        """
        return self.limit.run(
            lambda part: self.engine.speaking([(self, audio_prompts[part], indices[part])]), len(indices)
        )

    def conditions(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the UNet is given: latents (B, 8, 32, 32) and prompts (B, n, 384) with their positions."""
        rows = np.array([self._row_of[index] for index in indices])
        latents = self._latents[self._sent(rows)]
        prompts = audio_prompts + sinusoidal_positions(*audio_prompts.shape[1:])
        return latents, self._sent(prompts).to(latents.dtype)

    def _sent(self, array: np.ndarray) -> Tensor:
        import torch

        tensor = torch.from_numpy(array)
        if self._latents.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self._latents.device, non_blocking=True)
