"""A template's files: one image or clip, or a folder of images; their frames and their hash."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from musetalk.config import IMAGE_SUFFIXES, MAX_TEMPLATE_BYTES, PreprocessingConfig
from musetalk.errors import CancelledRun, InputError
from musetalk.files import file_sha256
from musetalk.media.kind import is_picture, kind_of
from musetalk.templates.timeline import Timeline

if TYPE_CHECKING:
    from musetalk.media.video import VideoReader

Item = TypeVar("Item")

SMALLER_SIDES = (1920, 1280, 960, 640)  # pixels, that a frame too large is advised to be shrunk to

log = logging.getLogger(__name__)


def progress(
    items: Iterable[Item], total: int | None, label: str, cancel: threading.Event | None = None
) -> Iterator[Item]:
    """`items` under a bar on stderr when that is a terminal.

    Raises:
        CancelledRun: `cancel` was set.
    """
    from tqdm import tqdm

    for item in tqdm(items, total=total, desc=label, unit="frame", disable=None, file=sys.stderr):
        if cancel is not None and cancel.is_set():
            raise CancelledRun("the request was cancelled 已取消", "")
        yield item


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key by which frame 2 comes before frame 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def is_video(source: Path) -> bool:
    """Whether a template source, which can be read, holds several frames: a video file or a folder."""
    return source.is_dir() or kind_of(source) == "video"


def source_files(source: Path) -> list[Path]:
    """The files that a template is made from: one image or video, or a folder's images in natural order.

    Raises:
        InputError: missing, empty, unreadable, or a folder without images.
    """
    from musetalk.media.ffmpeg import check_input_file

    try:
        if not source.is_dir():
            return [check_input_file(source, "template")]
        images = [path for path in source.iterdir() if not path.name.startswith(".") and _is_image(path)]
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"template {source} can't be read: {e}", "check the path and its rights") from e
    if not images:
        raise InputError(f"no images in folder {source}", f"it should hold {', '.join(IMAGE_SUFFIXES)} files")
    return sorted(images, key=natural_order)


def _is_image(path: Path) -> bool:
    """Whether a folder's entry is one of its images, or calls itself one and is to be complained of."""
    return path.suffix.lower() in IMAGE_SUFFIXES or (path.is_file() and is_picture(path))


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


class SourceFrames:
    """A template's frames, read while they are asked for, and their time.

    Attributes:
        moving: whether they follow each other: a video's, or a folder's images.
        total: how many there are, as far as the file says; None where it doesn't.
    """

    def __init__(self, source: Path, settings: PreprocessingConfig) -> None:
        """Look at `source`, an image, a video or a folder of images.

        Raises:
            InputError: missing, empty, unreadable, a folder without images, or larger than a template may be.
        """
        from musetalk.media.image import read_background
        from musetalk.preprocessing.idle_motion import IDLE_FRAMES

        self.source = source
        self.files = source_files(source)
        self.moving = is_video(source)
        self._max_side = settings.max_side
        self._background = read_background(settings.background)
        self._video = self._open_video(settings) if self.moving and source.is_file() else None
        self.total = self._video.frame_count if self._video else len(self.files)
        self._check_room(IDLE_FRAMES if settings.idle_motion and not self.moving else 1)
        if self._video is None and (settings.start or settings.seconds is not None):
            log.warning("--start and --seconds cut clips, %s is none 图片模板忽略 --start/--seconds", source)

    def _open_video(self, settings: PreprocessingConfig) -> VideoReader:
        from musetalk.media.video import VideoReader

        return VideoReader(
            self.source,
            start=settings.start,
            seconds=settings.seconds,
            max_side=self._max_side,
            background=self._background,
        )

    def _check_room(self, copies: int) -> None:
        """Whether the frames can be held, and whether they are made smaller, said before one is decoded."""
        from musetalk.media.image import image_size, shrunk_size

        stored = (
            (self._video.info.width, self._video.info.height) if self._video else image_size(self.files[0])
        )
        width, height = shrunk_size(*stored, self._max_side)
        count = (self.total or 1) * copies
        if count * width * height * 3 > MAX_TEMPLATE_BYTES:
            raise self._too_large(count, width, height)
        if (width, height) != stored:
            size = f"{stored[0]}×{stored[1]} to {width}×{height}"
            log.warning("%s is shrunk from %s (--max_side) 已缩小", self.source, size)

    def _too_large(self, count: int, width: int, height: int) -> InputError:
        """What a template of `count` frames would need, and what makes it fit."""
        sides = (side for side in SMALLER_SIDES if side < max(width, height))
        fitting = (side for side in sides if count * _bytes_at(width, height, side) <= MAX_TEMPLATE_BYTES)
        ways = [f"at --max_side {side} it fits" for side in itertools.islice(fitting, 1)]
        if self._video is not None:
            rate = self._video.info.fps
            ways.append(f"cut it to {int(MAX_TEMPLATE_BYTES / (width * height * 3) / rate)} s with --seconds")
        need = count * width * height * 3 / 1e9
        return InputError(
            f"{self.source} needs {need:.1f} GB for {count} frames at {width}×{height}, of "
            f"{MAX_TEMPLATE_BYTES / 1e9:.1f} GB that a template may take 模板过大",
            f"{', or '.join(ways) or 'take fewer images'} 请缩短视频或降低分辨率",
        )

    def too_large(self, count: int, shape: tuple[int, ...]) -> InputError:
        """The error of a source that turned out larger than its file says, after `count` frames."""
        return self._too_large(max(count, self.total or 0), shape[1], shape[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 BGR frames, a folder's in natural order of their names.

        Raises:
            InputError: unreadable.
        """
        from musetalk.media.image import read_image

        if self._video is not None:
            yield from self._video
            return
        for path in self.files:
            yield read_image(path, max_side=self._max_side, background=self._background)

    def timeline(self) -> Timeline | None:
        """A video's own time, once its frames have been read; None of images."""
        return Timeline.of(self._video.times, self._video.info.fps) if self._video else None


def _bytes_at(width: int, height: int, side: int) -> int:
    """Bytes of a frame of this proportion whose longer side is `side`."""
    return 3 * side * side * min(width, height) // max(width, height)
