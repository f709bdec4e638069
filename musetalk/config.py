"""Every default and range, once: frozen dataclasses checked when they are made.

argparse reads its defaults from here, so a default can't differ between the command line and
the Python classes.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

from musetalk.errors import InputError

EngineName = Literal["lite", "musetalk"]
EngineRequest = Literal["auto", "lite", "musetalk"]
ParsingMode = Literal["jaw", "neck", "raw"]
Version = Literal["v1", "v15"]
FaceDetectorRequest = Literal["auto", "mediapipe", "dwpose", "s3fd"]
FaceParserRequest = Literal["auto", "landmarks", "bisenet"]
RuntimeRequest = Literal["auto", "torch", "openvino"]
Switch = Literal["auto", "on", "off"]
VaeDecoder = Literal["full", "tiny"]
SoundCodec = Literal["aac", "flac"]

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "models").is_dir()  # a wheel carries the bundled models inside the package
REPOSITORY = Path.cwd() if _INSTALLED else _PACKAGE.parent
"""The checkout; without one the working directory, so that nothing is ever written beside the package."""
LITE_MODELS = (_PACKAGE if _INSTALLED else REPOSITORY) / "models" / "lite"
"""Bundled: lite's networks, the demo's portraits and speech."""
MEDIAPIPE_PACKAGE = "mediapipe==0.10.21"  # installed with --no-deps; the last release with its models
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
OUTPUT_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
MIN_FPS = Fraction(1, 100)  # frames per second
MAX_FPS = 240
MIN_ARTICULATION, MAX_ARTICULATION = 0.5, 1.5  # of a usual speaker's movement
MAX_BATCH_SIZE = 1024
MAX_CRF = 51  # x264's scale, 0 is lossless
MAX_ENCODER_THREADS = 128  # x264 takes no more
MAX_SIDE = 8192  # pixels, of a template's frame
MIN_SIDE = 16  # pixels
MIN_SECONDS = 0.001  # of a clip
MAX_TEMPLATE_BYTES = 8 << 30  # of all frames of a template, which are held at once
SOURCE_FPS = "source"  # in place of a number: the template's own rate
FACE_SIZE = 256  # pixels, side of the crop that the networks see


def _choice(name: str, value: str, allowed: object) -> None:
    names = get_args(allowed)
    if value not in names:
        raise InputError(f"{name} is {value!r}", f"choose one of {', '.join(names)}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}", f"{name} is a whole number from {low} to {high}")


def _amount(name: str, value: float, low: float) -> None:
    if not low <= value < math.inf:
        raise InputError(f"{name} is {value!r}", f"{name} is a number of seconds from {low} on")


def parse_fps(value: float | str | Fraction) -> Fraction:
    """Frames per second as an exact fraction: NTSC decimals (23.976, 29.97, 59.94) become n·1000/1001.

    Raises:
        InputError: not a number from `MIN_FPS` to `MAX_FPS`.
    """
    hint = f"fps is a number from {float(MIN_FPS)} to {MAX_FPS}, 25 say, or {SOURCE_FPS}"
    text = str(value)
    try:
        # as a float first: the exact value of 1e999999999 would take hours and all memory
        plausible = "/" in text or MIN_FPS <= float(text) <= MAX_FPS
        fps = Fraction(text) if plausible else Fraction(0)
    except (ValueError, ZeroDivisionError) as e:
        raise InputError(f"fps is {text[:40]!r}", hint) from e
    if not MIN_FPS <= fps <= MAX_FPS:
        raise InputError(f"fps is {text[:40]!r}", hint)
    nominal = math.ceil(fps)
    ntsc = Fraction(nominal * 1000, 1001)
    if nominal in (24, 30, 48, 60, 120) and fps != nominal and abs(fps - ntsc) < Fraction(1, 500):
        return ntsc
    return fps.limit_denominator(4000)


def output_fps(value: float | str | Fraction, source_fps: object) -> Fraction:
    """`parse_fps`, or the template's own rate where `value` is "source".

    Args:
        source_fps: what the template's metadata says; for a template without a time of its own, which
            says nothing, the default rate is taken.
    """
    if value != SOURCE_FPS:
        return parse_fps(value)
    own = source_fps if isinstance(source_fps, (int, float)) else Defaults.fps
    return parse_fps(min(max(own, float(MIN_FPS)), MAX_FPS))


@dataclass(frozen=True)
class ModelPaths:
    """Where the MuseTalk weights are; None means the official place under models/."""

    version: Version = "v15"
    unet_config: Path | None = None
    unet_model_path: Path | None = None
    vae_type: str = "sd-vae"
    whisper_dir: Path | None = None
    taesd_dir: Path | None = None

    def __post_init__(self) -> None:
        _choice("version", self.version, Version)


@dataclass(frozen=True)
class EngineConfig:
    """Which engine runs, where, and in what precision."""

    engine: EngineRequest = "auto"
    device: str = "auto"
    strict_device: bool = False
    fp16: bool = True
    batch_size: int = 8
    runtime: RuntimeRequest = "auto"
    vae_region: Switch = "auto"
    vae_decoder: VaeDecoder = "full"
    compile: bool = False
    models: ModelPaths = field(default_factory=ModelPaths)

    def __post_init__(self) -> None:
        _choice("engine", self.engine, EngineRequest)
        _choice("runtime", self.runtime, RuntimeRequest)
        _choice("vae_region", self.vae_region, Switch)
        _choice("vae_decoder", self.vae_decoder, VaeDecoder)
        _whole("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)


@dataclass(frozen=True)
class PreprocessingConfig:
    """What turns a portrait or video into a template; a change of any field makes a new cache."""

    bbox_shift: int = 0  # pixels, down is positive
    parsing_mode: ParsingMode = "jaw"
    extra_margin: int = 10  # pixels below the chin, not for MuseTalk 1.0
    left_cheek_width: int = 90  # pixels of the 512² parsing map
    right_cheek_width: int = 90
    face_detector: FaceDetectorRequest = "auto"
    face_parser: FaceParserRequest = "auto"
    idle_motion: bool = False
    max_side: int = 4096  # pixels; larger frames are made smaller
    start: float = 0.0  # seconds of a clip that are left away at its beginning
    seconds: float | None = None  # of a clip that are taken; None takes it to its end
    background: str = "#ffffff"  # what shows through where frames are transparent: a colour or a picture

    def __post_init__(self) -> None:
        _whole("bbox_shift", self.bbox_shift, -1000, 1000)
        _choice("parsing_mode", self.parsing_mode, ParsingMode)
        _whole("extra_margin", self.extra_margin, 0, 1000)
        _whole("left_cheek_width", self.left_cheek_width, 0, 256)
        _whole("right_cheek_width", self.right_cheek_width, 0, 256)
        _whole("max_side", self.max_side, MIN_SIDE, MAX_SIDE)
        _amount("start", self.start, 0)
        if self.seconds is not None:
            _amount("seconds", self.seconds, MIN_SECONDS)
        _choice("face_detector", self.face_detector, FaceDetectorRequest)
        _choice("face_parser", self.face_parser, FaceParserRequest)


@dataclass(frozen=True)
class EncodingConfig:
    """The shape of the output file.

    Attributes:
        threads: of libx264, whose bytes depend on them; None takes what fits this machine's cores.
    """

    encoder: str = "libx264"
    preset: str = "veryfast"
    crf: int = 18
    threads: int | None = None
    sound: SoundCodec = "aac"  # of mp4 and mov; FLAC keeps every sample

    def __post_init__(self) -> None:
        _whole("crf", self.crf, 0, MAX_CRF)
        _choice("sound", self.sound, SoundCodec)
        if self.threads is not None:
            _whole("threads", self.threads, 1, MAX_ENCODER_THREADS)


@dataclass(frozen=True)
class ServerConfig:
    """Where the resident worker listens and what it allows itself and its callers."""

    host: str = "127.0.0.1"
    http_port: int = 28888
    tcp_port: int = 58080
    videos_dir: Path = Path("./output/videos")
    temp_dir: Path = Path("./output/uploads")
    preload: tuple[str, ...] = ()
    max_sessions: int | None = None  # None: as many as a test at the start says
    grace: float = 30.0  # seconds that running work has to end in when the worker is asked to stop
    keep: float = 24.0  # hours that finished jobs and uploads are kept
    keep_bytes: int = 20 << 30  # of finished jobs together; beyond it the oldest go first
    job_deadline: float = 3600.0  # seconds after which a job that hasn't ended has failed
    token: str = ""  # what callers must show when the address isn't the loopback's
    trust: tuple[str, ...] = ()  # networks whose callers need no token, "172.18.0.0/16" say
    allow_dirs: tuple[Path, ...] = ()  # what paths in requests may lie below, when not on the loopback
    client_connections: int | None = 192  # of one address by HTTP, and as many by TCP; None: all
    client_uploads: int | None = 32  # that one address may send at once
    client_jobs: int | None = 16  # of one address, that haven't ended
    client_sessions: int | None = (
        None  # of one address; production callers have one address for all of theirs
    )
    segment_sound: SoundCodec = "flac"  # of sessions' segments: joined they are the speech, sample for sample

    def __post_init__(self) -> None:
        _whole("http_port", self.http_port, 0, 65_535)
        _whole("port", self.tcp_port, 0, 65_535)
        _choice("segment_sound", self.segment_sound, SoundCodec)
        for name in ("client_connections", "client_uploads", "client_jobs", "client_sessions"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 10_000)
        if self.max_sessions is not None:
            _whole("max_sessions", self.max_sessions, 1, 10_000)
        if not 0 <= self.grace <= 3600:
            raise InputError(f"grace is {self.grace}", "grace is a number of seconds from 0 to 3600")
        if not 0 < self.job_deadline <= 7 * 24 * 3600:
            raise InputError(f"job_deadline is {self.job_deadline}", "job_deadline is seconds above 0")
        if not 0 < self.keep <= 24 * 366:
            raise InputError(f"keep is {self.keep}", "keep is a number of hours above 0")


def parse_articulation(value: object) -> float:
    """How far the mouth moves, in units of a usual speaker's movement.

    Args:
        value: a number, or one as text.

    Raises:
        InputError: not a number from `MIN_ARTICULATION` to `MAX_ARTICULATION`.
    """
    number = float("nan")
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not MIN_ARTICULATION <= number <= MAX_ARTICULATION:  # NaN too
        raise InputError(
            f"articulation is {value!r:.40}",
            f"articulation is a number from {MIN_ARTICULATION} to {MAX_ARTICULATION}",
        )
    return number


@dataclass(frozen=True)
class Defaults:
    """Defaults of the commands that belong to no other dataclass."""

    cache_dir: str = "./template_cache"
    fps: float = 25.0
    articulation: float = 1.0  # the middle stranger opens the mouth as far as this makes it
    output_path: str = "./output/{template_id}.mp4"
    benchmark_runs: int = 3
    memory_limit: int = 2 << 30  # bytes of templates that stay open between requests
