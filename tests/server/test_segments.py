"""What a segment knows of what came before it: its first frames are those of the speech in one piece."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from musetalk.config import EngineConfig
from musetalk.engines.base import hear_all
from musetalk.engines.registry import EngineRegistry
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.tools.demo import SPEECH

FPS = 25
BEHIND = 3  # frames behind a seam, which hear what came before it


@pytest.fixture(scope="module")
def engine():
    return EngineRegistry().engine("lite", EngineConfig(device="cpu"), "cpu")


def heard(engine, samples: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
    """The rig's parameters (T, 10), and where the listener stands behind them."""
    listener = engine.listen(Fraction(FPS), state=state)
    return np.concatenate(list(hear_all(listener, [samples]))), listener.state


def test_what_came_before_is_heard_across_seams(engine):
    speech = np.concatenate(list(read_waveform(SPEECH)))
    whole, _ = heard(engine, speech)
    worst = {}
    for carried in (False, True):
        state, differences = None, []
        for second in range(len(speech) // SAMPLE_RATE):
            piece = speech[second * SAMPLE_RATE : (second + 1) * SAMPLE_RATE]
            parameters, behind = heard(engine, piece, state)
            state = behind if carried else None
            expected = whole[second * FPS : second * FPS + BEHIND]
            differences.append(np.abs(parameters[:BEHIND] - expected).max())
        worst[carried] = max(differences[1:])
    assert worst[True] < 0.35 and worst[False] > 2 * worst[True], worst
