"""A template's files: one image or clip, or a folder of images; their frames and their hash."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from musetalk.config import IMAGE_SUFFIXES
from musetalk.errors import InputError
from musetalk.files import file_sha256
from musetalk.media.kind import is_picture, kind_of
from musetalk.templates.timeline import Timeline

Item = TypeVar("Item")

log = logging.getLogger(__name__)


def progress(items: Iterable[Item], total: int | None, label: str) -> Iterator[Item]:
    """`items` under a bar on stderr when that is a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=label, unit="frame", disable=None, file=sys.stderr)


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

    def __init__(self, source: Path) -> None:
        """Look at `source`, an image, a video or a folder of images.

        Raises:
            InputError: missing, empty, unreadable, or a folder without images.
        """
        from musetalk.media.video import VideoReader

        self.files = source_files(source)
        self.moving = is_video(source)
        self._video = VideoReader(source) if self.moving and source.is_file() else None
        self.total = self._video.info.frame_count if self._video else len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 BGR frames, a folder's in natural order of their names.

        Raises:
            InputError: unreadable.
        """
        from musetalk.media.image import read_image

        return iter(self._video) if self._video else map(read_image, self.files)

    def timeline(self) -> Timeline | None:
        """A video's own time, once its frames have been read; None of images."""
        return Timeline.of(self._video.times, self._video.info.fps) if self._video else None
