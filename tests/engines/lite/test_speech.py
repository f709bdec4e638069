"""The mouth network at run time: frame counts and times at any rate, streaming, level, and stillness."""

import pickle
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from musetalk.config import LITE_MODELS
from musetalk.engines.base import hear_all
from musetalk.engines.lite import speech
from musetalk.engines.lite.parameters import HIGH, LOW, PARAMETER_INDEX, rig_opening
from musetalk.engines.lite.speech import (
    WHOLE_GRID,
    MouthListener,
    MouthNetwork,
    SpeechLevel,
    frame_values,
    live_grid,
    network_input,
)
from musetalk.errors import WeightsError
from musetalk.whisper import frame_count


@pytest.fixture(scope="module")
def network():
    return MouthNetwork(LITE_MODELS)


SPEECH = np.load(Path(__file__).parents[2] / "data" / "lite" / "speech_flite_rms.npz")
"""Labelled speech of a voice that the network was not trained on (CMU Flite, rms)."""


def _speech(seconds: float) -> np.ndarray:
    waveform = SPEECH["waveform"].astype(np.float32) / 32768
    return np.resize(waveform, int(seconds * 16_000))


def _blocks(waveform: np.ndarray, size: int):
    return (waveform[i : i + size] for i in range(0, len(waveform), size))


def _rig_parameters(network, waveform, fps):
    return hear_all(network.listen(fps), waveform)


@pytest.mark.parametrize("n_samples", [0, 1, 639, 640, 16_000, 130_001])
@pytest.mark.parametrize(
    "fps", [Fraction(25), Fraction(30_000, 1001), Fraction(60), Fraction(1), Fraction(240)]
)
def test_gives_exactly_floor_of_duration_times_fps_frames(network, n_samples, fps):
    blocks = list(_rig_parameters(network, _blocks(np.zeros(n_samples, np.float32), 4096), fps))
    assert sum(map(len, blocks)) == n_samples * fps // 16_000
    assert all(len(block) and block.shape[1] == 10 and block.dtype == np.float32 for block in blocks)


def test_block_lengths_of_the_input_change_nothing(network):
    waveform = _speech(11)
    whole = np.concatenate(list(_rig_parameters(network, [waveform], Fraction(30))))
    pieces = np.concatenate(list(_rig_parameters(network, _blocks(waveform, 1237), Fraction(30))))
    np.testing.assert_array_equal(whole, pieces)


def test_the_same_sound_gives_the_same_bytes(network):
    first, second = (
        b"".join(block.tobytes() for block in _rig_parameters(network, [_speech(3)], Fraction(25)))
        for _ in range(2)
    )
    assert first == second


def test_values_stay_in_the_parameters_ranges(network):
    noise = np.random.default_rng(1).standard_normal(80_000).astype(np.float32)
    values = np.concatenate(list(_rig_parameters(network, [noise], Fraction(25))))
    assert (values >= LOW).all()
    assert (values <= HIGH).all()


def test_the_mouth_moves_in_speech_and_rests_in_silence(network):
    speech = _speech(3)
    waveform = np.concatenate([np.zeros(32_000, np.float32), speech, np.zeros(48_000, np.float32)])
    opening = rig_opening(np.concatenate(list(_rig_parameters(network, [waveform], Fraction(25)))))
    assert opening[50:125].max() > 0.05
    assert opening[:40].max() < 0.005
    assert opening[130:].max() < 0.005


def test_lips_meet_on_p_b_and_m_and_the_lip_tucks_on_f_and_v(network):
    waveform = SPEECH["waveform"].astype(np.float32) / 32768
    values = np.concatenate(list(_rig_parameters(network, [waveform], Fraction(50))))
    opening, tuck = rig_opening(values), values[:, PARAMETER_INDEX["lip_tuck"]]
    met, tucked = [], []
    for phone, start, end in zip(SPEECH["phones"], SPEECH["starts"], SPEECH["ends"], strict=True):
        frames = slice(int((start - 0.06) * 50), int((end + 0.06) * 50) + 1)
        if phone in ("p", "b", "m"):
            met.append(opening[frames].min() < 0.08 * np.percentile(opening, 95))
        if phone in ("f", "v"):
            tucked.append(tuck[frames].max() > 0.5)
    assert len(met) == 10
    assert np.mean(met) >= 0.9
    assert np.mean(tucked) >= 0.8


def test_quiet_and_loud_recordings_talk_alike(network):
    loud = _speech(4) * 3
    quiet = loud * np.float32(10 ** (-30 / 20))
    curves = [
        rig_opening(np.concatenate(list(_rig_parameters(network, [w], Fraction(25))))) for w in (loud, quiet)
    ]
    assert np.corrcoef(curves)[0, 1] > 0.98
    assert curves[1].std() > 0.7 * curves[0].std()


def test_every_frame_rate_samples_the_same_curve(network):
    waveform = _speech(4)
    slow, fast = (np.concatenate(list(_rig_parameters(network, [waveform], Fraction(f)))) for f in (25, 50))
    # frame i at 25 fps lies at 0.02 + 0.04 i s, halfway between the frames 2 i and 2 i + 1 at 50 fps
    np.testing.assert_allclose(slow, (fast[0::2] + fast[1::2]) / 2, atol=0.25)
    assert np.abs(slow - (fast[0::2] + fast[1::2]) / 2).mean() < 0.02


def test_frames_take_the_curve_at_their_middle():
    ramp = np.arange(200, dtype=np.float32)[:, None]  # value = step = 20 ms
    frames = frame_values(ramp, 0, range(100), Fraction(25))
    np.testing.assert_allclose(frames[:, 0], 50 * (np.arange(100) + 0.5) / 25, rtol=1e-6)
    later = frame_values(ramp[60:], 60, range(40, 100), Fraction(25))
    np.testing.assert_array_equal(later, frames[40:])


class NumberedNetwork:
    """Answers each step with the sample that it begins with; keeps how long its windows were."""

    def __init__(self):
        self.lengths = []

    def shapes(self, window: np.ndarray, level: SpeechLevel) -> np.ndarray:
        self.lengths.append(len(window))
        return np.repeat(window[::320, None], 10, axis=1)


@pytest.mark.parametrize(
    "fps", [Fraction(24_000, 1001), Fraction(25), Fraction(50), Fraction(7, 2), Fraction(120)]
)
@pytest.mark.parametrize("live", [False, True])
def test_each_step_is_answered_once_from_a_bounded_window(live, fps):
    grid = live_grid(fps) if live else WHOLE_GRID
    waveform, network = np.arange(16_000 * 21 + 5, dtype=np.float32), NumberedNetwork()
    listener = MouthListener(network, fps, grid)
    frames = np.concatenate(list(hear_all(listener, _blocks(waveform, 3001))))
    middles = (np.arange(len(frames)) + 0.5) / float(fps) * 16_000
    assert len(frames) == frame_count(len(waveform), fps)
    np.testing.assert_allclose(frames[:, 0], np.minimum(middles, 16_000 * 21), atol=0.5)
    assert max(network.lengths) <= sum(grid) * 320


@pytest.mark.parametrize("size", [1, 319, 320, 5333])
def test_live_prompts_are_the_same_however_the_speech_is_cut(network, size):
    waveform = _speech(1.5 if size == 1 else 6)
    whole, pieces = (
        b"".join(block.tobytes() for block in hear_all(network.listen(Fraction(25), live=True), blocks))
        for blocks in ([waveform], _blocks(waveform, size))
    )
    assert whole == pieces


@pytest.mark.parametrize(
    "fps", [Fraction(24), Fraction(25), Fraction(30_000, 1001), Fraction(50), Fraction(60)]
)
def test_live_prompts_leave_at_most_200_ms_behind_the_sound(network, fps):
    listener, given = network.listen(fps, live=True), 0
    for heard, block in enumerate(_blocks(_speech(3), 160), 1):
        given += sum(map(len, listener.hear(block)))
        over = (heard * 160 - 3200) * fps / 16_000  # frames that ended 200 ms ago
        assert given >= int(over)


def test_live_curves_are_those_of_the_whole_speech(network):
    waveform = _speech(12)
    live, whole = (
        rig_opening(np.concatenate(list(hear_all(network.listen(Fraction(25), live=live), [waveform]))))
        for live in (True, False)
    )
    assert np.corrcoef(live, whole)[0, 1] > 0.97


def test_a_live_session_goes_on_from_its_state(network):
    waveform = _speech(5)
    whole = np.concatenate(list(network.listen(Fraction(25), live=True).hear(waveform)))
    first = network.listen(Fraction(25), live=True)
    frames = list(first.hear(waveform[:33_333]))
    second = network.listen(Fraction(25), live=True, state=pickle.loads(pickle.dumps(first.state)))
    frames += second.hear(waveform[33_333:])
    assert np.concatenate(frames).tobytes() == whole.tobytes()


def test_a_live_session_remembers_nine_seconds_at_most(network):
    listener, sizes = network.listen(Fraction(25), live=True), []
    for block in _blocks(_speech(9), 16_000):
        list(listener.hear(block))
        sizes.append(len(pickle.dumps(listener.state)))
    assert max(sizes) < 6_000_000, "nine seconds of keys and values and a second of sound"
    assert sizes[-1] < 0.4 * max(sizes), "after eight seconds it begins anew"


def test_after_silence_a_live_session_remembers_nothing(network):
    listener = network.listen(Fraction(25), live=True)
    list(listener.hear(_speech(2)))
    assert listener.state.memory is not None
    frames = np.concatenate(list(listener.hear(np.zeros(32_000, np.float32))))
    assert listener.state.memory is None and not frames[-25:].any()


def test_segments_join_to_the_session_they_are_cut_from(network):
    waveform, fps = _speech(6), Fraction(30_000, 1001)
    whole = np.concatenate(list(hear_all(network.listen(fps), [waveform])))
    state, joined = None, []
    for number, segment in enumerate(_blocks(waveform, 8000), 1):
        listener = network.listen(fps, state=pickle.loads(pickle.dumps(state)))
        joined += [*listener.hear(segment), *listener.flush()]
        state = listener.state
        assert sum(map(len, joined)) == frame_count(number * 8000, fps)
    assert np.corrcoef(rig_opening(np.concatenate(joined)), rig_opening(whole))[0, 1] > 0.95


def test_first_frames_leave_before_the_last_sound_was_read(network):
    read = []

    def waveform():
        for second in range(30):
            read.append(second)
            yield np.zeros(16_000, np.float32)

    frames = _rig_parameters(network, waveform(), Fraction(25))
    assert len(next(iter(frames))) > 100
    assert max(read) < 12


def test_memory_does_not_grow_with_the_length(network):
    def peak(seconds: int) -> int:
        tracemalloc.start()
        for _ in _rig_parameters(
            network, (np.zeros(16_000, np.float32) for _ in range(seconds)), Fraction(25)
        ):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(60) < peak(20) + 2_000_000


def test_silence_costs_no_network_and_the_level_still_hears_it(network, monkeypatch):
    silence = np.zeros(32_000, np.float32)
    monkeypatch.setattr(network, "encoder", None)
    assert not np.concatenate(list(_rig_parameters(network, [silence], Fraction(25)))).any()
    level = SpeechLevel()
    level.update(_speech(2)[:100] ** 2)
    before = (level.power, level.steps)
    network.shapes(silence, level)
    assert level.power < before[0] and level.steps != before[1]


def test_level_is_that_of_the_speech_not_of_the_pauses():
    level = SpeechLevel()
    powers = np.concatenate([np.full(50, 1e-2), np.full(450, 1e-8)])
    assert level.update(powers) == pytest.approx(1e-2)


def test_level_follows_a_new_speaker():
    level = SpeechLevel()
    level.update(np.full(500, 1e-2))
    after = [level.update(np.full(500, 1e-4)) for _ in range(40)]
    assert after[0] > 1e-3
    assert after[-1] == pytest.approx(1e-4, rel=0.1)


def test_networks_see_the_same_spectrum_at_any_recording_level():
    speech = _speech(3)
    loud, quiet = (network_input(speech * np.float32(gain), SpeechLevel()) for gain in (4, 0.1))
    assert loud.mel.shape == (1, 80, 300)
    assert loud.loudness.shape == (150,)
    np.testing.assert_allclose(loud.mel, quiet.mel, atol=1e-3)


def test_not_a_number_in_the_sound_is_silence(network):
    waveform = _speech(2)
    waveform[5000:5100] = np.nan
    values = np.concatenate(list(_rig_parameters(network, [waveform], Fraction(25))))
    assert np.isfinite(values).all()
    assert values.std() > 0


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>"], ids=["missing", "empty", "html"])
def test_missing_or_damaged_weights_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / speech.ENCODER_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=speech.ENCODER_FILE):
        MouthNetwork(tmp_path)


def test_network_has_fewer_parameters_than_two_million():
    onnx = pytest.importorskip("onnx", reason="needs the full environment (make install-full)")
    graph = onnx.load(str(LITE_MODELS / speech.NETWORK_FILE)).graph
    assert sum(int(np.prod(tensor.dims)) for tensor in graph.initializer) <= 2_000_000
