"""Mouth shapes of English and Mandarin phones, and how neighbouring phones pull on each other.

A labelled utterance becomes curves of the ten rig parameters. Each phone pulls every parameter towards
its target with a dominance that falls off exponentially from its middle; the curve is the mean of all
targets weighted by dominance (Cohen & Massaro 1993, "Modeling coarticulation in synthetic visual
speech"). Lip closure, lip tuck and the tongue's tip are no such means: a closure that is averaged with its
neighbours isn't one, so they are trapezoids over the phone's own time, with ramps of 40 ms.

Phone names are ARPAbet in lower case, with additions for Mandarin (`yu` the vowel of 女, `iz` of 四, `ir`
of 十, `xx` `jj` `qq` its alveolo-palatals) and `pau` for silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from musetalk.engines.lite.parameters import PARAMETER_INDEX, RIG_PARAMETERS
from musetalk.faces.head import smoothstep
from musetalk.whisper import STEPS_PER_SECOND

RAMP = 0.04  # s, of closures, tucks and tongue tips
LEAD = 0.20  # s, the mouth starts to move before the first sound
HOLD = 0.04  # s, after the last sound before the mouth returns
RETURN = 0.14  # s, of the return to neutral
SHORTEST_CLOSURE = 0.05  # s
LOUDNESS_SHARE = 0.2  # of the jaw's opening, gained or lost at ±10 dB
NAMES = tuple(parameter.name for parameter in RIG_PARAMETERS)
EVENTS = ("lip_press", "lip_tuck", "tongue_up")


class Phone(NamedTuple):
    """A phone with its time in seconds."""

    name: str
    start: float
    end: float


def _shape(
    jaw: float = 0,
    lip: float = 0,
    width: float = 0,
    pucker: float = 0,
    upper: float = 0,
    lower: float = 0,
    press: float = 0,
    tuck: float = 0,
    smile: float = 0,
    tongue: float = 0,
) -> tuple[float, ...]:
    return jaw, lip, width, pucker, upper, lower, press, tuck, smile, tongue


_CLOSED = _shape(jaw=0.12, lip=-0.10, width=-0.20, upper=-0.05, press=1.0)
_TUCKED = _shape(jaw=0.02, width=-0.12, upper=0.18, tuck=1.0)
_SH = _shape(jaw=0.27, lip=0.55, width=0.02, pucker=0.38, upper=0.40, lower=0.42)
_RETROFLEX = _shape(jaw=0.22, lip=0.50, pucker=0.25, upper=0.32, lower=0.42)
_PALATAL = _shape(jaw=0.22, lip=0.55, width=0.30, upper=0.35, lower=0.50)
_S = _shape(jaw=0.07, lip=0.80, width=0.13, pucker=0.08, upper=0.39, lower=0.65)

# Inner-lip opening is what OPENING_GAIN makes of a row: 0.18 eye distances for aa, 0.05 for uw. Negative
# values lie beyond contact: such a phone pulls its neighbours' openings down (Löfqvist and Gracco 1997).
# English rows and strengths were fitted by least squares, from phonetic first guesses, to the mouth of GRID's
# speaker s1; rows that he never says, Mandarin's among them, follow the nearest that he does.
SHAPES: dict[str, tuple[float, ...]] = {
    "aa": _shape(jaw=0.64, lip=0.45, upper=0.15, lower=0.40),
    "ae": _shape(jaw=0.40, lip=0.50, width=0.30, upper=0.35, lower=0.50),
    "ah": _shape(jaw=0.34, lip=0.30, upper=0.10, lower=0.25),
    "ao": _shape(jaw=0.29, lip=0.02, width=-0.08, pucker=0.56, lower=0.04),
    "ax": _shape(jaw=0.27, lip=0.60, upper=0.15, lower=0.45),
    "eh": _shape(jaw=0.47, lip=0.60, width=0.25, upper=0.28, lower=0.55),
    "er": _shape(jaw=0.20, lip=0.25, pucker=0.35, upper=0.10, lower=0.15),
    "ih": _shape(jaw=0.45, lip=0.54, width=0.23, upper=0.24, lower=0.50),
    "iy": _shape(jaw=0.36, lip=0.70, width=0.50, upper=0.32, lower=0.60, smile=0.25),
    "uh": _shape(jaw=0.22, lip=0.30, pucker=0.45, upper=0.10, lower=0.15),
    "uw": _shape(jaw=0.08, lip=0.40, width=0.15, pucker=0.72, lower=0.12),
    "oo": _shape(jaw=0.40, lip=0.20, pucker=0.60, upper=0.05, lower=0.10),
    "ee": _shape(jaw=0.52, lip=0.68, width=0.40, upper=0.30, lower=0.60, smile=0.10),
    "yu": _shape(jaw=0.15, lip=0.20, pucker=0.75, upper=0.10),
    "iz": _shape(jaw=0.16, lip=0.55, width=0.30, upper=0.30, lower=0.50),
    "ir": _shape(jaw=0.18, lip=0.48, pucker=0.20, upper=0.25, lower=0.42),
    "p": _CLOSED,
    "b": _CLOSED,
    "m": _CLOSED,
    "f": _TUCKED,
    "v": _TUCKED,
    "th": _shape(jaw=0.02, lip=0.38, upper=0.15, lower=0.29, tongue=1.0),
    "dh": _shape(jaw=-0.05, lip=0.20, upper=0.12, lower=0.24, tongue=1.0),
    "t": _shape(jaw=0.30, lip=0.65, upper=0.22, lower=0.46, tongue=0.3),
    "d": _shape(jaw=0.22, lip=0.52, upper=0.20, lower=0.40, tongue=0.3),
    "n": _shape(lip=0.25, upper=0.10, lower=0.27, tongue=0.6),
    "l": _shape(jaw=0.20, lip=0.31, width=-0.08, upper=0.09, lower=0.21, tongue=0.9),
    "s": _S,
    "z": _shape(jaw=0.05, lip=0.65, width=0.12, pucker=0.06, upper=0.36, lower=0.58),
    "ts": _S,
    "sh": _SH,
    "zh": _SH,
    "ch": _SH,
    "jh": _SH,
    "sr": _RETROFLEX,
    "cr": _RETROFLEX,
    "rr": _RETROFLEX,
    "xx": _PALATAL,
    "jj": _PALATAL,
    "qq": _PALATAL,
    "k": _shape(jaw=0.38, lip=0.52, upper=0.16, lower=0.35),
    "g": _shape(jaw=0.29, lip=0.70, upper=0.17, lower=0.42),
    "ng": _shape(jaw=0.30, lip=0.50, upper=0.15, lower=0.35),
    "hh": _shape(jaw=0.30, lip=0.45, upper=0.15, lower=0.30),
    "r": _shape(jaw=-0.01, lip=-0.20, pucker=0.50, upper=-0.03, lower=-0.09),
    "w": _shape(jaw=-0.06, lip=-0.26, pucker=0.83, upper=-0.09, lower=-0.13),
    "y": _shape(jaw=0.27, lip=0.47, width=0.39, upper=0.25, lower=0.40),
    "pau": _shape(),
}


class Strength(NamedTuple):
    """How strongly a phone pulls jaw, lip edges, width and rounding towards its shape."""

    jaw: float
    lips: float
    width: float
    pucker: float


_LABIAL_PULL, _TUCK_PULL = Strength(1.0, 1.6, 0.8, 0.3), Strength(0.8, 1.6, 0.5, 0.3)
_SH_PULL, _RETROFLEX_PULL = Strength(0.75, 0.5, 1.2, 1.6), Strength(0.75, 0.6, 0.5, 0.8)
_PALATAL_PULL, _S_PULL = Strength(0.7, 0.7, 0.4, 0.5), Strength(0.4, 2.0, 0.26, 1.1)

STRENGTHS: dict[str, Strength] = {
    "aa": Strength(0.9, 0.7, 0.3, 2.0),
    "ae": Strength(0.6, 0.8, 0.5, 0.6),
    "ah": Strength(0.75, 0.95, 1.05, 0.6),
    "ao": Strength(1.0, 1.15, 1.2, 2.0),
    "ax": Strength(0.9, 1.0, 1.1, 1.2),
    "eh": Strength(0.9, 1.1, 0.6, 1.1),
    "er": Strength(1.0, 1.0, 1.0, 1.0),
    "ih": Strength(0.55, 0.5, 1.1, 0.95),
    "iy": Strength(0.5, 0.8, 1.3, 0.7),
    "uh": Strength(1.0, 1.0, 1.5, 2.0),
    "uw": Strength(0.65, 0.9, 0.8, 1.0),
    "oo": Strength(1.3, 0.9, 1.3, 1.6),
    "ee": Strength(1.3, 1.8, 0.5, 0.55),
    "yu": Strength(1.0, 1.0, 1.5, 2.0),
    "iz": Strength(1.0, 1.0, 1.0, 1.0),
    "ir": Strength(1.0, 1.0, 1.0, 1.0),
    **dict.fromkeys(("p", "b", "m"), _LABIAL_PULL),
    **dict.fromkeys(("f", "v"), _TUCK_PULL),
    "th": Strength(0.45, 0.3, 0.3, 0.35),
    "dh": Strength(1.0, 0.5, 0.3, 0.35),
    "t": Strength(0.2, 0.3, 0.26, 0.28),
    "d": Strength(0.28, 0.28, 0.35, 0.8),
    "n": Strength(0.15, 0.1, 0.16, 0.4),
    "l": Strength(0.7, 0.2, 0.55, 0.15),
    "s": _S_PULL,
    "ts": _S_PULL,
    "z": Strength(0.6, 0.6, 0.6, 0.4),
    **dict.fromkeys(("sh", "zh", "ch", "jh"), _SH_PULL),
    **dict.fromkeys(("sr", "cr", "rr"), _RETROFLEX_PULL),
    **dict.fromkeys(("xx", "jj", "qq"), _PALATAL_PULL),
    "k": Strength(0.45, 0.25, 0.25, 0.33),
    "g": Strength(0.2, 0.5, 0.4, 0.26),
    "ng": Strength(0.2, 0.3, 0.3, 0.3),
    "hh": Strength(0.08, 0.08, 0.08, 0.08),
    "r": Strength(0.65, 1.5, 0.6, 1.4),
    "w": Strength(0.6, 1.7, 1.25, 2.1),
    "y": Strength(0.37, 0.32, 0.26, 0.26),
    "pau": Strength(0.8, 0.8, 0.8, 0.8),
}
# s in which a phone's pull falls to a third, before and after it: rounding and width outlast their phone.
REACH_BEFORE = Strength(0.038, 0.057, 0.044, 0.035)
REACH_AFTER = Strength(0.042, 0.022, 0.096, 0.123)

# A diphthong is its two ends, the first for the larger part of the time.
DIPHTHONGS = {
    "aw": ("aa", "uw"),
    "ay": ("aa", "ih"),
    "ey": ("ee", "iy"),
    "ow": ("oo", "uw"),
    "oy": ("ao", "ih"),
    "ia": ("iy", "aa"),
    "ie": ("iy", "eh"),
    "iu": ("iy", "ow"),
    "ua": ("uw", "aa"),
    "uo": ("uw", "ao"),
    "ui": ("uw", "ey"),
    "ue": ("uw", "ax"),
    "ye": ("yu", "eh"),
    "ya": ("yu", "ae"),
    "yx": ("yu", "ax"),
    "wy": ("uw", "ay"),
}
FIRST_PART = 0.55


_PART_OF_CLOSURE = {"p": 0.65, "b": 0.85, "m": 1.0}

_JAW = PARAMETER_INDEX["jaw_open"]
EVENT_COLUMNS = [PARAMETER_INDEX[name] for name in EVENTS]
# Which strength rules each rig parameter; the smile comes and goes with the width.
_RULED_BY = {"jaw_open": "jaw", "lip_width": "width", "smile": "width", "pucker": "pucker"}
_RULES = [Strength._fields.index(_RULED_BY.get(name, "lips")) for name in NAMES]


def split_diphthongs(phones: Sequence[Phone]) -> list[Phone]:
    """The phones with each diphthong replaced by its ends, down to names of `SHAPES`."""
    flat: list[Phone] = []
    for phone in phones:
        ends = DIPHTHONGS.get(phone.name)
        if ends is None:
            flat.append(phone)
            continue
        middle = phone.start + FIRST_PART * (phone.end - phone.start)
        flat += split_diphthongs([Phone(ends[0], phone.start, middle), Phone(ends[1], middle, phone.end)])
    return flat


def _trapezoid(times: np.ndarray, start: float, end: float) -> np.ndarray:
    """1 from start to end, with ramps of `RAMP` outside."""
    return np.clip(np.minimum(times - start, end - times) / RAMP + 1, 0, 1)


def speaking(phones: Sequence[Phone], times: np.ndarray) -> np.ndarray:
    """(T,) how much of the shapes shows: 1 in speech, 0 from 180 ms after it until 200 ms before it."""
    shown = np.zeros(len(times))
    for phone in phones:
        if phone.name != "pau":
            rise = np.clip((times - phone.start) / LEAD + 1, 0, 1)
            fall = np.clip((phone.end + HOLD - times) / RETURN + 1, 0, 1)
            shown = np.maximum(shown, np.minimum(rise, fall))
    return smoothstep(shown)


def closures(phones: Sequence[Phone]) -> list[tuple[float, float]]:
    """Start and end, in seconds, of the time the lips are shut in each p, b and m: up to the burst."""
    spans = []
    for phone in phones:
        if phone.name in _PART_OF_CLOSURE:
            length = _PART_OF_CLOSURE[phone.name] * (phone.end - phone.start)
            spans.append((phone.start, phone.start + max(length, SHORTEST_CLOSURE)))
    return spans


def _blend(phones: Sequence[Phone], times: np.ndarray) -> np.ndarray:
    """(T, 10) the phones' shapes averaged by dominance, none beyond its range's lower end."""
    middles = np.array([(phone.start + phone.end) / 2 for phone in phones])
    halves = np.array([(phone.end - phone.start) / 4 for phone in phones])[:, None]
    distance = times - middles[:, None]  # (P, T)
    early, late = np.maximum(-distance - halves, 0), np.maximum(distance - halves, 0)
    shapes = np.array([SHAPES[phone.name] for phone in phones])
    strengths = np.array([STRENGTHS[phone.name] for phone in phones])
    curves = np.empty((len(times), len(NAMES)))
    for i, rule in enumerate(_RULES):
        fall = np.exp(-early / REACH_BEFORE[rule] - late / REACH_AFTER[rule])
        pull = strengths[:, rule, None] * fall + 1e-9
        curves[:, i] = (pull * shapes[:, i, None]).sum(0) / pull.sum(0)
    return np.maximum(curves, [parameter.low for parameter in RIG_PARAMETERS])


def _smooth(curves: np.ndarray) -> np.ndarray:
    """Curves smoothed over three steps: lips have mass."""
    padded = np.pad(curves, ((1, 1), (0, 0)), mode="edge")
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]


def mouth_curves(phones: Sequence[Phone], n_steps: int, loudness: np.ndarray | None = None) -> np.ndarray:
    """Rig parameters of a labelled utterance.

    Args:
        phones: in the order of time; names of `SHAPES` or `DIPHTHONGS`.
        n_steps: steps of 20 ms; step j stands for the time j × 20 ms.
        loudness: (n_steps,) dB over the speaker's level, smoothed over about 0.2 s; moves the jaw a little.

    Returns:
        (n_steps, 10) float32.
    """
    phones = split_diphthongs(phones)
    times = np.arange(n_steps) / STEPS_PER_SECOND
    if not phones:
        return np.zeros((n_steps, len(NAMES)), np.float32)
    curves = _smooth(_blend(phones, times))
    if loudness is not None:
        curves[:, _JAW] *= 1 + LOUDNESS_SHARE * np.tanh(loudness / 10)
    curves[:, EVENT_COLUMNS] = 0
    for start, end in closures(phones):
        press = curves[:, PARAMETER_INDEX["lip_press"]]
        np.maximum(press, _trapezoid(times, start, end), out=press)
    for phone in phones:
        for name in ("lip_tuck", "tongue_up"):
            height = SHAPES[phone.name][PARAMETER_INDEX[name]]
            event = curves[:, PARAMETER_INDEX[name]]
            np.maximum(event, height * _trapezoid(times, phone.start, phone.end), out=event)
    return (curves * speaking(phones, times)[:, None]).astype(np.float32)
