"""A live session counts: its frames and its sound stay together, whatever is said and however it comes."""

from __future__ import annotations

import gc
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from musetalk.server.live import (
    ALONE_SECONDS,
    MOST_BEHIND,
    SILENT_SECONDS,
    TICK,
    LiveSessions,
    LiveSettings,
    Utterance,
    WallClock,
    scaled,
)
from musetalk.server.live_sound import Sound
from tests.server.live_stand_ins import LoudFaces, Shown, events_of, in_background, opened, session

RATE = 16_000


def brightness(picture: bytes, width: int = 64, height: int = 48) -> int:
    """The face's luma, in the middle of the picture's template of noise."""
    luma = np.frombuffer(picture, np.uint8)[: width * height].reshape(height, width)
    return int(luma[20:28, 28:36].mean())


def loud_frames(shown: Shown) -> tuple[list[bool], list[bool]]:
    """For each frame whether its face is bright, and whether its sound is loud."""
    levels = [brightness(picture) for picture in shown.pictures]
    faces = [level > (min(levels) + max(levels)) / 2 for level in levels]
    return faces, [bool(np.abs(samples).max(initial=0) > 0.1) for samples in shown.sound]


@pytest.mark.parametrize(
    ("fps", "hours"), [(Fraction(1, 2), 24), (Fraction(30_000, 1001), Fraction(1, 8)), (25, Fraction(1, 8))]
)
def test_picture_and_sound_never_drift(fps, hours):
    seconds = hours * 3600
    said = []

    def clap_every_1000_seconds(heard):
        if heard // (1000 * RATE) >= len(said):
            said.append(heard)
            live.speech.push(np.full(1600, 0.25, np.float32))

    live = session(fps, block=8000, script=clap_every_1000_seconds)
    total = int(seconds * fps)
    shown = Shown(live, total, keep=False)
    rests, mismatched, objects = set(), [], []

    def write(i420, samples, count=shown.write):
        face = brightness(i420.tobytes())
        rests.update([face] if shown.frames < 3 and not samples.any() else [])
        if rests and (face > max(rests) + 20) != bool(samples.max(initial=0) > 0.1):
            mismatched.append(shown.frames)
        if shown.frames in (total // 10, total - 10):
            objects.append(len(gc.get_objects()))
        count(i420, samples)

    shown.write = write
    live.run()
    assert shown.samples == int(total * RATE / Fraction(fps)) == live.shown_samples(live.frames)
    assert len(said) == seconds * RATE // (1000 * RATE) + (seconds % 1000 > 0) and not mismatched
    assert abs(objects[1] - objects[0]) < 2000


def test_speech_takes_over_and_gives_way():
    live = session(script=lambda heard: heard == RATE and live.speech.push(np.full(RATE, 0.2, np.float32)))
    shown, events = Shown(live, 100), events_of(live)
    live.run()
    faces, sounds = loud_frames(shown)
    assert faces == sounds and sounds == [False] * 25 + [True] * 25 + [False] * 50
    assert [e["state"] for e in events if e["type"] == "state"] == ["talking", "idle"]
    positions = [e["position"] for e in events if e["type"] == "playback"]
    assert positions == sorted(positions) and positions[-1] == 1.0


@pytest.mark.parametrize("chunk", [320, 5328])
def test_cutting_speech_changes_nothing(chunk):
    random = np.random.default_rng(3)
    speech = (random.random(40_000) * np.repeat(random.random(40), 1000)).astype(np.float32)

    def rendered(size):
        live = session(block=777, script=lambda heard: not heard and push(live, size))
        shown = Shown(live, 80)
        live.run()
        return shown.pictures, np.concatenate(shown.sound)

    def push(live, size):
        for at in range(0, len(speech), size):
            live.speech.push(speech[at : at + size])

    pictures, sound = rendered(chunk)
    whole_pictures, whole_sound = rendered(len(speech))
    assert pictures == whole_pictures and np.array_equal(sound, whole_sound)


def test_an_interrupt_drops_what_was_not_shown_and_rests_at_once():
    reported = []
    live = session(script=lambda heard: not heard and live.speech.push(np.full(10 * RATE, 0.2, np.float32)))
    shown, events = Shown(live, 200), events_of(live)

    def interrupt_after_50(i420, samples, write=shown.write):
        write(i420, samples)
        if shown.frames == 50:
            reported.append(live.interrupt())

    shown.write = interrupt_after_50
    live.run()
    faces, sounds = loud_frames(shown)
    said = sum(sounds) / 25
    assert reported == [said] == [sum(faces) / 25] and sounds == [True] * 50 + [False] * 150
    assert [e for e in events if e["type"] != "playback"] == [
        {"type": "state", "state": "talking"},
        {"type": "state", "state": "idle"},
        {"type": "ended", "message": "enough"},
    ]
    assert shown.samples == 200 * 640


def test_after_an_interrupt_the_next_speech_is_locked_again():
    live = session(Fraction(30_000, 1001), block=333)
    shown = Shown(live, 400)

    def speak_and_interrupt(i420, samples, write=shown.write):
        write(i420, samples)
        if shown.frames % 40 == 7:
            live.interrupt()
        if shown.frames % 40 == 9:
            live.speech.push(np.full(20_000, 0.2, np.float32))

    shown.write = speak_and_interrupt
    live.run()
    faces, sounds = loud_frames(shown)
    assert faces == sounds and sum(sounds) > 100
    assert shown.samples == live.shown_samples(400)


def test_no_session_hears_another():
    template = opened()
    lives = [session(template=template, block=500 + 100 * i) for i in range(4)]
    shown = [Shown(live, 100) for live in lives]
    for i, live in enumerate(lives):
        live.speech.push(np.full(RATE * (i + 1) // 2, 0.05 * (i + 1), np.float32))
    for thread in [in_background(live) for live in lives]:
        thread.join()
    for i, one in enumerate(shown):
        sound = np.concatenate(one.sound)
        assert set(np.unique(sound)) == {np.float32(0), np.float32(0.05 * (i + 1))}
        assert (sound > 0).sum() == RATE * (i + 1) // 2
    levels = [max(brightness(picture) for picture in one.pictures) for one in shown]
    assert levels == sorted(levels) and len(set(levels)) == 4


def test_who_is_alone_or_silent_too_long_is_ended():
    for connected, seconds in ((0, ALONE_SECONDS), (1, SILENT_SECONDS)):
        live = session()
        now = [0.0]
        live._now = lambda now=now: now[0]
        live.sign()
        for _ in range(connected):
            live.connect()
        shown = Shown(live, 10_000, keep=False)

        def pass_time(i420, samples, now=now, write=shown.write):
            write(i420, samples)
            now[0] += 1.0

        shown.write = pass_time
        live.run()
        assert "gone" in live.ended and seconds < now[0] <= seconds + 2


def test_a_session_that_talks_to_nobody_is_heard_out():
    live = session(script=lambda heard: not heard and live.speech.push(np.full(8 * RATE, 0.2, np.float32)))
    now = [0.0]
    live._now = lambda: now[0]
    live.sign()
    shown = Shown(live, 10_000)

    def pass_time(i420, samples, write=shown.write):
        write(i420, samples)
        now[0] += 1.0

    shown.write = pass_time
    live.run()
    assert sum(loud_frames(shown)[1]) == 200 and "gone" in live.ended


class BrokenFaces(LoudFaces):
    def generate(self, audio_prompts, indices):
        raise ZeroDivisionError


def test_what_goes_wrong_is_told_and_ends_the_session():
    live = session(template=opened(BrokenFaces()))
    events = events_of(live)
    live.run()
    assert [e["type"] for e in events] == ["error", "ended"] and events[0]["message"] == "ZeroDivisionError"


def test_the_worker_is_told_every_frame_and_what_each_stage_took():
    told: list[tuple[dict, int]] = []
    live = session()
    live._note = lambda stages, frames: told.append((dict(stages), frames))
    shown = Shown(live, 60)
    live.run()
    assert [frames for _, frames in told] == [25, 25, 10] and sum(f for _, f in told) == shown.frames
    stages = set(told[0][0])
    assert stages == {"features", "generate", "composite", "output"} == set(live.status()["frame_ms"])
    for stage in stages:
        total = sum(seconds.get(stage, 0) for seconds, _ in told)
        assert total == pytest.approx(live._clock.seconds[stage]) and total > 0
        assert min(seconds[stage] for seconds, _ in told) >= 0


def test_a_stopped_worker_ends_its_sessions():
    live = session()
    live._closing = lambda speaking: True
    live.run()
    assert "stopped" in live.ended and live.frames == 1


class Held:
    """An event that is never set; waiting on it lets the clock run on."""

    def __init__(self, clock):
        self.clock = clock

    def wait(self, seconds):
        self.clock[0] += seconds
        return False


def test_the_clock_only_paces():
    clock = [100.0]
    pace, heard = WallClock(lambda: clock[0]), 0
    for _ in range(1000):
        heard += pace.wait(heard, Held(clock))
    assert heard / RATE == pytest.approx(clock[0] - 100.0, abs=2 * TICK / RATE) and not pace.held_up


def test_a_long_hold_up_is_not_made_up_for():
    clock = [0.0]
    pace = WallClock(lambda: clock[0])
    heard = pace.wait(0, Held(clock))
    clock[0] += 60
    caught_up = pace.wait(heard, Held(clock))
    heard += caught_up
    assert caught_up == MOST_BEHIND and pace.held_up == 1
    assert pace.wait(heard, Held(clock)) <= TICK + 1


def test_a_gap_in_speech_does_not_end_the_utterance_but_its_end_does():
    utterance, told = Utterance(), []
    for sound in (Sound(np.ones(640), 640), Sound(np.zeros(640), 0), Sound(np.ones(640), 100, True)):
        told += [e["state"] for e in utterance.advance(sound) if e["type"] == "state"]
    assert told == ["talking", "idle"] and utterance.position == round(740 / RATE, 3)


def test_the_end_that_a_sender_says_is_always_told():
    told = []
    live = session(script=lambda heard: heard == RATE and live.speech.end())
    Shown(live, 60)
    live.listen(told.append)
    live.run()
    assert [event for event in told if event.get("done")] == [
        {"type": "playback", "position": 0.0, "done": True}
    ]


def test_a_smaller_picture_has_the_same_colours():
    frame = np.concatenate([np.full(96 * 64, 90), np.full(48 * 32, 30), np.full(48 * 32, 200)])
    small = scaled(frame.astype(np.uint8).reshape(96, 96)[: 64 * 3 // 2], (48, 32))
    flat = small.reshape(-1)
    assert small.shape == (48, 48)
    assert (
        set(flat[: 48 * 32]) == {90}
        and set(flat[48 * 32 : 48 * 40]) == {30}
        and set(flat[48 * 40 :]) == {200}
    )


@pytest.fixture(scope="module")
def lite_template(tmp_path_factory):
    from musetalk.config import LITE_MODELS, EngineConfig
    from musetalk.service import IntegratedMuseTalkService

    service = IntegratedMuseTalkService(
        tmp_path_factory.mktemp("cache"), config=EngineConfig(engine="lite", device="cpu")
    )
    service.preprocess_template("anna", LITE_MODELS / "portraits" / "astronaut.jpg")
    return service.renderer().open("anna")


def test_lite_shows_the_same_bytes_however_speech_is_cut(lite_template, speech):
    from musetalk.media.audio import read_waveform

    samples = np.concatenate(list(read_waveform(speech)))[: 2 * RATE]

    def rendered(chunk, block):
        def push(heard):
            if not heard:
                for at in range(0, len(samples), chunk):
                    live.speech.push(samples[at : at + chunk])

        live = session(template=lite_template, block=block, script=push)
        shown = Shown(live, 60)
        live.run()
        return shown

    whole = rendered(len(samples), 320)
    assert len(set(whole.pictures)) > 20
    for chunk, block in ((320, 320), (5328, 1000)):
        assert rendered(chunk, block).pictures == whole.pictures


def test_a_worker_that_takes_no_more_lets_its_sessions_go_on_until_it_stops():
    asked = []
    worker = SimpleNamespace(
        ends_session=lambda speaking: asked.append(speaking) or stopping, note_rendering=None
    )
    service = SimpleNamespace(
        renderer=lambda: SimpleNamespace(open=lambda name: opened()), config=SimpleNamespace(batch_size=1)
    )
    place = SimpleNamespace(service=service, scheduler=None)
    live = LiveSessions(worker)._opened(place, "anna", LiveSettings())
    stopping = False
    live._end_when_left()
    assert live.ended == ""
    live.speech.push(np.ones(320, np.float32))
    live._end_when_left()
    assert asked == [False, True], "whether it speaks"
    stopping = True
    live._end_when_left()
    assert "stopped" in live.ended
