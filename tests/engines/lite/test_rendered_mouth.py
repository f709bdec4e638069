"""What a face mesh sees of a rendered mouth is what the parameters asked for."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from musetalk.compositor import paste_back
from musetalk.engines.lite.engine import LiteEngine
from musetalk.engines.lite.parameters import PARAMETER_INDEX, RIG_PARAMETERS, rig_opening, rig_width
from musetalk.faces.head import mouth_opening, mouth_width
from musetalk.faces.mediapipe import MediapipeDetector
from musetalk.tools.portrait_sheet import portrait_template
from tests.engines.lite.face_meshes import load_portrait

# Mouths of a babbled phrase, eight frames from each to the next.
TARGETS: list[dict[str, float]] = [
    {},
    {"jaw_open": 0.45, "lip_open": 0.5, "upper_lip_raise": 0.2, "lower_lip_drop": 0.4},
    {"jaw_open": 0.14, "lip_press": 1.0},
    {
        "jaw_open": 0.25,
        "lip_open": 0.5,
        "lip_width": 0.4,
        "lower_lip_drop": 0.5,
        "upper_lip_raise": 0.3,
        "smile": 0.2,
    },
    {"jaw_open": 0.2, "lip_open": 0.2, "pucker": 0.6},
    {"jaw_open": 0.35, "lip_open": 0.3, "pucker": 0.3},
    {"jaw_open": 0.1, "lip_tuck": 1.0, "upper_lip_raise": 0.2},
    {"jaw_open": 0.5, "lip_open": 0.5, "lip_width": 0.3, "upper_lip_raise": 0.3, "lower_lip_drop": 0.5},
    {},
]


def rows(targets: list[dict[str, float]], steps: int) -> np.ndarray:
    """Parameters (n, 10) that go from each target to the next."""
    points = np.zeros((len(targets), len(RIG_PARAMETERS)), np.float32)
    for point, target in zip(points, targets, strict=True):
        for name, value in target.items():
            point[PARAMETER_INDEX[name]] = value
    share = (1 - np.cos(np.pi * np.arange(steps) / steps))[:, None] / 2
    return np.concatenate([a + share * (b - a) for a, b in itertools.pairwise(points)])


def seen(name: str, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Opening and outer width in the blended frames, eye distances."""
    frame = load_portrait(name).frame
    engine = LiteEngine(Path("unused"))
    template = portrait_template(frame, engine)
    detector = MediapipeDetector(video=True)
    meshes = []
    for face in engine.open(template).generate(parameters, [0] * len(parameters)):
        blended = paste_back(frame, face, template.bboxes[0], template.masks[0], template.crop_boxes[0])
        mesh = detector.detect(blended)[0].mesh
        assert mesh is not None
        meshes.append(mesh)
    return mouth_opening(np.stack(meshes)), mouth_width(np.stack(meshes))


@pytest.mark.parametrize("name", ["hopper", "drawn_girl"])
def test_opening_and_width_of_speech_are_seen(name: str) -> None:
    parameters = rows(TARGETS, steps=8)
    seen_opening, seen_width = seen(name, parameters)
    asked_opening, asked_width = rig_opening(parameters), rig_width(parameters)
    assert np.corrcoef(seen_opening, asked_opening)[0, 1] > 0.95
    assert np.corrcoef(seen_width, asked_width)[0, 1] > 0.9
    assert np.polyfit(asked_opening, seen_opening, 1)[0] == pytest.approx(1, abs=0.25)
    assert np.polyfit(asked_width, seen_width, 1)[0] == pytest.approx(1, abs=0.35)


def test_lips_that_meet_are_seen_to_meet() -> None:
    pressed = {"jaw_open": 0.3, "lip_open": 0.5, "lip_press": 1.0}
    seen_opening, _ = seen("astronaut", rows([{}, pressed, {}], steps=6))
    assert seen_opening.max() < 0.02


def test_a_narrow_gap_is_seen() -> None:
    seen_opening, _ = seen("hopper", rows([{}, {"jaw_open": 0.1, "lip_open": 0.25}, {}], steps=6))
    assert seen_opening.max() > 0.02
    assert seen_opening[0] < 0.005


def test_a_jaw_that_opens_leaves_the_width() -> None:
    parameters = rows([{}, {"jaw_open": 0.5}, {}, {"jaw_open": 0.5}, {}], steps=8)
    jaw = parameters[:, PARAMETER_INDEX["jaw_open"]]
    _, width = seen("hopper", parameters)
    assert np.median(width[jaw > 0.35]) == pytest.approx(np.median(width[jaw < 0.05]), abs=0.02)
