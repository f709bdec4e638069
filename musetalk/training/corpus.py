"""The training corpus: synthetic speech with its mouth curves, recording conditions, real tracks.

Nothing here is downloaded or kept in the repository: sentences are drawn by seed, spoken by whatever
synthesizers the machine has, and degraded by seed. Real speakers come from a folder of
tracks that the user names. A sample is one window as the engine cuts it at run time, prepared by the same
function, so that the network is trained on exactly what it will be given.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musetalk.engines.lite.parameters import RIG_PARAMETERS
from musetalk.engines.lite.speech import SHORTEST_STEPS, SpeechLevel, network_input, step_powers
from musetalk.errors import InputError
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.training.evaluate import TRACK_NAMES, measure_video
from musetalk.training.phones import Phone, mouth_curves
from musetalk.training.texts import SENTENCES
from musetalk.training.voices import Utterance, Voice
from musetalk.whisper import STEP_SAMPLES, STEPS_PER_SECOND

logger = logging.getLogger(__name__)

Rng = np.random.Generator


def speak(voice: Voice, seconds: float, rng: Rng) -> Utterance:
    """About `seconds` of speech: sentences at varying pace and pitch, with pauses before, between and after.

    Most pauses last 0.1 to 1.5 s; one in ten lasts 2 to 4 s, because a mouth must also wait.
    """
    samples = int(rng.uniform(0.3, 1.5) * SAMPLE_RATE)
    waveforms: list[np.ndarray] = [np.zeros(samples, np.float32)]
    phones: list[Phone] = []
    while samples < seconds * SAMPLE_RATE:
        said = voice.speak(SENTENCES[voice.language](rng), rng.uniform(0.8, 1.3), rng.uniform(0.75, 1.35))
        said = resampled(said, rng.uniform(0.9, 1.12))
        offset = samples / SAMPLE_RATE
        phones += [Phone(name, start + offset, end + offset) for name, start, end in said.phones]
        seconds_still = rng.uniform(2, 4) if rng.random() < 0.1 else min(0.1 + rng.exponential(0.35), 1.5)
        pause = int(seconds_still * SAMPLE_RATE)
        waveforms += [said.waveform * rng.uniform(0.7, 1.3), np.zeros(pause, np.float32)]
        samples += len(said.waveform) + pause
    return Utterance(np.concatenate(waveforms).astype(np.float32), tuple(phones), voice.name, voice.language)


def resampled(said: Utterance, factor: float) -> Utterance:
    """Pitch, formants and pace all raised by `factor`: another size of speaker."""
    import soxr

    waveform = soxr.resample(said.waveform, SAMPLE_RATE * factor, SAMPLE_RATE, quality="MQ")
    phones = tuple(Phone(name, start / factor, end / factor) for name, start, end in said.phones)
    return said._replace(waveform=waveform, phones=phones)


def _room(waveform: np.ndarray, rng: Rng) -> np.ndarray:
    """A small room: exponentially decaying noise of 0.1 to 0.5 s after the direct sound."""
    reverberation = rng.uniform(0.1, 0.5)
    times = np.arange(int(reverberation * SAMPLE_RATE)) / SAMPLE_RATE
    response = rng.standard_normal(len(times)) * 10 ** (-3 * times / reverberation)
    response *= rng.uniform(0.1, 0.7) / np.sqrt((response**2).sum())
    response[0] = 1.0
    size = len(waveform) + len(response)
    spectrum = np.fft.rfft(waveform, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(waveform)].astype(np.float32)


def _band(waveform: np.ndarray, rng: Rng) -> np.ndarray:
    """A telephone's or cheap microphone's band, with a tilt of up to ±6 dB per octave round 1 kHz."""
    frequencies = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    low, high = rng.uniform(20, 300), rng.uniform(3300, 8000)
    tilt = (np.maximum(frequencies, 50) / 1000) ** rng.uniform(-0.6, 0.6)
    response = tilt / (1 + (low / np.maximum(frequencies, 1)) ** 4) / (1 + (frequencies / high) ** 8)
    return np.fft.irfft(np.fft.rfft(waveform) * response, len(waveform)).astype(np.float32)


def _noise(waveform: np.ndarray, rng: Rng) -> np.ndarray:
    """Coloured noise 8 to 40 dB below the speech."""
    spectrum = np.fft.rfft(rng.standard_normal(len(waveform)))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, len(waveform))
    scale = np.sqrt((waveform**2).mean() / (noise**2).mean()) * 10 ** (-rng.uniform(8, 40) / 20)
    return (waveform + scale * noise).astype(np.float32)


_CODECS = (
    ("mp3", "libmp3lame", ("32k", "48k", "64k")),
    ("ogg", "libopus", ("12k", "16k", "24k")),
    ("adts", "aac", ("24k", "32k", "64k")),
)


def _codec(waveform: np.ndarray, rng: Rng) -> np.ndarray:
    """Through a lossy codec and back, realigned to the sample by cross-correlation."""
    container, codec, rates = _CODECS[int(rng.integers(len(_CODECS)))]
    raw = ["-f", "s16le", "-ar", str(SAMPLE_RATE), "-ac", "1"]
    quiet = [ffmpeg_path(), "-v", "error"]
    encode = [*quiet, *raw, "-i", "-", "-c:a", codec, "-b:a", str(rng.choice(rates)), "-f", container, "-"]
    samples = (np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()
    packed = subprocess.run(encode, input=samples, check=True, capture_output=True).stdout
    decode = [*quiet, "-i", "-", *raw, "-"]
    unpacked = subprocess.run(decode, input=packed, check=True, capture_output=True).stdout
    decoded = np.frombuffer(unpacked, "<i2").astype(np.float32) / 32767
    size = len(waveform) + len(decoded)
    correlation = np.fft.irfft(np.fft.rfft(decoded, size) * np.conj(np.fft.rfft(waveform, size)), size)
    delay = int(np.argmax(correlation[: SAMPLE_RATE // 4]))
    aligned = np.zeros_like(waveform)
    kept = decoded[delay : delay + len(waveform)]
    aligned[: len(kept)] = kept
    return aligned


def degraded(waveform: np.ndarray, rng: Rng) -> np.ndarray:
    """`waveform` (n,) at 16 kHz as another recording of it would be, float32 (n,); times don't move.

    A third stays clean but for its gain; others pass a room, a band, noise, a codec, each by chance.
    """
    waveform = waveform * np.float32(0.05 / np.sqrt((waveform**2).mean() + 1e-9))
    if rng.random() < 2 / 3:
        for condition, chance in ((_room, 0.5), (_band, 0.5), (_noise, 0.6), (_codec, 0.25)):
            if rng.random() < chance:
                waveform = condition(waveform, rng)
    return (waveform * np.float32(10 ** (rng.uniform(-25, 8) / 20))).clip(-1, 1)


class Sample(NamedTuple):
    """A window as the networks meet it, with what the mouth does in it.

    Attributes:
        states: (T, 5, 384) float16 hidden states of the encoder, each brought to mean 0 and deviation 1; in
            training their components, (T, 128) float32.
        loudness: (T,) float32.
        truth: (T, 10) float32 rig parameters of synthetic speech, or (T, 9) distances measured in real
            speech (`MEASURED`), in the speaker's deviations.
        weight: (T,) float32, 1 where the truth is known.
    """

    states: np.ndarray
    loudness: np.ndarray
    truth: np.ndarray
    weight: np.ndarray


Condition = Callable[[np.ndarray, Rng], np.ndarray]
"""A waveform and a generator of chance → the waveform as recorded otherwise, not moved in time."""
Encode = Callable[[np.ndarray], np.ndarray]
"""(1, 80, 2 T) log-mel → (5, T, 384) hidden states."""


def _sample(window: np.ndarray, truth: np.ndarray, weight: np.ndarray, encode: Encode) -> Sample:
    given = network_input(window, SpeechLevel())
    states = encode(given.mel).transpose(1, 0, 2)[: len(truth)]
    states = states - states.mean(-1, keepdims=True)
    states /= np.sqrt((states**2).mean(-1, keepdims=True) + 1e-5)
    return Sample(states.astype(np.float16), given.loudness[: len(truth)], truth, weight)


def _relative_loudness(waveform: np.ndarray, n_steps: int) -> np.ndarray:
    """(n_steps,) dB over the level of the clean speech, averaged over 0.2 s."""
    powers = step_powers(waveform, n_steps)
    level = SpeechLevel().update(powers)
    smooth = np.convolve(powers, np.full(11, 1 / 11), mode="same")
    return 10 * np.log10(np.maximum(smooth, 1e-8) / level)


def as_it_is(waveform: np.ndarray, rng: Rng) -> np.ndarray:
    """The clean recording condition: `waveform` (n,) itself."""
    return waveform


def synthetic_samples(
    said: Utterance, encode: Encode, rng: Rng, condition: Condition = degraded
) -> Iterator[Sample]:
    """Cut an utterance into windows of 3 to 10 s, each in a recording condition of its own."""
    total = len(said.waveform) // STEP_SAMPLES
    curves = mouth_curves(said.phones, total, _relative_loudness(said.waveform, total))
    begin = 0
    while total - begin >= SHORTEST_STEPS:
        steps = min(int(rng.uniform(3, 10) * STEPS_PER_SECOND), total - begin)
        window = said.waveform[begin * STEP_SAMPLES : (begin + steps) * STEP_SAMPLES]
        yield _sample(
            condition(window, rng), curves[begin : begin + steps], np.ones(steps, np.float32), encode
        )
        begin += steps


def _white(n: int, rng: Rng) -> np.ndarray:
    return rng.standard_normal(n)


def _coloured(n: int, rng: Rng) -> np.ndarray:
    """Noise that falls by 0 to 9 dB per octave, swelling and fading by up to 12 dB in some seconds."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** rng.uniform(0.1, 1.5)
    times = np.arange(n) / SAMPLE_RATE
    swell = 10 ** (rng.uniform(0, 0.3) * np.sin(2 * np.pi * (rng.uniform(0.1, 3) * times + rng.random())))
    return np.fft.irfft(spectrum, n) * swell


def _hum(n: int, rng: Rng) -> np.ndarray:
    """Mains or machines: a low tone with harmonics, and a little noise."""
    times = np.arange(n) / SAMPLE_RATE
    low = rng.uniform(40, 130)
    tones = [
        rng.random() / k * np.sin(2 * np.pi * (k * low * times + rng.random()))
        for k in range(1, int(rng.integers(3, 25)))
    ]
    return np.sum(tones, axis=0) + rng.uniform(0, 0.05) * rng.standard_normal(n)


def _clicks(n: int, rng: Rng) -> np.ndarray:
    """Knocks and keys, each of 0.1 to 20 ms."""
    sound = np.zeros(n)
    for _ in range(int(rng.uniform(1, 8) * n / SAMPLE_RATE)):
        length = int(rng.uniform(1, 320))
        begin = int(rng.integers(0, n - 4 * length))
        times = np.arange(4 * length)
        ring = np.cos(times * rng.uniform(0.1, 3)) if rng.random() < 0.5 else rng.standard_normal(4 * length)
        sound[begin : begin + 4 * length] += rng.uniform(0.2, 1) * np.exp(-times / length) * ring
    return sound


def _music(n: int, rng: Rng) -> np.ndarray:
    """Melodies and chords of plucked and held tones with 1 to 12 harmonics."""
    sound = np.zeros(n)
    pulse, brightness = rng.uniform(0.12, 0.8), rng.uniform(0.4, 2)
    for number in range(int(n / SAMPLE_RATE / pulse)):
        begin = int(number * pulse * SAMPLE_RATE)
        for _ in range(int(rng.integers(1, 5))):
            times = np.arange(min(int(rng.uniform(1, 4) * pulse * SAMPLE_RATE), n - begin)) / SAMPLE_RATE
            pitch = 110 * 2 ** (rng.integers(0, 40) / 12)
            harmonics = np.arange(1, int(rng.integers(2, 13)))
            tones = np.sin(2 * np.pi * pitch * harmonics[:, None] * times) / harmonics[:, None] ** brightness
            shape = np.exp(-times * rng.uniform(0.5, 6)) * np.minimum(times / 0.01, 1)
            sound[begin : begin + len(times)] += tones.sum(0) * shape
    return sound


STILL_KINDS: dict[str, Callable[[int, Rng], np.ndarray]] = {
    "white noise": _white,
    "coloured noise": _coloured,
    "hum": _hum,
    "clicks": _clicks,
    "music": _music,
}
"""Sounds in which a mouth rests: their name, and (samples, generator of chance) → (samples,)."""
STILL_LENGTH = 8  # s of each sound


def still_samples(seconds: int, encode: Encode, rng: Rng) -> Iterator[Sample]:
    """About `seconds` of sound that isn't speech, kinds by turns, and a mouth that rests."""
    kinds = list(STILL_KINDS.values())
    for i in range(max(seconds // STILL_LENGTH, len(kinds))):
        sound = kinds[i % len(kinds)](STILL_LENGTH * SAMPLE_RATE, rng)
        level = 10 ** (rng.uniform(-50, -6) / 20)
        sound = (sound * level / np.abs(sound).max()).astype(np.float32)
        steps = len(sound) // STEP_SAMPLES
        truth, weight = np.zeros((steps, len(RIG_PARAMETERS)), np.float32), np.ones(steps, np.float32)
        yield _sample(sound, truth, weight, encode)


MEASURED = (
    "opening",
    "outer_width",
    "inner_width",
    "outer_height",
    "upper_lip",
    "lower_lip",
    "chin",
    "lower_lip_thickness",
    "protrusion",
)
"""Distances that followers learn, of `evaluate.TRACK_NAMES`: the two they are for, and what moves along."""
_MEASURED_COLUMNS = [TRACK_NAMES.index(name) for name in MEASURED]
TRACK_RATE = 25  # frames/s of the tracks that are learned from
SLOT = 3 * SAMPLE_RATE  # samples of one sentence
STILL = 0.002  # eye distances; a movement no larger is noise
SEVERAL_SPEAKERS = "x"  # name under which every sentence is another's


@dataclass(frozen=True)
class Clip:
    """Real speech with distances measured on the speaker's face.

    Attributes:
        group: whose clips they are, "grid" say: the unit of terms of use.
        speaker, language: as the folder names them, "x" where each sentence is another speaker's.
        waveform: (n,) float32 at 16 kHz.
        track: (frames, 10) float32 in eye distances, columns `evaluate.TRACK_NAMES`, NaN where no face was
            found; frame i at (i + 0.5) / fps.
        fps: frames per second.
    """

    group: str
    speaker: str
    language: str
    waveform: np.ndarray
    track: np.ndarray
    fps: float


def read_clips(folder: Path) -> list[Clip]:
    """Every clip of a folder, in one of three forms.

    ``tracks.npz`` (name, group, speaker, language, start and samples in ``GROUP.flac``, fps, first and frames
    in tracks); ``tracks.npz`` (names, speaker, slot, tracks) with a ``SPEAKER.flac`` of 3-s slots each; or
    videos ``SPEAKER/*.mpg``, as GRID comes, measured now.

    Raises:
        InputError: a file is missing or isn't what it should be.
        NoFaceError: a video shows no face.
    """
    import soundfile

    path = folder / "tracks.npz"
    if not path.exists():
        return list(_measured_clips(folder))
    try:
        with np.load(path) as stored:
            tables = {name: stored[name] for name in stored.files}
        return list((_clips_of_groups if "group" in tables else _clips_of_slots)(folder, tables))
    except (OSError, KeyError, ValueError, soundfile.SoundFileError) as e:
        raise InputError(
            f"{folder} can't be read as tracks of real speech", "see --help for the folder's form"
        ) from e


def _read_flac(path: Path) -> np.ndarray:
    import soundfile

    waveform, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLE_RATE:
        raise InputError(f"{path} has {rate} samples/s", f"resample it to {SAMPLE_RATE}")
    return waveform


def _clips_of_groups(folder: Path, tables: dict[str, np.ndarray]) -> Iterator[Clip]:
    sound = {group: _read_flac(folder / f"{group}.flac") for group in sorted(set(tables["group"].tolist()))}
    for i, group in enumerate(tables["group"].tolist()):
        start, first = int(tables["start"][i]), int(tables["first"][i])
        yield Clip(
            group,
            str(tables["speaker"][i]),
            str(tables["language"][i]),
            sound[group][start : start + int(tables["samples"][i])],
            tables["tracks"][first : first + int(tables["frames"][i])].astype(np.float32),
            float(tables["fps"][i]),
        )


def _clips_of_slots(folder: Path, tables: dict[str, np.ndarray]) -> Iterator[Clip]:
    speakers = tables["speaker"].tolist()
    sound = {speaker: _read_flac(folder / f"{speaker}.flac") for speaker in sorted(set(speakers))}
    for speaker, slot, track in zip(speakers, tables["slot"].tolist(), tables["tracks"], strict=True):
        waveform = sound[speaker][slot * SLOT : (slot + 1) * SLOT]
        yield Clip(folder.name, speaker, "en", waveform, track.astype(np.float32), TRACK_RATE)


def _measured_clips(folder: Path) -> Iterator[Clip]:
    videos = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in (".mpg", ".mp4"))
    if not videos:
        raise InputError(
            f"{folder} holds neither tracks.npz nor SPEAKER/*.mpg", "name a folder of tracks or of videos"
        )
    for video in videos:
        measured = measure_video(video)
        waveform = np.concatenate(list(read_waveform(video)))
        yield Clip(folder.name, video.parent.name, "en", waveform, measured.tracks, measured.fps)


def learnable(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Clips by speaker; of `SEVERAL_SPEAKERS` each is one of its own."""
    speakers: dict[str, list[Clip]] = {}
    for i, clip in enumerate(clips):
        alone = f"_{i}" if clip.speaker == SEVERAL_SPEAKERS else ""
        speakers.setdefault(f"{clip.group}_{clip.speaker}{alone}", []).append(clip)
    return speakers


def track_at_steps(track: np.ndarray, fps: float, n_steps: int) -> np.ndarray:
    """A track (frames, ...) at the network's steps, linear between frame middles, NaN beyond them."""
    times = np.arange(n_steps) / STEPS_PER_SECOND
    at = times * fps - 0.5
    before = np.clip(np.floor(at).astype(int), 0, len(track) - 1)
    after = np.minimum(before + 1, len(track) - 1)
    share = (at - before).reshape(-1, *[1] * (track.ndim - 1))
    values = track[before] * (1 - share) + track[after] * share
    values[(at < 0) | (at > len(track) - 1)] = np.nan
    return values.astype(np.float32)


def real_samples(clips: Sequence[Clip], encode: Encode) -> Iterator[Sample]:
    """One speaker's clips, each distance brought to the speaker's mean 0 and deviation 1.

    How far one man moves his lips is his habit: how he moves them is what others share.
    """
    moved = [clip.track[:, _MEASURED_COLUMNS] for clip in clips]
    joined = np.concatenate(moved)
    mean, deviation = np.nanmean(joined, 0), np.maximum(np.nanstd(joined, 0), STILL)
    for clip, track in zip(clips, moved, strict=True):
        steps = len(clip.waveform) // STEP_SAMPLES
        truth = track_at_steps((track - mean) / deviation, clip.fps, steps)
        weight = np.isfinite(truth).all(1).astype(np.float32)
        yield _sample(clip.waveform, np.nan_to_num(truth), weight, encode)
