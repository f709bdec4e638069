"""Jobs as a new caller uses them: made, watched, played while they render, fetched, cancelled, kept."""

from __future__ import annotations

import http.client
import json
import secrets
import signal
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musetalk.media.video import probe_video, read_video
from musetalk.service import IntegratedMuseTalkService
from musetalk.tools.demo import PORTRAIT, SPEECH

TEMPLATE = "小哈 (1)"
FINAL = {"completed", "failed", "cancelled"}


SENT_NAME = "of the sender.bin"


def multipart(fields: dict[str, str], files: dict[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A form's body and its content type."""
    boundary = secrets.token_hex(8)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in fields.items()
    ]
    parts += [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{SENT_NAME}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def post(served, path: str, fields: dict[str, str], files: dict[str, bytes], **headers: str):
    body, kind = multipart(fields, files)
    return served.call("POST", path, body, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}})


MOUTH_PERCENTILE = 99.9  # of a picture's changes: the inside of the mouth, and nothing of the encoder's noise


def make(served, **fields: str) -> dict[str, Any]:
    fields = {"template_id": TEMPLATE, **fields}
    status, headers, job = post(served, "/v1/videos", fields, {"audio": SPEECH.read_bytes()})
    assert status == 201 and headers["location"] == f"/v1/videos/{job['id']}", job
    return job


def ended(served, job_id: str) -> dict[str, Any]:
    """The job's final state, from its events."""
    return list(events(served, job_id))[-1]


def events(served, job_id: str) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=60)
    connection.request("GET", f"/v1/videos/{job_id}/events")
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    deadline = time.monotonic() + 60
    for line in answer:
        assert time.monotonic() < deadline, "the job doesn't end"
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    connection.close()


def long_sound(path: Path, seconds: int = 120) -> bytes:
    """Noise that takes a while to render."""
    samples = np.random.default_rng(1).integers(-3000, 3000, 16_000 * seconds).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return path.read_bytes()


@pytest.fixture
def long_job(served, tmp_path) -> dict[str, Any]:
    sound = long_sound(tmp_path / "long.wav")
    return post(served, "/v1/videos", {"template_id": TEMPLATE}, {"audio": sound})[2]


def test_a_job_is_made_watched_and_fetched(served, tmp_path):
    job = make(served)
    assert job["object"] == "video" and job["status"] in {"queued", "in_progress"}
    seen = list(events(served, job["id"]))
    assert [event["progress"] for event in seen] == sorted(event["progress"] for event in seen)
    last = seen[-1]
    assert last["status"] == "completed" and (last["progress"], last["frames"]) == (100, 190)
    assert (last["size"], last["seconds"], last["engine"], last["error"]) == ("512x512", 7.6, "lite", None)
    assert served.call("GET", f"/v1/videos/{job['id']}")[2] == last
    status, headers, content = served.call("GET", last["content_url"])
    assert status == 200 and headers["content-type"] == "video/mp4" and headers["accept-ranges"] == "bytes"
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    assert len(list(read_video(path))) == 190
    assert probe_video(path).duration == pytest.approx(7.63, abs=0.05)
    status, _, part = served.call("GET", last["content_url"], headers={"Range": "bytes=0-99"})
    assert status == 206 and part == content[:100]


def test_content_plays_while_it_renders(served, tmp_path):
    job = make(served)
    connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=60)
    connection.request("GET", f"/v1/videos/{job['id']}/content")
    answer = connection.getresponse()
    first = answer.read(4096)
    state = served.call("GET", f"/v1/videos/{job['id']}")[2]["status"]
    path = tmp_path / "stream.mp4"
    path.write_bytes(first + answer.read())
    assert b"moof" in path.read_bytes() and state == "in_progress"
    assert len(list(read_video(path))) == 190


def test_a_portrait_that_comes_along_is_preprocessed_once(served):
    jobs = [
        post(served, "/v1/videos", {}, {"portrait": PORTRAIT.read_bytes(), "audio": SPEECH.read_bytes()})[2]
        for _ in range(2)
    ]
    assert [ended(served, job["id"])["status"] for job in jobs] == ["completed"] * 2
    assert jobs[0]["template_id"] == jobs[1]["template_id"] and jobs[0]["id"] != jobs[1]["id"]


def test_the_same_key_gives_the_same_job(served):
    body, kind = multipart({"template_id": TEMPLATE}, {"audio": SPEECH.read_bytes()})
    key = {"Idempotency-Key": secrets.token_hex(4)}
    first = served.call("POST", "/v1/videos", body, {**kind, **key})
    again = served.call("POST", "/v1/videos", body, {**kind, **key})
    assert (first[0], again[0]) == (201, 200) and first[2]["id"] == again[2]["id"]
    other, other_kind = multipart({"template_id": TEMPLATE, "fps": "30"}, {"audio": SPEECH.read_bytes()})
    assert served.call("POST", "/v1/videos", other, {**other_kind, **key})[0] == 400
    ended(served, first[2]["id"])
    assert served.call("POST", "/v1/videos", body, {**kind, **key})[2]["id"] == first[2]["id"]


def test_a_job_that_runs_is_cancelled_and_then_removed(served, long_job):
    seen = events(served, long_job["id"])
    while next(seen)["status"] != "in_progress":
        pass
    assert served.call("DELETE", f"/v1/videos/{long_job['id']}")[2]["status"] == "cancelled"
    assert ended(served, long_job["id"])["error"]["code"] == "cancelled"
    assert served.call("GET", f"/v1/videos/{long_job['id']}/content")[0] == 409
    while served.call("GET", "/api/status")[2]["running"]:
        pass
    answer = served.call("DELETE", f"/v1/videos/{long_job['id']}")[2]
    assert answer == {"object": "video.deleted", "id": long_job["id"], "deleted": True}
    assert served.call("GET", f"/v1/videos/{long_job['id']}")[0] == 404
    assert not (served.videos / "jobs" / long_job["id"]).exists()


def test_articulation_moves_a_job_s_mouth_more_or_less(served, tmp_path):
    def movement(articulation: str) -> float:
        job = make(served, articulation=articulation)
        assert (
            job["articulation"] == float(articulation) and ended(served, job["id"])["status"] == "completed"
        )
        path = tmp_path / f"{articulation}.mp4"
        path.write_bytes(served.call("GET", f"/v1/videos/{job['id']}/content")[2])
        frames = np.stack([frame[::4, ::4] for frame in read_video(path)]).astype(np.float32)
        changes = np.abs(frames - frames[0]).mean(axis=(0, 3))
        return float(np.percentile(changes, MOUTH_PERCENTILE))

    assert movement("1.5") > 1.3 * movement("0.5")


def test_a_jobs_video_pays_for_few_key_frames(served, tmp_path):
    job = make(served)
    assert ended(served, job["id"])["status"] == "completed"
    status, _, content = served.call("GET", f"/v1/videos/{job['id']}/content")
    command = tmp_path / "command.mp4"
    service = IntegratedMuseTalkService(served.folder / "cache", "cpu")
    service.realtime_inference(TEMPLATE, SPEECH, command)
    assert status == 200 and len(content) < 3 * command.stat().st_size


def test_a_picture_without_a_face_is_named_as_it_was_sent(served, tmp_path):
    wall = tmp_path / "wall.png"
    Image.new("RGB", (256, 256), (120, 110, 100)).save(wall)
    status, _, answer = post(served, "/v1/templates", {"template_id": "wall"}, {"file": wall.read_bytes()})
    assert status == 422 and answer["error_code"] == "no_face"
    assert SENT_NAME in answer["message"] and "portraits" not in answer["message"]


def test_jobs_are_listed_by_pages(served):
    made = [make(served)["id"] for _ in range(3)]
    for job_id in made:
        ended(served, job_id)
    page = served.call("GET", "/v1/videos?limit=2")[2]
    assert [job["id"] for job in page["data"]] == made[:0:-1] and page["has_more"] is True
    rest = served.call("GET", f"/v1/videos?limit=1&after={page['last_id']}")[2]
    assert rest["data"][0]["id"] == made[0]


def test_sound_that_cannot_be_used_ends_in_a_failure_with_its_code(served, tmp_path):
    job = post(served, "/v1/videos", {"template_id": TEMPLATE}, {"audio": b"RIFF\0\0\0\0WAVEjunk"})[2]
    last = ended(served, job["id"])
    assert last["status"] == "failed" and last["error"]["code"] == "bad_input" and last["error"]["hint"]
    assert str(served.folder) not in json.dumps({**last, "error": {}})


@pytest.mark.parametrize(
    ("fields", "files", "status"),
    [
        ({"template_id": TEMPLATE}, {}, 422),
        ({}, {"audio": b"fLaC...."}, 400),
        ({"template_id": "nobody"}, {"audio": b"fLaC...."}, 404),
        ({"template_id": "../x"}, {"audio": b"fLaC...."}, 400),
        ({"template_id": TEMPLATE}, {"audio": b"<html>"}, 400),
        ({"template_id": TEMPLATE}, {"audio": b"#EXTM3U\nfile:///etc/passwd"}, 400),
        ({"template_id": TEMPLATE}, {"audio": b""}, 400),
        ({"template_id": TEMPLATE, "fps": "1e99"}, {"audio": b"fLaC...."}, 400),
        ({"template_id": TEMPLATE, "articulation": "1.6"}, {"audio": b"fLaC...."}, 400),
        ({"template_id": TEMPLATE, "articulation": "wide"}, {"audio": b"fLaC...."}, 422),
        ({"template_id": TEMPLATE, "parsing_mode": "chin"}, {"audio": b"fLaC...."}, 422),
        ({}, {"audio": b"fLaC....", "portrait": b"MZ executable"}, 400),
    ],
)
def test_what_cannot_become_a_job_is_refused_and_leaves_nothing(served, fields, files, status):
    before = set((served.videos / "jobs").iterdir())
    told = post(served, "/v1/videos", fields, files)
    assert told[0] == status and told[2]["detail"], told
    assert set((served.videos / "jobs").iterdir()) == before


def test_a_deadline_ends_a_job(start_worker, tmp_path):
    worker = start_worker("--job_deadline", "1")
    sound = long_sound(tmp_path / "long.wav", 600)
    job = post(worker, "/v1/videos", {"template_id": TEMPLATE}, {"audio": sound})[2]
    last = ended(worker, job["id"])
    assert last["status"] == "failed" and last["error"]["code"] == "deadline"


def test_a_restarted_worker_knows_what_was_finished_and_what_was_lost(start_worker, tmp_path):
    worker = start_worker()
    done = make(worker)["id"]
    assert ended(worker, done)["status"] == "completed"
    sound = long_sound(tmp_path / "long.wav")
    lost = post(worker, "/v1/videos", {"template_id": TEMPLATE}, {"audio": sound})[2]["id"]
    assert next(events(worker, lost))["id"] == lost
    worker.stop(signal.SIGKILL)
    again = start_worker()
    assert again.call("GET", f"/v1/videos/{done}/content")[0] == 200
    last = again.call("GET", f"/v1/videos/{lost}")[2]
    assert last["status"] == "failed" and last["error"]["code"] == "worker_lost"


def test_templates_are_made_shown_and_removed(served):
    fields = {"template_id": "上传 1", "bbox_shift": "2", "parsing_mode": "neck"}
    status, _, made = post(served, "/v1/templates", fields, {"file": PORTRAIT.read_bytes()})
    assert status == 201 and made["valid"] is True and made["bbox_shift"] == 2, made
    address = "/v1/templates/%E4%B8%8A%E4%BC%A0%201"
    assert served.call("GET", address)[2] == made
    assert "上传 1" in [item["id"] for item in served.call("GET", "/v1/templates")[2]["data"]]
    status, headers, picture = served.call("GET", f"{address}/preview")
    assert status == 200 and headers["content-type"] == "image/jpeg" and picture[:2] == b"\xff\xd8"
    assert served.call("DELETE", address)[2]["deleted"] is True
    assert served.call("GET", address)[0] == 404 and served.call("DELETE", address)[0] == 404


def test_health_readiness_capabilities_and_docs(served):
    assert [served.call("GET", path)[0] for path in ("/healthz", "/readyz")] == [200, 200]
    assert served.call("GET", "/capabilities")[2]["sessions"]["capacity"] == 3
    page = served.call("GET", "/docs")[2].decode()
    assert "/v1/videos/{job_id}/content" in page and "<script" not in page and "://" not in page


def test_docs_name_the_fields_of_what_is_sent(served):
    page = served.call("GET", "/docs")[2].decode()
    section = {part.partition("</code>")[0]: part for part in page.split("<section><code>")[1:]}
    assert "The same <code>Idempotency-Key</code>" in page and "`" not in page
    assert "<code>audio</code> (file, required)" in section["POST /v1/videos"]
    assert "<code>parsing_mode</code> (jaw or neck or raw, default" in section["POST /v1/videos"]
    assert "<code>segment_index</code> (integer" in section["POST /api/process_segment"]
    assert "<code>job_id</code> (path, required)" in section["GET /v1/videos/{job_id}"]


def test_metrics_count_requests_frames_and_stages(served):
    make_and_end = ended(served, make(served)["id"])
    text = served.call("GET", "/metrics")[2].decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
    values = {name: float(value) for name, _, value in lines}
    assert values["musetalk_frames_total"] >= make_and_end["frames"]
    assert values['musetalk_stage_seconds_count{stage="generate"}'] >= 1
    assert any("/v1/videos/{job_id}" in name for name in values), "ids are no labels"
    assert make_and_end["id"] not in text and values["process_resident_memory_bytes"] > 1e6


def test_a_drained_worker_takes_nothing_more_and_says_so(start_worker):
    worker = start_worker()
    job = make(worker)["id"]
    assert worker.post("/worker/drain")["status"] == "draining"
    assert worker.call("GET", "/readyz")[0] == 503
    status, headers, _ = post(worker, "/v1/videos", {"template_id": TEMPLATE}, {"audio": SPEECH.read_bytes()})
    assert status == 503 and headers["retry-after"]
    assert ended(worker, job)["status"] == "completed", "what was accepted is finished"


def test_many_jobs_at_once_each_get_their_own(served, tmp_path):
    """Told apart by their sound's length."""
    found: dict[int, int] = {}

    def call(number: int) -> None:
        samples = b"\x10\x20" * (3200 * number)
        path = tmp_path / f"{number}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(samples)
        job = post(served, "/v1/videos", {"template_id": TEMPLATE}, {"audio": path.read_bytes()})[2]
        found[number] = ended(served, job["id"])["frames"]

    threads = [threading.Thread(target=call, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: 5 * n for n in range(1, 7)}


def test_a_first_byte_comes_long_before_the_last(served, long_job):
    connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=60)
    connection.request("GET", f"/v1/videos/{long_job['id']}/content")
    answer = connection.getresponse()
    began = time.monotonic()
    assert answer.read(2048)
    assert served.call("GET", f"/v1/videos/{long_job['id']}")[2]["progress"] < 50, time.monotonic() - began
    connection.close()
    served.call("DELETE", f"/v1/videos/{long_job['id']}")
