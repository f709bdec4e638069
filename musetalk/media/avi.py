"""Raw pictures and raw sound in one pipe: an AVI stream without an end.

The decision a reader would question: AVI, because it counts. Its times are numbers of frames and of samples,
so what is written is locked by counting, and one pipe is enough, on Windows as well.
"""

from __future__ import annotations

import struct
from fractions import Fraction

PICTURE = b"00dc"
SOUND = b"01wb"
SAMPLE_BYTES = 2  # s16le, mono
_PCM = 1
_INTERLEAVED = 0x100


def chunk(kind: bytes, size: int) -> bytes:
    """What precedes `size` bytes of a picture or of sound; sizes are even."""
    return kind + struct.pack("<I", size)


def header(width: int, height: int, fps: Fraction, sample_rate: int) -> bytes:
    """The stream's beginning, for I420 pictures of even sides and mono 16-bit sound.

    Sizes of what has no end yet are 0.
    """
    size = width * height * 3 // 2
    main = struct.pack(
        "<14I", round(1_000_000 / fps), 0, 0, _INTERLEAVED, 0, 0, 2, size, width, height, 0, 0, 0, 0
    )
    picture = struct.pack("<3I2H4s5I", 40, width, height, 1, 12, b"I420", size, 0, 0, 0, 0)
    sound = struct.pack("<2H2I2HH", _PCM, 1, sample_rate, sample_rate * SAMPLE_BYTES, SAMPLE_BYTES, 16, 0)
    streams = _list(
        b"strl",
        _stream(b"vids", b"I420", (fps.denominator, fps.numerator), size, 0) + _chunk(b"strf", picture),
    ) + _list(
        b"strl",
        _stream(b"auds", b"\0" * 4, (SAMPLE_BYTES, sample_rate * SAMPLE_BYTES), 0, SAMPLE_BYTES)
        + _chunk(b"strf", sound),
    )
    headers = _list(b"hdrl", _chunk(b"avih", main) + streams)
    return b"RIFF" + struct.pack("<I", 0) + b"AVI " + headers + b"LIST" + struct.pack("<I", 0) + b"movi"


def _stream(kind: bytes, codec: bytes, rate: tuple[int, int], buffer: int, sample: int) -> bytes:
    """A stream's header; `rate` is the seconds of a picture or sample as a fraction."""
    fields = struct.pack(
        "<4s4sI2H8I2I", kind, codec, 0, 0, 0, 0, *rate, 0, 0, buffer, 0xFFFFFFFF, sample, 0, 0
    )
    return _chunk(b"strh", fields)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return chunk(kind, len(content)) + content + b"\0" * (len(content) % 2)


def _list(kind: bytes, content: bytes) -> bytes:
    return b"LIST" + struct.pack("<I", 4 + len(content)) + kind + content
