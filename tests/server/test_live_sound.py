"""Speech that waits to be heard: nothing of it is lost, torn or heard twice, however it comes."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.errors import BusyError, InputError
from musetalk.server.live_sound import (
    MAX_WAITING,
    SPOKEN_LATE,
    START_SAMPLES,
    HeardSound,
    Sound,
    SpeechQueue,
    SpeechSender,
)


def ramp(n: int, first: int = 1) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.float32)


def pcm(samples: np.ndarray) -> bytes:
    return (samples * 32_768).round().astype("<i2").tobytes()


def test_silence_where_nothing_was_pushed():
    sound = SpeechQueue().take(320)
    assert not sound.samples.any() and len(sound.samples) == 320 and sound.spoken == 0


def test_speech_is_heard_in_order_and_silence_follows():
    speech = SpeechQueue()
    speech.push(ramp(700))
    speech.push(ramp(300, 701))
    taken = [speech.take(400) for _ in range(3)]
    assert np.array_equal(np.concatenate([t.samples for t in taken]), [*ramp(1000), *np.zeros(200)])
    assert [t.spoken for t in taken] == [400, 400, 200]


def test_a_first_piece_waits_for_enough_to_begin_with():
    speech = SpeechQueue()
    speech.push(ramp(START_SAMPLES - 1))
    assert speech.take(10).spoken == 0
    speech.push(ramp(1))
    assert speech.take(10).spoken == 10


def test_a_first_piece_waits_no_longer_than_that():
    speech = SpeechQueue()
    speech.push(ramp(100))
    waited = 0
    while not (sound := speech.take(100)).spoken:
        waited += 100
    assert START_SAMPLES <= waited < START_SAMPLES + 100 and sound.spoken == 100


def test_a_complete_utterance_waits_for_nothing():
    speech = SpeechQueue()
    speech.push(ramp(100))
    speech.end()
    sound = speech.take(320)
    assert (sound.spoken, sound.ends) == (100, True)
    assert not speech.take(320).ends


def test_the_end_may_be_said_after_the_last_of_it_was_heard():
    speech = SpeechQueue()
    speech.push(ramp(START_SAMPLES))
    assert not speech.take(START_SAMPLES).ends
    speech.end()
    assert [speech.take(10).ends for _ in range(2)] == [True, False]


def test_what_was_cleared_is_never_heard():
    speech = SpeechQueue()
    sender = SpeechSender(speech)
    speech.push(ramp(5000))
    sender.push_pcm(b"\1")
    speech.take(320)
    speech.clear()
    assert speech.waiting == 0 and not speech.take(5000).samples.any()
    sender.push_pcm(pcm(np.full(START_SAMPLES, 0.5)))
    assert (speech.take(START_SAMPLES).samples == 0.5).all()


@pytest.mark.parametrize("size", [1, 3, 640, 9999])
def test_bytes_may_be_cut_anywhere(size):
    samples = np.random.default_rng(1).integers(-32_768, 32_768, 5000).astype(np.float32) / 32_768
    speech, content = SpeechQueue(), pcm(samples)
    sender = SpeechSender(speech)
    for at in range(0, len(content), size):
        sender.push_pcm(content[at : at + size])
    assert np.array_equal(speech.take(5000).samples, samples)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_another_rate_is_resampled_the_same_in_any_pieces(rate):
    import soxr

    samples = np.sin(np.arange(rate) * 2 * np.pi * 300 / rate).astype(np.float32) / 2
    content, heard = pcm(samples), []
    for size in (rate // 50 * 2, rate * 666 // 1000 // 2 * 2, len(content)):
        speech = SpeechQueue()
        sender = SpeechSender(speech, rate)
        for at in range(0, len(content), size):
            sender.push_pcm(content[at : at + size])
        sender.end()
        assert abs(speech.waiting - 16_000) <= 1
        heard.append(speech.take(16_000).samples)
    assert np.array_equal(heard[0], heard[2]) and np.array_equal(heard[1], heard[2])
    whole = soxr.resample(samples, rate, 16_000, quality="HQ")
    assert np.abs(heard[0][: len(whole)] - whole[:16_000]).max() < 1e-3


@pytest.mark.parametrize("rate", [0, -1, 10**9, "16000", None, 16_000.5])
def test_no_sound_has_such_a_rate(rate):
    with pytest.raises(InputError):
        SpeechSender(SpeechQueue()).set_rate(rate)


def test_a_rate_is_its_sender_s_alone():
    speech = SpeechQueue()
    microphone = SpeechSender(speech, 48_000)
    microphone.push_pcm(pcm(np.full(24_000, 0.5)))
    upload = SpeechSender(speech)
    assert upload.push_pcm(pcm(np.full(1600, 0.25))) == 1600
    upload.end()
    microphone.push_pcm(pcm(np.full(24_000, 0.5)))
    microphone.end()
    assert speech.waiting == 16_000 + 1600


def test_more_than_some_minutes_ahead_is_refused_and_what_waits_is_kept():
    speech = SpeechQueue()
    speech.push(np.ones(MAX_WAITING, np.float32))
    with pytest.raises(BusyError):
        SpeechSender(speech).push_pcm(b"\0\0")
    assert speech.waiting == MAX_WAITING


def test_heard_sound_is_taken_across_its_blocks_with_what_of_it_is_speech():
    heard = HeardSound()
    heard.append(Sound(ramp(10), 10))
    heard.append(Sound(ramp(10, 11), 4, True))
    heard.append(Sound(np.zeros(10, np.float32), 0))
    taken = [heard.take(n) for n in (7, 6, 6, 11)]
    assert np.array_equal(np.concatenate([t.samples for t in taken])[:20], ramp(20))
    assert [t.spoken for t in taken] == [7, 6, 1, 0]
    assert [t.ends for t in taken] == [False, False, True, False], "with its last sample of speech"


def test_a_microphone_that_is_late_is_shortened_at_its_pauses():
    speech = SpeechQueue()
    speech.set_realtime(True)
    word, pause = np.full(320, 0.5, np.float32), np.zeros(320, np.float32)
    for block in [word] * 10 + [pause] * 20 + [word] * 10:
        speech.push(block)
    heard = np.concatenate([speech.take(320).samples for _ in range(60)])
    assert (heard == 0.5).sum() == 20 * 320
    last = np.flatnonzero(heard)[-1] + 1
    assert last <= 20 * 320 + SPOKEN_LATE


def test_a_microphone_that_is_far_too_late_is_cut_and_a_file_never():
    for realtime, spoken in ((True, SPOKEN_LATE), (False, 5 * 16_000)):
        speech = SpeechQueue()
        speech.set_realtime(realtime)
        for _ in range(250):
            speech.push(np.full(320, 0.5, np.float32))
        heard = np.concatenate([speech.take(320).samples for _ in range(300)])
        assert abs(int((heard > 0).sum()) - spoken) <= (16_000 if realtime else 0)


def test_speech_ends_with_its_last_sample_however_much_silence_was_heard_behind_it():
    """After a hold-up much is heard at once: what follows the speech in it is a pause, not a part of it."""
    heard = HeardSound()
    heard.append(Sound(np.zeros(8000, np.float32), 1000, True))
    frames = [heard.take(640) for _ in range(12)]
    assert [frame.spoken for frame in frames[:3]] == [640, 360, 0]
    assert [frame.ends for frame in frames] == [False, True, *[False] * 10]
