"""How many 25-fps sessions this machine carries: one is rendered as it would be live, and its cost counted.

The decision a reader would question: processor time is counted, not the clock. A session costs the same
whatever else the machine does at its start, and the share that is planned with leaves room for the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from fractions import Fraction
from pathlib import Path

from musetalk.config import LITE_MODELS, EngineConfig
from musetalk.device import usable_cores
from musetalk.measurement import processor_seconds
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.media.video import VideoWriter
from musetalk.pipeline import StageClock
from musetalk.rendering import OpenedTemplate, Request, render
from musetalk.server.viewers import LIVE_ENCODING
from musetalk.service import IntegratedMuseTalkService

SESSION_FPS = Fraction(25)
PLANNED_SHARE = 0.7  # of the processors or the card; the rest is for what a session doesn't do all the time
PORTRAIT = LITE_MODELS / "portraits" / "astronaut.jpg"
SPEECH = LITE_MODELS / "speech" / "demo_en.flac"
TEMPLATE_ID = "self-test"
FOLDER = ".self-test"  # in the cache folder: the portrait is preprocessed once
MEASURED_SECONDS = 2  # of speech, read in blocks of one


def warm_up(service: IntegratedMuseTalkService) -> OpenedTemplate:
    """Loads everything that a first request would wait for; the bundled portrait, opened and rendered once.

    Raises:
        WeightsError, EngineError: the engine can't run.
    """
    import numpy as np

    config = dataclasses.replace(service.config, strict_device=False)
    test = IntegratedMuseTalkService(service.store.cache_dir / FOLDER, config=config, engines=service.engines)
    test.preprocess_template(TEMPLATE_ID, PORTRAIT)
    opened = test.renderer().open(TEMPLATE_ID)
    frames, _ = render(opened, [np.zeros(SAMPLE_RATE // 5, np.float32)], Request(SESSION_FPS, 1))
    for _ in frames:
        pass
    return opened


def measured_capacity(opened: OpenedTemplate) -> int:
    """Sessions at 25 frames/s that a device carries which renders `opened`, at least 1."""
    request, clock = Request(SESSION_FPS, EngineConfig.batch_size, live=True), StageClock()
    speech = itertools.islice(read_waveform(SPEECH), MEASURED_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        before = processor_seconds()
        frames, info = render(opened, speech, request, clock)
        output = Path(folder) / "self-test.mp4"
        with VideoWriter(output, *info.size, SESSION_FPS, None, encoding=LIVE_ENCODING) as writer:
            for frame in frames:
                writer.write(frame.i420)
        spent = processor_seconds() - before
    seconds = float(info.position.frames / SESSION_FPS)
    by_cores = usable_cores() * PLANNED_SHARE * seconds / max(spent, 1e-6)
    if opened.engine.device == "cpu":
        return max(1, int(by_cores))
    by_card = PLANNED_SHARE * seconds / max(clock.seconds.get("generate", 0.0), 1e-6)
    return max(1, int(min(by_cores, by_card)))
