"""The protocol between the pipeline and what generates faces.

An engine meets a template twice: `Engine.encode` once, at preprocessing, and a `Generator` opened
on the finished template, at every request. The generator may keep what it derives from a template's
frames (displacement fields, device copies of latents); the engine itself stays free of templates.
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
    """Generates the faces of one template."""

    def generate(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> list[np.ndarray]:
        """Faces for `audio_prompts` (B, …) on the template's cycle positions `indices` (B).

        Every index has a face. Returns B uint8 BGR images that show the frame's bbox, each of
        any size: the compositor resizes them to the bbox.
        """
        ...


@runtime_checkable
class TemplateJudge(Protocol):
    """An engine that decides at preprocessing how a template is to be rendered."""

    def judge(self, template: Template) -> dict[str, Any]:
        """What the template's metadata is to hold of it, by key."""
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

    def audio_prompts(self, waveform: Iterable[np.ndarray], fps: Fraction) -> Iterator[np.ndarray]:
        """Conditioning of floor(samples × fps / 16000) frames, in blocks (k, …), k ≥ 1, streamed.

        `waveform` yields float32 (n,) blocks at 16 kHz, of any length.
        """
        ...

    def open(self, template: Template) -> Generator:
        """A generator on `template`; raises CacheError when another engine made it."""
        ...
