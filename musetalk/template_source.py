"""A template's pictures before they become a template: frames, followed face, boxes, masks, preview.

The decision a reader would question: all frames are held at once. The cache that is made of them holds
them at once too, and boxes can be smoothed without lag only when the whole clip has been seen.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from musetalk.config import (
    IMAGE_SUFFIXES,
    MAX_TEMPLATE_BYTES,
    VIDEO_SUFFIXES,
    EngineConfig,
    EngineName,
    PreprocessingConfig,
)
from musetalk.engines.base import FaceFrame
from musetalk.errors import InputError, NoFaceError
from musetalk.files import file_sha256
from musetalk.geometry import NO_FACE, Box, crop_box
from musetalk.template import Template

if TYPE_CHECKING:
    from musetalk.faces.base import Face

Item = TypeVar("Item")

log = logging.getLogger(__name__)

PREVIEW_SIDE = 720  # pixels, the longer side of the operators' picture at most
PREVIEW_QUALITY = 85  # of its JPEG


def progress(items: Iterable[Item], total: int | None, label: str) -> Iterator[Item]:
    """`items` under a bar on stderr when that is a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=label, unit="frame", disable=None, file=sys.stderr)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key by which frame 2 comes before frame 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def is_video(source: Path) -> bool:
    """Whether a template source holds several frames: a video file or a folder."""
    return source.is_dir() or source.suffix.lower() in VIDEO_SUFFIXES


def source_files(source: Path) -> list[Path]:
    """The files that a template is made from: one image or video, or a folder's images in natural order.

    Raises:
        InputError: missing, empty, unreadable, or a folder without images.
    """
    from musetalk.media.ffmpeg import check_input_file

    try:
        if not source.is_dir():
            return [check_input_file(source, "template")]
        files = [path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"template {source} can't be read: {e}", "check the path and its rights") from e
    images = [path for path in files if not path.name.startswith(".")]
    if not images:
        raise InputError(f"no images in folder {source}", f"it should hold {', '.join(IMAGE_SUFFIXES)} files")
    return sorted(images, key=natural_order)


def source_sha256(source: Path) -> str:
    """Hex sha256 of a template's file, or of the names and contents of a folder's images.

    Raises:
        InputError: as `source_files`.
    """
    files = source_files(source)
    try:
        sums = [file_sha256(path) for path in files]
    except OSError as e:
        raise InputError(f"template {source} can't be read: {e}", "check the path and its rights") from e
    if not source.is_dir():
        return sums[0]
    entries = "".join(f"{path.name}\0{digest}\n" for path, digest in zip(files, sums, strict=True))
    return hashlib.sha256(entries.encode("utf-8", "surrogateescape")).hexdigest()


def read_frames(source: Path) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 BGR frames of an image, a video or a folder of images in natural name order.

    Raises:
        InputError: unreadable, no images in the folder, or images of different sizes.
    """
    from musetalk.media.image import read_image
    from musetalk.media.video import read_video

    for path in source_files(source):
        yield from read_video(path) if is_video(path) else (read_image(path),)


def _frame_total(source: Path) -> int | None:
    from musetalk.media.video import probe_video

    return probe_video(source).frame_count if source.is_file() and is_video(source) else None


@dataclass(frozen=True)
class TemplateSource:
    """The frames of a template with the face that it follows.

    Attributes:
        frames: (H, W, 3) uint8 BGR, all of one size.
        faces: the followed face per frame, smoothed over time; None where it isn't seen.
        bboxes: the boxes that the engine generates; `NO_FACE` without a face.
    """

    frames: list[np.ndarray]
    faces: Sequence[Face | None]
    bboxes: list[Box]

    @property
    def faced(self) -> list[int]:
        """Indices of the frames with a usable face."""
        return [i for i, bbox in enumerate(self.bboxes) if bbox != NO_FACE]

    def _face(self, index: int) -> Face:
        face = self.faces[index]
        assert face is not None, "a box comes from a face"
        return face

    def face_frame(self, index: int) -> FaceFrame:
        """What an engine encodes of a frame with a face."""
        face = self._face(index)
        landmarks = face.landmarks68 if face.mesh is None else face.mesh
        return FaceFrame(self.frames[index], self.bboxes[index], landmarks, face.mesh_z)

    def masks(
        self, settings: PreprocessingConfig, engine: EngineName, config: EngineConfig, device: str
    ) -> list[np.ndarray]:
        """The blend mask per frame, empty without a face."""
        from musetalk.compositor import prepare_mask
        from musetalk.faces import create_label_mapper

        mapper = create_label_mapper(settings.face_parser, engine, device)
        mode = "raw" if (engine, config.models.version) == ("musetalk", "v1") else settings.parsing_mode
        masks = [np.zeros((0, 0), np.uint8)] * len(self.frames)
        for i in progress(self.faced, len(self.faced), "masks 遮罩"):
            labels = mapper.label_map(self.frames[i], self._face(i), crop_box(self.bboxes[i]))
            masks[i], _ = prepare_mask(
                labels, self.bboxes[i], mode, settings.left_cheek_width, settings.right_cheek_width
            )
        return masks

    def template(self, latents: dict[int, Any], masks: Sequence[np.ndarray]) -> Template:
        """The finished template over its ping-pong cycle."""
        crops = [NO_FACE if bbox == NO_FACE else crop_box(bbox) for bbox in self.bboxes]
        every = [latents.get(i) for i in range(len(self.frames))]
        return Template.from_frames(self.frames, self.bboxes, every, masks, crops)

    def preview(self, masks: Sequence[np.ndarray]) -> bytes:
        """A JPEG of the first face: box green, landmarks yellow, the mask's outline red."""
        import cv2

        index = self.faced[0]
        image = self.frames[index].copy()
        x1, y1, x2, y2 = self.bboxes[index]
        cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), (0, 255, 0), 2)
        for x, y in self._face(index).landmarks68.round().astype(int).tolist():
            cv2.circle(image, (x, y), 2, (0, 255, 255), -1)
        outlines, _ = cv2.findContours(
            np.asarray(masks[index] > 127, np.uint8),
            cv2.RETR_EXTERNAL,
            cv2.CHAIN_APPROX_NONE,
            offset=crop_box(self.bboxes[index])[:2],
        )
        cv2.drawContours(image, outlines, -1, (0, 0, 255), 2)
        scale = min(1.0, PREVIEW_SIDE / max(image.shape[:2]))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, PREVIEW_QUALITY])[1].tobytes()


def _held(source: Path, frames: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames of `source`, each also kept in `frames`."""
    for frame in read_frames(source):
        if frames and frame.shape != frames[0].shape:
            raise InputError(f"the images in {source} differ in size", "make them all the same size")
        frames.append(frame)
        if len(frames) * frame.nbytes > MAX_TEMPLATE_BYTES:
            raise InputError(
                f"{source} is too long for a template: over {len(frames) - 1} frames of its size 模板过长",
                "cut it to less than a minute, or make its frames smaller 请缩短视频或降低分辨率",
            )
        yield frame


def find_faces(
    source: Path, settings: PreprocessingConfig, engine: EngineName, config: EngineConfig, device: str
) -> TemplateSource:
    """Reads a template's source and follows its largest face.

    Raises:
        InputError: the source can't be read, is too long, or its frames differ in size.
        NoFaceError: no frame shows a usable face.
    """
    from musetalk.faces import create_detector
    from musetalk.faces.base import face_boxes, smooth_track, track
    from musetalk.idle_motion import idle_frames

    moving = is_video(source)
    detector = create_detector(settings.face_detector, engine, device, moving)
    frames: list[np.ndarray] = []
    total = _frame_total(source)
    found = list(track(detector, progress(_held(source, frames), total, "detect 检测")))
    faces = smooth_track(found) if moving else found
    if settings.idle_motion:
        if moving:
            log.warning(
                "idle motion is for single images, %s moves by itself 视频模板忽略 --idle_motion", source
            )
        elif faces[0] is not None:
            frames, faces = map(list, zip(*idle_frames(frames[0], faces[0]), strict=True))
    margin = 0 if (engine, config.models.version) == ("musetalk", "v1") else settings.extra_margin
    bboxes = face_boxes(faces, frames[0].shape[:2], settings, margin)
    result = TemplateSource(frames, faces, bboxes)
    if not result.faced:
        raise NoFaceError(
            f"ValueError: 未检测到有效面部 (no usable face in {source})",
            "检查模板图片质量，调整bbox_shift参数 (use a clear, frontal face, at least 64 pixels wide)",
        )
    return result
