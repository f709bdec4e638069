"""The measuring module on videos and tracks whose truth is known by construction."""

import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from musetalk.config import REPOSITORY, EncodingConfig
from musetalk.errors import InputError, NoFaceError
from musetalk.training import evaluate
from musetalk.training.evaluate import TRACK_NAMES, MouthTracks
from musetalk.training.phones import Phone
from tests.conftest import PORTRAIT


def _tracks(opening: np.ndarray, fps: float = 25.0) -> MouthTracks:
    tracks = np.zeros((len(opening), len(TRACK_NAMES)), np.float32)
    tracks[:, TRACK_NAMES.index("opening")] = opening
    tracks[:, TRACK_NAMES.index("outer_width")] = np.cos(np.arange(len(opening)) / 3)
    return MouthTracks(
        fps, tracks, np.zeros((len(opening), 478, 2), np.float32), np.ones(len(opening), np.float32)
    )


def test_distances_are_those_of_the_mesh_in_eye_distances():
    mesh, depth = np.zeros((478, 2), np.float32), np.zeros(478, np.float32)
    mesh[33], mesh[263] = (100, 50), (300, 50)
    mesh[13], mesh[14] = (200, 200), (200, 240)
    mesh[61], mesh[291] = (150, 220), (250, 220)
    depth[[13, 14, 0, 17]] = -20
    found = dict(zip(TRACK_NAMES, evaluate.mouth_distances(mesh, depth), strict=True))
    assert found["opening"] == pytest.approx(0.2)
    assert found["outer_width"] == pytest.approx(0.5)
    assert found["protrusion"] == pytest.approx(-0.1)


def test_a_late_rendering_is_told_by_its_lag():
    times = np.arange(200) / 25
    wave = np.sin(2 * np.pi * 1.1 * times) + 0.5 * np.sin(2 * np.pi * 2.7 * times)
    found = evaluate.compare_tracks(_tracks(np.roll(wave, 2)), _tracks(wave))
    assert found["opening"]["lag"] == pytest.approx(0.08)
    assert found["opening"]["best_r"] > 0.99 > found["opening"]["r"]
    assert found["width"]["r"] == pytest.approx(1)


def test_videos_of_other_frame_rates_are_compared_in_time():
    def wave(fps: float, n: int) -> np.ndarray:
        return np.sin(2 * np.pi * 0.8 * (np.arange(n) + 0.5) / fps)

    found = evaluate.compare_tracks(_tracks(wave(25, 150), 25.0), _tracks(wave(50, 300), 50.0))
    assert found["opening"]["r"] > 0.999


def test_labels_tell_which_closures_were_made():
    opening = np.full(100, 0.15)
    opening[[25, 26, 27, 75]] = 0
    phones = [Phone("b", 1.0, 1.08), Phone("aa", 1.08, 2.0), Phone("m", 2.0, 2.08)]
    assert evaluate.compare_labels(_tracks(opening), phones)["closure_rate"] == pytest.approx(0.5)


def test_label_files_are_read_and_wrong_lines_named(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("sil 0 0.5\nB 0.5 0.6\nAA1 0.6 0.8\n")
    assert [phone.name for phone in evaluate.read_labels(path)] == ["pau", "b", "aa"]
    path.write_text("sil 0\n")
    with pytest.raises(InputError, match="line 1"):
        evaluate.read_labels(path)


def test_what_could_not_be_measured_is_null():
    assert json.loads(evaluate.json_text({"a": float("nan"), "b": {"c": 1.5}})) == {
        "a": None,
        "b": {"c": 1.5},
    }


def _write_video(path, frames):
    from musetalk.media.video import VideoWriter

    height, width = frames[0].shape[:2]
    sound = path.with_suffix(".wav")
    _write_silence(sound, len(frames) / 25)
    with VideoWriter(
        path, width, height, Fraction(25), sound, EncodingConfig(), pixel_format="bgr24"
    ) as writer:
        for frame in frames:
            writer.write(frame)


def _write_silence(path, seconds):
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(b"\0\0" * int(seconds * 16_000))


def test_a_still_portrait_is_found_still_by_the_command(tmp_path):
    import cv2

    pytest.importorskip("mediapipe", reason="needs mediapipe (make demo)")
    video = tmp_path / "静止 portrait.mp4"
    _write_video(video, [cv2.resize(cv2.imread(str(PORTRAIT)), (384, 384))] * 12)
    command = [
        sys.executable,
        "-m",
        "musetalk.training.evaluate",
        str(video),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["frames"] == 12
    assert found["frames_without_face"] == 0
    assert found["jitter_mouth"] < 0.01
    assert found["opening_range"] < 0.02
    assert json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8")) == found
    assert cv2.imdecode(np.fromfile(tmp_path / "out" / "tracks.png", np.uint8), 1).shape[1] == 1200


def test_a_video_without_a_face_is_refused(tmp_path):
    pytest.importorskip("mediapipe", reason="needs mediapipe (make demo)")
    video = tmp_path / "grey.mp4"
    _write_video(video, [np.full((96, 96, 3), 128, np.uint8)] * 3)
    with pytest.raises(NoFaceError, match=r"grey\.mp4"):
        evaluate.measure_video(video)
