"""What strangers send as files: copied in blocks, bounded, and told by its first bytes, never by its name."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from musetalk.errors import InputError, OutputError
from musetalk.files import claim, publish, remove_file, remove_folder, sweep
from musetalk.media.kind import LOOKED_AT, ContentKind, kind_of_content

Kind = Literal["picture", "sound"]

PORTRAITS_FOLDER = "portraits"  # in the folder of uploads: what templates are made of
ARRIVING = r"\.arriving-[0-9a-f]{8}"
LEFT_BEHIND = "speech-*"  # folders of speech files, where a killed worker left them
BLOCK = 1 << 20  # bytes
TAKEN: dict[Kind, tuple[ContentKind, ...]] = {"picture": ("image", "video"), "sound": ("sound", "video")}


def save_upload(source: IO[bytes], path: Path, kind: Kind, limit: int) -> str:
    """Copies an upload into a new file; returns its content's sha256.

    Args:
        limit: bytes.

    Raises:
        InputError: empty, too large, or nothing of that kind.
        OutputError: it can't be written.
    """
    with _kept(), path.open("xb") as target:
        return _copy(source, target, kind, limit)


def _copy(source: IO[bytes], target: IO[bytes], kind: Kind, limit: int) -> str:
    block, digest, size = source.read(LOOKED_AT), hashlib.sha256(), 0
    if kind_of_content(block) not in TAKEN[kind]:
        wanted = "picture or video 图片或视频" if kind == "picture" else "sound 音频"
        raise InputError(f"what was sent is no {wanted}", "send a usual file, complete")
    while block:
        size += len(block)
        if size > limit:
            raise InputError(f"the {kind} that was sent is larger than {limit} bytes", "send less")
        digest.update(block)
        target.write(block)
        block = source.read(BLOCK)
    return digest.hexdigest()


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"the upload can't be kept: {e.strerror}", "free disk space 请检查磁盘空间") from e


def keep_portrait(source: IO[bytes], folder: Path, limit: int) -> Path:
    """An upload under its content's sha256: the same bytes are one file, and no others ever overwrite it.

    Args:
        folder: of all uploads; `sweep_uploads` knows it.
        limit: bytes.

    Raises:
        InputError, OutputError: as `save_upload`.
    """
    portraits = folder / PORTRAITS_FOLDER
    arriving = portraits / f".arriving-{secrets.token_hex(4)}"
    with _kept(), contextlib.ExitStack() as stack:
        portraits.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context(claim(arriving))
        stack.callback(remove_file, arriving)
        stack.callback(stream.close)
        kept = portraits / _copy(source, stream, "picture", limit)
        stream.flush()
        publish(stream, arriving, kept)
    return kept


def sweep_uploads(folder: Path, oldest: float) -> None:
    """Removes kept portraits that came before `oldest`, seconds since 1970, and what a killed worker left."""
    sweep(folder / PORTRAITS_FOLDER, ARRIVING)
    for path in (*(folder / PORTRAITS_FOLDER).glob("[!.]*"), *folder.glob(LEFT_BEHIND)):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                remove_folder(path) if path.is_dir() else remove_file(path)
