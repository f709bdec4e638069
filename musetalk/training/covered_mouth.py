"""Learn what a covered mouth looks like: `python -m musetalk.training.covered_mouth FOLDER`.

The folder holds pictures of faces whose mouths are free. Each is looked at as it is and with covers drawn on
it (`covers`), in colour and in grey, and a logistic regression weighs what `faces.covered_mouth` measures;
the same folder gives the same weights. The decision a reader would question: the constant is moved so that
few free mouths are called covered. The warning is of use only where it is rare.

The bundled weights come from 133 pictures, 420 pixels at most, whose origin NOTICES.md names. Called covered
by fits that never saw the picture: 2.3 % of free mouths; 95 % of masks, 92 % of cloths, 91 % of hands, 94 %
of microphones, 97 % of cards. With other drawings, among them photographed masks, on mostly the same faces:
masks 94 to 98 %, cloths 87 %, hands 95 %, microphones 92 %, free mouths 0.5 %. No photograph of a really
covered mouth was at hand.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musetalk.config import IMAGE_SUFFIXES
from musetalk.errors import InputError, MuseTalkError
from musetalk.faces.base import FaceDetector
from musetalk.faces.covered_mouth import WEIGHTS, measures
from musetalk.files import atomic_file
from musetalk.training.covers import covered
from musetalk.training.evaluate import json_text

logger = logging.getLogger(__name__)

FREE = "free"
FALSE_ALARMS = 0.02  # share of free mouths that are called covered
FOLDS = 8  # parts of the pictures, each scored by a fit of the others
PENALTY = 0.01  # of the fit: the data's weight against that of small weights
STEPS, SETTLED = 50, 1e-9  # Newton's
SMALLEST_SPREAD = 1e-6  # of a measure that is worth a weight


class Example(NamedTuple):
    """A mouth that was looked at.

    Attributes:
        picture: its file's number.
        kind: `FREE` or the cover's name.
        measures: (222,) see `faces.covered_mouth`.
    """

    picture: int
    kind: str
    measures: np.ndarray


def grey(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 without colour."""
    return np.repeat(frame.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)


def examples(pictures: Iterable[np.ndarray], detector: FaceDetector) -> Iterator[Example]:
    """What is learned from: the first face of each picture, free and covered, where it is still seen."""
    for number, picture in enumerate(pictures):
        mesh = _mesh(detector, picture)
        if mesh is None:
            logger.warning("no face in picture %d", number)
            continue
        for frame in (picture, grey(picture)):
            yield Example(number, FREE, measures(frame, mesh))
        for kind, frame in covered(picture, mesh, number):
            found = _mesh(detector, frame)
            if found is not None:
                for shown in (frame, grey(frame)):
                    yield Example(number, kind, measures(shown, found))


def _mesh(detector: FaceDetector, frame: np.ndarray) -> np.ndarray | None:
    faces = detector.detect(frame)
    return faces[0].mesh if faces else None


def fitted(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(k + 1,) constant and weights of a balanced logistic regression of standardised measures.

    Args:
        values: (n, k) measures.
        positive: (n,) bool, some of either.
    """
    mean, spread = values.mean(axis=0), np.maximum(values.std(axis=0), SMALLEST_SPREAD)
    constant, *weights = _newton((values - mean) / spread, positive)
    plain = np.array(weights) / spread
    return np.append(constant - plain @ mean, plain)


def _newton(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The minimum of half the weights' square and the balanced log loss, the constant first and free."""
    design = np.column_stack([np.ones(len(values)), values])
    penalty = np.append(0.0, np.ones(values.shape[1]))
    worth = PENALTY * len(positive) / 2 / np.where(positive, positive.sum(), (~positive).sum())
    solution = np.zeros(design.shape[1])
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-design @ solution))
        slope = design.T @ (worth * (chance - positive)) + penalty * solution
        bend = (design.T * (worth * chance * (1 - chance))) @ design + np.diag(penalty)
        step = np.linalg.solve(bend, slope)
        solution -= step
        if np.abs(step).max() < SETTLED:
            break
    return solution


def unseen_scores(found: Sequence[Example]) -> np.ndarray:
    """(n,) each example's score by a fit that saw nothing of its picture."""
    values, positive, part = _table(found)
    scores = np.zeros(len(found))
    for fold in range(FOLDS):
        own = part == fold
        if own.any():
            constant, *weights = fitted(values[~own], positive[~own])
            scores[own] = constant + values[own] @ np.array(weights)
    return scores


def _table(found: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, k) measures, (n,) whether covered, and (n,) which part of the pictures."""
    values = np.stack([example.measures for example in found])
    positive = np.array([example.kind != FREE for example in found])
    return values, positive, np.array([example.picture % FOLDS for example in found])


def learned(found: Sequence[Example], false_alarms: float) -> tuple[np.ndarray, dict[str, Any]]:
    """(k + 1,) float32 weights for `faces.covered_mouth`, and how unseen faces fared.

    Args:
        false_alarms: share of free mouths that may be called covered.
    """
    values, positive, _ = _table(found)
    scores = unseen_scores(found)
    threshold = float(np.quantile(scores[~positive], 1 - false_alarms))
    weights = fitted(values, positive)
    weights[0] -= threshold
    kinds = np.array([example.kind for example in found])
    shares = {
        str(kind): round(float((scores[kinds == kind] > threshold).mean()), 3) for kind in np.unique(kinds)
    }
    told = {"pictures": len({example.picture for example in found}), "examples": len(found)}
    return weights.astype(np.float32), {**told, "threshold": round(threshold, 3), "called_covered": shares}


def pictures_in(folder: Path) -> list[Path]:
    """The folder's pictures in the order of their names.

    Raises:
        InputError: there are too few to learn from.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < 2 * FOLDS:
        raise InputError(
            f"{folder} has {len(found)} pictures", f"give {2 * FOLDS} at least; some 200 are good"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; writes the weights, their figures to stdout, and returns the exit code."""
    parser = argparse.ArgumentParser(description="learn what a covered mouth looks like")
    parser.add_argument("folder", type=Path, help="pictures of faces whose mouths are free")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--false_alarms", type=float, default=FALSE_ALARMS, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        weights, told = learned(list(_examples_in(options.folder)), options.false_alarms)
        with atomic_file(options.output) as stream:
            np.save(stream, weights)
    except MuseTalkError as e:
        logger.error("%s. %s", e.message, e.hint)
        return e.exit_code
    sys.stdout.buffer.write(json_text(told).encode() + b"\n")
    return 0


def _examples_in(folder: Path) -> Iterator[Example]:
    from musetalk.faces.mediapipe import MediapipeDetector
    from musetalk.media.image import read_image

    return examples((read_image(path) for path in pictures_in(folder)), MediapipeDetector())


if __name__ == "__main__":
    raise SystemExit(main())
