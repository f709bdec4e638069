"""A rendering is a generator: it can be stopped, gone on with, and served by somebody else's generator."""

from __future__ import annotations

import contextlib
import pickle
import threading
from fractions import Fraction

import numpy as np
import pytest

from musetalk.benchmark.scene import FrameCounter
from musetalk.compositor import FrameCompositor
from musetalk.pipeline import StageClock
from musetalk.rendering import OpenedTemplate, Position, Request, batched, render
from tests.conftest import make_template

FPS = Fraction(25)


class NumberedFaces:
    """The face of prompt n is one grey level that tells n; the prompts are frame numbers."""

    name, device, dtype, fingerprint = "lite", "cpu", "float32", "numbered"

    def listen(self, fps, *, live=False, state=None):
        return FrameCounter(fps, state)

    def generate(self, audio_prompts, indices):
        return [np.full((16, 16, 3), int(prompt[0]) % 200, np.uint8) for prompt in audio_prompts]


class HeldUpFaces(NumberedFaces):
    """Doesn't come back from the second batch until it is let go."""

    def __init__(self):
        self.batches = 0
        self.let_go = threading.Event()

    def generate(self, audio_prompts, indices):
        self.batches += 1
        if self.batches == 2:
            self.let_go.wait()
        return super().generate(audio_prompts, indices)


def opened(engine=None, template=None) -> OpenedTemplate:
    engine, template = engine or NumberedFaces(), template or make_template(3, (96, 64))
    return OpenedTemplate("state", template, engine, engine, FrameCompositor(template))


def speech(n_samples: int, block: int = 4000):
    return (np.zeros(min(block, n_samples - i), np.float32) for i in range(0, n_samples, block))


def pictures(template: OpenedTemplate, sound, request: Request) -> list[bytes]:
    return [frame.i420.tobytes() for frame in render(template, sound, request)[0]]


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30_000, 1001), Fraction(7, 2)])
def test_segments_that_hand_their_position_on_are_one_rendering(fps):
    template, joined, position = opened(), [], Position()
    for number in range(1, 6):
        frames, info = render(template, speech(8001), Request(fps, 8, position))
        joined += [frame.i420.tobytes() for frame in frames]
        position = pickle.loads(pickle.dumps(info.position))
        assert position.frames == len(joined) == number * 8001 * fps // 16_000
    assert joined == pictures(template, speech(5 * 8001), Request(fps, 8))


def test_info_says_what_it_is_and_how_far_it_has_come():
    frames, info = render(opened(), speech(16_000), Request(FPS, 4))
    assert (info.engine, info.device, info.dtype, info.size, info.fps) == (
        "lite",
        "cpu",
        "float32",
        (96, 64),
        25,
    )
    next(frames), next(frames)
    assert info.position.frames == 2
    assert len(list(frames)) == 23 and info.position.frames == 25
    assert set(info.clock.seconds) == {"features", "generate", "composite"}


class WatchedClock(StageClock):
    """Knows which stages work at the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.working: set[str] = set()

    @contextlib.contextmanager
    def stage(self, name):
        self.working.add(name)
        with super().stage(name):
            yield
        self.working.discard(name)


def test_waiting_for_more_speech_counts_for_no_stage():
    clock, working = WatchedClock(), []

    def waited_for():
        for block in speech(16_000):
            working.append("features" in clock.working)
            yield block

    assert len(list(render(opened(), waited_for(), Request(FPS, 4), clock)[0])) == 25
    assert len(working) > 1 and not any(working) and clock.seconds["features"] > 0


def test_after_cancel_no_more_frames_come_and_all_threads_end():
    cancel, before = threading.Event(), threading.active_count()
    frames, _ = render(opened(), speech(16_000 * 3600), Request(FPS, 4, cancel=cancel))
    for _ in range(30):
        next(frames)
    cancel.set()
    assert len(list(frames)) <= 1
    assert threading.active_count() == before


def test_closing_early_ends_all_threads():
    before, template = threading.active_count(), opened()
    frames, _ = render(template, speech(16_000 * 3600), Request(FPS, 4))
    next(frames)
    frames.close()
    assert threading.active_count() == before and not template.abandoned


def test_a_generator_that_is_held_up_is_marked_abandoned():
    engine = HeldUpFaces()
    template = opened(engine)
    frames, _ = render(template, speech(16_000), Request(FPS, 4))
    next(frames)
    frames.close()
    engine.let_go.set()
    assert template.abandoned


def test_live_frames_leave_with_their_sound():
    heard = []

    def arriving():
        for number in range(100):
            heard.append(number)
            yield np.zeros(640, np.float32)

    frames, _ = render(opened(), arriving(), Request(FPS, 64, live=True))
    next(frames)
    frames.close()
    assert len(heard) < 64  # of a batch that would have to fill first


def test_faces_may_be_made_by_somebody_else():
    asked = []

    def scheduled(prompts, indices):
        asked.extend(zip(prompts[:, 0].astype(int).tolist(), indices, strict=True))
        return NumberedFaces().generate(prompts, indices)

    template = opened()
    assert pictures(template, speech(6400), Request(FPS, 4, generate=scheduled)) == pictures(
        template, speech(6400), Request(FPS, 4)
    )
    assert asked == [(i, template.template.position(i, Fraction(25))) for i in range(10)]


def test_two_renderings_of_one_template_at_once_are_right():
    template = opened(template=make_template(20, (96, 64)))
    alone = pictures(template, speech(32_000), Request(FPS, 4))
    together: dict[int, list[bytes]] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: together.update({i: pictures(template, speech(32_000), Request(FPS, 3 + i))})
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(together[i] == alone for i in range(4))


@pytest.mark.parametrize("sizes", [[], [1], [5, 5, 5], [100], [1] * 9])
def test_batched_keeps_every_row_in_order(sizes):
    rows = np.arange(sum(sizes))
    blocks = np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []
    batches = list(batched(blocks, 11))
    full = [4, 8, *[11] * len(batches)][: max(0, len(batches) - 1)]
    assert [len(batch) for batch in batches[:-1]] == full
    assert all(0 < len(batch) <= 11 for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches) if batches else rows, rows)


class ScaledFaces(NumberedFaces):
    """As `NumberedFaces`, told how far to go."""

    def articulate(self, audio_prompts, articulation):
        return audio_prompts * articulation


def test_articulation_reaches_an_engine_that_can_be_told():
    still = make_template(1, (96, 64))
    usual = pictures(opened(ScaledFaces(), still), speech(16_000), Request(FPS, 4))
    asked = pictures(opened(ScaledFaces(), still), speech(16_000), Request(FPS, 4, articulation=1.5))
    assert len(set(usual)) == 25
    assert asked[:17:2] == usual[::3]


def test_an_engine_that_knows_no_articulation_renders_as_usual_and_says_so(caplog):
    asked = pictures(opened(), speech(16_000), Request(FPS, 4, articulation=0.5))
    assert asked == pictures(opened(), speech(16_000), Request(FPS, 4))
    assert "articulation" in caplog.text
