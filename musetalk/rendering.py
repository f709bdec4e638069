"""The stages of one request: speech in, composed frames out, into the encoder.

features ∥ generator ∥ compositor ∥ encoder: every stage is a generator on a thread of its own; the caller's
thread feeds the encoder, so that a signal or an error there stops everything at once. Memory is bounded by
the queues, whatever the audio's length.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from musetalk.config import EncodingConfig
from musetalk.device import Device
from musetalk.errors import InputError
from musetalk.media.frame_folder import FrameFolder
from musetalk.pipeline import Pipeline, StageClock

if TYPE_CHECKING:
    import numpy as np

    from musetalk.compositor import FrameCompositor
    from musetalk.engines.base import Engine, Generator
    from musetalk.media.video import VideoWriter
    from musetalk.templates.template import Template

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
