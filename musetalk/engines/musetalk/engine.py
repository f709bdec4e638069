"""The MuseTalk engine: VAE latents of the face, one UNet step on them, VAE decoding.

The decision a reader would question: `encode` takes the mean of the VAE's posterior where the reference
draws a sample, so that one template always gives one cache and one video.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar, cast

import numpy as np

from musetalk.config import FACE_SIZE, MAX_BATCH_SIZE, EngineConfig, EngineName, VaeDecoder
from musetalk.device import computes_bfloat16, is_out_of_memory, memory_needed, out_of_memory
from musetalk.engines.base import FaceFrame, Generator
from musetalk.engines.musetalk import networks
from musetalk.engines.musetalk.architectures.shapes import (
    AutoencoderShape,
    TinyDecoderShape,
    UNetShape,
    WhisperShape,
)
from musetalk.engines.musetalk.networks import Network, NetworkName, read_shape
from musetalk.engines.musetalk.openvino_runtime import WORTHWHILE_BYTES, OpenVinoRuntime, choose_runtime
from musetalk.engines.musetalk.region import Rectangle, difference, face_weights, used_rectangle, verdict
from musetalk.engines.musetalk.runtime import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    PROMPT_LENGTH,
    FaceDecoder,
    Latents,
    Runtime,
)
from musetalk.engines.musetalk.tiny import tiny_verdict
from musetalk.engines.musetalk.torch_runtime import TorchRuntime
from musetalk.errors import CacheError, DeviceError, EngineError, WeightsError
from musetalk.templates.template import Template
from musetalk.weights.files import MuseTalkFiles, latents_fingerprint, sampled_digest
from musetalk.whisper import N_MELS, PromptListener, PromptState

Result = TypeVar("Result")
log = logging.getLogger(__name__)

CPU_BATCH = 4  # faces; on a CPU more at once are no faster, and each takes 0.2 GB
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
    return "bfloat16" if computes_bfloat16() else "float32"


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

    Configurations are checked when it is made, checkpoints too where torch runs them; OpenVINO's networks
    were checked when they were converted. Weights are read when they are first needed: encoding a template
    touches the VAE only, judging it the UNet too.
    """

    name: EngineName = "musetalk"

    def __init__(self, files: MuseTalkFiles, engine_config: EngineConfig, device: str) -> None:
        """Chooses what runs the networks.

        Args:
            files: the weight files; all present.
            engine_config: precision, batch size and runtime.
            device: resolved, e.g. "cpu", "cuda:0".

        Raises:
            WeightsError: a file is damaged, hostile, or doesn't fit the others.
        """
        self.device = device
        self.dtype = running_dtype(device, half=engine_config.fp16)
        self.fingerprint = latents_fingerprint(files)
        self.vae_decoder = engine_config.vae_decoder
        self._mixed_limit = BatchLimit(device)
        self._config = engine_config
        self._files = files
        self._opened_networks: dict[NetworkName, Network] = {}
        self._lock = threading.Lock()
        self._unet_shape = read_shape(UNetShape, files.unet_config)
        self._vae_shape = read_shape(AutoencoderShape, files.vae_config)
        self._check_fit()
        self.runtime: Runtime = (
            OpenVinoRuntime(files, self.network, self.dtype)
            if choose_runtime(engine_config.runtime, device, files.unet_weights)
            else TorchRuntime(self.network, device, self.dtype)
        )

    def network(self, name: NetworkName) -> Network:
        """One of the engine's networks in torch, opened once.

        Raises:
            WeightsError: its files are damaged, hostile or not of each other.
        """
        with self._lock:
            if name not in self._opened_networks:
                self._opened_networks[name] = self.open_network(name)
            return self._opened_networks[name]

    def open_network(self, name: NetworkName) -> Network:
        """A network of its own, checked and not yet loaded; raises as `network`."""
        openers = {
            "unet": networks.open_unet,
            "vae": networks.open_vae,
            "whisper": networks.open_whisper_encoder,
            "taesd": networks.open_tiny_decoder,
        }
        return openers[name](self._files)

    def _check_fit(self) -> None:
        unet, vae = self._unet_shape, self._vae_shape
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

    def _check_whisper(self) -> None:
        whisper = read_shape(WhisperShape, self._files.whisper_config)
        if (whisper.d_model, whisper.num_mel_bins) != (self.prompt_width, N_MELS):
            raise WeightsError(
                f"{self._files.whisper_config} is another Whisper: width {whisper.d_model}, "
                f"{whisper.num_mel_bins} mel bins; the UNet wants {self.prompt_width} and {N_MELS} "
                "Whisper模型不符",
                "use the official whisper-tiny (--whisper_dir)",
            )

    def _check_tiny(self) -> None:
        tiny = read_shape(TinyDecoderShape, self._files.taesd_config)
        if (tiny.latent_channels, len(tiny.widths)) != (LATENT_CHANNELS, 4):
            raise WeightsError(
                f"{self._files.taesd_config} is another decoder: {tiny.latent_channels} channels, "
                f"{len(tiny.widths)} levels 解码器不符",
                "use the official madebyollin/taesd (--taesd_dir)",
            )

    @property
    def prompt_width(self) -> int:
        """Channels of an audio prompt."""
        return self._unet_shape.cross_attention_dim

    def encode(self, faces: Iterable[FaceFrame]) -> Iterator[np.ndarray]:
        """(1, 8, 32, 32) float32 per face: masked latents, then reference latents, scaled means.

        Raises:
            DeviceError: the VAE or a single face doesn't fit into memory.
        """
        with memory_needed(self.device, "loading the VAE"):
            self.network("vae").load(self.device, self.dtype)
        limit = BatchLimit(self.device)
        crops = (face_crop(face.frame, face.bbox) for face in faces)
        while batch := list(itertools.islice(crops, self._config.batch_size)):
            yield from limit.run(functools.partial(self._encode, np.stack(batch)), len(batch))

    def _encode(self, crops: np.ndarray, part: slice) -> np.ndarray:
        """(B, 256, 256, 3) uint8 BGR → (part of B, 1, 8, 32, 32) float32."""
        import torch

        vae = self.network("vae").load(self.device, self.dtype)
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
        self._check_whisper()
        return PromptListener(self._encode_audio, fps, live=live, state=state)

    def _encode_audio(self, mel: np.ndarray) -> np.ndarray:
        """(80, 3000) float32 → (layers + 1, 1500, 384) float32."""
        with memory_needed(self.device, "encoding audio"):
            runtime = self.runtime
            try:
                return runtime.encode_audio(mel)
            except EngineError as e:
                return self._in_place_of(runtime, e).encode_audio(mel)

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

    def speaking(self, parts: Sequence[Part]) -> np.ndarray:
        """(B, 256, 256, 3) uint8 BGR faces of all parts, from one batch through the UNet."""
        runs = itertools.groupby(parts, key=lambda part: part[0].runtime)
        return np.concatenate([_spoken(runtime, list(run)) for runtime, run in runs])

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
        tiny = self.vae_decoder == "tiny"
        if tiny:
            self._check_tiny()
        wish = self._config.vae_region
        wanted = wish == "on" or (wish == "auto" and (tiny or self._found_harmless(template.region_verdict)))
        rectangle = used_rectangle(face_weights(template)) if wanted else None
        generator, (decode,) = self._prepared(
            template, [(self.vae_decoder, rectangle)], optimise=self._compiles
        )
        self._let_go()
        generator.decode = decode
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
        weights = face_weights(template)
        rectangle = used_rectangle(weights)
        generator, decoders = self._prepared(template, [("full", rectangle), ("full", None)])
        part, whole = generator.own_faces_by(decoders)
        differs = difference(part, whole, weights)
        found = verdict(rectangle, differs)
        log.info("decoding %.0f %% of the face differs by %s", 100 * found["share"], differs)
        return found

    def _tiny_verdict(self, template: Template) -> dict[str, Any]:
        self._check_tiny()
        generator, decoders = self._prepared(template, [("tiny", None), ("full", None)])
        tiny, whole = generator.own_faces_by(decoders)
        found = tiny_verdict(tiny, whole, face_weights(template))
        log.warning(
            "⚠️ the tiny decoder's faces differ by %.1f levels on average, %.1f at the 99.9th percentile, and "
            "keep %.0f %% of the sharpness 小型解码器画质略降",
            *(found["mean"], found["tail"], 100 * found["sharpness"]),
        )
        return {"decoder": "tiny", **found}

    def _prepared(
        self,
        template: Template,
        wanted: Sequence[tuple[VaeDecoder, Rectangle | None]],
        *,
        optimise: bool = False,
    ) -> tuple[MuseTalkGenerator, list[FaceDecoder]]:
        """A generator, its networks loaded or compiled, and what decodes its faces in the wanted ways.

        torch takes OpenVINO's place where that can't be had and needn't be.

        Args:
            wanted: decoders, and the part of the face that each is to decode; None: all of it.
            optimise: whether torch compiles what will be called.
        """
        generator = MuseTalkGenerator(self, template)
        try:
            return generator, [
                generator.runtime.decoder(kind, rectangle, generator.faces_at_rest, optimise=optimise)
                for kind, rectangle in wanted
            ]
        except EngineError as e:
            self._in_place_of(generator.runtime, e)
            return self._prepared(template, wanted, optimise=optimise)

    def _in_place_of(self, runtime: Runtime, error: EngineError) -> Runtime:
        """torch, where OpenVINO can't be had; what is open already goes on with what it has.

        Raises:
            EngineError: `error`, where OpenVINO was asked for by name, torch failed or memory is missing.
        """
        asked_for = isinstance(runtime, TorchRuntime) or self._config.runtime == "openvino"
        if asked_for or isinstance(error, DeviceError):
            raise error
        if self.runtime is runtime:  # somebody else may have met it at the same time
            log.warning("⚠️ %s; going on with torch", error)
            self.runtime = TorchRuntime(self.network, self.device, self.dtype)
        return self.runtime

    def _let_go(self) -> None:
        """Gives back networks that were loaded only to make those that run."""
        if isinstance(self.runtime, OpenVinoRuntime) and (vae := self._opened_networks.get("vae")):
            vae.release()


def _spoken(runtime: Runtime, parts: Sequence[Part]) -> np.ndarray:
    """(B, 256, 256, 3) uint8 BGR faces of all parts, from one batch through the UNet."""
    with runtime.inference():
        conditions = [generator.conditions(prompts, indices) for generator, prompts, indices in parts]
        latents, prompts = zip(*conditions, strict=True)
        predicted = runtime.predict(runtime.joined(latents), np.concatenate(prompts))
        return np.concatenate(
            [runtime.levels(decode(latents)) for decode, latents in _by_decoder(parts, predicted)]
        )


def _by_decoder(parts: Sequence[Part], predicted: Latents) -> Iterator[tuple[FaceDecoder, Latents]]:
    """Neighbouring latents that one decoder decodes, with it."""
    counts = ((generator.decode, len(indices)) for generator, _, indices in parts)
    start = 0
    for decode, run in itertools.groupby(counts, key=lambda entry: entry[0]):
        count = sum(number for _, number in run)
        yield decode, predicted[start : start + count]
        start += count


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
        engine: whose runtime makes the faces.
        template: whose latents stay where that computes, each distinct frame's once.
    """

    decode: FaceDecoder  # given once the engine has prepared it

    def __init__(self, engine: MuseTalkEngine, template: Template) -> None:
        self.engine = engine
        self.runtime = engine.runtime
        self.limit = BatchLimit(engine.device)
        latents, self._row_of = stack_latents(template)
        self._latents = self.runtime.kept(latents)

    def own_faces_by(self, decoders: Iterable[FaceDecoder]) -> list[np.ndarray]:
        """A few of the template's frames, (n, 3, 256, 256) float32 around -1…1, by each decoder."""
        with self.runtime.inference():
            return [self.runtime.images(decode(self._few()[:, LATENT_CHANNELS:])) for decode in decoders]

    def faces_at_rest(self) -> Latents:
        """(n, 4, 32, 32) scaled latents of the same frames as the UNet makes them in silence."""
        latents = self._few()
        silence = sinusoidal_positions(PROMPT_LENGTH, self.engine.prompt_width)
        with self.runtime.inference():
            return self.runtime.predict(latents, np.repeat(silence[None], len(latents), axis=0))

    def _few(self) -> Latents:
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

    def conditions(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> tuple[Latents, np.ndarray]:
        """What the UNet is given: latents (B, 8, 32, 32) and prompts (B, n, 384) with their positions."""
        latents = self._latents[[self._row_of[index] for index in indices]]
        return latents, audio_prompts + sinusoidal_positions(*audio_prompts.shape[1:])


Part = tuple[MuseTalkGenerator, np.ndarray, Sequence[int]]
"""One generator's share of a batch: audio prompts and cycle positions."""
