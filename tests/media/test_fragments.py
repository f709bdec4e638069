"""Fragmented mp4 is opened again by ffmpeg on its own, whole and from a key frame in its middle."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from musetalk.config import EncodingConfig
from musetalk.errors import InputError, OutputError
from musetalk.media.audio import read_waveform
from musetalk.media.fragments import Fragment, FragmentWriter, Picture
from musetalk.media.video import probe_video, read_video

FAST = EncodingConfig(preset="ultrafast", crf=10)
PICTURE = Picture(64, 48, Fraction(25))
RATE = 16_000


def frame(number: int) -> np.ndarray:
    """A grey that tells the frame's number."""
    i420 = np.full((72, 64), 128, np.uint8)
    i420[:48] = 40 + 4 * (number % 50)
    return i420


def tone(n_samples: int) -> np.ndarray:
    return (8000 * np.sin(2 * np.pi * 440 * np.arange(n_samples) / RATE)).astype(np.int16)


def written(writer: FragmentWriter, n_frames: int, samples: np.ndarray | None = None) -> list[Fragment]:
    """What leaves while `n_frames` and `samples` go in, a frame's time of each in turn."""
    taken: list[Fragment] = []
    reader = threading.Thread(target=lambda: taken.extend(writer.fragments()))
    reader.start()
    for number in range(n_frames):
        writer.write(frame(number))
        if samples is not None:
            writer.write_sound(samples[number * 640 : (number + 1) * 640])
    writer.finish()
    reader.join()
    return taken


def pictures_in(content: bytes) -> int:
    """Samples of the picture's track in a fragment: ISO 14496-12, the trun box behind its tfhd."""
    count, at = 0, content.find(b"tfhd")
    while at >= 0:
        run = content.find(b"trun", at)
        if int.from_bytes(content[at + 8 : at + 12], "big") == 1:
            count += int.from_bytes(content[run + 8 : run + 12], "big")
        at = content.find(b"tfhd", run)
    return count


def saved(path: Path, fragments: list[Fragment]) -> Path:
    path.write_bytes(b"".join(fragment.content for fragment in fragments))
    return path


def greys(path: Path) -> list[int]:
    return [round(float(picture.mean())) for picture in read_video(path)]


def expected_greys(first: int, end: int) -> list[float]:
    return [(40 + 4 * (number % 50) - 16) * 255 / 219 for number in range(first, end)]


def sound_seconds(path: Path) -> float:
    return sum(len(block) for block in read_waveform(path)) / RATE


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30_000, 1001)])
def test_every_frame_is_in_the_stream_at_its_time(tmp_path, fps):
    with FragmentWriter(Picture(64, 48, fps), None, FAST) as writer:
        path = saved(tmp_path / "stream.mp4", written(writer, 60))
    assert np.allclose(greys(path), expected_greys(0, 60), atol=2)
    assert abs(probe_video(path).fps - fps) < Fraction(1, 100)


def test_counted_sound_and_pictures_end_together(tmp_path):
    samples = np.where(np.arange(75 * 640) < RATE, 0, tone(75 * 640)).astype(np.int16)
    with FragmentWriter(PICTURE, RATE, FAST) as writer:
        path = saved(tmp_path / "stream.mp4", written(writer, 75, samples))
        assert (writer.frame_count, writer.sample_count) == (75, 75 * 640)
    assert len(greys(path)) == 75
    assert abs(sound_seconds(path) - 3) < 0.05
    heard = np.concatenate(list(read_waveform(path)))[: 75 * 640]
    rises = [int(np.argmax(np.abs(sound) > 0.1)) for sound in (heard, samples / 32768)]
    assert abs(rises[0] - rises[1]) < RATE // 25


def test_a_file_s_sound_goes_in_whole(tmp_path, write_tone):
    sound = write_tone(2 * RATE)
    with FragmentWriter(PICTURE, sound, FAST) as writer:
        path = saved(tmp_path / "stream.mp4", written(writer, 50))
    assert len(greys(path)) == 50 and abs(sound_seconds(path) - 2) < 0.05


def test_a_viewer_who_begins_at_a_key_frame_sees_all_that_follows(tmp_path):
    with FragmentWriter(PICTURE, None, FAST) as writer:
        header, *rest = written(writer, 60)
    keys = [i for i, fragment in enumerate(rest) if fragment.key]
    assert len(keys) == 3 and keys[0] == 0
    later = saved(tmp_path / "later.mp4", [header, *rest[keys[1] :]])
    assert np.allclose(greys(later), expected_greys(25, 60), atol=2)


def test_what_begins_without_a_key_frame_is_said_to(tmp_path, write_tone):
    with FragmentWriter(PICTURE, write_tone(3 * RATE), FAST) as writer:
        _, *rest = written(writer, 30)
    assert sum(fragment.key for fragment in rest) == 2, "fragments of sound alone are no place to begin"


def test_fragments_are_short():
    with FragmentWriter(PICTURE, None, FAST, fragment_seconds=0.04) as writer:
        assert len(written(writer, 50)) >= 50
    with FragmentWriter(PICTURE, None, FAST) as writer:
        assert len(written(writer, 50)) >= 1 + 50 / 5, "no fragment is longer than 200 ms"


def test_frames_leave_before_the_stream_ends():
    first = threading.Event()

    def watch() -> None:
        for number, _ in enumerate(writer.fragments()):
            if number == 1:
                first.set()

    with FragmentWriter(PICTURE, None, FAST) as writer:
        reader = threading.Thread(target=watch)
        reader.start()
        for number in range(8):
            writer.write(frame(number))
        assert first.wait(10), "the encoder keeps frames back"
        writer.finish()
        reader.join()


def test_a_picture_leaves_as_soon_as_the_next_is_there():
    left, seen = threading.Condition(), []

    def watch() -> None:
        for fragment in writer.fragments():
            with left:
                seen.append(pictures_in(fragment.content))
                left.notify_all()

    with FragmentWriter(PICTURE, RATE, FAST, fragment_seconds=0.01) as writer:
        reader = threading.Thread(target=watch)
        reader.start()
        for number in range(12):
            writer.write_sound(tone(640))
            writer.write(frame(number))
        with left:
            assert left.wait_for(lambda: sum(seen) >= 11, 10), "more than the last picture is kept back"
        writer.finish()
        reader.join()
    assert sum(seen) == 12 and max(seen) == 1


def test_the_smallest_fragments_play_as_one_stream(tmp_path):
    with FragmentWriter(PICTURE, RATE, FAST, fragment_seconds=0.01) as writer:
        fragments = written(writer, 60, tone(60 * 640))
    path = saved(tmp_path / "stream.mp4", fragments)
    assert np.allclose(greys(path), expected_greys(0, 60), atol=2)
    assert abs(sound_seconds(path) - 60 / 25) < 0.05
    keys = [i for i, fragment in enumerate(fragments) if fragment.key and i]
    later = saved(tmp_path / "later.mp4", [fragments[0], *fragments[keys[1] :]])
    assert len(keys) == 3 and np.allclose(greys(later), expected_greys(25, 60), atol=2)


def test_the_finished_file_is_an_ordinary_one_whatever_its_name(tmp_path, write_tone):
    path = tmp_path / "完成 a'b|c[d]:e.mp4"
    with FragmentWriter(PICTURE, write_tone(2 * RATE), FAST, finished=path) as writer:
        written(writer, 50)
    assert np.allclose(greys(path), expected_greys(0, 50), atol=2)
    assert probe_video(path).duration == pytest.approx(2, abs=0.05)
    assert path.read_bytes()[:64].find(b"ftyp") == 4 and b"moof" not in path.read_bytes()


def test_abort_ends_the_stream_from_another_thread():
    with FragmentWriter(PICTURE, None, FAST) as writer:
        reader = threading.Thread(target=lambda: list(writer.fragments()))
        reader.start()
        writer.write(frame(0))
        writer.abort()
        reader.join(10)
        assert not reader.is_alive()
        with pytest.raises(OutputError):
            writer.finish()


def test_what_cannot_be_encoded_is_refused(tmp_path):
    with pytest.raises(InputError, match="not found"):
        FragmentWriter(PICTURE, tmp_path / "missing.wav", FAST)
    with FragmentWriter(PICTURE, RATE, FAST) as writer:
        for wrong in (np.zeros((48, 64), np.uint8), np.zeros((72, 64), np.float32)):
            with pytest.raises(ValueError, match="frame"):
                writer.write(wrong)
        with pytest.raises(ValueError, match="sound"):
            writer.write_sound(np.zeros(640, np.float32))


def test_a_stream_without_a_frame_is_a_failure():
    with FragmentWriter(PICTURE, None, FAST) as writer, pytest.raises(OutputError):
        written(writer, 0)
