"""What strangers send as files: copied in blocks, bounded, and told by its first bytes, never by its name."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path
from typing import IO, Literal

from musetalk.errors import InputError, OutputError
from musetalk.files import remove_file, remove_folder, replace_file

Kind = Literal["picture", "sound"]

PORTRAITS_FOLDER = "portraits"  # in the folder of uploads: what templates are made of
BLOCK = 1 << 20  # bytes
HEAD = 16  # bytes that tell what a file is
PICTURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"BM": ".bmp",
    b"GIF8": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"\x1aE\xdf\xa3": ".mkv",
}
SOUNDS = {
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"ID3": ".mp3",
    b"\xff\xfb": ".mp3",
    b"\xff\xf3": ".mp3",
    b"\xff\xf2": ".mp3",
    b"\xff\xfa": ".mp3",
    b"\xff\xf1": ".aac",
    b"\xff\xf9": ".aac",
    b"\x1aE\xdf\xa3": ".webm",
    b"FORM": ".aiff",
    b"caff": ".caf",
    b"#!AMR": ".amr",
    b".snd": ".au",
    b"RF64": ".wav",
    b"0&\xb2u": ".wma",
}


def sniffed_suffix(head: bytes, kind: Kind) -> str | None:
    """The suffix that fits a file's first bytes; None when it is nothing of that kind."""
    if head[4:8] == b"ftyp":
        return ".mp4"
    if head[:4] == b"RIFF":
        inside = {b"WEBP": ("picture", ".webp"), b"AVI ": ("picture", ".avi"), b"WAVE": ("sound", ".wav")}
        found = inside.get(head[8:12], ("", ""))
        return found[1] if found[0] == kind else None
    known = PICTURES if kind == "picture" else SOUNDS
    return next((suffix for start, suffix in known.items() if head.startswith(start)), None)


def save_upload(source: IO[bytes], folder: Path, stem: str, kind: Kind, limit: int) -> tuple[Path, str]:
    """Copies an upload into `folder`; returns its path and its content's sha256.

    Args:
        stem: the file's name, which gets the suffix that its content has.
        limit: bytes.

    Raises:
        InputError: empty, too large, or nothing of that kind.
        OutputError: it can't be written.
    """
    head = source.read(HEAD)
    suffix = sniffed_suffix(head, kind)
    if suffix is None:
        wanted = "picture or video 图片或视频" if kind == "picture" else "sound 音频"
        raise InputError(f"the {stem} that was sent is no {wanted}", "send a usual file, complete")
    path, digest, size = folder / f"{stem}{suffix}", hashlib.sha256(), 0
    try:
        with path.open("wb") as target:
            block = head
            while block:
                size += len(block)
                if size > limit:
                    raise InputError(f"the {stem} that was sent is larger than {limit} bytes", "send less")
                digest.update(block)
                target.write(block)
                block = source.read(BLOCK)
    except OSError as e:
        raise OutputError(f"the upload can't be kept: {e.strerror}", "free disk space 请检查磁盘空间") from e
    return path, digest.hexdigest()


def keep_portrait(source: IO[bytes], folder: Path, limit: int) -> Path:
    """An upload under its content's sha256: the same bytes are one file, and no others ever overwrite it.

    Args:
        folder: of all uploads; `sweep_portraits` knows it.
        limit: bytes.

    Raises:
        InputError, OutputError: as `save_upload`.
    """
    portraits = folder / PORTRAITS_FOLDER
    portraits.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=portraits, prefix="arriving-", ignore_cleanup_errors=True
    ) as arriving:
        saved, sha256 = save_upload(source, Path(arriving), "portrait", "picture", limit)
        kept = portraits / f"{sha256}{saved.suffix}"
        replace_file(saved, kept)
    return kept


def sweep_portraits(folder: Path, oldest: float) -> None:
    """Removes the kept portraits that came before `oldest`, seconds since 1970."""
    for path in (folder / PORTRAITS_FOLDER).glob("*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                remove_folder(path) if path.is_dir() else remove_file(path)
