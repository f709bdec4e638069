"""Video files → BGR frames, and frames plus a sound file → a finished video.

Both directions are one ffmpeg process with raw frames in a pipe. Frames are read as they are stored,
each exactly once, and their time stamps beside them; the writer's frames are evenly spaced at an exact
rational rate.
"""

from __future__ import annotations

import logging
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from musetalk.config import MAX_FPS, OUTPUT_SUFFIXES, EncodingConfig
from musetalk.device import usable_cores
from musetalk.errors import InputError, OutputError
from musetalk.files import claim, publish, remove_file, sweep
from musetalk.media import ffmpeg
from musetalk.media.audio import sound_track
from musetalk.media.colour import beyond_sdr, unsaid_matrix, write_table
from musetalk.media.encoders import shaping_options
from musetalk.media.image import check_frame_size, shrunk_size
from musetalk.media.layers import WHITE, Background, over
from musetalk.media.stream_info import FirstFrame, Report, chosen_track, says_interlaced

PixelFormat = Literal["yuv420p", "bgr24"]

MIN_TIMESCALE = 10_000  # ticks per second of an mp4's picture track
END_GRACE = 5.0  # seconds in which an encoder that failed may say why
TEMPORARY_STEM = 40  # characters of the output's name that its temporary file keeps
NEARLY_SQUARE = 0.01  # of a pixel's side; less is the rounding of a scaled picture's aspect
# containers without an index: ffmpeg's seeking lands on a later key frame in them, or nowhere
UNINDEXED = ("mpegts", "mpeg", "mpegvideo", "h264", "hevc", "obu", "m4v")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own leave WebM's second picture away
_STAMP = re.compile(r"frame:\d+ +pts:(-?\d+|NOPTS)")
_MARK = "told"  # a frame's metadata entry, without which its time stamp isn't printed
MP4_SUFFIXES = (".mp4", ".mov")  # AAC; Matroska can't say where AAC's last packet ends, so it takes Opus
SOUND_SHAPES = {  # FLAC's is the source's own
    "aac": {"channel_layouts": "mono|stereo", "sample_rates": "44100|48000"},
    "opus": {"channel_layouts": "mono|stereo", "sample_rates": "44100|48000"},
    "flac": {"channel_layouts": "mono|stereo"},
}
SOUND_OPTIONS = {
    # aac's default coder takes twice the time and is further from what it was given
    "aac": {"acodec": "aac", "aac_coder": "fast"},
    "opus": {"acodec": "libopus"},
    "flac": {"acodec": "flac", "strict": "experimental"},  # in mp4, for ffmpeg before 5
}
WEBM_CODECS = ("vp8", "vp9", "av1", "vpx")

COLOUR = {"colorspace": "smpte170m", "color_primaries": "smpte170m", "color_trc": "smpte170m"}
# swscale's quick default paths are up to 1.4 levels off on average
SCALER = "bilinear+accurate_rnd+full_chroma_int"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        width, height: square pixels, after the rotation that its metadata asks for.
        fps: frames per second, the average where the rate varies.
        duration: seconds as the container states them, None where it doesn't.
        frame_count: duration × fps, an estimate good enough for a progress bar.
        track: index of the picture track that players show.
        first: what its first picture was decoded to.
        interlaced: pictures hold two fields of different times.
        alpha_decoder: the decoder that gives the transparency which the usual one leaves away.
        is_indexed: the container says where its pictures lie, so that one may begin in the middle.
    """

    width: int
    height: int
    fps: Fraction
    duration: float | None
    frame_count: int | None
    track: int
    first: FirstFrame
    interlaced: bool
    alpha_decoder: str | None
    is_indexed: bool

    @property
    def has_alpha(self) -> bool:
        """Whether parts of the pictures are transparent."""
        return self.first.has_alpha or self.alpha_decoder is not None


def probe_video(path: Path | str) -> VideoInfo:
    """Decode the first frame of `path` for its size and rate.

    Raises:
        InputError: missing, empty, unreadable, without pictures, too small or too large.
    """
    path = ffmpeg.check_input_file(path, "video")
    report = _report(path, "V:0")
    track = chosen_track(report.tracks, "Video")
    shown = next((one for one in report.tracks if one.kind == "Video" and not one.is_cover), track)
    if track is not None and track != shown:
        report = _report(path, str(track.index))
    first = report.first_frame()
    assert first is not None and track is not None, "a frame was decoded from it"
    width, height = _squared(first)
    check_frame_size(path, "video", width, height)
    fps = _frame_rate(report.frame_rate, track.fps)
    duration = report.duration
    frame_count = None if duration is None else round(duration * fps)
    interlaced = first.interlaced or says_interlaced(track)
    decoder = next((name for codec, name in ALPHA_DECODERS.items() if track.text.startswith(codec)), None)
    decoder = decoder if track.has_alpha else None
    indexed = report.container not in UNINDEXED
    return VideoInfo(
        width, height, fps, duration, frame_count, track.index, first, interlaced, decoder, indexed
    )


def _squared(first: FirstFrame) -> tuple[int, int]:
    """Width and height in square pixels: the side along which pixels are longer grows."""
    aspect = first.sample_aspect
    if abs(aspect - 1) < NEARLY_SQUARE:
        return first.width, first.height
    if aspect > 1:
        return round(first.width * aspect), first.height
    return first.width, round(first.height / aspect)


def _report(path: Path, track: str) -> Report:
    """What ffmpeg says of `path` while it decodes the first frame of `track`, a stream specifier."""
    import ffmpeg as builder

    report = Report()
    shown = ffmpeg.input_stream(path)[track].filter("showinfo", checksum=0)
    arguments = builder.get_args(builder.output(shown, "pipe:1", format="null", **{"frames:v": 1}))
    with ffmpeg.Child(list(arguments), listener=report.hear) as child:
        child.finish()
        if report.first_frame() is None:
            raise ffmpeg.undecodable(path, "video", child)
    return report


def _frame_rate(exact: Fraction | None, average: Fraction | None) -> Fraction:
    """The exact rate that the decoder's frames are announced with, unless it contradicts the average."""
    if exact is not None and (average is None or abs(exact - average) <= Fraction(1, 100)):
        return exact
    return average if average and average <= MAX_FPS else Fraction(25)


def read_video(path: Path | str) -> Iterator[np.ndarray]:
    """The frames of `VideoReader`, for those who need nothing else of it."""
    return iter(VideoReader(path))


class VideoReader:
    """A video's frames, decoded while they are asked for, and when each is shown.

    Pixels are made square, fields one picture, HDR and wide gamut BT.709; what is transparent is laid over
    a background.

    Attributes:
        info: what the file says of itself.
        size: width and height of the frames, pixels.
        times: seconds from the first frame to each one decoded so far; as the container has them, made
            to rise where it has none or they don't.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        start: float = 0.0,
        seconds: float | None = None,
        max_side: int | None = None,
        background: Background = WHITE,
    ) -> None:
        """Probe `path`.

        Args:
            start: seconds that are left away at the beginning.
            seconds: of the clip behind `start`; None takes it to its end.
            max_side: pixels; larger frames are made smaller.
            background: what shows through where the video is transparent.

        Raises:
            InputError: as `probe_video`.
        """
        self.info = probe_video(path)
        self.size = shrunk_size(self.info.width, self.info.height, max_side)
        self._path = Path(path)
        self._start, self._seconds = start, seconds
        self._background = background
        self._stamps: list[int | None] = []
        self._decoded = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Every frame once, uint8 (H, W, 3) BGR, upright; each an array of its own.

        Of a truncated file whose container can be read, the frames that are there.

        Raises:
            InputError: not one frame can be decoded.
        """
        width, height = self.size
        self._stamps, self._decoded = [], 0
        with ExitStack() as stack:
            arguments = self._arguments(self._table(stack))
            child = stack.enter_context(ffmpeg.Child(arguments, stdout=True, listener=self._hear))
            while True:
                frame = np.empty((height, width, 4 if self.info.has_alpha else 3), np.uint8)
                if not child.read_array(frame):
                    break
                self._decoded += 1
                yield over(frame, self._background) if self.info.has_alpha else frame
            self._check_end(child, child.finish())

    def _check_end(self, child: ffmpeg.Child, status: int) -> None:
        if status == 0 and self._decoded == 0 and self._start:
            raise InputError(
                f"video {self._path} has no pictures after {self._start:g} s", "give a smaller --start"
            )
        if status != 0 or self._decoded == 0:
            raise ffmpeg.undecodable(self._path, "video", child)
        if child.complaint:
            logger.warning(
                "video %s is damaged, %d frames could be decoded: %s",
                self._path,
                self._decoded,
                child.complaint,
            )

    def _table(self, stack: ExitStack) -> Path | None:
        """The colour table that the stream needs, in a folder that is left to `stack`."""
        tags = self.info.first.colour
        finding = beyond_sdr(tags)
        if not finding or self.info.has_alpha:
            return None
        logger.warning("%s is %s, its colours are brought to BT.709 已转换为标准色彩", self._path, finding)
        table = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "table.cube"
        write_table(tags, table)
        return table

    @property
    def frame_count(self) -> int | None:
        """How many frames are to come, as far as the container says; None where it doesn't."""
        if self.info.duration is None:
            return None
        left = max(self.info.duration - self._start, 0)
        shown = left if self._seconds is None else min(left, self._seconds)
        return round(shown * self.info.fps)

    def _hear(self, line: str) -> None:
        if stamp := _STAMP.match(line):
            self._stamps.append(None if stamp[1] == "NOPTS" else int(stamp[1]))

    @property
    def times(self) -> list[float]:
        """See the class; complete when the frames have been read."""
        stamps = (self._stamps + [None] * self._decoded)[: self._decoded]
        return _rising(stamps, 1 / float(self.info.fps))

    def _arguments(self, table: Path | None) -> list[str]:
        """Every frame in one size, since a stream may change its size half-way.

        The log names each frame's time stamp, in microseconds. Then it is replaced by the frame's number:
        neither -vsync nor -fps_mode works in every ffmpeg. A tick is longer than any frame is shown, so
        that the last one isn't repeated to fill its time.
        """
        import ffmpeg as builder

        source = self._input()
        if self.info.interlaced:
            source = source.filter("bwdif", mode="send_frame", deint="interlaced")
        stamped = source.filter("settb", "1/1000000").filter("metadata", "add", key=_MARK, value=1)
        told = stamped.filter("metadata", "print", key=_MARK)
        numbered = told.filter("settb", "60/1").filter("setpts", "N")
        first = self.info.first
        matrix = unsaid_matrix(first.colour, first.width, first.height)
        named = {} if matrix is None else {"in_color_matrix": matrix}
        scaled = numbered.filter("scale", *self.size, flags=SCALER, **named)
        if table is not None:
            scaled = scaled.filter("format", "gbrp16le").filter("lut3d", str(table), interp="tetrahedral")
        layout = "bgra" if self.info.has_alpha else "bgr24"
        output = builder.output(scaled.filter("format", layout), "pipe:1", format="rawvideo", r="1/60")
        return list(builder.get_args(output))

    def _input(self) -> Any:
        """The track that is shown, as far as it is asked for."""
        options: dict[str, Any] = {}
        if self._start and self.info.is_indexed:
            options["ss"] = self._start
        if self._seconds is not None:
            options["t"] = self._seconds + (0 if self.info.is_indexed else self._start)
        if self.info.alpha_decoder is not None:
            options["c:v"] = self.info.alpha_decoder
        # a new graph would count from 0 again
        track = ffmpeg.input_stream(self._path, reinit_filter=0, **options)[str(self.info.track)]
        if not self._start or self.info.is_indexed:
            return track
        return track.filter("setpts", "PTS-STARTPTS").filter("trim", start=self._start)


def _rising(stamps: Sequence[int | None], step: float) -> list[float]:
    """Microseconds as seconds from the first, every one later than the one before.

    Args:
        stamps: None where the container says nothing.
        step: seconds from a frame to one that has no later time of its own.
    """
    times: list[float] = []
    origin: float | None = None
    for stamp in stamps:
        time = times[-1] + step if times else 0.0
        if stamp is not None:
            origin = stamp / 1e6 - time if origin is None else origin
            known = stamp / 1e6 - origin
            time = known if not times or known > times[-1] else time
        times.append(time)
    return times


def check_output_path(output_path: Path | str, inputs: Iterable[Path | str] = ()) -> Path:
    """`output_path` when a video can be written there; its folder is made.

    Raises:
        OutputError: wrong suffix, a folder, one of `inputs`, or a folder that can't be written.
    """
    path = Path(output_path)
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise OutputError(
            f"output {path} ends in {path.suffix or 'no suffix'}", f"use one of {', '.join(OUTPUT_SUFFIXES)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # says whether the system can hold such a name
        if path.is_dir():
            raise OutputError(f"output {path} is a folder", "name a file in it")
        if any(_same_file(path, Path(source)) for source in inputs):
            raise OutputError(f"output {path} is also an input", "choose another name for the output")
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OutputError:
        raise
    except (OSError, ValueError) as e:
        raise _unwritable(path, e) from e


def _same_file(path: Path, source: Path) -> bool:
    if path.exists() and source.exists():
        return path.samefile(source)
    return path.absolute() == source.absolute()


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(
        f"output {path} can't be written 无法写入: {reason}",
        "choose another place or free it 请检查路径和权限",
    )


def _unfinished_path(output_path: Path) -> Path:
    """A hidden name for `output_path` until it is whole."""
    stem, suffix = output_path.stem[:TEMPORARY_STEM], output_path.suffix.lower()
    return output_path.with_name(f".{stem}.{secrets.token_hex(6)}.tmp{suffix}")


def _unfinished_pattern(output_path: Path) -> str:
    """What `_unfinished_path` may have called earlier files."""
    stem, suffix = output_path.stem[:TEMPORARY_STEM], output_path.suffix.lower()
    return rf"\.{re.escape(stem)}\.[0-9a-f]{{12}}\.tmp{re.escape(suffix)}"


def encoder_threads() -> int:
    """libx264's threads on this machine: what x264 would take, were the control group's quota all it has."""
    return usable_cores() * 3 // 2


def encoder_options(encoding: EncodingConfig, suffix: str) -> dict[str, Any]:
    """ffmpeg's output options for the picture: quality and speed in the words the encoder knows.

    A .webm holds VP8, VP9 or AV1 only: any other encoder is replaced by libvpx-vp9 there.

    Raises:
        InputError: the encoder has no such setting, or doesn't know that value.
    """
    encoder = encoding.encoder
    if suffix == ".webm" and not any(codec in encoder for codec in WEBM_CODECS):
        encoder = "libvpx-vp9"
    options: dict[str, Any] = {"vcodec": encoder, "pix_fmt": "yuv420p"}
    options |= shaping_options(encoder, encoding)
    if encoder.startswith("libx264"):
        options |= {"threads": encoding.threads or encoder_threads()}
    elif encoder in ("libvpx-vp9", "libaom-av1"):
        options |= {"row-mt": 1}
    return options


class VideoWriter:
    """Frames and a sound file into one video, which appears under its name only when complete.

    A context manager: leaving it normally completes the file, leaving it by an exception removes
    every trace. Sound and picture end within one frame of each other.

    Colour is BT.601 with limited range, what ``cv2.COLOR_BGR2YUV_I420`` makes, and tagged so.
    """

    def __init__(
        self,
        output_path: Path | str,
        width: int,
        height: int,
        fps: Fraction,
        audio_path: Path | str | None,
        encoding: EncodingConfig,
        pixel_format: PixelFormat = "yuv420p",
        earlier: Sequence[Path] = (),
    ) -> None:
        """Start the encoder for frames of `width`×`height` pixels at `fps` (1/s).

        Odd sides are encoded one pixel longer, with the last column or row repeated: "yuv420p"
        buffers come with that pixel already, "bgr24" frames without it. The sound of `earlier` files is
        heard before that of `audio_path`.

        Raises:
            OutputError: as `check_output_path`.
            InputError: `audio_path` isn't a readable file.
        """
        self.output_path = check_output_path(output_path, [audio_path] if audio_path else [])
        audio = ffmpeg.check_input_file(audio_path, "audio") if audio_path else None
        self._padding = (height % 2, width % 2)
        even_height, even_width = height + height % 2, width + width % 2
        self._frame_shape: tuple[int, ...] = (height, width, 3)
        if pixel_format == "yuv420p":
            self._frame_shape = (even_height * 3 // 2, even_width)
        self._pads = pixel_format == "bgr24" and self._padding != (0, 0)
        self.frame_count = 0
        self._temporary = _unfinished_path(self.output_path)
        self._open = True
        size = (even_width, even_height)
        sounds = [] if audio is None else [*earlier, audio]
        self._start(_encode_arguments(self._temporary, size, fps, sounds, encoding, pixel_format))

    def _start(self, arguments: list[str]) -> None:
        sweep(self.output_path.parent, _unfinished_pattern(self.output_path))
        try:
            self._claim = claim(self._temporary)
        except OSError as e:
            raise _unwritable(self.output_path, e) from e
        try:
            self._child = ffmpeg.Child(arguments, stdin=True)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def write(self, buffer: np.ndarray) -> None:
        """Append one frame, without copying it.

        Args:
            buffer: C-contiguous uint8; "yuv420p": (H × 3 // 2, W) planar I420 of even H and W;
                "bgr24": (height, width, 3).

        Raises:
            OutputError: the encoder failed; its own words are in the message.
        """
        if buffer.shape != self._frame_shape or buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
            raise ValueError(
                f"frame of shape {buffer.shape} {buffer.dtype}, expected contiguous {self._frame_shape} uint8"
            )
        if self._pads:
            buffer = np.pad(buffer, ((0, self._padding[0]), (0, self._padding[1]), (0, 0)), mode="edge")
        try:
            self._child.write(buffer.data.cast("B"))
        except (OSError, ValueError) as e:
            self._child.end(END_GRACE)
            self.abort()
            raise self._failure() from e
        self.frame_count += 1

    def close(self) -> None:
        """Complete the file and give it its name; nothing happens when it is closed already.

        Raises:
            OutputError: the encoder failed, or the name can't be taken; nothing is left behind.
        """
        if not self._open:
            return
        try:
            if self._child.finish() != 0 or self.frame_count == 0:
                raise self._failure()
            self._change(lambda: publish(self._claim, self._temporary, self.output_path))
        finally:
            self.abort()

    def abort(self) -> None:
        """Kill the encoder and remove the unfinished file; safe at any time, from any thread."""
        self._open = False
        self._child.end()
        self._discard()

    def _discard(self) -> None:
        self._claim.close()
        self._change(lambda: remove_file(self._temporary))

    def _change(self, change: Callable[[], None]) -> None:
        try:
            change()
        except OSError as e:
            raise _unwritable(self.output_path, e) from e

    def _failure(self) -> OutputError:
        words = self._child.complaint or "the encoder ended early"
        return OutputError(
            f"video {self.output_path} can't be written: {words}",
            "check --encoder, the free disk space and the folder's rights 请检查编码器和磁盘空间",
        )


def _encode_arguments(
    target: Path,
    size: tuple[int, int],
    fps: Fraction,
    sounds: Sequence[Path],
    encoding: EncodingConfig,
    pixel_format: PixelFormat,
) -> list[str]:
    import ffmpeg as builder

    pictures = builder.input(
        "pipe:0",
        format="rawvideo",
        pix_fmt=pixel_format,
        video_size=size,
        framerate=f"{fps.numerator}/{fps.denominator}",
    )["v:0"]
    if pixel_format == "bgr24":
        pictures = pictures.filter("scale", out_color_matrix="bt601", out_range="tv", flags=SCALER)
        pictures = pictures.filter("format", "yuv420p")
    streams = [pictures.filter("setparams", range="tv", **COLOUR)]
    # ffmpeg before 5 takes the tags from the options, later ones from the frames
    options = {**encoder_options(encoding, target.suffix), **COLOUR, "color_range": "tv", "map_metadata": -1}
    if sounds:
        codec = encoding.sound if target.suffix in MP4_SUFFIXES else "opus"
        streams.append(_heard(sounds).filter("aformat", **SOUND_SHAPES[codec]))
        options |= SOUND_OPTIONS[codec]
    if target.suffix in MP4_SUFFIXES:
        options |= {"movflags": "+faststart", "video_track_timescale": timescale(fps)}
    output = builder.output(*streams, ffmpeg.file_url(target), **options)
    return list(builder.get_args(builder.overwrite_output(output)))


def _heard(sounds: Sequence[Path]) -> Any:
    """All sounds, one behind the other."""
    import ffmpeg as builder

    # numbered samples: a gap or a late start in a source would shift what was heard by the encoder
    tracks = [ffmpeg.input_stream(path)[sound_track(path)].filter("asetpts", "N/SR/TB") for path in sounds]
    return tracks[0] if len(tracks) == 1 else builder.concat(*tracks, v=0, a=1)


def timescale(fps: Fraction) -> int:
    """Ticks per second in which a frame's duration is a whole number."""
    return fps.numerator * -(-MIN_TIMESCALE // fps.numerator)
