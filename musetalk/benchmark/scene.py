"""What the benchmark renders: templates and sound made from the bundled portrait and sentence.

The decision a reader would question: the picture is enlarged for larger sizes, and a video is the picture
swaying. Both are smoother than a camera's, which the encoder likes; figures of real clips with grain are
lower, and every comparison runs on the same frames.
"""

from __future__ import annotations

import time
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from musetalk.config import FACE_SIZE, EngineName, PreprocessingConfig
from musetalk.errors import InputError
from musetalk.geometry import Box, crop_box
from musetalk.media.audio import SAMPLE_RATE
from musetalk.templates.template import Template
from musetalk.tools.demo import PORTRAIT, SPEECH
from musetalk.whisper import frame_count

if TYPE_CHECKING:
    from musetalk.engines.base import FaceFrame

TemplateKind = Literal["image", "video"]

PORTRAIT_FACE = (179 / 512, 51 / 512, 270 / 512, 187 / 512)  # of the portrait's width and height
SIZES = {
    "256": (256, 256),
    "512": (512, 512),
    "720p": (1280, 720),
    "1080p": (1920, 1080),
    "1440p": (2560, 1440),
    "4k": (3840, 2160),
}
VIDEO_FRAMES = 48
VIDEO_BYTES = 400 << 20  # of a video template's frames; larger pictures get fewer
SWAY = 0.015  # of the frame's width
ZOOM = 0.01
MOUTH_SHAPES = 8  # different faces of a stand-in engine


@dataclass(frozen=True)
class Scene:
    """Frames (H, W, 3) uint8 BGR with the place of the face in each."""

    frames: list[np.ndarray]
    bboxes: list[Box]


def make_scene(kind: TemplateKind, size: tuple[int, int]) -> Scene:
    """The bundled portrait on a (width, height) canvas: one picture, or as many swaying ones as fit."""
    picture, bbox = _portrait(size)
    if kind == "image":
        return Scene([picture], [bbox])
    count = max(8, min(VIDEO_FRAMES, VIDEO_BYTES // picture.nbytes))
    moved = [_swayed(picture, bbox, i / VIDEO_FRAMES) for i in range(count)]
    return Scene([frame for frame, _ in moved], [box for _, box in moved])


def _portrait(size: tuple[int, int]) -> tuple[np.ndarray, Box]:
    """The portrait at the canvas's height in its middle, its edges mirrored outwards, and its face's box."""
    import cv2

    from musetalk.media.image import read_image

    width, height = size
    side = min(width, height)
    picture = cv2.resize(read_image(PORTRAIT), (side, side), interpolation=cv2.INTER_CUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    margins = (top, height - side - top, left, width - side - left)
    x1, y1, x2, y2 = (round(part * side) for part in PORTRAIT_FACE)
    bbox = (x1 + left, y1 + top, x2 + left, y2 + top)
    return cv2.copyMakeBorder(picture, *margins, cv2.BORDER_REFLECT), bbox


def _swayed(picture: np.ndarray, bbox: Box, phase: float) -> tuple[np.ndarray, Box]:
    """The picture moved, turned and enlarged a little, as a person in front of a camera moves."""
    import cv2

    height, width = picture.shape[:2]
    swing, bob = np.sin(2 * np.pi * phase), np.sin(4 * np.pi * phase + 1)
    x1, y1, x2, y2 = bbox
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    motion = cv2.getRotationMatrix2D(middle, float(swing), 1 + ZOOM * float(bob))
    motion[:, 2] += (SWAY * width * swing, SWAY * width * bob / 2)
    frame = cv2.warpAffine(picture, motion, (width, height), borderMode=cv2.BORDER_REFLECT)
    dx, dy = (motion[:, :2] @ middle + motion[:, 2] - middle).round().astype(int).tolist()
    return frame, (x1 + dx, y1 + dy, x2 + dx, y2 + dy)


def make_template(scene: Scene) -> Template:
    """A template without a face detector: known boxes, ovals for faces, the frame's number as latent."""
    import cv2

    from musetalk.faces.labels import LABEL_SIDE, SKIN
    from musetalk.preprocessing.blend_mask import prepare_mask

    labels = np.zeros((LABEL_SIDE, LABEL_SIDE), np.uint8)
    middle, axes = (LABEL_SIDE // 2, LABEL_SIDE // 2), (LABEL_SIDE // 4, LABEL_SIDE // 3)
    cv2.ellipse(labels, middle, axes, 0, 0, 360, SKIN, -1)
    cheeks = PreprocessingConfig.left_cheek_width, PreprocessingConfig.right_cheek_width
    masks = [prepare_mask(labels, bbox, "jaw", *cheeks)[0] for bbox in scene.bboxes]
    latents = [np.array([i], np.float32) for i in range(len(scene.frames))]
    return Template.from_frames(
        scene.frames, scene.bboxes, latents, masks, [crop_box(bbox) for bbox in scene.bboxes]
    )


def write_source(scene: Scene, folder: Path) -> Path:
    """The scene as a file to preprocess: a PNG, or an mp4 at 25 frames per second."""
    import cv2

    from musetalk.config import EncodingConfig
    from musetalk.media.video import VideoWriter

    if len(scene.frames) == 1:
        path = folder / "portrait.png"
        path.write_bytes(cv2.imencode(".png", scene.frames[0])[1].tobytes())
        return path
    path = folder / "portrait.mp4"
    height, width = scene.frames[0].shape[:2]
    with VideoWriter(path, width, height, Fraction(25), None, EncodingConfig(), "bgr24") as writer:
        for frame in scene.frames:
            writer.write(frame)
    return path


def write_speech(path: Path, frames: int, fps: Fraction) -> Path:
    """The bundled sentence over and over, as 16-bit WAV just long enough for `frames` video frames."""
    from musetalk.media.audio import read_waveform

    samples = (np.concatenate(list(read_waveform(SPEECH))) * 32767).astype("<i2")
    missing = -(-frames * SAMPLE_RATE * fps.denominator // fps.numerator)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        while missing > 0:
            file.writeframesraw(samples[:missing].tobytes())
            missing -= len(samples)
    return path


class FrameCounter:
    """A listener whose audio prompts are the frames' numbers (k, 1) float32, each as soon as it is over.

    Args:
        fps: frames per second.
        state: samples heard and frames numbered so far.
    """

    def __init__(self, fps: Fraction, state: tuple[int, int] | None = None) -> None:
        self.fps = fps
        self.state = state or (0, 0)

    def hear(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """The numbers of the frames that `samples` complete."""
        heard, numbered = self.state
        heard += len(samples)
        complete = frame_count(heard, self.fps)
        self.state = heard, complete
        if complete > numbered:
            yield np.arange(numbered, complete, dtype=np.float32)[:, None]

    def flush(self) -> Iterator[np.ndarray]:
        """Nothing: every frame is numbered when it is over."""
        return iter(())


class StandInEngine:
    """An engine that only takes time: its faces are made beforehand, its prompts are frame numbers.

    Args:
        milliseconds: slept per face, as a GPU would be waited for; 0 measures the pipeline alone.
    """

    device = "none"
    dtype = "none"
    fingerprint = "stand-in"

    def __init__(self, milliseconds: float) -> None:
        self.seconds = milliseconds / 1000
        self.name = cast(EngineName, f"sleep:{milliseconds:g}" if milliseconds else "null")

    def encode(self, faces: Iterable[FaceFrame]) -> Iterator[np.ndarray]:
        """Nothing: `make_template` makes the latents of stand-in templates."""
        return iter(())

    def listen(
        self, fps: Fraction, *, live: bool = False, state: tuple[int, int] | None = None
    ) -> FrameCounter:
        """Prompts are frame numbers (k, 1) float32."""
        return FrameCounter(fps, state)

    def open(self, template: Template) -> StandInGenerator:
        """A generator of the template's first face, its mouth moved."""
        x1, y1, x2, y2 = template.original_bbox
        return StandInGenerator(_talking(template.frames[0][y1:y2, x1:x2]), self.seconds)


class StandInGenerator:
    """Hands out faces (256, 256, 3) in turn, after a sleep."""

    def __init__(self, faces: list[np.ndarray], seconds: float) -> None:
        self.faces = faces
        self.seconds = seconds

    def generate(self, audio_prompts: np.ndarray, indices: Sequence[int]) -> list[np.ndarray]:
        """One face per prompt."""
        time.sleep(self.seconds * len(indices))
        return [self.faces[int(number) % len(self.faces)] for number in audio_prompts[:, 0]]


def _talking(face: np.ndarray) -> list[np.ndarray]:
    """`face` at the networks' size with its lower half drawn down by up to a tenth."""
    import cv2

    face = cv2.resize(face, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)
    x, y = (grid.astype(np.float32) for grid in np.meshgrid(np.arange(FACE_SIZE), np.arange(FACE_SIZE)))
    below = np.clip(y / FACE_SIZE - 0.5, 0, 0.5) * 2
    shapes = []
    for i in range(MOUTH_SHAPES):
        open_by = FACE_SIZE * 0.1 * np.sin(np.pi * i / MOUTH_SHAPES)
        shapes.append(cv2.remap(face, x, y - np.float32(open_by) * below, cv2.INTER_LINEAR))
    return shapes


def parse_stand_in(text: str) -> float | None:
    """Milliseconds per face of "null" or "sleep:MS"; None for an engine's own name.

    Raises:
        InputError: the milliseconds are no number of at least 0.
    """
    if text == "null":
        return 0.0
    if not text.startswith("sleep:"):
        return None
    try:
        milliseconds = float(text.removeprefix("sleep:"))
        if not 0 <= milliseconds < float("inf"):
            raise ValueError(milliseconds)
    except ValueError as e:
        raise InputError(f"engine is {text!r}", "write sleep:8 for 8 ms per face") from e
    return milliseconds
