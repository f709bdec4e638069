"""Sounds of many kinds; the oracles are soxr over the whole signal at once and, where it is, librosa."""

from __future__ import annotations

import logging
import subprocess
import wave
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soxr

from musetalk.config import EncodingConfig
from musetalk.errors import InputError
from musetalk.media.audio import probe_audio, read_waveform
from musetalk.media.ffmpeg import ffmpeg_path
from musetalk.media.video import VideoWriter


def sound(n_samples: int, channels: int, rate: int) -> np.ndarray:
    """A different chirp and noise in each channel, (n, channels) float in [-0.6, 0.6]."""
    t = np.arange(n_samples)[:, None] / rate
    tones = 0.4 * np.sin(2 * np.pi * (200 + 250 * np.arange(channels) + 100 * t) * t)
    return tones + 0.1 * np.random.default_rng(3).standard_normal((n_samples, channels)).clip(-2, 2)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> np.ndarray:
    """16-bit file; returns what it holds as float32 (n, channels)."""
    whole = np.rint(samples * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.tobytes())
    return whole.astype(np.float32) / 32768


def write_float_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """32-bit float mono, by hand."""
    data = samples.astype("<f4").tobytes()
    form = b"fmt " + (16).to_bytes(4, "little") + np.array([3, 1], "<u2").tobytes()
    form += np.array([rate, rate * 4], "<u4").tobytes() + np.array([4, 32], "<u2").tobytes()
    body = b"WAVE" + form + b"data" + len(data).to_bytes(4, "little") + data
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)


def run_ffmpeg(*arguments: object) -> None:
    subprocess.run([ffmpeg_path(), "-v", "error", "-y", *map(str, arguments)], check=True)


def read_all(path: Path) -> np.ndarray:
    return np.concatenate(list(read_waveform(path)))


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_equals_the_mean_of_channels_resampled_at_once(tmp_path: Path, rate: int, channels: int) -> None:
    n_samples = int(rate * 2.3) + 7
    held = write_wav(tmp_path / "s.wav", sound(n_samples, channels, rate), rate)
    expected = soxr.resample(held.mean(axis=1), rate, 16_000, quality="HQ")
    waveform = read_all(tmp_path / "s.wav")
    assert waveform.dtype == np.float32
    assert len(waveform) == -(-n_samples * 16_000 // rate)
    common = min(len(expected), len(waveform))
    np.testing.assert_allclose(waveform[:common], expected[:common], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["s.wav", "s.flac", "s.ogg", "s.mp3", "s24.wav", "s8.wav"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_equals_librosa(tmp_path: Path, name: str, rate: int) -> None:
    librosa = pytest.importorskip("librosa", reason="needs the full environment (make install-full)")
    write_wav(tmp_path / "source.wav", sound(int(rate * 1.7), 2, rate), rate)
    codec = {"s24.wav": ["-c:a", "pcm_s24le"], "s8.wav": ["-c:a", "pcm_u8"], "s.ogg": ["-c:a", "libvorbis"]}
    run_ffmpeg("-i", tmp_path / "source.wav", *codec.get(name, []), tmp_path / name)
    expected, _ = librosa.load(tmp_path / name, sr=16_000)
    waveform = read_all(tmp_path / name)
    assert len(waveform) == len(expected)
    np.testing.assert_allclose(waveform, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["s.mp3", "s.m4a", "s.flac", "s.ogg", "s.opus", "s.webm", "s.mkv", "s.mov", "s.aiff"]
)
def test_every_container_gives_the_same_sound(tmp_path: Path, name: str) -> None:
    write_wav(tmp_path / "source.wav", sound(48_000, 2, 48_000), 48_000)
    run_ffmpeg("-i", tmp_path / "source.wav", "-b:a", "256k", tmp_path / name)
    expected, waveform = read_all(tmp_path / "source.wav"), read_all(tmp_path / name)
    assert abs(len(waveform) - len(expected)) < 1200
    common = min(len(waveform), len(expected))
    assert np.corrcoef(waveform[:common], expected[:common])[0, 1] > 0.98


def test_the_sound_of_a_video(tmp_path: Path) -> None:
    write_wav(tmp_path / "source.wav", sound(16_000, 1, 16_000), 16_000)
    run_ffmpeg("-f", "lavfi", "-i", "color=s=64x64:d=1", "-i", tmp_path / "source.wav", tmp_path / "v.mp4")
    assert abs(len(read_all(tmp_path / "v.mp4")) - 16_000) < 1100


@pytest.mark.parametrize(
    "name", ["-y.wav", "a b 小哈 (2).wav", "100%d.wav", "it's.wav", "concat:x.wav", "http:.wav"]
)
def test_odd_names_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        write_wav(tmp_path / name, sound(1600, 1, 16_000), 16_000)
    except OSError:
        pytest.skip("the file system doesn't allow the name")
    assert len(read_all(Path(name))) == 1600


def test_float_samples_beyond_full_scale_are_kept(tmp_path: Path) -> None:
    samples = np.array([0.0, 1.5, -1.5, 0.25] * 400, np.float32)
    write_float_wav(tmp_path / "s.wav", samples)
    np.testing.assert_array_equal(read_all(tmp_path / "s.wav"), samples)


def test_blocks_are_about_a_second_and_memory_stays_bounded(tmp_path: Path) -> None:
    import tracemalloc

    write_wav(tmp_path / "s.wav", np.zeros((44_100 * 120, 1)), 44_100)
    tracemalloc.start()
    lengths = [len(block) for block in read_waveform(tmp_path / "s.wav")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == 16_000 * 120
    assert max(lengths) < 20_000
    assert peak < 4_000_000


def test_a_reader_that_stops_early_ends_the_child(tmp_path: Path, children: Callable[[], list[int]]) -> None:
    write_wav(tmp_path / "s.wav", np.zeros((16_000 * 600, 1)), 16_000)
    blocks = read_waveform(tmp_path / "s.wav")
    assert len(list(islice(blocks, 2))) == 2
    assert len(children()) == 1
    blocks.close()  # type: ignore[attr-defined]
    assert children() == []


def test_probe(tmp_path: Path) -> None:
    write_wav(tmp_path / "s.wav", np.zeros((22_050 * 3, 2)), 22_050)
    info = probe_audio(tmp_path / "s.wav")
    assert (info.sample_rate, info.channels, info.duration) == (22_050, 2, 3.0)


def assert_refused(path: Path, word: str) -> None:
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert caught.value.hint
    assert path.name in caught.value.message
    assert "\n" not in caught.value.message
    assert word in caught.value.message


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.wav", "not found")
    assert_refused(tmp_path, "folder")
    (tmp_path / "empty.wav").write_bytes(b"")
    assert_refused(tmp_path / "empty.wav", "empty")


def test_text_named_wav(tmp_path: Path) -> None:
    (tmp_path / "s.wav").write_text("not a sound " * 100)
    assert_refused(tmp_path / "s.wav", "can't be decoded")
    with pytest.raises(InputError, match="can't be decoded"):
        probe_audio(tmp_path / "s.wav")


def test_no_samples(tmp_path: Path) -> None:
    write_wav(tmp_path / "s.wav", np.zeros((0, 1)), 16_000)
    assert_refused(tmp_path / "s.wav", "no")


def test_a_video_without_sound(tmp_path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "color=s=64x64:d=1", tmp_path / "v.mp4")
    assert_refused(tmp_path / "v.mp4", "no audio")
    with pytest.raises(InputError, match="no audio"):
        probe_audio(tmp_path / "v.mp4")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_anywhere(tmp_path: Path, value: float) -> None:
    samples = np.zeros(40_000, np.float32)
    samples[39_999] = value
    write_float_wav(tmp_path / "s.wav", samples)
    assert_refused(tmp_path / "s.wav", "NaN or infinite samples after 2 s")


def test_a_truncated_container_that_cannot_be_read(tmp_path: Path) -> None:
    write_wav(tmp_path / "s.wav", sound(16_000, 1, 16_000), 16_000)
    run_ffmpeg("-i", tmp_path / "s.wav", tmp_path / "s.m4a")
    whole = (tmp_path / "s.m4a").read_bytes()
    (tmp_path / "s.m4a").write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path / "s.m4a", "moov")


def test_damage_inside_a_readable_file_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_wav(tmp_path / "s.wav", sound(32_000, 1, 16_000), 16_000)
    run_ffmpeg("-i", tmp_path / "s.wav", tmp_path / "s.flac")
    damaged = bytearray((tmp_path / "s.flac").read_bytes())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    (tmp_path / "s.flac").write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert 0 < len(read_all(tmp_path / "s.flac")) <= 32_000
    assert "s.flac is damaged" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.wav\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
    ids=["hls", "concat", "sdp"],
)
@pytest.mark.parametrize("suffix", [".wav", ".m3u8", ".mp4"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, text: str, suffix: str) -> None:
    write_wav(tmp_path / "secret.wav", sound(16_000, 1, 16_000), 16_000)
    path = tmp_path / f"list{suffix}"
    path.write_text(text)
    with pytest.raises(InputError):
        read_all(path)


def tracks(path: Path, *dispositions: str) -> Path:
    """A film with a tone of another pitch in each sound track: 300 Hz, 600 Hz and so on."""
    inputs, maps, options = ["-f", "lavfi", "-i", "color=s=64x64:r=25:d=2"], ["-map", "0"], []
    for i, disposition in enumerate(dispositions):
        inputs += ["-f", "lavfi", "-i", f"sine=frequency={300 * (i + 1)}:sample_rate=48000:duration=2"]
        maps += ["-map", str(i + 1)]
        options += [f"-disposition:a:{i}", disposition]
    run_ffmpeg(*inputs, *maps, *options, path)
    return path


def pitch(waveform: np.ndarray, rate: int = 16_000) -> float:
    return float(np.abs(np.fft.rfft(waveform)).argmax() * rate / len(waveform))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize(
    ("dispositions", "number"),
    [(("0", "default"), 2), (("default", "0"), 1), (("0", "0", "default"), 3), (("default", "default"), 1)],
)
def test_the_default_track_is_heard_and_kept(
    tmp_path: Path, suffix: str, dispositions: tuple[str, ...], number: int
) -> None:
    path = tracks(tmp_path / f"f{suffix}", *dispositions)
    assert pitch(read_all(path)) == pytest.approx(300 * number, abs=2)
    with VideoWriter(tmp_path / "o.mp4", 64, 48, Fraction(25), path, EncodingConfig()) as writer:
        for _ in range(50):
            writer.write(np.zeros((72, 64), np.uint8))
    assert pitch(read_all(tmp_path / "o.mp4")) == pytest.approx(300 * number, abs=2)


@pytest.mark.parametrize("gain", [-1.0, -0.98])
@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_cancel_each_other_out_are_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gain: float, channels: int
) -> None:
    voice = sound(40_000, 1, 16_000)
    held = write_wav(tmp_path / "s.wav", np.hstack([voice, gain * voice] * (channels // 2)), 16_000)
    with caplog.at_level(logging.WARNING):
        waveform = read_all(tmp_path / "s.wav")
    np.testing.assert_allclose(waveform, held[:, 0], atol=1e-6)
    assert caplog.text.count("cancel each other") == 1


@pytest.mark.parametrize("gain", [1.0, 0.0, -0.5, -0.75])
def test_other_stereo_is_averaged(tmp_path: Path, caplog: pytest.LogCaptureFixture, gain: float) -> None:
    voice = sound(20_000, 1, 16_000)
    held = write_wav(tmp_path / "s.wav", np.hstack([voice, gain * voice]), 16_000)
    np.testing.assert_allclose(read_all(tmp_path / "s.wav"), held.mean(axis=1), atol=1e-6)
    assert not caplog.text
