"""One stretch of speech becomes composed frames: features ∥ generator ∥ compositor, each on its own thread.

A rendering is a generator of frames and an object that says where it stands; it knows nothing of files. Who
takes the frames decides what becomes of them. Memory is bounded by the queues, whatever the speech's length.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from musetalk.config import Defaults
from musetalk.pipeline import Pipeline, StageClock

if TYPE_CHECKING:
    import numpy as np

    from musetalk.compositor import FrameCompositor
    from musetalk.engines.base import Engine, Listener
    from musetalk.engines.base import Generator as FaceGenerator
    from musetalk.templates.template import Template

log = logging.getLogger(__name__)

FIRST_BATCH = 4  # frames; the following batches double up to the batch size
PROMPT_BATCHES = 4  # batches of audio prompts ahead of the generator
FACE_BATCHES = 2  # generated batches ahead of the compositor
FRAME_BUFFERS = 12  # composed frames ahead of whoever takes them

GenerateFaces = Callable[["np.ndarray", Sequence[int]], "list[np.ndarray]"]
"""As `Generator.generate`: audio prompts (B, …) and B cycle positions to B faces."""


@dataclass
class OpenedTemplate:
    """A loaded template with the generator and compositor opened on it.

    Attributes:
        identity: tells this state of the template's cache from any other.
        abandoned: a thread of an ended rendering still uses the generator; no new rendering may.
    """

    identity: object
    template: Template
    engine: Engine
    generator: FaceGenerator
    compositor: FrameCompositor
    abandoned: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the template's arrays and of what was derived from them."""
        derived = getattr(self.generator, "kept_bytes", 0)
        return self.template.nbytes + self.compositor.kept_bytes + derived


class Position(NamedTuple):
    """Where a session stands; a value, so that a session may go on in another process.

    Attributes:
        frames: rendered so far, counted from the session's first sample.
        speech: state of the engine's listener; None at the beginning.
    """

    frames: int = 0
    speech: Any = None


class PlacedFace(NamedTuple):
    """A generated face and the cycle position it belongs to; None where the template shows no face."""

    position: int
    face: np.ndarray | None


class Frame(NamedTuple):
    """One composed frame.

    Attributes:
        i420: (H * 3 // 2, W) uint8 planar YUV 4:2:0, sides made even; the rendering's own buffer, used again
            once the next frame is asked for.
        placed: the face and cycle position that it shows.
    """

    i420: np.ndarray
    placed: PlacedFace


@dataclass
class RenderingInfo:
    """What a rendering is and how far it has come.

    Attributes:
        fps: frames per second.
        size: (width, height) pixels of the template's frames.
        engine, device, dtype: what generates.
        clock: seconds each stage worked.
        position: where the session stands behind the frames that were taken; `speech` is that of the
            beginning until the last one was taken.
    """

    fps: Fraction
    size: tuple[int, int]
    engine: str
    device: str
    dtype: str
    clock: StageClock
    position: Position = field(default_factory=Position)


@dataclass(frozen=True)
class Request:
    """How a stretch of speech is to be rendered.

    Attributes:
        fps: frames per second.
        batch_size: frames generated at once, at most.
        start: where the session stands; the template's cycle goes on from there.
        live: frames leave a fixed time behind the sound, none waits for a batch to fill.
        articulation: how far the mouth moves, 1 as usual, where the engine can be told.
        generate: makes the faces instead of the template's own generator, a scheduler say.
        cancel: once it is set, no further frame is made.
    """

    fps: Fraction
    batch_size: int
    start: Position = field(default_factory=Position)
    live: bool = False
    articulation: float = Defaults.articulation
    generate: GenerateFaces | None = None
    cancel: threading.Event | None = None


@dataclass(frozen=True)
class Conduct:
    """How a request is watched and steered while it runs.

    Attributes:
        generate: of an open template, what makes its faces, a scheduler say; its own generator by default.
        cancel: ends the request once it is set.
        progress: told the frames that are made and, where it is known, how many there will be.
        bar: whether a person watches a bar on stderr.
    """

    generate: Callable[[OpenedTemplate], GenerateFaces] | None = None
    cancel: threading.Event | None = None
    progress: Callable[[int, int | None], None] | None = None
    bar: bool = True


def render(
    opened: OpenedTemplate,
    speech: Iterable[np.ndarray],
    request: Request,
    clock: StageClock | None = None,
) -> tuple[Generator[Frame, None, None], RenderingInfo]:
    """The frames of `speech` on a template, and what is known of them.

    All frames together bring the session to floor(samples × fps / 16000). Closing the iterator stops every
    stage; where one is held up in a native call for longer, the opened template is marked abandoned.

    Args:
        speech: float32 (n,) blocks at 16 kHz, of any length.
        clock: counts the stages' seconds; by default a new one.
    """
    template, engine = opened.template, opened.engine
    info = RenderingInfo(
        fps=request.fps,
        size=template.frame_size,
        engine=engine.name,
        device=engine.device,
        dtype=engine.dtype,
        clock=clock or StageClock(),
        position=request.start,
    )
    return _Rendering(opened, request, info).frames(speech), info


class _Rendering:
    """The stages of one rendering, and what they share."""

    def __init__(self, opened: OpenedTemplate, request: Request, info: RenderingInfo) -> None:
        self.opened = opened
        self.request = request
        self.clock = info.clock
        self.info = info

    def frames(self, speech: Iterable[np.ndarray]) -> Generator[Frame, None, None]:
        limit_opencv_threads()
        start = self.request.start
        listener = self.opened.engine.listen(self.request.fps, live=self.request.live, state=start.speech)
        pipeline, free = Pipeline(self.request.cancel), self._buffers()
        try:
            with pipeline:
                prompts = pipeline.overlap(self._prompts(listener, speech), "features", PROMPT_BATCHES)
                faces = pipeline.overlap(self._faces(prompts), "generate", FACE_BATCHES)
                composed = pipeline.overlap(self._composed(faces, pipeline, free), "composite", FRAME_BUFFERS)
                for count, frame in enumerate(composed, start.frames + 1):
                    self.info.position = Position(count, start.speech)
                    yield frame
                    free.put(frame.i420)
                if not (self.request.cancel and self.request.cancel.is_set()):
                    self.info.position = Position(self.info.position.frames, listener.state)
        finally:
            self.opened.abandoned |= pipeline.abandoned

    def _buffers(self) -> queue.SimpleQueue[np.ndarray]:
        import numpy as np

        free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(FRAME_BUFFERS):
            free.put(np.empty(self.opened.compositor.buffer_shape, np.uint8))
        return free

    def _prompts(self, listener: Listener, speech: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        blocks = self._articulated(self._heard(listener, speech))
        return blocks if self.request.live else batched(blocks, self.request.batch_size)

    def _heard(self, listener: Listener, speech: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """What the listener makes of the speech; waiting for more of it is no work."""
        for block in speech:
            yield from self.clock.timed("features", listener.hear(block))
        yield from self.clock.timed("features", listener.flush())

    def _articulated(self, prompts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        from musetalk.engines.base import Articulator

        engine, articulation = self.opened.engine, self.request.articulation
        if articulation == 1:
            return prompts
        if not isinstance(engine, Articulator):
            log.warning("⚠️ articulation says nothing to the engine %s 该引擎不支持此参数", engine.name)
            return prompts
        return (engine.articulate(block, articulation) for block in prompts)

    def _faces(self, batches: Iterable[np.ndarray]) -> Iterator[list[PlacedFace]]:
        """A generated face per output frame, a batch at a time: the generator goes on to the next at once."""
        template = self.opened.template
        generate = self.request.generate or self.opened.generator.generate
        output_index = self.request.start.frames
        for batch in batches:
            positions = [template.position(output_index + i, self.request.fps) for i in range(len(batch))]
            output_index += len(batch)
            faced = [i for i, position in enumerate(positions) if template.has_face(position)]
            faces: dict[int, np.ndarray] = {}
            if faced:
                with self.clock.stage("generate"):
                    generated = generate(batch[faced], [positions[i] for i in faced])
                faces = dict(zip(faced, generated, strict=True))
            yield [PlacedFace(position, faces.get(i)) for i, position in enumerate(positions)]

    def _composed(
        self, batches: Iterable[list[PlacedFace]], pipeline: Pipeline, free: queue.SimpleQueue[np.ndarray]
    ) -> Iterator[Frame]:
        """Frames in buffers taken from `free`."""
        compositor = self.opened.compositor
        for placed in itertools.chain.from_iterable(batches):
            buffer = pipeline.wait(free)
            if buffer is None:
                return
            with self.clock.stage("composite"):
                compositor.compose_i420(placed.position, placed.face, buffer)
            yield Frame(buffer, placed)


def limit_opencv_threads() -> None:
    """Keeps OpenCV from starting a thread per core of the host for pictures as small as faces.

    The stages run in parallel already, and OpenCV doesn't know of a control group's quota. It is a setting
    of the whole process, so it is made once and stays.
    """
    import cv2

    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


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
