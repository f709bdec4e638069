"""What a file is, told by its first bytes: a picture, a clip, sound, or nothing that is known here.

The decision a reader would question: names are not asked first. Phones, chats and downloads rename files, and
a picture that is called .mp4 is a picture to whoever looks at it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from musetalk.config import IMAGE_SUFFIXES

Kind = Literal["image", "video"]
ContentKind = Literal["image", "video", "sound"]

LOOKED_AT = 1024  # bytes
_PICTURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"8BPS", b"\0\0\1\0", b"\xff\x0a", b"\0\0\0\x0cJXL "),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
)
_CLIPS = (
    *(b"\x1a\x45\xdf\xa3", b"FLV\1", b"OggS", b".RMF", b"DKIF", b"YUV4MPEG2", b"nut/multimedia"),
    *(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"\0\0\1\xba", b"\0\0\1\xb3", b"\0\0\0\1", b"\0\0\1\x67"),
    *(b"\x06\x0e\x2b\x34\x02\x05\x01\x01", b"\xb7\xd8\x00\x20\x37\x49\xda\x11"),
    *(b"\x1f\x07\0\x3f", b"\x1f\x07\0\xbf"),
)
_SOUNDS = (
    *(b"fLaC", b"ID3", b"FORM", b"caff", b"#!AMR", b".snd", b"RF64", b"wvpk", b"MAC ", b"TTA1", b"TTA2"),
    *(b"\x0bw", b"\x7f\xfe\x80\x01", b"riff\x2e\x91\xcf\x11", b"ADIF", b"MPCK", b"MP+", b"tBaK"),
    *(b"Creative Voice File\x1a", b"\xf8\x72\x6f\xba"),
)
_DEMUXERS = {  # the least sure of themselves
    **{b"\0\0\1\xba": "mpeg", b"\0\0\1\xb3": "mpegvideo"},
    **{b"\x1f\x07\0\x3f": "dv", b"\x1f\x07\0\xbf": "dv"},
}
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_TRANSPORT_PACKETS = (188, 192, 204)  # bytes


def kind_of(path: Path) -> Kind:
    """Whether `path` holds a picture or a clip; where its bytes say neither, what its name says.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as stream:
        known = kind_of_content(stream.read(LOOKED_AT))
    if known == "image" or known == "video":
        return known
    return "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"


def is_picture(path: Path) -> bool:
    """Whether `path`'s first bytes are a picture's; False for what can't be read."""
    try:
        with path.open("rb") as stream:
            return kind_of_content(stream.read(LOOKED_AT)) == "image"
    except OSError:
        return False


def demuxer_of(path: Path) -> str | None:
    """ffmpeg's demuxer for files that it would take for pictures because of their names; None for others."""
    try:
        with path.open("rb") as stream:
            return _DEMUXERS.get(stream.read(4))
    except OSError:
        return None


def is_heif(path: Path) -> bool:
    """Whether `path`'s first bytes are those of HEIC, which shares its container with AVIF."""
    try:
        with path.open("rb") as stream:
            head = stream.read(LOOKED_AT)
    except OSError:
        return False
    # the brands: the main one, and behind four bytes of version the others that the file keeps to
    brands = head[8:12] + head[16 : int.from_bytes(head[:4], "big")]
    return (
        head[4:8] == b"ftyp"
        and head[8:12] in _PICTURE_BRANDS
        and b"avif" not in brands
        and b"avis" not in brands
    )


def kind_of_content(head: bytes) -> ContentKind | None:
    """What begins with the `LOOKED_AT` bytes of `head`; a container of pictures and sound is a video."""
    box = head[4:8]
    if box == b"ftyp":
        return "image" if head[8:12] in _PICTURE_BRANDS else "video"
    if head[:4] == b"RIFF":
        return {b"WEBP": "image", b"AVI ": "video", b"WAVE": "sound"}.get(head[8:12])  # type: ignore[return-value]
    if head.startswith(_PICTURES):
        return "image"
    if head.startswith(_CLIPS) or box in _BOXES or _is_transport_stream(head):
        return "video"
    return "sound" if head.startswith(_SOUNDS) or _is_mpeg_audio(head) else None


def _is_mpeg_audio(head: bytes) -> bool:
    """A frame's sync, with a layer and rates that there are: MP2 and MP3, and AAC in ADTS or LOAS."""
    if len(head) < 4 or head[1] & 0xE0 != 0xE0:
        return False
    if head[0] != 0xFF:
        return head[0] == 0x56
    if head[1] & 0xF6 == 0xF0:
        return head[2] >> 2 & 15 < 13
    return head[1] & 0x18 != 0x08 and head[1] & 6 in (2, 4) and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3


def _is_transport_stream(head: bytes) -> bool:
    """Sync bytes at the distance of packets; M2TS puts four bytes of time before each."""
    return any(
        len(head) > start + 2 * size and all(head[start + i * size] == 0x47 for i in range(3))
        for size in _TRANSPORT_PACKETS
        for start in (0, size - 188 if size == 192 else 0)
    )
