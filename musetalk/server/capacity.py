"""What a live frame costs on this machine: a session is rendered as it would be live, and its cost counted.

The decision a reader would question: processor time is counted, not the clock. A session costs the same
whatever else the machine does at its start, and the share that is planned with leaves room for the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from fractions import Fraction

from musetalk.config import LITE_MODELS, EngineConfig
from musetalk.measurement import processor_seconds
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.media.fragments import Picture
from musetalk.pipeline import StageClock
from musetalk.rendering import OpenedTemplate, Request, render
from musetalk.server.viewers import live_writer
from musetalk.service import IntegratedMuseTalkService

SESSION_FPS = 25
PLANNED_SHARE = 0.4  # of the processors or the card; more sessions come late: they share one interpreter
PORTRAIT = LITE_MODELS / "portraits" / "astronaut.jpg"
SPEECH = LITE_MODELS / "speech" / "demo_en.flac"
TEMPLATE_ID = "self-test"
FOLDER = ".self-test"  # in the cache folder: the portrait is preprocessed once
MEASURED_SECONDS = 2  # of speech, read in blocks of one
ON_CARD = ("features", "generate")  # stages whose networks run there: Whisper and the engine's own
SHORTEST = 1e-6  # seconds


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
    frames, _ = render(opened, [np.zeros(SAMPLE_RATE // 5, np.float32)], Request(Fraction(SESSION_FPS), 1))
    for _ in frames:
        pass
    return opened


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one frame of a live session costs, from its speech to its encoded picture.

    Attributes:
        cores: seconds of one processor.
        card: seconds of the device, where that is a card.
    """

    cores: float
    card: float = 0.0

    def frames_per_second(self, cores: int) -> float:
        """Frames that `cores` processors and one device carry in a second."""
        by_cores = PLANNED_SHARE * cores / max(self.cores, SHORTEST)
        return min(by_cores, PLANNED_SHARE / max(self.card, SHORTEST))


def measured_cost(opened: OpenedTemplate) -> Cost:
    """What a frame of a session on `opened` costs on its device."""
    import numpy as np

    request, clock = Request(Fraction(SESSION_FPS), EngineConfig.batch_size, live=True), StageClock()
    speech = itertools.islice(read_waveform(SPEECH), MEASURED_SECONDS)
    rows, width = opened.compositor.buffer_shape
    before = processor_seconds()
    frames, info = render(opened, speech, request, clock)
    with live_writer(Picture(width, rows * 2 // 3, Fraction(SESSION_FPS))) as writer:
        watching = threading.Thread(target=deque, args=(writer.fragments(), 0), daemon=True)
        watching.start()
        for frame in frames:
            writer.write_sound(np.zeros(SAMPLE_RATE // SESSION_FPS, np.int16))
            writer.write(frame.i420)
        writer.finish()
        watching.join()
    spent, n_frames = processor_seconds() - before, info.position.frames
    if opened.engine.device == "cpu":
        return Cost(spent / n_frames)
    return Cost(spent / n_frames, sum(clock.seconds.get(stage, 0.0) for stage in ON_CARD) / n_frames)
