"""Frames and sound → fragmented mp4 bytes that play while they are made, and the finished file at its side.

One ffmpeg process with raw frames in its stdin and fragments out of its stdout. The decisions a reader would
question: the encoder keeps no frame back and has no B-frames, so a fragment leaves as soon as its last frame
is in, at the price of a file some 10 % larger where all moves, and twice as large of a still portrait. And
the stream is cut into its boxes here, so that whoever serves it can let a viewer begin at a key frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from musetalk.config import EncodingConfig
from musetalk.errors import OutputError
from musetalk.media import avi, ffmpeg
from musetalk.media.audio import sound_track
from musetalk.media.video import COLOUR, encoder_options, timescale

if TYPE_CHECKING:
    import numpy as np

FRAGMENT_SECONDS = 0.12  # a fragment ends with the first frame at or behind this
KEY_SECONDS = 1.0  # between two key frames: where a viewer may begin
SOUND_RATE = 48_000  # Hz, of the AAC: its 1024 samples are then 21 ms
PICTURE_TRACK = 1
TEE_SYNTAX = "\\'|[] :"  # what ffmpeg's tee reads as more than a letter
NOT_A_KEY = 0x10000  # of a sample's flags, ISO 14496-12 8.8.3.1


class Fragment(NamedTuple):
    """A piece of the stream that ends where a box ends.

    Attributes:
        content: bytes; the first piece is the header that every viewer needs, each other one some frames.
        key: whether a viewer can begin here; true of the header as well.
    """

    content: bytes
    key: bool


@dataclass(frozen=True)
class Picture:
    """Shape of the frames: sides in pixels, both even, and frames per second."""

    width: int
    height: int
    fps: Fraction


class FragmentWriter:
    """Takes frames and, where it is live, sound on one thread; gives fragments on another.

    A context manager: leaving it ends the encoder. Whoever writes must have a reader of `fragments` beside
    him, for the encoder waits once its pipe is full.

    Args:
        picture: shape of the frames.
        sound: a file whose sound belongs to them, or the rate (Hz) of the samples that `write_sound` takes;
            None for silence without a track.
        encoding: encoder, speed and quality.
        finished: where the same pictures and sound are also written as an ordinary mp4, whole only once
            `finish` has returned; its folder exists.
        fragment_seconds: the shortest fragment but for the last. Less than a frame's time makes a fragment of
            each picture, which leaves once the next one is in; it costs two bytes in a hundred.
        key_seconds: between two key frames.

    Raises:
        InputError: `sound` isn't a readable file, or the encoder doesn't know `encoding`.
        EngineError: there is no ffmpeg.
    """

    def __init__(
        self,
        picture: Picture,
        sound: Path | int | None,
        encoding: EncodingConfig,
        *,
        finished: Path | None = None,
        fragment_seconds: float = FRAGMENT_SECONDS,
        key_seconds: float = KEY_SECONDS,
    ) -> None:
        self._picture = picture
        self._counted = isinstance(sound, int)
        self.frame_count = 0
        self.sample_count = 0
        if isinstance(sound, Path):
            ffmpeg.check_input_file(sound, "audio")
        options = _encoding(picture, encoding, key_seconds)
        muxing = _muxing(picture.fps, fragment_seconds)
        arguments = _arguments(picture, sound, options, muxing, finished)
        self._child = ffmpeg.Child(arguments, stdin=True, stdout=True)
        if isinstance(sound, int):
            start = avi.header(picture.width, picture.height, picture.fps, sound)
            self._send(memoryview(start))

    def __enter__(self) -> FragmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()

    def write(self, i420: np.ndarray) -> None:
        """Appends a frame, (H * 3 // 2, W) uint8, C-contiguous.

        Raises:
            OutputError: the encoder failed; its own words are in the message.
        """
        wanted = (self._picture.height * 3 // 2, self._picture.width)
        if i420.shape != wanted or i420.dtype.name != "uint8" or not i420.flags.c_contiguous:
            raise ValueError(f"frame of shape {i420.shape} {i420.dtype}, expected contiguous {wanted} uint8")
        if self._counted:
            self._send(memoryview(avi.chunk(avi.PICTURE, i420.nbytes)))
        self._send(i420.data.cast("B"))
        self.frame_count += 1

    def write_sound(self, samples: np.ndarray) -> None:
        """Appends (n,) int16 samples; frames and sound are to keep pace with each other.

        Raises:
            OutputError: the encoder failed.
        """
        if not self._counted or samples.dtype.name != "int16" or samples.ndim != 1:
            raise ValueError(f"sound of shape {samples.shape} {samples.dtype}, expected (n,) int16")
        if len(samples):
            content = samples.astype("<i2", copy=False).tobytes()
            self._send(memoryview(avi.chunk(avi.SOUND, len(content)) + content))
            self.sample_count += len(samples)

    def fragments(self) -> Iterator[Fragment]:
        """The header, then the fragments, as they are made; it ends with the stream."""
        header, pending = b"", b""
        while box := self._box():
            kind, content = box
            if kind in (b"ftyp", b"moov"):
                header += content
                if kind == b"moov":
                    yield Fragment(header, key=True)
            elif kind == b"moof":
                pending = content
            elif kind == b"mdat":
                yield Fragment(pending + content, begins_with_key(pending))

    def finish(self) -> None:
        """Says that no more is written; waits for the encoder. The rest of the fragments must be read.

        Raises:
            OutputError: the encoder failed or had no frame.
        """
        if self._child.finish() != 0 or not self.frame_count:
            raise self._failure()

    def abort(self) -> None:
        """Stops the encoder at once, from any thread; `fragments` then ends."""
        self._child.kill()

    def _send(self, content: memoryview) -> None:
        try:
            self._child.write(content)
        except (OSError, ValueError) as e:
            raise self._failure() from e

    def _box(self) -> tuple[bytes, bytes] | None:
        start = self._child.read(8)
        if len(start) < 8:
            return None
        size, kind = struct.unpack(">I4s", start)
        content = self._child.read(size - 8)
        return (kind, start + content) if len(content) == size - 8 else None

    def _failure(self) -> OutputError:
        words = self._child.complaint or "the encoder ended early"
        return OutputError(
            f"the stream can't be made 视频流编码失败: {words}",
            "check --encoder and the free disk space 请检查编码器和磁盘空间",
        )


def begins_with_key(moof: bytes) -> bool:
    """Whether a fragment has pictures and the first needs no other; ISO 14496-12 8.8.4 to 8.8.8."""
    for _, traf in filter(lambda box: box[0] == b"traf", _boxes(moof[8:])):
        boxes = dict(_boxes(traf))
        track, run = boxes.get(b"tfhd", b""), boxes.get(b"trun", b"")
        if int.from_bytes(track[4:8], "big") == PICTURE_TRACK and run:
            default = int.from_bytes(track[-4:], "big") if track[3] & 0x20 else 0
            return not _first_flags(run, default) & NOT_A_KEY
    return False


def _first_flags(run: bytes, default: int) -> int:
    """Flags of a track run's first sample; `default` where the run leaves them to its track."""
    flags = int.from_bytes(run[1:4], "big")
    at = 8 + (4 if flags & 1 else 0)
    if not flags & 0x404:
        return default
    if not flags & 4:
        at += (4 if flags & 0x100 else 0) + (4 if flags & 0x200 else 0)
    return int.from_bytes(run[at : at + 4], "big")


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        yield kind, content[at + 8 : at + size]
        at += max(size, 8)


def _encoding(picture: Picture, encoding: EncodingConfig, key_seconds: float) -> dict[str, Any]:
    options = {**encoder_options(encoding, ".mp4"), **COLOUR, "color_range": "tv", "map_metadata": -1}
    options["flags"] = "+global_header"  # tee doesn't say that mp4 wants the codec's parameters in front
    if encoding.encoder.startswith("libx264"):
        options["tune"] = "zerolatency"
    return options | {"g": max(1, round(picture.fps * Fraction(key_seconds))), "bf": 0}


def _arguments(
    picture: Picture,
    sound: Path | int | None,
    options: dict[str, Any],
    muxing: dict[str, Any],
    finished: Path | None,
) -> list[str]:
    import ffmpeg as builder

    source = _source(picture, counted=isinstance(sound, int))
    streams = [source["v:0"].filter("setparams", range="tv", **COLOUR)]
    if sound is not None:
        # numbered samples: a gap or a late start in a file would shift what was heard by the encoder
        heard = source["a:0"] if isinstance(sound, int) else ffmpeg.input_stream(sound)[sound_track(sound)]
        numbered = heard.filter("asetpts", "N/SR/TB")
        streams.append(numbered.filter("aformat", channel_layouts="mono|stereo", sample_rates=SOUND_RATE))
        options = options | {"acodec": "aac", "aac_coder": "fast"}
    if finished is None:  # tee would keep each packet back until the next one
        output = builder.output(*streams, "pipe:1", format="mp4", **muxing, **options)
    else:
        target = _two_targets(muxing, finished)
        output = builder.output(*streams, target, format="tee", **options)
    return list(builder.get_args(builder.overwrite_output(output)))


def _source(picture: Picture, *, counted: bool) -> Any:
    """stdin: frames alone, or counted together with their sound."""
    import ffmpeg as builder

    if counted:
        return builder.input("pipe:0", format="avi", probesize=32, analyzeduration=0, fpsprobesize=0)
    return builder.input(
        "pipe:0",
        format="rawvideo",
        pix_fmt="yuv420p",
        video_size=(picture.width, picture.height),
        framerate=f"{picture.fps.numerator}/{picture.fps.denominator}",
    )


def _muxing(fps: Fraction, fragment_seconds: float) -> dict[str, Any]:
    """ffmpeg's options for fragments that leave as soon as they are whole."""
    return {
        "movflags": "+frag_keyframe+empty_moov+default_base_moof",
        "frag_duration": round(fragment_seconds * 1_000_000),
        "flush_packets": 1,
        "video_track_timescale": timescale(fps),
    }


def _two_targets(muxing: dict[str, Any], finished: Path) -> str:
    """What ffmpeg's tee writes: fragments into stdout, and an ordinary file."""
    options = ":".join(f"{name}={value}" for name, value in muxing.items())
    scale = f"video_track_timescale={muxing['video_track_timescale']}"
    name = "".join(f"\\{c}" if c in TEE_SYNTAX else c for c in ffmpeg.file_url(finished))
    return f"[f=mp4:{options}]pipe\\:1|[f=mp4:movflags=+faststart:{scale}]{name}"
