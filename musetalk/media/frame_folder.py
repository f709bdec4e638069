"""Frames as numbered lossless pictures in a folder that is filled only when the run ends well."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from musetalk.errors import OutputError
from musetalk.files import OWNER_NAME, claim, patiently, remove_file, remove_folder, replace_file, sweep

if TYPE_CHECKING:
    import numpy as np


SUFFIX = ".png"
UNFINISHED_PATTERN = r"\.[0-9a-f]{8}\.tmp"


class FrameFolder:
    """A folder of lossless frames, filled only when the run ends well; a new one is removed else.

    Numbered frames of an earlier, longer run are removed, so that the folder holds this run's only, and so
    are the unfinished ones of runs that were killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._made = not folder.exists()
        self._temporary = folder / f".{secrets.token_hex(4)}.tmp"

    def __enter__(self) -> FrameFolder:
        sweep(self.folder, UNFINISHED_PATTERN)
        try:
            self._temporary.mkdir(parents=True)
            self._owner = claim(self._temporary / OWNER_NAME)
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._owner.close()
            with contextlib.suppress(OSError):  # a later run sweeps it
                remove_folder(self._temporary)
            if kind is not None and self._made:
                with contextlib.suppress(OSError):  # something else is in it by now
                    patiently(self.folder.rmdir)

    def write(self, frame: np.ndarray) -> None:
        """Adds the next frame, (H, W, 3) uint8 BGR."""
        import cv2

        _, encoded = cv2.imencode(SUFFIX, frame, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        path = self._temporary / f"{self._count:08d}{SUFFIX}"
        try:
            path.write_bytes(encoded.tobytes())
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        self._count += 1

    def _publish(self) -> None:
        try:
            for file in sorted(self._temporary.glob(f"*{SUFFIX}")):
                replace_file(file, self.folder / file.name)
            for file in self.folder.glob("[0-9]" * 8 + SUFFIX):
                if int(file.stem) >= self._count:
                    remove_file(file)
        except OSError as e:
            raise _unwritable(self.folder, e) from e


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder} can't be written 无法写入: {error.strerror or error}",
        "choose another --frames_dir, or free some space",
    )
