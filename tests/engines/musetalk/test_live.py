"""MuseTalk in a live session: whatever pieces speech comes in, the picture is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musetalk.compositor import FrameCompositor
from musetalk.config import EngineConfig
from musetalk.engines.choice import create_engine
from musetalk.rendering import OpenedTemplate
from musetalk.templates.template import Template
from tests.conftest import make_template
from tests.engines.conftest import model_paths
from tests.server.live_stand_ins import Shown, session

FRAMES = 6  # each hears its whole segment again


@pytest.fixture(scope="module")
def template(tiny_models: Path) -> OpenedTemplate:
    config = EngineConfig(engine="musetalk", models=model_paths(tiny_models), fp16=False)
    engine = create_engine("musetalk", config, "cpu")
    base = make_template(1)
    latent = np.random.default_rng(3).standard_normal((1, 8, 32, 32)).astype(np.float32)
    faces = Template.from_frames(base.frames, base.bboxes, [latent], base.masks, base.crop_boxes)
    return OpenedTemplate("state", faces, engine, engine.open(faces), FrameCompositor(faces))


def buzz(seconds: float) -> np.ndarray:
    times = np.arange(int(16_000 * seconds)) / 16_000
    return (0.3 * np.sign(np.sin(2 * np.pi * 150 * times)) * np.sin(2 * np.pi * 3 * times)).astype(np.float32)


def shown_of(template: OpenedTemplate, chunk: int, block: int) -> np.ndarray:
    """The pictures of speech that is pushed in chunks and heard in blocks."""
    samples = buzz(0.2)

    def push(heard: int) -> None:
        if not heard:
            for at in range(0, len(samples), chunk):
                live.speech.push(samples[at : at + chunk])

    live = session(template=template, block=block, script=push)
    shown = Shown(live, FRAMES)
    live.run()
    assert live.ended == "enough"
    return np.stack([np.frombuffer(picture, np.uint8) for picture in shown.pictures]).astype(int)


def test_chunks_of_speech_change_no_picture_by_more_than_a_level(template: OpenedTemplate) -> None:
    whole, pieces = shown_of(template, 16_000, 320), shown_of(template, 333, 1000)
    assert np.abs(np.diff(whole, axis=0)).max() > 1, "the speech must show"
    assert np.abs(pieces - whole).max() <= 1
