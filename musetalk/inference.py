"""From audio and a cached template to an mp4: features ∥ generator ∥ compositor ∥ encoder.

Every stage is a generator on a thread of its own; the main thread feeds the encoder, so that a signal
or an error there stops everything at once. Memory is bounded by the queues, whatever the audio's length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import queue
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from musetalk.config import Defaults, EncodingConfig, EngineConfig, parse_fps
from musetalk.device import Device, resolve_device
from musetalk.engines import choose_engine, create_engine
from musetalk.errors import CacheError, InputError, OutputError
from musetalk.files import replace_file
from musetalk.pipeline import Pipeline, StageClock
from musetalk.store import TemplateMetadata, TemplateStore

if TYPE_CHECKING:
    import numpy as np

    from musetalk.compositor import FrameCompositor
    from musetalk.engines.base import Engine, Generator
    from musetalk.measurement import BenchmarkAnswer, Measurement
    from musetalk.media.video import VideoWriter
    from musetalk.template import Template

log = logging.getLogger(__name__)

FIRST_BATCH = 4  # frames; the following batches double up to the batch size
PROMPT_BATCHES = 4  # batches of audio prompts ahead of the generator
FACE_BATCHES = 2  # generated batches ahead of the compositor
FRAME_BUFFERS = 12  # composed frames ahead of the encoder


@dataclass(frozen=True)
class InferenceResult:
    """What one request made and what it cost.

    Attributes:
        duration: seconds of video.
        processing_time: seconds from the call to the finished file.
        time_to_first_frame: seconds until the encoder had the first frame.
        stages: seconds each stage worked, waiting left out.
        intervals: (start, end) seconds of each stage's work, when they were recorded.
    """

    template_id: str
    audio_path: str
    output_path: str
    fps: Fraction
    frames: int
    duration: float
    processing_time: float
    time_to_first_frame: float
    stages: dict[str, float]
    intervals: dict[str, list[tuple[float, float]]]
    engine: str
    device: Device
    dtype: str


class PlacedFace(NamedTuple):
    """A generated face and the cycle position it belongs to; None where the template shows no face."""

    position: int
    face: np.ndarray | None


class OpenedTemplate(NamedTuple):
    """A loaded template with the generator and compositor opened on it."""

    sha256: str
    template: Template
    engine: Engine
    generator: Generator
    compositor: FrameCompositor


class UltraFastRealtimeInference:
    """Renders speech onto cached templates; keeps the last template open between calls.

    Args:
        cache_dir: the folder of template caches.
        device: "auto", "cpu", "cuda:0"; a missing GPU falls back to the CPU. None: as in `config`.
        config: engine and model settings.
        encoding: shape of the output file.
    """

    def __init__(
        self,
        cache_dir: str | Path = Defaults.cache_dir,
        device: str | None = None,
        *,
        config: EngineConfig | None = None,
        encoding: EncodingConfig | None = None,
    ) -> None:
        self.store = TemplateStore(cache_dir)
        self.config = config or EngineConfig()
        self.encoding = encoding or EncodingConfig()
        self.device = resolve_device(device or self.config.device, strict=self.config.strict_device)
        self._opened: OpenedTemplate | None = None

    def ultra_fast_inference(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str | Fraction = Defaults.fps,
        *,
        frames_dir: str | Path | None = None,
        record: bool = False,
    ) -> InferenceResult:
        """Renders `audio_path` onto a template into `output_path`.

        Args:
            fps: frames per second; any real number, NTSC rates exact.
            frames_dir: also write each blended frame there, losslessly, as 00000000.png and so on.
            record: keep each stage's intervals in the result.

        Raises:
            InputError: audio or fps can't be used.
            CacheError: the template's cache is missing, damaged or made by another engine.
            WeightsError, EngineError: the engine can't run.
            OutputError: the output can't be written.
        """
        from musetalk.media.audio import probe_audio
        from musetalk.media.video import check_output_path

        clock = StageClock(record=record)
        rate = parse_fps(fps)
        # bad audio is refused before the networks are loaded; a warm renderer meets it soon enough
        asked = self._opened is None or sys.stderr.isatty()
        audio_duration = probe_audio(Path(audio_path)).duration if asked else None
        source = self.store.read_metadata(template_id).get("template_image_path", "")
        output = check_output_path(Path(output_path), inputs=[Path(audio_path), Path(str(source))])
        with clock.stage("load"):
            opened = self.open(template_id)
        engine = opened.engine
        log.info(
            "engine %s on %s, %s, batch %d", engine.name, engine.device, engine.dtype, self.config.batch_size
        )
        expected = None if audio_duration is None else int(audio_duration * rate)
        rendering = Rendering(opened, Path(audio_path), rate, self.config.batch_size, clock)
        folder = Path(frames_dir) if frames_dir else None
        frames, first_frame = rendering.write(output, self.encoding, folder, expected)
        log.info("%d frames at %s per second into %s: %s", frames, rate, output, clock.summary())
        return InferenceResult(
            template_id=template_id,
            audio_path=str(audio_path),
            output_path=str(output_path),
            fps=rate,
            frames=frames,
            duration=float(frames / rate),
            processing_time=time.perf_counter() - clock.started,
            time_to_first_frame=first_frame,
            stages=dict(clock.seconds),
            intervals=clock.intervals,
            engine=engine.name,
            device=Device(engine.device, self.device.requested),
            dtype=engine.dtype,
        )

    def measure(
        self,
        template_id: str,
        audio_path: str | Path,
        output_path: str | Path,
        fps: float | str | Fraction = Defaults.fps,
        runs: int = Defaults.benchmark_runs,
    ) -> Measurement:
        """`ultra_fast_inference` once to warm up, then `runs` times; raises what it raises.

        Raises:
            InputError: `runs` is below 1.
        """
        from musetalk.measurement import measure

        return measure(
            lambda: self.ultra_fast_inference(template_id, audio_path, output_path, fps, record=True), runs
        )

    def benchmark_performance(
        self, template_id: str, audio_path: str | Path, runs: int = Defaults.benchmark_runs
    ) -> BenchmarkAnswer:
        """What rendering `audio_path` costs, the video thrown away; see `measure`."""
        with tempfile.TemporaryDirectory() as folder:
            return self.measure(template_id, audio_path, Path(folder) / "benchmark.mp4", runs=runs).answer()

    def open(self, template_id: str) -> OpenedTemplate:
        """The template, ready to render; loaded again only when its cache has changed."""
        from musetalk.compositor import FrameCompositor

        metadata = self.store.read_metadata(template_id)
        sha256 = metadata.get("pkl_sha256")
        if self._opened is not None and sha256 == self._opened.sha256:
            return self._opened
        engine = self.create_engine(metadata)
        template, metadata = self.store.load(template_id)
        if metadata.get("engine_fingerprint", engine.fingerprint) != engine.fingerprint:
            raise CacheError(
                f"❌ template cache {template_id} was made with other weights 模板缓存与权重不匹配",
                "💡 请重新运行预处理 (run --preprocess again)",
            )
        generator = engine.open(dataclasses.replace(template, region_verdict=metadata.get("vae_region")))
        loaded = metadata.get("pkl_sha256", "")
        self._opened = OpenedTemplate(loaded, template, engine, generator, FrameCompositor(template))
        return self._opened

    def create_engine(self, metadata: TemplateMetadata) -> Engine:
        """The engine that a template's metadata and the configuration ask for."""
        name = choose_engine(self.config, template_engine=metadata.get("engine", "musetalk"))
        return create_engine(name, self.config, self.device.name)


class Rendering:
    """The stages of one request, and what they share."""

    def __init__(
        self, opened: OpenedTemplate, audio_path: Path, fps: Fraction, batch_size: int, clock: StageClock
    ) -> None:
        self.opened = opened
        self.audio_path = audio_path
        self.fps = fps
        self.batch_size = batch_size
        self.clock = clock

    def write(
        self, output: Path, encoding: EncodingConfig, folder: Path | None, expected: int | None
    ) -> tuple[int, float]:
        """Renders everything; returns the number of frames and the seconds to the first one."""
        from musetalk.media.video import VideoWriter

        width, height = self.opened.template.frame_size
        with contextlib.ExitStack() as stack:
            frames = stack.enter_context(FrameFolder(folder)) if folder else None
            writer = stack.enter_context(
                VideoWriter(output, width, height, self.fps, self.audio_path, encoding=encoding)
            )
            pipeline = stack.enter_context(Pipeline())
            free = self._buffers()
            batches = pipeline.overlap(self._audio_prompts(), "features", PROMPT_BATCHES)
            faces = pipeline.overlap(self._faces(batches), "generate", FACE_BATCHES)
            images = pipeline.overlap(
                self._composed(faces, pipeline, free, frames), "composite", FRAME_BUFFERS
            )
            stack.enter_context(single_threaded_opencv())
            return self._encode(images, free, writer, expected)

    def _buffers(self) -> queue.SimpleQueue[np.ndarray]:
        import numpy as np

        free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(FRAME_BUFFERS):
            free.put(np.empty(self.opened.compositor.buffer_shape, np.uint8))
        return free

    def _audio_prompts(self) -> Iterator[np.ndarray]:
        from musetalk.media.audio import read_waveform

        with self.clock.stage("features"):
            prompts = self.opened.engine.audio_prompts(read_waveform(self.audio_path), self.fps)
        yield from self.clock.timed("features", batched(prompts, self.batch_size))

    def _faces(self, batches: Iterable[np.ndarray]) -> Iterator[list[PlacedFace]]:
        """A generated face per output frame, a batch at a time: the generator goes on to the next at once."""
        template, generator = self.opened.template, self.opened.generator
        output_index = 0
        for batch in batches:
            positions = [template.position(output_index + i) for i in range(len(batch))]
            output_index += len(batch)
            faced = [i for i, position in enumerate(positions) if template.has_face(position)]
            faces: dict[int, np.ndarray] = {}
            if faced:
                with self.clock.stage("generate"):
                    generated = generator.generate(batch[faced], [positions[i] for i in faced])
                faces = dict(zip(faced, generated, strict=True))
            yield [PlacedFace(position, faces.get(i)) for i, position in enumerate(positions)]

    def _composed(
        self,
        batches: Iterable[list[PlacedFace]],
        pipeline: Pipeline,
        free: queue.SimpleQueue[np.ndarray],
        frames: FrameFolder | None,
    ) -> Iterator[np.ndarray]:
        """I420 images in buffers taken from `free`."""
        compositor = self.opened.compositor
        for position, face in itertools.chain.from_iterable(batches):
            buffer = pipeline.wait(free)
            if buffer is None:
                return
            with self.clock.stage("composite"):
                compositor.compose_i420(position, face, buffer)
                if frames is not None:
                    frames.write(compositor.compose_bgr(position, face))
            yield buffer

    def _encode(
        self,
        images: Iterable[np.ndarray],
        free: queue.SimpleQueue[np.ndarray],
        writer: VideoWriter,
        expected: int | None,
    ) -> tuple[int, float]:
        from tqdm import tqdm

        count, first_frame = 0, 0.0
        with tqdm(total=expected, desc="render 渲染", unit="frame", disable=None, file=sys.stderr) as bar:
            for image in images:
                with self.clock.stage("encode"):
                    writer.write(image)
                free.put(image)
                first_frame = first_frame or time.perf_counter() - self.clock.started
                count += 1
                bar.update()
        if not count:
            raise InputError("the audio is shorter than one frame 音频太短", "use a longer recording")
        with self.clock.stage("encode"):
            writer.close()
        return count, first_frame


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keeps OpenCV from starting a thread per core of the host for pictures as small as faces.

    The stages run in parallel already, and OpenCV doesn't know of a control group's quota.
    """
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def batched(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The rows of `blocks` in blocks that grow up to `size`, the last one shorter.

    The first are small, so that frames leave before a large batch is through.
    """
    import numpy as np

    rows: np.ndarray | None = None
    wanted = min(FIRST_BATCH, size)
    for block in blocks:
        rows = block if rows is None else np.concatenate([rows, block])
        while len(rows) >= wanted:
            yield rows[:wanted]
            rows, wanted = rows[wanted:], min(2 * wanted, size)
    if rows is not None and len(rows):
        yield rows


class FrameFolder:
    """A folder of lossless frames, filled only when the run ends well; a new one is removed else.

    Numbered frames of an earlier, longer run are removed, so that the folder holds this run's only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._made = not folder.exists()
        self._temporary = folder / f".{secrets.token_hex(4)}.tmp"

    def __enter__(self) -> FrameFolder:
        try:
            self._temporary.mkdir(parents=True)
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if kind is not None and self._made:
                with contextlib.suppress(OSError):  # something else is in it by now
                    self.folder.rmdir()

    def write(self, frame: np.ndarray) -> None:
        """Adds the next frame, (H, W, 3) uint8 BGR."""
        import cv2

        _, encoded = cv2.imencode(".png", frame, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        path = self._temporary / f"{self._count:08d}.png"
        try:
            path.write_bytes(encoded.tobytes())
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        self._count += 1

    def _publish(self) -> None:
        try:
            for file in sorted(self._temporary.iterdir()):
                replace_file(file, self.folder / file.name)
            for file in self.folder.glob("[0-9]" * 8 + ".png"):
                if int(file.stem) >= self._count:
                    file.unlink()
        except OSError as e:
            raise _unwritable(self.folder, e) from e


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder} can't be written 无法写入: {error.strerror or error}",
        "choose another --frames_dir, or free some space",
    )
