"""The training corpus: synthetic speech with its mouth curves, recording conditions, real tracks.

Nothing here is downloaded or kept in the repository: sentences are drawn by seed, spoken by whatever
synthesizers the machine has, and degraded by seed. Real speakers come from a folder of
tracks that the user names. A sample is one window as the engine cuts it at run time, prepared by the same
function, so that the network is trained on exactly what it will be given.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musetalk.engines.lite.speech import (
    SHORTEST_STEPS,
    SpeechLevel,
    loudness,
    network_input,
    step_powers,
)
from musetalk.errors import InputError
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.training.evaluate import SILENT, TRACK_NAMES, measure_video, resampled_track
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
        states: (T, 5, 384) float16 hidden states of the encoder, each brought to mean 0 and deviation 1.
        loudness: (T,) float32.
        truth: (T, 10) float32 rig parameters of synthetic speech, or (T, 4) distances measured in real
            speech (`MEASURED`).
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


MEASURED = ("opening", "outer_width", "chin", "upper_lip")
"""Distances of real tracks that training uses, in eye distances over the speaker's rest: inner-lip opening,
outer width, nose base to chin, nose base to upper lip."""
_MEASURED_COLUMNS = [TRACK_NAMES.index(name) for name in MEASURED]
TRACK_RATE = 25  # frames/s
SLOT = 3 * SAMPLE_RATE  # samples of one sentence
NATURAL_OPENING = 0.17  # eye distances, 95th percentile that every real speaker is brought to
NATURAL_WIDTH = 0.032  # eye distances, deviation of the outer width that every real speaker is brought to
STILL = 0.002  # eye distances; a movement no larger is noise


@dataclass(frozen=True)
class TrackedSpeaker:
    """Real speech with distances measured on the speaker's face.

    Attributes:
        name: of the speaker; "x" marks sentences of several.
        waveforms: (640 × frames,) float32 at 16 kHz, one per sentence.
        tracks: (frames, 10) float32 each, 25 frames/s, frame i at (i + 0.5) / 25 s, in eye distances: inner
            opening, inner width, outer height, outer width, nose base to upper lip, to lower lip, to chin,
            thickness of the upper and the lower lip, protrusion. NaN where no face was found.
    """

    name: str
    waveforms: list[np.ndarray]
    tracks: list[np.ndarray]


def measure_speakers(folder: Path) -> list[TrackedSpeaker]:
    """Speakers of a folder of videos ``SPEAKER/*.mpg`` or ``.mp4``, as GRID comes, measured now.

    Raises:
        InputError: the folder holds no such video, or one can't be read.
        NoFaceError: a video shows no face.
    """
    speakers = []
    for path in sorted(child for child in folder.iterdir() if child.is_dir()):
        videos = sorted(file for file in path.iterdir() if file.suffix.lower() in (".mpg", ".mp4"))
        waveforms, tracks = [], []
        for video in videos:
            measured = measure_video(video)
            n_frames = int(len(measured.tracks) * TRACK_RATE / measured.fps)
            columns = [
                resampled_track(column, measured.fps, TRACK_RATE, n_frames) for column in measured.tracks.T
            ]
            tracks.append(np.stack(columns, 1).astype(np.float32))
            waveform = np.zeros(n_frames * SAMPLE_RATE // TRACK_RATE, np.float32)
            heard = np.concatenate(list(read_waveform(video)))[: len(waveform)]
            waveform[: len(heard)] = heard
            waveforms.append(waveform)
        if videos:
            speakers.append(TrackedSpeaker(path.name, waveforms, tracks))
    if not speakers:
        raise InputError(
            f"{folder} holds neither tracks.npz nor SPEAKER/*.mpg", "name a folder of tracks or of videos"
        )
    return speakers


def read_tracks(folder: Path) -> list[TrackedSpeaker]:
    """Speakers of a folder that holds ``tracks.npz`` (names, speaker, slot, tracks) and ``SPEAKER.flac``.

    Raises:
        InputError: a file is missing or isn't what it should be.
    """
    import soundfile

    path = folder / "tracks.npz"
    try:
        with np.load(path) as stored:
            speaker, slot, tracks = stored["speaker"], stored["slot"], stored["tracks"].astype(np.float32)
        speakers = []
        for name in sorted(set(speaker.tolist())):
            path = folder / f"{name}.flac"
            waveform, rate = soundfile.read(path, dtype="float32")
            if rate != SAMPLE_RATE:
                raise InputError(f"{path} has {rate} samples/s", f"resample it to {SAMPLE_RATE}")
            rows = np.flatnonzero(speaker == name)
            cuts = [waveform[slot[row] * SLOT : (slot[row] + 1) * SLOT] for row in rows]
            speakers.append(TrackedSpeaker(name, cuts, [tracks[row] for row in rows]))
    except (OSError, KeyError, ValueError, soundfile.SoundFileError) as e:
        raise InputError(
            f"{path} can't be read as tracks of real speech", "see --help for the folder's form"
        ) from e
    return speakers


def rest_distances(speaker: TrackedSpeaker) -> np.ndarray:
    """(10,) the speaker's distances in silence; the opening's is that of a mouth at rest, nearly closed."""
    silent = []
    for waveform, track in zip(speaker.waveforms, speaker.tracks, strict=True):
        powers = step_powers(waveform, len(waveform) // STEP_SAMPLES)
        heard = loudness(powers, SpeechLevel().update(powers))
        silent.append(track[heard[1::2][: len(track)] < SILENT])
    rest = np.nanmedian(np.concatenate(silent), axis=0)
    rest[0] = min(rest[0], 0.01)
    return rest


def real_samples(speaker: TrackedSpeaker, encode: Encode, rng: Rng) -> Iterator[Sample]:
    """The speaker's sentences, each clean and in one other recording condition.

    Distances are scaled so that the opening's 95th percentile is `NATURAL_OPENING` and the width's deviation
    `NATURAL_WIDTH`: how far one man moves his lips is his habit. The truth stands at every second step, where
    the frames' middles lie.
    """
    rest = rest_distances(speaker)
    moved = [(track - rest)[:, _MEASURED_COLUMNS] for track in speaker.tracks]
    opening, width = np.concatenate(moved)[:, :2].T
    widest = max(np.nanpercentile(opening, 95), STILL)
    scale = np.full(len(MEASURED), NATURAL_OPENING / widest, np.float32)
    scale[MEASURED.index("outer_width")] = NATURAL_WIDTH / max(np.nanstd(width), STILL)
    for waveform, track in zip(speaker.waveforms, moved, strict=True):
        steps = len(waveform) // STEP_SAMPLES
        truth = np.zeros((steps, len(MEASURED)), np.float32)
        weight = np.zeros(steps, np.float32)
        truth[1::2] = np.nan_to_num(track * scale)
        weight[1::2] = np.isfinite(track).all(1)
        yield _sample(waveform, truth, weight, encode)
        yield _sample(degraded(waveform, rng), truth, weight, encode)
