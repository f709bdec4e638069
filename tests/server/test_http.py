"""The production caller's way: HTTP with and without bodies, sessions by GUID, segments by file name."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import uuid
import wave
from pathlib import Path

import numpy as np
import pytest

from musetalk.media.audio import read_waveform
from musetalk.media.video import read_video
from musetalk.tools.demo import PORTRAIT, SPEECH

TEMPLATE = "小哈 (1)"
SEGMENT_KEYS = {
    *("session_id", "segment_index", "video_path", "video_filename", "video_url", "duration", "frames"),
    *("process_time", "latency_ms", "is_final"),
}


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.clip(samples * 32767, -32768, 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def heard() -> np.ndarray:
    """The bundled sentence, (n,) float32 at 16 kHz."""
    return np.concatenate(list(read_waveform(SPEECH)))


@pytest.fixture
def session(served):
    session_id = str(uuid.uuid4())
    served.post("/api/start_session", {"session_id": session_id, "template_id": TEMPLATE})
    yield session_id
    served.call("POST", f"/api/end_session/{session_id}")


def segment(served, session: str, path: Path | str, index: int, final: bool = False):
    body = {"session_id": session, "audio_path": str(path), "segment_index": index, "is_final": final}
    return served.post("/api/process_segment", body)


def test_health_and_initialize_need_no_body_and_no_content_type(served):
    assert served.call("GET", "/health")[0] == 200
    for _ in range(2):
        answer = served.post("/api/initialize")
        assert answer["success"] is True and answer["message"]


def test_a_template_is_preprocessed_and_found_again(served, tmp_path):
    picture = shutil.copy(PORTRAIT, tmp_path / "头像 1.jpg")
    body = {"template_id": "anna (2)", "image_path": str(picture), "force": False}
    answer = served.post("/api/preprocess_template", body)
    assert answer["success"] is True and answer["template_id"] == "anna (2)" and answer["cached"] is False
    assert (served.folder / answer["cache_path"]).is_file() and answer["message"]
    assert served.post("/api/preprocess_template", body)["cached"] is True


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/preprocess_template", {"template_id": "x", "image_path": "/nowhere/x.jpg"}),
        ("/api/preprocess_template", {"template_id": "../x", "image_path": str(PORTRAIT)}),
        ("/api/start_session", {"session_id": "s", "template_id": "nobody"}),
        ("/api/start_session", {"session_id": "s", "template_id": TEMPLATE, "articulation": 1.6}),
        ("/api/process_segment", {"session_id": "nobody's", "audio_path": str(SPEECH), "segment_index": 0}),
        ("/api/end_session/nobody", None),
    ],
)
def test_what_cannot_be_done_is_a_400_with_the_reason_in_detail(served, path, body):
    status, _, answer = served.call("POST", path, body)
    assert status == 400 and isinstance(answer["detail"], str) and answer["success"] is False
    assert answer["error_code"] and answer["detail"].startswith(answer["error"])


def test_segments_of_a_session_join_to_the_whole(served, session, heard, tmp_path):
    samples, step = heard[: 16_000 * 4 + 123], 8_000
    pieces = [samples[i : i + step] for i in range(0, len(samples), step)]
    answers = []
    for index, piece in enumerate(pieces):
        path = write_wav(tmp_path / f"句子 {index}.wav", piece)
        answers.append(segment(served, session, path, index, index == len(pieces) - 1))
    made = [answer for answer in answers if answer["frames"]]
    assert all(answer.keys() >= SEGMENT_KEYS for answer in answers)
    assert len({answer["video_filename"] for answer in made}) == len(made)
    assert sum(answer["frames"] for answer in answers) == len(samples) * 25 // 16_000
    for answer in made:
        path = served.videos / answer["video_filename"]
        assert (served.folder / answer["video_path"]) == path and path.parent == served.videos
        assert len(list(read_video(path))) == answer["frames"], "each file plays alone"
    ended = served.post(f"/api/end_session/{session}")
    assert ended["success"] is True and ended["segments_processed"] == len(pieces)
    assert ended["average_latency"] == pytest.approx(ended["total_latency"] / len(pieces), abs=2e-3)


def sound_of(path: Path) -> np.ndarray:
    """(n,) float32 at 16 kHz as a player hears it, the encoder's padding left out."""
    return np.concatenate(list(read_waveform(path)))


def joined_sound(worker, session: str, samples: np.ndarray, folder: Path, lengths: list[int]) -> np.ndarray:
    """What the videos of a session's segments say, one behind the other."""
    worker.post("/api/start_session", {"session_id": session, "template_id": TEMPLATE})
    parts, begin, frames = [], 0, 0
    for index, length in enumerate(lengths):
        path = write_wav(folder / f"{session} {index}.wav", samples[begin : begin + length])
        answer = segment(worker, session, path, index, index == len(lengths) - 1)
        path.unlink()  # callers clean up behind an answer
        begin, frames = begin + length, frames + answer["frames"]
        if answer["frames"]:
            parts.append(sound_of(worker.videos / answer["video_filename"]))
    assert begin == len(samples) and frames == begin * 25 // 16_000
    return np.concatenate(parts)


UNEVEN = [8000, 7999, 300, 200, 8123, 640, 100, 4000]
"""Samples of segments; some complete no frame, so that their sound comes with the next one's."""


@pytest.mark.parametrize("lengths", [[8000] * 6, UNEVEN], ids=["half seconds", "uneven"])
def test_joined_sound_of_segments_is_the_speech_sample_for_sample(served, heard, tmp_path, lengths):
    samples = heard[: sum(lengths)]
    joined = joined_sound(served, str(uuid.uuid4()), samples, tmp_path, lengths)
    sent = np.clip(samples * 32767, -32768, 32767).astype(np.int16)
    assert np.array_equal(joined * 32768, sent)


def test_aac_segments_have_the_length_and_place_of_the_speech(start_worker, heard, tmp_path):
    """For players without FLAC: lossy, and its 44.1 kHz rounds each segment up to a whole sample."""
    worker = start_worker("--segment_sound", "aac")
    samples = heard[: sum(UNEVEN)]
    joined = joined_sound(worker, "aac", samples, tmp_path, UNEVEN)
    assert 0 <= len(joined) - len(samples) <= len(UNEVEN)
    end, lags = len(samples) - 100, range(-20, 21)
    likeness = [float(np.dot(samples[100:end], joined[100 + lag : end + lag])) for lag in lags]
    assert abs(lags[int(np.argmax(likeness))]) <= len(UNEVEN) // 2
    assert max(likeness) > 0.95 * float(np.dot(samples, samples))


def test_mouths_of_segments_are_those_of_the_whole(served, session, heard, tmp_path):
    """The features of a segment hear what came before it; a segment alone would begin from silence."""
    whole = write_wav(tmp_path / "whole.wav", heard[: 16_000 * 2])
    other = str(uuid.uuid4())
    served.post("/api/start_session", {"session_id": other, "template_id": TEMPLATE})
    pictures = list(read_video(served.videos / segment(served, other, whole, 0, True)["video_filename"]))
    served.call("POST", f"/api/end_session/{other}")
    parts = []
    for index in range(2):
        path = write_wav(tmp_path / f"{index}.wav", heard[16_000 * index : 16_000 * (index + 1)])
        parts += list(read_video(served.videos / segment(served, session, path, index)["video_filename"]))
    differences = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(pictures, parts, strict=True)]
    assert max(differences) < 2.0, differences


def test_a_segment_shorter_than_a_frame_is_heard_and_counted(served, session, heard, tmp_path):
    frames = []
    for index in range(8):
        path = write_wav(tmp_path / f"{index}.wav", heard[400 * index : 400 * (index + 1)])
        answer = segment(served, session, path, index)
        assert bool(answer["video_path"]) == bool(answer["frames"])
        frames.append(answer["frames"])
    assert frames == [400 * (n + 1) * 25 // 16_000 - 400 * n * 25 // 16_000 for n in range(8)]
    assert sum(frames) == 5


def test_a_segment_that_is_sent_again_gets_the_same_answer(served, session, heard, tmp_path):
    path = write_wav(tmp_path / "a.wav", heard[:8000])
    assert segment(served, session, path, 0) == segment(served, session, path, 0)


def test_a_whole_clip_is_a_session_of_one_final_segment(served, session):
    answer = segment(served, session, SPEECH, 0, final=True)
    assert answer["is_final"] is True
    frames = list(read_video(served.videos / answer["video_filename"]))
    assert len(frames) == answer["frames"] == 190 and answer["duration"] == 190 / 25


def test_a_file_that_lies_elsewhere_here_is_found_by_its_name_in_a_shared_folder(served, session, heard):
    write_wav(served.videos / "句子 9.wav", heard[:8000])
    for index, path in enumerate(("C:\\wwwroot\\videos\\句子 9.wav", "/app/wwwroot/videos/句子 9.wav")):
        assert segment(served, session, path, index)["frames"] == 12 + index


def test_nested_caches_of_callers_are_found(served):
    served.post("/api/preprocess_template", {"template_id": "nested", "image_path": str(PORTRAIT)})
    nested = served.folder / "cache" / "nested"
    nested.mkdir()
    for kind in ("preprocessed.pkl", "metadata.json"):
        shutil.move(served.folder / "cache" / f"nested_{kind}", nested)
    body = {"session_id": "nested", "template_id": "nested"}
    assert served.post("/api/start_session", body)["success"] is True
    served.post("/api/end_session/nested")


def test_videos_are_served_with_ranges(served, session):
    answer = segment(served, session, SPEECH, 0)
    whole = (served.videos / answer["video_filename"]).read_bytes()
    status, headers, content = served.call("GET", answer["video_url"])
    assert (status, headers["content-type"], content) == (200, "video/mp4", whole)
    status, headers, content = served.call("GET", answer["video_url"], headers={"Range": "bytes=100-299"})
    assert (status, content) == (206, whole[100:300])
    assert headers["content-range"] == f"bytes 100-299/{len(whole)}"


def test_places_are_counted_refused_with_retry_after_and_freed(served):
    def start(name: str):
        return served.call("POST", "/api/start_session", {"session_id": name, "template_id": TEMPLATE})

    assert [start(f"place {n}")[0] for n in range(3)] == [200] * 3
    assert start("place 0")[0] == 200, "the same call again finds the session"
    assert served.call("GET", "/api/status")[2]["active_sessions"] == 3
    status, headers, answer = start("one too many")
    assert status == 503 and int(headers["retry-after"]) > 0 and "3" in answer["detail"]
    served.post("/api/end_session/place 0".replace(" ", "%20"))
    assert start("one more")[0] == 200
    for name in ("place 1", "place 2", "one more"):
        served.post(f"/api/end_session/{name}".replace(" ", "%20"))
    assert served.call("GET", "/api/status")[2]["active_sessions"] == 0


def test_status_tells_what_callers_read(served):
    answer = served.call("GET", "/api/status")[2]
    assert answer.keys() >= {"status", "active_sessions", "templates_cached", "gpu_count", "config"}
    assert answer["templates_cached"] >= 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"session_id": "\\ud800"}', b"\xff\xfe"]
)
def test_bodies_that_are_none_are_told_so(served, body):
    headers = {"Content-Type": "application/json"}
    status, _, answer = served.call("POST", "/api/start_session", body, headers)
    assert 400 <= status < 500 and answer["detail"]


def test_half_a_surrogate_pair_comes_back_as_its_number(served):
    status, _, answer = served.call(
        "POST",
        "/api/preprocess_template",
        b'{"template_id":"x","image_path":"\\ud800.jpg"}',
        {"Content-Type": "application/json"},
    )
    assert 400 <= status < 500 and answer["detail"]


def test_an_error_to_a_caller_from_elsewhere_names_no_folder(start_worker):
    worker = start_worker("--host", "0.0.0.0", "--token", "secret")
    headers = {"Authorization": "Bearer secret", "Host": f"127.0.0.1:{worker.http_port}"}
    body = {"session_id": "s", "template_id": "nobody"}
    status, _, answer = worker.call("POST", "/api/start_session", body, headers)
    assert status == 400 and "looked in cache" in answer["hint"]
    assert str(worker.folder) not in json.dumps(answer, ensure_ascii=False)


@pytest.mark.parametrize(("wanted", "status"), [("bytes=9999999-", 416), ("bytes=5-2", 400), ("x", 400)])
def test_a_range_that_cannot_be_given_is_told_as_every_error(served, wanted, status):
    (served.videos / "ranges.mp4").write_bytes(bytes(100))
    told, headers, answer = served.call("GET", "/videos/ranges.mp4", None, {"Range": wanted})
    assert told == status and answer["success"] is False and answer["detail"]
    assert headers.get("content-range") == ("bytes */100" if status == 416 else None)


@pytest.mark.parametrize("path", ["/health", "/", "/docs", "/v1/templates", "/videos/head.mp4"])
def test_head_is_get_without_the_body(served, path):
    (served.videos / "head.mp4").write_bytes(bytes(100))
    connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=60)
    with contextlib.closing(connection):
        for _ in range(2):  # the connection is fit for another call
            connection.request("HEAD", path)
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read() == b""
        if path.endswith("mp4"):
            assert answer.headers["content-length"] == "100" and answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("index", [-1, 10**9, 10**400])
def test_a_segment_s_number_is_one_that_a_file_can_be_named_by(served, session, index):
    body = {"session_id": session, "audio_path": str(SPEECH), "segment_index": index}
    assert served.call("POST", "/api/process_segment", body)[0] == 422
