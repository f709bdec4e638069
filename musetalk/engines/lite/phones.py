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

STEPS_PER_SECOND = 50  # of every curve here: Whisper's encoder steps

RAMP = 0.04  # s, of closures, tucks and tongue tips
LEAD = 0.14  # s, the mouth starts to move before the first sound
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


_SIBILANT = _shape(jaw=0.17, lip=0.55, width=0.20, upper=0.35, lower=0.55)
_SH = _shape(jaw=0.20, lip=0.50, pucker=0.40, upper=0.40, lower=0.40)
_RETROFLEX = _shape(jaw=0.18, lip=0.45, pucker=0.25, upper=0.30, lower=0.40)
_PALATAL = _shape(jaw=0.18, lip=0.50, width=0.30, upper=0.30, lower=0.50)
_STOP = _shape(jaw=0.25, lip=0.50, upper=0.20, lower=0.40, tongue=0.3)
_VELAR = _shape(jaw=0.26, lip=0.50, upper=0.15, lower=0.35)
_DENTAL = _shape(jaw=0.17, lip=0.40, upper=0.15, lower=0.30, tongue=1.0)
_CLOSED = _shape(jaw=0.14, width=-0.15, press=1.0)
_TUCKED = _shape(jaw=0.10, width=-0.10, upper=0.20, tuck=1.0)

# Inner-lip opening is what OPENING_GAIN makes of a row: 0.17 eye distances for aa, 0.05 for uw. Speech keeps
# the lips parted: between front vowels, alveolars and sibilants they hardly move, and what closes them is
# labials, w, r and rounded vowels (seen in GRID's speakers as well).
SHAPES: dict[str, tuple[float, ...]] = {
    "aa": _shape(jaw=0.58, lip=0.50, upper=0.20, lower=0.40),
    "ae": _shape(jaw=0.52, lip=0.55, width=0.35, upper=0.35, lower=0.50),
    "ah": _shape(jaw=0.38, lip=0.40, upper=0.15, lower=0.30),
    "ao": _shape(jaw=0.34, lip=0.12, pucker=0.50, lower=0.05),
    "ax": _shape(jaw=0.24, lip=0.50, upper=0.15, lower=0.40),
    "eh": _shape(jaw=0.44, lip=0.55, width=0.30, upper=0.30, lower=0.50),
    "er": _shape(jaw=0.20, lip=0.25, pucker=0.35, upper=0.10, lower=0.15),
    "ih": _shape(jaw=0.32, lip=0.50, width=0.25, upper=0.25, lower=0.45),
    "iy": _shape(jaw=0.25, lip=0.50, width=0.50, upper=0.30, lower=0.50, smile=0.25),
    "uh": _shape(jaw=0.22, lip=0.30, pucker=0.45, upper=0.10, lower=0.15),
    "uw": _shape(jaw=0.19, lip=0.20, pucker=0.70),
    "oo": _shape(jaw=0.30, lip=0.15, pucker=0.60, upper=0.05, lower=0.10),
    "ee": _shape(jaw=0.40, lip=0.55, width=0.40, upper=0.30, lower=0.50, smile=0.1),
    "yu": _shape(jaw=0.15, lip=0.20, pucker=0.75, upper=0.10),
    "iz": _shape(jaw=0.16, lip=0.50, width=0.30, upper=0.30, lower=0.50),
    "ir": _shape(jaw=0.16, lip=0.45, pucker=0.20, upper=0.20, lower=0.40),
    "p": _CLOSED,
    "b": _CLOSED,
    "m": _CLOSED,
    "f": _TUCKED,
    "v": _TUCKED,
    "th": _DENTAL,
    "dh": _DENTAL,
    "t": _STOP,
    "d": _STOP,
    "n": _shape(jaw=0.24, lip=0.45, upper=0.15, lower=0.35, tongue=0.6),
    "l": _shape(jaw=0.24, lip=0.35, upper=0.10, lower=0.20, tongue=0.9),
    "s": _SIBILANT,
    "z": _SIBILANT,
    "ts": _SIBILANT,
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
    "k": _VELAR,
    "g": _VELAR,
    "ng": _VELAR,
    "hh": _shape(jaw=0.30, lip=0.45, upper=0.15, lower=0.30),
    "r": _shape(jaw=0.15, lip=0.10, pucker=0.45, upper=0.05, lower=0.05),
    "w": _shape(jaw=0.08, pucker=0.85),
    "y": _shape(jaw=0.22, lip=0.45, width=0.40, upper=0.25, lower=0.40),
    "pau": _shape(),
}

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


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


VOWELS = _set("aa ae ah ao ax eh er ih iy uh uw oo ee yu iz ir")
_ROUNDED = _set("uw oo yu w sh zh ch jh uh ao")
_SIBILANTS = _set("s z ts sh zh ch jh xx jj qq sr cr rr")
_LABIALS = _set("p b m f v")
_VELARS = _set("k g ng")
_PART_OF_CLOSURE = {"p": 0.65, "b": 0.85, "m": 1.0}

_JAW, _PUCKER, _WIDTH = (PARAMETER_INDEX[name] for name in ("jaw_open", "pucker", "lip_width"))
_LIPS = [PARAMETER_INDEX[name] for name in ("lip_open", "upper_lip_raise", "lower_lip_drop")]
_EVENT_COLUMNS = [PARAMETER_INDEX[name] for name in EVENTS]

# Fall of the dominance, s: the lips round early and long, the jaw is quick.
REACH = np.full(len(NAMES), 0.06)
REACH[_PUCKER], REACH[_WIDTH] = 0.08, 0.07


def dominance(name: str) -> np.ndarray:
    """(10,) strength with which a phone pulls each rig parameter towards its shape."""
    strength = np.full(len(NAMES), 1.0)
    if name in VOWELS:
        strength[_JAW] = 0.7 if name == "ax" else 1.0
    elif name == "pau":
        strength[:] = 0.8
    elif name == "hh":
        strength[:] = 0.08
    else:
        strength[:] = 0.3
        if name in _SIBILANTS:
            strength[_JAW] = 0.8
            strength[_LIPS] = 0.5
        elif name in _LABIALS:
            strength[_JAW] = 0.7
            strength[_LIPS] = 2.0
        elif name in _VELARS:
            strength[_JAW] = 0.2
    if name in _ROUNDED:
        strength[_PUCKER], strength[_WIDTH] = 2.0, 1.5
    return strength


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
    """(T,) how much of the shapes shows: 1 in speech, 0 from 180 ms after it until 140 ms before it."""
    shown = np.zeros(len(times))
    for phone in phones:
        if phone.name != "pau":
            rise = np.clip((times - phone.start) / LEAD + 1, 0, 1)
            fall = np.clip((phone.end + HOLD - times) / RETURN + 1, 0, 1)
            shown = np.maximum(shown, np.minimum(rise, fall))
    return shown * shown * (3 - 2 * shown)


def closures(phones: Sequence[Phone]) -> list[tuple[float, float]]:
    """Start and end, in seconds, of the time the lips are shut in each p, b and m: up to the burst."""
    spans = []
    for phone in phones:
        if phone.name in _PART_OF_CLOSURE:
            length = _PART_OF_CLOSURE[phone.name] * (phone.end - phone.start)
            spans.append((phone.start, phone.start + max(length, SHORTEST_CLOSURE)))
    return spans


def _blend(phones: Sequence[Phone], times: np.ndarray) -> np.ndarray:
    """(T, 10) the phones' shapes averaged by dominance."""
    middles = np.array([(phone.start + phone.end) / 2 for phone in phones])
    halves = np.array([(phone.end - phone.start) / 4 for phone in phones])
    distance = np.maximum(np.abs(times - middles[:, None]) - halves[:, None], 0)  # (P, T)
    curves = np.empty((len(times), len(NAMES)))
    shapes = np.array([SHAPES[phone.name] for phone in phones])
    strengths = np.array([dominance(phone.name) for phone in phones])
    for i, reach in enumerate(REACH):
        pull = strengths[:, i, None] * np.exp(-distance / reach) + 1e-9
        curves[:, i] = (pull * shapes[:, i, None]).sum(0) / pull.sum(0)
    return curves


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
    curves[:, _EVENT_COLUMNS] = 0
    for start, end in closures(phones):
        press = curves[:, PARAMETER_INDEX["lip_press"]]
        np.maximum(press, _trapezoid(times, start, end), out=press)
    for phone in phones:
        for name in ("lip_tuck", "tongue_up"):
            height = SHAPES[phone.name][PARAMETER_INDEX[name]]
            event = curves[:, PARAMETER_INDEX[name]]
            np.maximum(event, height * _trapezoid(times, phone.start, phone.end), out=event)
    return (curves * speaking(phones, times)[:, None]).astype(np.float32)
