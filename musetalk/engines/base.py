"""The protocol between the pipeline and what generates faces.

An engine meets a template twice: `Engine.encode` once, at preprocessing, and a `Generator` opened
on the finished template, at every request. The generator may keep what it derives from a template's
frames (displacement fields, device copies of latents); the engine itself stays free of templates.
Speech meets a `Listener`: one per session, fed in pieces of any length, its state a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from musetalk.config import EngineName

if TYPE_CHECKING:
    import numpy as np

    from musetalk.geometry import Box
    from musetalk.templates.template import Template


@dataclass(frozen=True)
class FaceFrame:
    """One template frame with its face, as preprocessing hands it to an engine.

    Attributes:
        frame: (H, W, 3) uint8 BGR.
        bbox: (x1, y1, x2, y2) pixels of the frame, inside it, not empty.
        landmarks: (478, 2) or (68, 2) float32 pixels of the frame, smoothed over time in videos.
        landmarks_z: (478,) float32 depth in pixels, smaller is nearer; None for 68 points.
    """

    frame: np.ndarray
    bbox: Box
    landmarks: np.ndarray
    landmarks_z: np.ndarray | None


class Generator(Protocol):
    """Generates the faces of one template; several threads may ask it at once."""

    def generate(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> list[np.ndarray]:
        """Faces for `audio_prompts` (B, …) on the template's cycle positions `indices` (B).

        Every index has a face. Returns B uint8 BGR images that show the frame's bbox, each of
        any size: the compositor resizes them to the bbox.
        """
        ...


class Listener(Protocol):
    """Hears one session's speech in order and makes audio prompts of it.

    Frames are counted from the session's first sample, however its sound is cut into pieces.
    """

    def hear(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Audio prompts of the frames that `samples` complete, in blocks (k, …), k ≥ 1.

        Args:
            samples: (n,) float32 at 16 kHz, n ≥ 0, following what was heard before.
        """
        ...

    def flush(self) -> Iterator[np.ndarray]:
        """Audio prompts of the remaining floor(samples × fps / 16000) frames of all that was heard.

        Silence stands for what comes next. Hearing may go on afterwards, from there.
        """
        ...

    @property
    def state(self) -> Any:
        """What the listener remembers, a value that can be pickled; `Engine.listen` goes on from it."""
        ...


@runtime_checkable
class MixingEngine(Protocol):
    """An engine that generates faces of several templates in one batch."""

    def generate_mixed(
        self, requests: Sequence[tuple[Generator, np.ndarray, Sequence[int]]]
    ) -> list[list[np.ndarray]]:
        """For each generator, audio prompts and indices what `Generator.generate` would give."""
        ...


@runtime_checkable
class TemplateJudge(Protocol):
    """An engine that decides at preprocessing how a template is to be rendered."""

    def judge(self, template: Template) -> dict[str, Any]:
        """What the template's metadata is to hold of it, by key."""
        ...


@runtime_checkable
class Articulator(Protocol):
    """An engine whose audio prompts say how far the mouth moves: a request can ask for less or more."""

    def articulate(self, audio_prompts: np.ndarray, articulation: float) -> np.ndarray:
        """Audio prompts (B, …) with movements `articulation` times as large; closures stay closures."""
        ...


class Engine(Protocol):
    """What the toolkit asks of an engine.

    Attributes:
        name: "lite" or "musetalk".
        device: where it runs, e.g. "cpu", "cuda:0".
        dtype: precision it runs in: "float32", "float16", "bfloat16".
        fingerprint: changes when templates encoded earlier no longer fit this engine.
    """

    name: EngineName
    device: str
    dtype: str
    fingerprint: str

    def encode(self, faces: Iterable[FaceFrame]) -> Iterator[Any]:
        """What the engine consumes per frame, in order: arrays, or containers of arrays."""
        ...

    def listen(self, fps: Fraction, *, live: bool = False, state: Any = None) -> Listener:
        """A listener to one session's speech.

        Args:
            fps: frames per second of the session.
            live: prompts leave a fixed time behind the sound, at most 200 ms, and don't depend on how it
                is cut; otherwise a listener hears seconds ahead before it answers, which costs less.
            state: of an earlier listener at the same `fps`, to go on where that one was.
        """
        ...

    def open(self, template: Template) -> Generator:
        """A generator on `template`; raises CacheError when another engine made it."""
        ...


def hear_all(listener: Listener, waveform: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Audio prompts of floor(samples × fps / 16000) frames, in blocks (k, …), k ≥ 1, streamed.

    Args:
        waveform: float32 (n,) blocks at 16 kHz, of any length.
    """
    for block in waveform:
        yield from listener.hear(block)
    yield from listener.flush()
