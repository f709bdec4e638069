"""What the proof run measures of a device: trials on their own, so that one that fails isn't the end.

A trial is a generator of rows. What it can't do here (no kernel of that kind, no memory, no compiler, no
ffmpeg) it raises, and the runner writes that down.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from musetalk.benchmark.random_engine import RandomEngine
from musetalk.benchmark.scene import SIZES, TemplateKind, make_scene, write_speech
from musetalk.config import FACE_SIZE, REPOSITORY, EncodingConfig, EngineConfig, VaeDecoder
from musetalk.engines.musetalk.region import Rectangle
from musetalk.engines.musetalk.runtime import LATENT_CHANNELS, LATENT_SIDE, PROMPT_LENGTH
from musetalk.measurement import Spread, significant

if TYPE_CHECKING:
    from torch import Tensor

    from musetalk.rendering import OpenedTemplate
    from musetalk.templates.template import Template

USUAL_BATCH = 8  # frames, where another thing than the batch is changed
LEAST_RUNS, MOST_RUNS = 3, 20
SECONDS_EACH = 1.5  # of runs of one variant, after a warm-up
MASKED = Rectangle(100, 256, 8, 248)  # 57 % of the face: what the jaw's mask of an upright head uses
FPS = Fraction(25)
SESSIONS = (1, 4, 16)
GOLDENS = REPOSITORY / "tests" / "data" / "generator" / "generator.npz"
Row = dict[str, Any]


class NotHereError(Exception):
    """A trial that this machine can't run; says why."""


@dataclass(frozen=True)
class Bench:
    """What trials run on.

    Attributes:
        device: resolved, e.g. "cuda:0".
        small: tiny networks and few runs, to see that everything works.
        folder: for files that are thrown away.
    """

    device: str
    small: bool
    folder: Path
    _engines: dict[VaeDecoder, RandomEngine] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is an NVIDIA card."""
        return self.device.startswith("cuda")

    @property
    def batches(self) -> tuple[int, ...]:
        """Frames at once."""
        return (1, 2) if self.small else (1, 2, 4, 8, 16, 32, 64)

    @property
    def usual_batch(self) -> int:
        """Frames at once where another thing is changed."""
        return 2 if self.small else USUAL_BATCH

    def engine(self, decoder: VaeDecoder = "full") -> RandomEngine:
        """The engine in half precision, made once."""
        if decoder not in self._engines:
            config = EngineConfig(batch_size=self.usual_batch, vae_decoder=decoder, vae_region="off")
            size = "tiny" if self.small else "full"
            self._engines[decoder] = RandomEngine(self.folder / decoder, size, config, self.device)
        return self._engines[decoder]

    def unet(self) -> Any:
        """The UNet on the device."""
        engine = self.engine()
        return engine.open_network("unet").load(engine.device, engine.dtype)

    def vae(self) -> Any:
        """The autoencoder on the device."""
        engine = self.engine()
        return engine.open_network("vae").load(engine.device, engine.dtype)

    def latents(self, batch: int, channels: int = LATENT_CHANNELS) -> Tensor:
        """Random latents on the device, in its precision."""
        return self._random(batch, channels, LATENT_SIDE, LATENT_SIDE)

    def prompts(self, batch: int) -> Tensor:
        """Random audio prompts on the device, in its precision."""
        return self._random(batch, PROMPT_LENGTH, self.engine().prompt_width)

    def _random(self, *shape: int) -> Tensor:
        import torch

        return torch.randn(*shape, device=self.device).to(getattr(torch, self.engine().dtype))

    def measure(self, call: Callable[[], object], frames: int) -> Row:
        """Milliseconds a frame of a call that makes `frames`, and the most memory that the device held."""
        self.forget_peak()
        least, most = (1, 1) if self.small else (LEAST_RUNS, MOST_RUNS)
        if not self.small:
            call()
            self.wait()
        times: list[float] = []
        end = time.perf_counter() + SECONDS_EACH
        while len(times) < least or (time.perf_counter() < end and len(times) < most):
            start = time.perf_counter()
            call()
            self.wait()
            times.append(1000 * (time.perf_counter() - start) / frames)
        spread = Spread.of(times)
        row: Row = {"ms_per_frame": spread.rounded(), "frames_per_second": significant(1000 / spread.median)}
        return row if (peak := self.peak_mb()) is None else {**row, "peak_memory_mb": peak}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.is_cuda:
            import torch

            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        """Starts counting the device's memory anew."""
        if self.is_cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mb(self) -> float | None:
        """The most memory that torch reserved since, in MB; None on a CPU."""
        if not self.is_cuda:
            return None
        import torch

        return significant(torch.cuda.max_memory_reserved(self.device) / (1 << 20))


def batches(bench: Bench) -> Iterator[Row]:
    """UNet and decoder by batch, apart and together, with the memory that each batch takes."""
    unet, vae = bench.unet(), bench.vae()
    for batch in bench.batches:
        latents, prompts, images = bench.latents(batch, 8), bench.prompts(batch), bench.latents(batch)
        for name, call in (
            ("unet", lambda latents=latents, prompts=prompts: unet(latents, prompts)),
            ("decoder", lambda images=images: vae.decode(images)),
            ("together", lambda latents=latents, prompts=prompts: vae.decode(unet(latents, prompts))),
        ):
            yield {"variant": name, "batch": batch, **bench.measure(call, batch)}


def attention_kernels(bench: Bench) -> Iterator[Row]:
    """The UNet with each of torch's attention kernels alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    unet, batch = bench.unet(), bench.usual_batch
    latents, prompts = bench.latents(batch, 8), bench.prompts(batch)
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    for name in names if bench.is_cuda else ("FLASH_ATTENTION", "MATH"):
        row = {"variant": name.lower(), "batch": batch}
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                yield {**row, **bench.measure(lambda: unet(latents, prompts), batch)}
        except RuntimeError as e:
            yield {**row, "error": first_line(e)}


def channels_last(bench: Bench) -> Iterator[Row]:
    """Both networks with their pixels' channels side by side."""
    import torch

    batch = bench.usual_batch
    unet, vae = (n.to(memory_format=torch.channels_last) for n in (bench.unet(), bench.vae()))
    latents = bench.latents(batch, 8).contiguous(memory_format=torch.channels_last)
    images = bench.latents(batch).contiguous(memory_format=torch.channels_last)
    prompts = bench.prompts(batch)
    yield {"variant": "unet", "batch": batch, **bench.measure(lambda: unet(latents, prompts), batch)}
    yield {"variant": "decoder", "batch": batch, **bench.measure(lambda: vae.decode(images), batch)}


def folded_doubling(bench: Bench) -> Iterator[Row]:
    """Each doubling of pixels and the convolution behind it as one convolution."""
    from musetalk.engines.musetalk.networks import fold_upsampling

    batch = bench.usual_batch
    unet, vae = fold_upsampling(bench.unet()), fold_upsampling(bench.vae())
    latents, prompts, images = bench.latents(batch, 8), bench.prompts(batch), bench.latents(batch)
    yield {"variant": "unet", "batch": batch, **bench.measure(lambda: unet(latents, prompts), batch)}
    yield {"variant": "decoder", "batch": batch, **bench.measure(lambda: vae.decode(images), batch)}


def decoders(bench: Bench) -> Iterator[Row]:
    """Full and tiny decoder, of whole faces and of the part that a mask uses."""
    from musetalk.engines.musetalk.region import RegionDecoder, full
    from musetalk.engines.musetalk.tiny import TinyFaceDecoder, decode_tiny_cuts

    engine, batch = bench.engine(), bench.usual_batch
    vae, images = bench.vae(), bench.latents(batch)
    tiny = engine.open_network("taesd").load(engine.device, engine.dtype)

    def of_part(rectangle: Rectangle) -> Callable[[Tensor], Tensor]:
        def decode_cuts(cuts: np.ndarray) -> Callable[[Tensor], Tensor]:
            return lambda latents: decode_tiny_cuts(tiny, latents, cuts.tolist())

        return TinyFaceDecoder(rectangle, decode_cuts, tiny.shape.counts, LATENT_SIDE).decode

    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "full, whole face": vae.decode,
        "full, 57 % of the face": RegionDecoder(vae, MASKED, images[:1]).decode,
        "tiny, whole face": of_part(full(FACE_SIZE)),
        "tiny, 57 % of the face": of_part(MASKED),
    }
    for name, decode in variants.items():
        yield {"variant": name, "batch": batch, **bench.measure(partial(decode, images), batch)}


def compiled(bench: Bench) -> Iterator[Row]:
    """torch.compile in two modes, with the seconds that compiling takes."""
    import torch

    if not bench.is_cuda:
        raise NotHereError("--compile is for cards")
    batch = bench.usual_batch
    latents, prompts, images = bench.latents(batch, 8), bench.prompts(batch), bench.latents(batch)
    for mode in ("default", "reduce-overhead"):
        unet, vae = bench.unet(), bench.vae()
        step, decode = torch.compile(unet, mode=mode), torch.compile(vae.decode, mode=mode)
        for name, call in (
            ("unet", lambda step=step: step(latents, prompts)),
            ("decoder", lambda decode=decode: decode(images)),
        ):
            start = time.perf_counter()
            call()
            bench.wait()
            seconds = significant(time.perf_counter() - start)
            row = {"variant": f"{name}, {mode}", "batch": batch, "compile_seconds": seconds}
            yield {**row, **bench.measure(call, batch)}


def captured_graph(bench: Bench) -> Iterator[Row]:
    """UNet and decoder replayed as one captured CUDA graph."""
    import torch

    if not bench.is_cuda:
        raise NotHereError("CUDA graphs are for cards")
    unet, vae = bench.unet(), bench.vae()
    for batch in (1, bench.usual_batch):
        latents, prompts = bench.latents(batch, 8), bench.prompts(batch)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # allocations of the first runs don't belong into the graph
            for _ in range(3):
                vae.decode(unet(latents, prompts))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            vae.decode(unet(latents, prompts))
        yield {"variant": "together", "batch": batch, **bench.measure(graph.replay, batch)}


def transfers(bench: Bench) -> Iterator[Row]:
    """Faces from the device to the host: plainly, through pinned memory, and one batch behind."""
    import torch

    batch = bench.usual_batch
    faces = torch.zeros(batch, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8, device=bench.device)
    yield {"variant": "plain", "batch": batch, **bench.measure(lambda: faces.cpu().numpy(), batch)}
    if not bench.is_cuda:
        raise NotHereError("pinned memory is for cards")
    pinned = [torch.empty(faces.shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def through_pinned() -> None:
        pinned[0].copy_(faces, non_blocking=True)
        torch.cuda.synchronize()

    yield {"variant": "pinned", "batch": batch, **bench.measure(through_pinned, batch)}
    stream, turn = torch.cuda.Stream(), [0]

    def one_behind() -> None:
        stream.synchronize()
        with torch.cuda.stream(stream):
            pinned[turn[0]].copy_(faces, non_blocking=True)
        turn[0] ^= 1

    yield {"variant": "pinned, double-buffered", "batch": batch, **bench.measure(one_behind, batch)}


def pasting(bench: Bench) -> Iterator[Row]:
    """Blending a face into its frame: the compositor on the CPU against the same sums on the device."""
    from musetalk.compositor import FrameCompositor

    face = np.random.RandomState(1).randint(0, 256, (FACE_SIZE, FACE_SIZE, 3), np.uint8)
    for size in ("512",) if bench.small else ("512", "1080p"):
        template = _scene_template("image", size)
        compositor = FrameCompositor(template)
        buffer = np.empty(compositor.buffer_shape, np.uint8)
        row = bench.measure(partial(compositor.compose_i420, 0, face, buffer), 1)
        yield {"variant": f"compositor on the CPU, {size}", "batch": 1, **row}
        blend = _blender(template, face, bench.device)
        yield {"variant": f"{bench.device}, {size}", "batch": 1, **bench.measure(blend, 1)}


def _blender(template: Template, face: np.ndarray, device: str) -> Callable[[], Tensor]:
    """Resizes the face to its box, blends it by the mask and brings the frame to the host."""
    import torch
    from torch.nn.functional import interpolate

    x1, y1, x2, y2 = template.bboxes[0]
    left, top = template.crop_boxes[0][:2]
    mask = template.masks[0][y1 - top : y2 - top, x1 - left : x2 - left]
    weights = torch.from_numpy(mask.copy()).to(device).float()[None, None] / 255
    frame = torch.from_numpy(template.frames[0].copy()).to(device).permute(2, 0, 1)[None]
    pixels = torch.from_numpy(face).to(device).permute(2, 0, 1)[None]

    def blend() -> Tensor:
        resized = interpolate(pixels.float(), (y2 - y1, x2 - x1), mode="bilinear")
        out = frame.clone()
        part = out[:, :, y1:y2, x1:x2]
        part.copy_((resized * weights + part * (1 - weights)).round())
        return out.cpu()

    return blend


def encoders(bench: Bench) -> Iterator[Row]:
    """x264 and, where the found ffmpeg has it, NVENC, fed with frames of 1080p."""
    from musetalk.media.ffmpeg import ffmpeg_path
    from musetalk.media.video import VideoWriter

    ffmpeg_path()
    frames = 4 if bench.small else 200
    width, height = SIZES["512"] if bench.small else SIZES["1080p"]
    audio = write_speech(bench.folder / "encoders.wav", frames, FPS)
    pictures = np.random.RandomState(1).randint(0, 256, (4, height * 3 // 2, width), np.uint8)

    def encode(encoder: str) -> None:
        output, encoding = bench.folder / "encoders.mp4", EncodingConfig(encoder=encoder)
        with VideoWriter(output, width, height, FPS, audio, encoding=encoding) as writer:
            for i in range(frames):
                writer.write(pictures[i % len(pictures)])
            writer.close()

    for encoder in ("libx264", "h264_nvenc"):
        try:
            yield {"variant": encoder, "batch": 1, **bench.measure(partial(encode, encoder), frames)}
        except OSError as e:
            yield {"variant": encoder, "error": first_line(e).replace(str(bench.folder), "")}


def _scene_template(kind: TemplateKind, size: str) -> Template:
    from musetalk.benchmark.scene import make_template
    from musetalk.templates.template import Template

    base = make_template(make_scene(kind, SIZES[size]))
    random = np.random.RandomState(3)
    shape = (1, 2 * LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    unique = len(set(base.unique))
    latents = [random.randn(*shape).astype(np.float32) for _ in range(unique)]
    parts = (base.frames[:unique], base.bboxes[:unique], latents)
    return Template.from_frames(*parts, base.masks[:unique], base.crop_boxes[:unique])


def _opened(bench: Bench, kind: TemplateKind, size: str, decoder: VaeDecoder) -> OpenedTemplate:
    from musetalk.compositor import FrameCompositor
    from musetalk.rendering import OpenedTemplate

    engine, template = bench.engine(decoder), _scene_template(kind, size)
    return OpenedTemplate("proof", template, engine, engine.open(template), FrameCompositor(template))


def pipelines(bench: Bench) -> Iterator[Row]:
    """Whole requests, from speech to mp4, with the time to the first frame."""
    from musetalk.file_rendering import Files, render_file
    from musetalk.pipeline import StageClock
    from musetalk.rendering import Request

    frames = 4 if bench.small else 250
    audio = write_speech(bench.folder / "speech.wav", frames, FPS)
    files = Files(audio, bench.folder / "pipeline.mp4")
    kinds: tuple[TemplateKind, ...] = ("image",) if bench.small else ("image", "video")
    sizes = ("512",) if bench.small else ("512", "1080p")
    for decoder in get_args(VaeDecoder):
        for kind, size in ((kind, size) for kind in kinds for size in sizes):
            opened, first = _opened(bench, kind, size, decoder), [0.0]

            def call(opened: OpenedTemplate = opened, first: list[float] = first) -> None:
                request = Request(FPS, bench.usual_batch)
                _, first[0] = render_file(opened, files, request, EncodingConfig(), StageClock())

            row = {"variant": f"{kind} {size}, {decoder} decoder", "batch": bench.usual_batch}
            row |= bench.measure(call, frames)
            yield {**row, "first_frame_seconds": significant(first[0])}


def sessions(bench: Bench) -> Iterator[Row]:
    """Sessions that ask the resident worker's scheduler for faces at once."""
    from musetalk.server.scheduler import Scheduler

    opened, batch = _opened(bench, "image", "512", "full"), bench.usual_batch
    prompts = np.random.RandomState(4).randn(batch, PROMPT_LENGTH, bench.engine().prompt_width)
    prompts = prompts.astype(np.float32)
    turns = 1 if bench.small else 4
    for count in SESSIONS[:2] if bench.small else SESSIONS:
        scheduler = Scheduler(bench.device, 1)
        generate = scheduler.generate(opened, threading.Event())

        def session(generate: Any = generate) -> None:
            for _ in range(turns):
                generate(prompts, [0] * batch)

        def call(session: Callable[[], None] = session, count: int = count) -> None:
            threads = [threading.Thread(target=session) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        with contextlib.closing(scheduler):
            yield {
                "variant": f"{count} sessions",
                "batch": batch,
                **bench.measure(call, count * turns * batch),
            }


def goldens(bench: Bench) -> Iterator[Row]:
    """The reference's frames of small networks against this device's, in levels."""
    from musetalk.engines.choice import create_engine
    from musetalk.tools.random_weights import write_random_weights
    from musetalk.weights.files import official_paths

    if not GOLDENS.is_file():
        raise NotHereError("the goldens come with the repository, not with an installed package")
    with np.load(GOLDENS) as file:
        golden = dict(file)
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        write_random_weights(Path(name), "tiny")
        for half in (False, True):
            config = EngineConfig("musetalk", fp16=half, runtime="torch", models=official_paths(Path(name)))
            engine: Any = create_engine("musetalk", config, bench.device)
            template = _golden_template(golden)
            found = np.stack(engine.open(template).generate(golden["audio_prompts"], [0, 1, 2]))
            levels = np.abs(found.astype(int) - golden["frames_bgr"])
            differs = {"mean_levels": significant(levels.mean()), "largest_levels": int(levels.max())}
            yield {"variant": engine.dtype, "batch": 3, **differs}


def _golden_template(golden: dict[str, np.ndarray]) -> Template:
    from musetalk.templates.template import Template

    latents = [np.concatenate([golden[f"masked_mean{i}"], golden[f"ref_mean{i}"]], axis=1) for i in range(3)]
    frames = [golden[f"crop{i}"] for i in range(3)]
    box = (0, 0, FACE_SIZE, FACE_SIZE)
    masks = [np.full((FACE_SIZE, FACE_SIZE), 255, np.uint8)] * 3
    return Template.from_frames(frames, [box] * 3, latents, masks, [box] * 3)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


TRIALS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    *(goldens, batches, decoders, pipelines, attention_kernels, channels_last, folded_doubling),
    *(captured_graph, transfers, pasting, encoders, sessions, compiled),
)
"""In the order of their weight: what the time doesn't suffice for is at the end."""
