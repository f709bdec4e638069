"""The plain way to make the same video, as a baseline for `python -m musetalk.benchmark compare`.

One step after the other, as the reference's inference script does it: all audio features, all faces, then
frame by frame a whole-frame blend by Pillow and a PNG file, then ffmpeg twice, PNGs to H.264 and once more
to add the sound, which encodes the pictures again with ffmpeg's defaults. Nothing else may use this module.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musetalk.engines.base import Engine, Generator, hear_all
from musetalk.geometry import Box
from musetalk.measurement import processor_seconds
from musetalk.media import ffmpeg
from musetalk.pipeline import StageClock
from musetalk.rendering import batched
from musetalk.templates.template import Template

CRF = "18"  # of the first pass


class PlainResult(NamedTuple):
    """What one video cost: frames, seconds of the whole, of processors, of each step."""

    frames: int
    processing_time: float
    cpu_time: float
    stages: dict[str, float]


def render_plainly(
    template: Template, engine: Engine, audio: Path, output: Path, fps: Fraction, batch_size: int, preset: str
) -> PlainResult:
    """Renders `audio` onto `template` step by step.

    Args:
        preset: x264's, of both passes; "medium" is ffmpeg's default and so the reference's.
    """
    from musetalk.media.audio import read_waveform

    clock, before = StageClock(), processor_seconds()
    with clock.stage("features"):
        waveform = np.concatenate(list(read_waveform(audio)))
        prompts = list(batched(hear_all(engine.listen(fps), [waveform]), batch_size))
    generator = engine.open(template)
    with clock.stage("generate"):
        shown = [template.position(i, fps) for i in range(sum(map(len, prompts)))]
        faces = list(_faces(shown, generator, prompts))
    with tempfile.TemporaryDirectory() as folder:
        with clock.stage("composite"):
            for i, face in enumerate(faces):
                _write_png(_composed(template, shown[i], face), Path(folder) / f"{i:08d}.png")
        with clock.stage("encode"):
            silent = Path(folder) / "silent.mp4"
            pictures = ["-f", "image2", "-framerate", f"{fps.numerator}/{fps.denominator}"]
            pictures += ["-i", str(Path(folder) / "%08d.png")]
            _encode([*pictures, "-vf", "format=yuv420p", "-crf", CRF], preset, silent)
            _encode(["-i", str(audio), "-i", str(silent)], preset, output)
    elapsed = time.perf_counter() - clock.started
    return PlainResult(len(faces), elapsed, processor_seconds() - before, clock.seconds)


def _faces(shown: list[int], generator: Generator, prompts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """A face per output frame; `shown` has the template's position of each."""
    done = 0
    for batch in prompts:
        yield from generator.generate(batch, shown[done : done + len(batch)])
        done += len(batch)


def _composed(template: Template, position: int, face: np.ndarray) -> np.ndarray:
    import cv2

    frame, (x1, y1, x2, y2) = template.frames[position].copy(), template.bboxes[position]
    face = cv2.resize(face, (x2 - x1, y2 - y1))
    return blend_whole_frame(
        frame, face, (x1, y1, x2, y2), template.masks[position], template.crop_boxes[position]
    )


def blend_whole_frame(
    frame: np.ndarray, face: np.ndarray, bbox: Box, mask: np.ndarray, crop: Box
) -> np.ndarray:
    """`face` blended into `frame` (H, W, 3) BGR by Pillow, the whole frame converted there and back."""
    from PIL import Image

    body = Image.fromarray(frame[:, :, ::-1])
    enlarged = body.crop(crop)
    enlarged.paste(Image.fromarray(face[:, :, ::-1]), (bbox[0] - crop[0], bbox[1] - crop[1]))
    body.paste(enlarged, crop[:2], Image.fromarray(mask).convert("L"))
    return np.array(body)[:, :, ::-1]


def _write_png(frame: np.ndarray, path: Path) -> None:
    import cv2

    path.write_bytes(cv2.imencode(".png", frame)[1].tobytes())


def _encode(arguments: Sequence[str], preset: str, target: Path) -> None:
    command = ["-y", *arguments, "-c:v", "libx264", "-preset", preset, ffmpeg.file_url(target)]
    with ffmpeg.Child(command) as child:
        if child.finish() != 0:
            raise ffmpeg.undecodable(target, "video", child)
