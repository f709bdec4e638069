"""The training corpus: texts by seed, recording conditions that keep time, samples that keep their labels."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from musetalk.errors import InputError
from musetalk.training import corpus, texts
from musetalk.training.evaluate import MouthTracks
from musetalk.training.phones import Phone
from musetalk.training.voices import (
    ESPEAK_MANDARIN,
    EspeakVoice,
    FliteVoice,
    Utterance,
    espeak,
    labelled_letters,
    pinyin_ipa,
)

SPEECH = np.load(Path(__file__).parents[1] / "data" / "lite" / "speech_flite_rms.npz")


def _speech() -> np.ndarray:
    return SPEECH["waveform"].astype(np.float32) / 32768


def _no_encoder(mel: np.ndarray) -> np.ndarray:
    """States that tell their own time: step number plus noise."""
    steps = mel.shape[2] // 2
    noise = np.random.default_rng(0).standard_normal((5, steps, 384))
    return (noise + np.arange(steps)[None, :, None]).astype(np.float32)


def test_sentences_repeat_by_seed_and_differ_between_seeds():
    for sentence in (texts.english_sentence, texts.mandarin_sentence):
        first, again, other = ([sentence(np.random.default_rng(s)) for _ in range(3)] for s in (1, 1, 2))
        assert first == again
        assert first != other


def test_english_sentences_hold_all_letters_and_few_repeats():
    rng = np.random.default_rng(3)
    sentences = [texts.english_sentence(rng) for _ in range(200)]
    assert set("abcdefghijklmnopqrstuvwxyz") <= set("".join(sentences).lower())
    assert len(set(sentences)) == 200


def test_mandarin_sentences_are_pinyin_with_tones():
    rng = np.random.default_rng(3)
    syllables = (
        " ".join(texts.mandarin_sentence(rng) for _ in range(300)).replace(",", "").replace(".", "").split()
    )
    assert all(s[-1] in "12345" and s[:-1].isalpha() for s in syllables)
    assert len({s[:-1] for s in syllables}) > 300


def test_resampling_moves_the_labels_with_the_sound():
    said = Utterance(_speech(), (Phone("aa", 0.5, 1.0),), "v", "en")
    faster = corpus.resampled(said, 1.1)
    assert len(faster.waveform) == pytest.approx(len(said.waveform) / 1.1, abs=2)
    assert faster.phones[0].end == pytest.approx(1.0 / 1.1)


@pytest.mark.parametrize("condition", ["_room", "_band", "_noise", "_codec"])
@pytest.mark.parametrize("seed", range(3))
def test_recording_conditions_do_not_move_the_sound_in_time(condition, seed):
    speech = _speech()[:48_000]
    changed = getattr(corpus, condition)(speech, np.random.default_rng(seed))
    assert changed.shape == speech.shape
    assert not np.array_equal(changed, speech)
    size = 2 * len(speech)
    product = np.fft.rfft(changed, size) * np.conj(np.fft.rfft(speech, size))
    lag = int(np.argmax(np.fft.irfft(product, size)))
    assert min(lag, size - lag) <= 16  # samples: 1 ms


def test_degraded_speech_repeats_by_seed_and_stays_in_range():
    first, again = (corpus.degraded(_speech(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first).max() <= 1


def test_samples_cover_an_utterance_in_order():
    phones = tuple(
        Phone(str(name), float(start), float(end))
        for name, start, end in zip(SPEECH["phones"], SPEECH["starts"], SPEECH["ends"], strict=True)
    )
    said = Utterance(_speech(), phones, "flite:rms", "en")
    samples = list(corpus.synthetic_samples(said, _no_encoder, np.random.default_rng(1)))
    assert sum(len(s.truth) for s in samples) > 0.6 * len(said.waveform) / 320
    for sample in samples:
        steps = len(sample.truth)
        assert sample.states.shape == (steps, 5, 384)
        assert sample.loudness.shape == sample.weight.shape == (steps,)
        assert abs(float(sample.states[0, 0].astype(np.float32).std()) - 1) < 0.01


def _write_tracks(folder: Path, track: np.ndarray) -> None:
    import soundfile

    np.savez(
        folder / "tracks.npz",
        names=np.array(["a", "b"]),
        speaker=np.array(["s1", "s1"]),
        slot=np.array([0, 1]),
        tracks=np.stack([track, track]).astype(np.float16),
    )
    second = np.concatenate([np.zeros(24_000, np.float32), _speech()[:24_000]])
    soundfile.write(folder / "s1.flac", np.concatenate([_speech()[:48_000], second]), 16_000)


def test_real_distances_are_told_in_the_speakers_own_deviations(tmp_path):
    pytest.importorskip("soundfile", reason="needs the full environment (make install-full)")
    track = np.full((75, 10), 0.5)
    track[:, 0] = np.resize([0.1, 0.1, 0.3, 0.3], 75)
    track[3] = np.nan
    _write_tracks(tmp_path, track)
    clips = corpus.read_clips(tmp_path)
    assert [(clip.speaker, clip.fps, len(clip.waveform)) for clip in clips] == [("s1", 25, 48_000)] * 2
    samples = list(corpus.real_samples(clips, _no_encoder))
    assert len(samples) == 2
    known = samples[0].weight > 0
    assert not known[0] and not known[6:9].any() and known[9:].all()  # before the first frame, and no face
    opening = samples[0].truth[known, 0]
    assert opening.max() == pytest.approx(1, abs=0.05) and opening.min() == pytest.approx(-1, abs=0.05)
    assert (np.abs(samples[0].truth[known, 1:]) < 1e-3).all()  # what stands still says nothing


def test_tracks_lie_between_frame_middles():
    track = np.arange(10, dtype=np.float32)[:, None]
    found = corpus.track_at_steps(track, 25.0, 22)
    # frame i at 20 + 40 i ms, step j at 20 j ms
    np.testing.assert_allclose(found[1:20, 0], (np.arange(1, 20) - 1) / 2, atol=1e-6)
    assert np.isnan(found[[0, 20, 21]]).all()


def _write_groups(folder: Path) -> None:
    import soundfile

    np.savez(
        folder / "tracks.npz",
        group=np.array(["a", "b", "a"]),
        speaker=np.array(["one", "two", "one"]),
        language=np.array(["en", "fr", "en"]),
        start=np.array([0, 0, 1000]),
        samples=np.array([1000, 640, 600]),
        fps=np.array([25.0, 30.0, 25.0]),
        first=np.array([0, 5, 8]),
        frames=np.array([5, 3, 2]),
        tracks=np.arange(100, dtype=np.float16).reshape(10, 10),
    )
    for name, size in (("a", 1600), ("b", 640)):
        soundfile.write(folder / f"{name}.flac", np.linspace(0, 0.5, size), 16_000)


def test_clips_of_groups_come_with_their_own_sound_and_track(tmp_path):
    pytest.importorskip("soundfile", reason="needs the full environment (make install-full)")
    _write_groups(tmp_path)
    first, second, third = corpus.read_clips(tmp_path)
    assert (first.group, first.speaker, first.language, first.fps) == ("a", "one", "en", 25)
    assert (second.group, second.speaker, second.language, second.fps) == ("b", "two", "fr", 30)
    assert [len(clip.waveform) for clip in (first, second, third)] == [1000, 640, 600]
    assert third.waveform[0] == pytest.approx(0.5 * 1000 / 1599, abs=1e-4)
    np.testing.assert_array_equal(third.track[:, 0], [80, 90])


def test_sentences_of_several_speakers_are_each_anothers(tmp_path):
    clips = [
        corpus.Clip("g", name, "en", np.zeros(10, np.float32), np.zeros((1, 10), np.float32), 25.0)
        for name in ("s1", "x", "s1", "x")
    ]
    assert {name: len(spoken) for name, spoken in corpus.learnable(clips).items()} == {
        "g_s1": 2,
        "g_x_1": 1,
        "g_x_3": 1,
    }


def test_a_damaged_folder_of_tracks_is_refused(tmp_path):
    pytest.importorskip("soundfile", reason="needs the full environment (make install-full)")
    (tmp_path / "tracks.npz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="can't be read as tracks"):
        corpus.read_clips(tmp_path)


def test_videos_of_speakers_are_measured(tmp_path, monkeypatch):
    pytest.importorskip("soundfile", reason="needs the full environment (make install-full)")
    (tmp_path / "s9").mkdir()
    (tmp_path / "s9" / "a.mpg").write_bytes(b"")
    tracks = np.tile(np.arange(150, dtype=np.float32)[:, None], (1, 10))
    measured = MouthTracks(50.0, tracks, np.zeros((150, 478, 2)), np.ones(150))
    monkeypatch.setattr(corpus, "measure_video", lambda path: measured)
    monkeypatch.setattr(corpus, "read_waveform", lambda path: iter([np.ones(24_000, np.float32)] * 2))
    (clip,) = corpus.read_clips(tmp_path)
    assert (clip.speaker, clip.fps, len(clip.waveform)) == ("s9", 50.0, 48_000)
    np.testing.assert_array_equal(clip.track, tracks)


def test_a_folder_of_nothing_is_refused(tmp_path):
    pytest.importorskip("soundfile", reason="needs the full environment (make install-full)")
    with pytest.raises(InputError, match="neither"):
        corpus.read_clips(tmp_path)


def test_pinyin_becomes_the_letters_that_kokoro_reads():
    assert [pinyin_ipa(s) for s in ("ni3", "hao3", "qu4", "shi4", "si1", "yuan2", "wu3", "bo1")] == [
        "ni↓",
        "xau↓",
        "ʨʰy↘",
        "ʂɨ↘",
        "sɨ→",
        "yɛn↗",
        "u↓",
        "po→",
    ]


def test_letters_with_times_become_phones():
    phones = labelled_letters(
        ["ˈ", "p", "ʰ", "a", " ", "ʂ", "ɨ", "."], [0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.7, 1.1], 0.0
    )
    assert [phone.name for phone in phones] == ["p", "aa", "sr", "ir", "pau"]
    assert phones[0].start == 0.0  # the stress mark's time is the onset's
    assert phones[0].end == 0.25  # aspiration belongs to the stop
    assert phones[2].start == 0.4  # so does the space's


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
def test_flite_labels_cover_the_speech():
    pytest.importorskip("soundfile", reason="needs the full environment (make install-full)")
    said = FliteVoice("slt").speak("Bob put five thin lemons.", 1.0, 1.0)
    names = [phone.name for phone in said.phones]
    assert " ".join(name for name in names if name != "pau") == "b aa b p uh t f ay v th ih n l eh m ax n z"
    assert said.phones[-1].end == pytest.approx(len(said.waveform) / 16_000, abs=0.05)


@pytest.mark.skipif(espeak() is None, reason="needs libespeak-ng")
def test_every_mandarin_syllable_of_espeak_has_known_phones():
    library = espeak()
    _, events = library.speak("cmn-latn-pinyin", " ".join(s + "4" for s in texts.SYLLABLES), 2.0, 1.0)
    unknown = {name for name, _ in events if not name.startswith(("_", "(")) and name not in ESPEAK_MANDARIN}
    assert not unknown


@pytest.mark.skipif(espeak() is None, reason="needs libespeak-ng")
def test_espeak_phones_follow_each_other_without_gap():
    said = EspeakVoice(espeak(), "en-us", "en").speak("Take a happy puppy to the park.", 1.0, 1.0)
    assert all(a.end == pytest.approx(b.start) for a, b in pairwise(said.phones))
    assert [phone.name for phone in said.phones].count("p") == 4
