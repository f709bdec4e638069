"""Judge a mouth network on strangers: `python -m musetalk.training.judge FOLDER [--network FILE]`.

The folder holds clips of people with sound and measured mouths (`corpus.read_clips`); what the engine would
make of the sound is compared with what the people did. A speaker is one witness, however many clips there
are of him: clips are averaged by speaker, and confidence is over speakers. Every second speaker of a group,
in the order of names, is for choosing among settings; what is reported is how the others are followed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musetalk.config import LITE_MODELS
from musetalk.engines.lite.parameters import CHIN_GAIN, PARAMETER_INDEX, rig_opening, rig_width
from musetalk.engines.lite.rig import PROTRUSION
from musetalk.engines.lite.speech import ENCODER_FILE, NETWORK_FILE, MouthNetwork
from musetalk.errors import MuseTalkError
from musetalk.native_messages import NativeMessages
from musetalk.training import scores
from musetalk.training.corpus import Clip, read_clips
from musetalk.training.evaluate import TRACK_NAMES, json_text

logger = logging.getLogger(__name__)

RATE = 50  # Hz at which curves are compared
LONGEST_LAG = 0.12  # s, either way
RESAMPLES = 1000  # of the speakers, for the confidence of a mean
Shapes = Callable[[np.ndarray], np.ndarray]
"""(n,) float32 samples at 16 kHz → (T, 10) rig parameters, row j at (j + 0.5) / `RATE` s."""

JUDGED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "opening": ("opening", rig_opening),
    "width": ("outer_width", rig_width),
    "chin": ("chin", lambda values: CHIN_GAIN * values[:, PARAMETER_INDEX["jaw_open"]]),
    "protrusion": ("protrusion", lambda values: PROTRUSION * values[:, PARAMETER_INDEX["pucker"]]),
}
"""What is judged: its column of a track, and the curve that rig parameters (T, 10) make of it."""


class Followed(NamedTuple):
    """How one distance of one speaker is followed.

    Attributes:
        r, best_r: Pearson's r at zero lag and at each clip's best lag, the mean over clips.
        amplitude: deviation of our curve over the speaker's.
    """

    r: float
    best_r: float
    amplitude: float


class Speaker(NamedTuple):
    """One speaker's scores, by what was judged.

    Attributes:
        chosen_on: whether settings were chosen on this speaker.
    """

    group: str
    name: str
    language: str
    chosen_on: bool
    followed: dict[str, Followed]


class Mean(NamedTuple):
    """A mean over speakers with the bounds of its 95 % confidence, by resampling speakers."""

    value: float
    low: float
    high: float


def shapes_of(network: MouthNetwork) -> Shapes:
    """What the engine makes of a clip's sound, its way through windows included."""

    def shapes(waveform: np.ndarray) -> np.ndarray:
        listener = network.listen(Fraction(RATE))
        blocks = [*listener.hear(waveform), *listener.flush()]
        return np.concatenate(blocks) if blocks else np.zeros((0, len(PARAMETER_INDEX)), np.float32)

    return shapes


def at_curve_times(track: np.ndarray, fps: float, n: int) -> np.ndarray:
    """(n,) a track (frames,) at (j + 0.5) / `RATE` s, linear between frame middles, NaN beyond them."""
    times, middles = (np.arange(n) + 0.5) / RATE, (np.arange(len(track)) + 0.5) / fps
    return np.interp(times, middles, track, left=np.nan, right=np.nan)


def judge(clips: Iterable[Clip], shapes: Shapes) -> list[Speaker]:
    """Scores by speaker, ordered by group and name."""
    by_speaker: dict[tuple[str, str], list[Clip]] = {}
    for clip in clips:
        by_speaker.setdefault((clip.group, clip.speaker), []).append(clip)
    found, places = [], dict.fromkeys((group for group, _ in by_speaker), 0)
    for group, name in sorted(by_speaker):
        spoken = by_speaker[group, name]
        chosen_on = places[group] % 2 == 0
        places[group] += 1
        found.append(Speaker(group, name, spoken[0].language, chosen_on, _followed(spoken, shapes)))
    return found


def _followed(clips: Sequence[Clip], shapes: Shapes) -> dict[str, Followed]:
    values = [shapes(clip.waveform) for clip in clips]
    result = {}
    for name, (column, curve_of) in JUDGED.items():
        curves = [curve_of(parameters) for parameters in values]
        truths = [
            at_curve_times(clip.track[:, TRACK_NAMES.index(column)], clip.fps, len(curve))
            for clip, curve in zip(clips, curves, strict=True)
        ]
        agreed = [
            scores.agreement(curve, truth, RATE, LONGEST_LAG)
            for curve, truth in zip(curves, truths, strict=True)
        ]
        theirs = float(np.nanstd(np.concatenate(truths)))
        result[name] = Followed(
            _mean([each.r for each in agreed]),
            _mean([each.best_r for each in agreed]),
            float(np.std(np.concatenate(curves))) / theirs if theirs > 0 else float("nan"),
        )
    return result


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def mean_over_speakers(values: Sequence[float]) -> Mean:
    """The mean of speakers' scores and its confidence; NaN speakers are left out."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return Mean(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(0).choice(known, (RESAMPLES, len(known)))
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return Mean(float(known.mean()), float(low), float(high))


def summary(speakers: Sequence[Speaker]) -> dict[str, Any]:
    """Speakers in number, and per distance r, r at best lag and the middle amplitude, JSON-ready."""
    result: dict[str, Any] = {"speakers": len(speakers)}
    for name in JUDGED:
        followed = [speaker.followed[name] for speaker in speakers]
        amplitudes = [each.amplitude for each in followed if np.isfinite(each.amplitude)]
        result[name] = {
            "r": mean_over_speakers([each.r for each in followed])._asdict(),
            "best_r": mean_over_speakers([each.best_r for each in followed])._asdict(),
            "amplitude": float(np.median(amplitudes)) if amplitudes else float("nan"),
        }
    return result


def by(speakers: Sequence[Speaker], key: Callable[[Speaker], str]) -> dict[str, list[Speaker]]:
    """The speakers in parts, by a name that each has."""
    parts: dict[str, list[Speaker]] = {}
    for speaker in speakers:
        parts.setdefault(key(speaker), []).append(speaker)
    return dict(sorted(parts.items()))


def half_of(speaker: Speaker) -> str:
    """The part of a group that a speaker belongs to."""
    return f"{speaker.group}, {'chosen on' if speaker.chosen_on else 'reported'}"


def scored(speakers: Sequence[Speaker]) -> dict[str, Any]:
    """All scores as one JSON-ready dict: by group, by half, by language and by speaker."""
    ways: dict[str, Callable[[Speaker], str]] = {
        "groups": lambda speaker: speaker.group,
        "halves": half_of,
        "languages": lambda speaker: f"{speaker.group}, {speaker.language}",
    }
    result: dict[str, Any] = {
        way: {name: summary(part) for name, part in by(speakers, key).items()} for way, key in ways.items()
    }
    result["by_speaker"] = {
        f"{speaker.group}, {speaker.name}": {
            name: followed._asdict() for name, followed in speaker.followed.items()
        }
        for speaker in speakers
    }
    return result


class RememberingEncoder:
    """An encoder session that runs once for each input: several networks are judged on the same clips."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._states: dict[bytes, np.ndarray] = {}

    def run(self, names: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As the session's `run`; kept states are rounded to float16, the first time too."""
        key = hashlib.blake2b(given["mel"].tobytes(), digest_size=16).digest()
        if key not in self._states:
            (states,) = self._session.run(names, given)
            self._states[key] = states.astype(np.float16)
        return [self._states[key].astype(np.float32)]


class Judge:
    """Judges networks, one after another, on the same clips.

    Args:
        clips: of strangers.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips
        self._encoder: RememberingEncoder | None = None

    def __call__(self, network: bytes) -> list[Speaker]:
        """Scores of a mouth network's ONNX file, with the bundled encoder before it."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / NETWORK_FILE).write_bytes(network)
            shutil.copy(LITE_MODELS / ENCODER_FILE, folder)
            whole = MouthNetwork(Path(folder))
        self._encoder = self._encoder or RememberingEncoder(whole.encoder)
        whole.encoder = self._encoder
        return judge(self.clips, shapes_of(whole))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; writes the scores to stdout and returns the exit code."""
    parser = argparse.ArgumentParser(description="judge a mouth network on clips of strangers")
    parser.add_argument("folder", type=Path, help="clips with sound and measured mouths")
    parser.add_argument("--network", type=Path, default=LITE_MODELS / NETWORK_FILE)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        speakers = Judge(read_clips(options.folder))(options.network.read_bytes())
    except MuseTalkError as e:
        logger.error("%s. %s", e.message, e.hint)
        return e.exit_code
    sys.stdout.buffer.write(json_text(scored(speakers)).encode() + b"\n")
    return 0


if __name__ == "__main__":
    with contextlib.closing(NativeMessages()):
        raise SystemExit(main())
