"""Any file with sound → mono float32 at 16 kHz, streamed.

ffmpeg decodes at the source's own rate with all its channels; averaging and resampling (soxr HQ)
happen here. ffmpeg could do both, but its downmix weighs the channels and its resampler differs:
this way the samples are those of ``librosa.load(path, sr=16000)``. Only channels that cancel each
other out aren't averaged, since nothing would be left of what was said.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from musetalk.errors import InputError
from musetalk.media import ffmpeg
from musetalk.media.stream_info import Report, chosen_track

SAMPLE_RATE = 16_000  # Hz, what Whisper hears
MAX_SAMPLE_RATE = 1_000_000  # Hz
MAX_CHANNELS = 64
BLOCK_SECONDS = 1

FIRST_TRACK = "a:0"
SINGLE_TRACK = (b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf1", b"\xff\xf9", b"FORM", b".snd")
CANCELLED = 0.01  # of the loudest channel's energy, below which a sum has lost 20 dB

_AU_HEADER = struct.Struct(">4s5I")  # magic, data offset, data size, encoding, sample rate, channels

logger = logging.getLogger(__name__)


def float_samples(samples: np.ndarray) -> np.ndarray:
    """16-bit samples as float32 of full scale 1, as ffmpeg makes them."""
    return samples.astype(np.float32) / 32_768


def int16_samples(samples: np.ndarray) -> np.ndarray:
    """Float samples of full scale 1 as 16-bit ones; louder ones are cut."""
    return (samples * 32_767).clip(-32_767, 32_767).astype(np.int16)


@dataclass(frozen=True)
class AudioInfo:
    """What a sound file says of itself.

    Attributes:
        sample_rate: Hz.
        channels: at least 1.
        duration: seconds as the container states them, None where it doesn't; the truth is known
            only after decoding.
    """

    sample_rate: int
    channels: int
    duration: float | None


def probe_audio(path: Path | str) -> AudioInfo:
    """Read the header of `path`'s sound track, the one that `sound_track` chooses.

    Raises:
        InputError: missing, empty, unreadable, without sound.
    """
    path = ffmpeg.check_input_file(path, "audio")
    with ffmpeg.Child(_decode_arguments(path, frames=1), stdout=True) as child:
        sample_rate, channels = _read_header(child, path)
        while child.read(1 << 16):
            continue
        child.finish()
        return AudioInfo(sample_rate, channels, stated_duration(child.log))


def sound_track(path: Path) -> str:
    """ffmpeg's name of the track that a player plays: the default one, else the first."""
    with path.open("rb") as stream:
        head = stream.read(12)
    if head.startswith(SINGLE_TRACK) or (head[:4], head[8:]) == (b"RIFF", b"WAVE"):
        return FIRST_TRACK
    status = path.stat()
    return _default_track(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _default_track(path: Path, _mtime_ns: int, _size: int) -> str:
    """`sound_track` of one state of a file, asked once: a request reads its sound more than once."""
    import ffmpeg as builder

    report = Report()
    heard = builder.output(ffmpeg.input_stream(path)[FIRST_TRACK], "pipe:1", format="null", **{"frames:a": 1})
    with ffmpeg.Child(list(builder.get_args(heard)), listener=report.hear) as child:
        child.finish()
    track = chosen_track(report.tracks, "Audio")
    return FIRST_TRACK if track is None else str(track.index)


def stated_duration(log: str) -> float | None:
    """Seconds of the ``Duration: 00:00:22.00`` that ffmpeg logs for an input, None where it says N/A."""
    found = re.search(r"Duration: (\d+):(\d\d):(\d\d(?:\.\d+)?)", log)
    if found is None:
        return None
    hours, minutes, seconds = found.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def read_waveform(path: Path | str) -> Iterator[np.ndarray]:
    """Decode `path`'s `sound_track`: float32 (n,) blocks of about a second, mono, 16 kHz.

    All blocks together are ceil(source samples × 16000 / source rate) samples, equal to librosa's.
    Full scale is [-1, 1]; float files may exceed it, as they do in librosa. Memory doesn't grow with
    the length.

    Raises:
        InputError: missing, empty, unreadable, without sound, no samples, NaN or infinite samples.
    """
    path = ffmpeg.check_input_file(path, "audio")
    with ffmpeg.Child(_decode_arguments(path), stdout=True) as child:
        sample_rate, channels = _read_header(child, path)
        yield from _resample(_mono_blocks(child, path, sample_rate, channels), sample_rate)


def _decode_arguments(path: Path, frames: int | None = None) -> list[str]:
    import ffmpeg as builder

    options: dict[str, object] = {"format": "au", "acodec": "pcm_f32be"}
    if frames is not None:
        options["frames:a"] = frames
    stream = ffmpeg.input_stream(path)[sound_track(path)]
    return list(builder.get_args(builder.output(stream, "pipe:1", **options)))


def _read_header(child: ffmpeg.Child, path: Path) -> tuple[int, int]:
    """(sample rate, channels) of the child's AU stream, leaving its samples to be read."""
    header = child.read(_AU_HEADER.size)
    if len(header) < _AU_HEADER.size:
        child.finish()
        raise ffmpeg.undecodable(path, "audio", child)
    magic, offset, _, _, sample_rate, channels = _AU_HEADER.unpack(header)
    if magic != b".snd" or not 1 <= channels <= MAX_CHANNELS or not 1 <= sample_rate <= MAX_SAMPLE_RATE:
        raise InputError(
            f"audio {path} has {channels} channels at {sample_rate} Hz",
            "convert it to a 48 kHz stereo WAV file",
        )
    child.read(offset - _AU_HEADER.size)
    return sample_rate, channels


def _mono_blocks(child: ffmpeg.Child, path: Path, sample_rate: int, channels: int) -> Iterator[np.ndarray]:
    """Blocks of one second at the source's rate, float32 (n,), the mean over the channels."""
    block = np.empty(sample_rate * BLOCK_SECONDS * channels * 4, np.uint8)
    big_endian = block.view(">f4").reshape(-1, channels)
    position, cancelled = 0, False
    while count := child.read_into(block.data) // (4 * channels):
        samples = big_endian[:count].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            louder = None if channels == 1 else _louder_channel(samples)
            mono = samples[:, louder or 0] if channels == 1 or louder is not None else samples.mean(axis=1)
        if louder is not None and not cancelled:
            cancelled = True
            logger.warning("the channels of %s cancel each other out, the louder one is heard 反相声道", path)
        if not np.isfinite(mono).all():
            second = position / sample_rate
            raise InputError(
                f"audio {path} has NaN or infinite samples after {second:.0f} s",
                "export it again as 16-bit WAV",
            )
        position += count
        yield mono
    if child.finish() != 0:
        raise ffmpeg.undecodable(path, "audio", child)
    if position == 0:
        raise InputError(f"audio {path} has no samples 音频为空", "record or export it again")
    if child.complaint:
        logger.warning("audio %s is damaged, what could be decoded is used: %s", path, child.complaint)


def _louder_channel(samples: np.ndarray) -> int | None:
    """The loudest channel of `samples` (n, channels) where their sum is next to nothing; None elsewhere."""
    energies = np.square(samples, dtype=np.float64).sum(axis=0)
    loudest = int(energies.argmax())
    together = np.square(samples.sum(axis=1, dtype=np.float64)).sum()
    return loudest if together < CANCELLED * energies[loudest] else None


def _resample(blocks: Iterator[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """To 16 kHz; exactly ceil(n × 16000 / sample_rate) samples leave for n that enter."""
    if sample_rate == SAMPLE_RATE:
        yield from blocks
        return
    import soxr

    resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    taken = given = 0
    for block in blocks:
        taken += len(block)
        resampled = resampler.resample_chunk(block)
        given += len(resampled)
        if len(resampled):
            yield resampled
    length = -(-taken * SAMPLE_RATE // sample_rate)
    rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)[: length - given]
    yield np.pad(rest, (0, length - given - len(rest)))
