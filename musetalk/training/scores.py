"""Scores of mouth movement: how well one curve follows another, whether lips meet, whether silence is still.

Curves are sampled at a known rate, on one time axis; NaN marks moments without a face and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST_LAG = 0.2  # s, either way
CLOSED_SHARE = 0.08  # of the opening's range: what is less counts as closed
TOLERANCE = 0.06  # s, within which a closure may come early or late


class Agreement(NamedTuple):
    """Pearson's r at zero lag, the best r, and its lag in seconds (positive: `measured` is late)."""

    r: float
    best_r: float
    lag: float


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two curves (n,); NaN where either stands still or fewer than three points remain."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def agreement(
    measured: np.ndarray, truth: np.ndarray, rate: float, longest_lag: float = LONGEST_LAG
) -> Agreement:
    """How `measured` (n,) follows `truth` (n,), both at `rate` per second, within lags of `longest_lag` s."""
    length = min(len(measured), len(truth))
    measured, truth = measured[:length], truth[:length]
    scores = {}
    reach = round(longest_lag * rate)
    for lag in range(-reach, reach + 1):
        shifted = measured[max(lag, 0) : length + min(lag, 0)]
        scores[lag] = pearson(shifted, truth[max(-lag, 0) : length - max(lag, 0)])
    best = max(scores, key=lambda lag: (np.nan_to_num(scores[lag], nan=-2.0), -abs(lag)))
    return Agreement(scores[0], scores[best], best / rate)


def opening_range(opening: np.ndarray) -> float:
    """The usual range of an opening (n,): its 95th percentile less its 2nd."""
    low, high = np.nanpercentile(opening, [2, 95])
    return float(high - low)


def closure_rate(opening: np.ndarray, rate: float, spans: Sequence[tuple[float, float]]) -> float:
    """Share of `spans` (start, end in s) in which, ± `TOLERANCE`, the mouth closes; NaN for none."""
    closed = np.nanpercentile(opening, 2) + CLOSED_SHARE * opening_range(opening)
    return event_rate(-opening, rate, spans, -float(closed))


def event_rate(curve: np.ndarray, rate: float, spans: Sequence[tuple[float, float]], least: float) -> float:
    """Share of `spans` (s) in which, ± `TOLERANCE`, `curve` (n,) reaches `least`; NaN for none."""
    hits = []
    for start, end in spans:
        begin = max(0, int(np.floor((start - TOLERANCE) * rate)))
        inside = curve[begin : int(np.ceil((end + TOLERANCE) * rate)) + 1]
        if np.isfinite(inside).any():
            hits.append(bool(np.nanmax(inside) >= least))
    return float(np.mean(hits)) if hits else float("nan")


def f_score(curve: np.ndarray, rate: float, spans: Sequence[tuple[float, float]], least: float) -> float:
    """F1 of the stretches in which `curve` (n,) reaches `least` as detections of `spans`, ± `TOLERANCE`."""
    recall = event_rate(curve, rate, spans, least)
    above = np.concatenate([[0], (np.nan_to_num(curve, nan=-np.inf) >= least).astype(int), [0]])
    begins, ends = np.flatnonzero(np.diff(above) == 1), np.flatnonzero(np.diff(above) == -1)
    if not len(begins) or not spans or not recall > 0:
        return 0.0 if spans else float("nan")
    near = [
        any(begin / rate <= end + TOLERANCE and stop / rate >= start - TOLERANCE for start, end in spans)
        for begin, stop in zip(begins, ends, strict=True)
    ]
    precision = float(np.mean(near))
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def jitter(points: np.ndarray) -> float:
    """Mean length of the second difference of points (frames, n, 2) over time, in their unit per frame²."""
    second = points[2:] - 2 * points[1:-1] + points[:-2]
    return float(np.nanmean(np.linalg.norm(second, axis=-1))) if len(second) else float("nan")
