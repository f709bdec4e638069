"""Learning what a covered mouth looks like: another solver's weights, unseen pictures, few false alarms."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from musetalk.errors import InputError
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.media.image import read_image
from musetalk.tools.demo import PORTRAIT
from musetalk.training import covered_mouth
from musetalk.training.covered_mouth import FREE, PENALTY, Example, examples, fitted, learned, unseen_scores
from musetalk.training.covers import REPEATS


def cases(count: int, apart: float, seed: int = 0) -> list[Example]:
    """Five measures of each picture, free and covered, `apart` of which the first tells."""
    rng = np.random.default_rng(seed)
    return [
        Example(number, kind, rng.normal(0, 1, 5) * [1, 10, 0.1, 1, 1] + [place, 50, 0, 0, 0])
        for number in range(count)
        for kind, place in ((FREE, 0.0), ("mask", apart), ("hand", apart))
    ]


def test_weights_are_those_of_another_solver():
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    found = cases(60, 1.5)
    values, positive = (
        np.stack([one.measures for one in found]),
        np.array([one.kind != FREE for one in found]),
    )
    scaled = preprocessing.StandardScaler().fit_transform(values)
    model = linear_model.LogisticRegression(C=PENALTY, class_weight="balanced", tol=1e-10, max_iter=10_000)
    constant, *weights = fitted(values, positive)
    expected = model.fit(scaled, positive).decision_function(scaled)
    assert constant + values @ np.array(weights) == pytest.approx(expected, abs=1e-4)


def test_a_measure_that_never_changes_has_no_say():
    values = np.column_stack([np.arange(20.0), np.full(20, 7.0)])
    assert np.isfinite(weights := fitted(values, np.arange(20) > 9)).all() and abs(weights[2]) < 1e-9


def test_scores_are_of_fits_that_saw_nothing_of_the_picture():
    rng = np.random.default_rng(0)
    own = rng.normal(0, 1, (40, 300))  # each picture is known by its measures, whose label is chance
    kinds = rng.permutation([FREE, "mask"] * 20)
    found = [
        Example(number, str(kind), row) for number, (kind, row) in enumerate(zip(kinds, own, strict=True))
    ]
    positive = kinds != FREE
    constant, *weights = fitted(own, positive)
    remembered, unseen = constant + own @ np.array(weights), unseen_scores(found)
    assert ((remembered > 0) == positive).mean() > 0.95
    assert ((unseen > 0) == positive).mean() < 0.75


def test_few_free_mouths_are_called_covered_and_what_was_found_is_told():
    found = cases(400, 3.0)
    weights, told = learned(found, false_alarms=0.05)
    scores = np.array([weights[0] + one.measures @ weights[1:] for one in found])
    free = np.array([one.kind == FREE for one in found])
    assert weights.dtype == np.float32 and (scores[free] > 0).mean() == pytest.approx(0.05, abs=0.02)
    assert told["called_covered"][FREE] == pytest.approx(0.05, abs=0.01)
    assert min(told["called_covered"][kind] for kind in ("mask", "hand")) > 0.8
    assert (told["pictures"], told["examples"]) == (400, 1200)


def test_each_face_is_looked_at_free_and_covered_in_colour_and_in_grey():
    portrait = read_image(PORTRAIT)[::3, ::3]
    found = list(examples([np.zeros_like(portrait), np.ascontiguousarray(portrait)], MediapipeDetector()))
    assert {one.picture for one in found} == {1}, "nobody is in the first"
    kinds = Counter(one.kind for one in found)
    assert kinds[FREE] == 2 and set(kinds) > {FREE, "mask", "card"}
    assert all(count % 2 == 0 and count <= 2 * REPEATS for count in kinds.values())
    coloured, grey = found[0].measures, found[1].measures
    assert coloured.shape == (222,) and (coloured[-1], grey[-1]) == (1, 0)


def test_the_command_writes_the_same_weights_each_time(tmp_path, monkeypatch, capsysbinary):
    monkeypatch.setattr(covered_mouth, "_examples_in", lambda folder: iter(cases(40, 3.0)))
    outputs = [tmp_path / name for name in ("one.npy", "two.npy")]
    for output in outputs:
        assert covered_mouth.main(["faces", "--output", str(output)]) == 0
        assert json.loads(capsysbinary.readouterr().out)["pictures"] == 40
    weights = np.load(outputs[0])
    assert weights.shape == (6,) and (weights == np.load(outputs[1])).all()


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="0 pictures"):
        covered_mouth.pictures_in(tmp_path)
    output = tmp_path / "weights.npy"
    assert covered_mouth.main([str(tmp_path), "--output", str(output)]) == 3
    assert not output.exists()
