"""A command finds its worker, lets it work, answers as if it had worked itself, and does so when it must."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musetalk import __version__
from musetalk.announcement import (
    NAMES,
    Announcement,
    announced,
    engine_settings,
    find_announcements,
    proof,
)
from musetalk.config import REPOSITORY, EncodingConfig, EngineConfig, ModelPaths
from musetalk.media.video import VideoWriter, read_video
from musetalk.tools.demo import PORTRAIT, SPEECH
from musetalk.worker_client import find_worker
from tests.server.conftest import Served, start

TEMPLATE = "小哈 (1)"
CONFIG = EngineConfig(device="cpu")
LONG = 60  # seconds of sound that take a while


def announcement(port: int = 1, **changes) -> Announcement:
    return Announcement(1, "127.0.0.1", port, ["cpu"], engine_settings(CONFIG), **changes)


class Listener(http.server.BaseHTTPRequestHandler):
    """Says the proof that its server has."""

    def do_GET(self):
        challenge = self.path.rpartition("=")[2]
        content = json.dumps({"proof": proof(self.server.nonce, challenge)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def listener():
    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    server.nonce = ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def words_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if NAMES.fullmatch(path.name)]


def test_each_worker_leaves_a_word_for_this_user_alone_while_it_lives(tmp_path):
    mine, other = announcement(1), announcement(2)
    with announced(tmp_path, other):
        with announced(tmp_path, mine):
            assert sorted(one.port for one in find_announcements(tmp_path)) == [1, 2]
            if os.name != "nt":
                assert [path.stat().st_mode & 0o777 for path in words_in(tmp_path)] == [0o600] * 2
        assert find_announcements(tmp_path) == [other], "another worker's stays"
    assert find_announcements(tmp_path) == [] and not list(tmp_path.iterdir())
    assert find_announcements(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1, "nonce": "short"}', "\0" * 100_000])
def test_what_is_no_announcement_is_passed_over(tmp_path, content):
    with announced(tmp_path, announcement()):
        (tmp_path / ".worker-00000000.json").write_text(content)
        (tmp_path / ".worker-00000000.json").chmod(0o600)
        assert len(find_announcements(tmp_path)) == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_what_others_may_have_written_is_not_believed(tmp_path):
    with announced(tmp_path, announcement()):
        words_in(tmp_path)[0].chmod(0o620)
        assert find_announcements(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="there an open file is the lock")
def test_the_next_worker_sweeps_what_a_killed_one_left_and_nothing_else(tmp_path):
    (tmp_path / ".worker-00000000.json").write_text("{}")
    (tmp_path / ".worker-mine.json").write_text("{}")
    with announced(tmp_path, announcement(1)), announced(tmp_path, announcement(2)):
        assert len(words_in(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [".worker-mine.json"]


def test_a_worker_that_proves_itself_is_used(tmp_path, listener):
    told = announcement(listener.server_port)
    listener.nonce = told.nonce
    with announced(tmp_path, told):
        assert find_worker("auto", tmp_path, CONFIG).port == listener.server_port
        assert find_worker("off", tmp_path, CONFIG) is None


def test_any_worker_that_lives_and_fits_is_found_among_others(tmp_path, listener):
    told = announcement(listener.server_port)
    listener.nonce = told.nonce
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = announcement(server.getsockname()[1])
    other = Announcement(**{**vars(announcement(dead.port)), "version": "0.9"})
    with announced(tmp_path, told), announced(tmp_path, dead), announced(tmp_path, other):
        assert find_worker("auto", tmp_path, CONFIG).port == listener.server_port


def test_whoever_took_the_port_meanwhile_is_not(tmp_path, listener):
    listener.nonce = "another"
    with announced(tmp_path, announcement(listener.server_port)):
        assert find_worker("auto", tmp_path, CONFIG) is None


def test_a_port_where_nobody_listens_is_passed_over(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with announced(tmp_path, announcement(port)):
        assert find_worker("auto", tmp_path, CONFIG) is None


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(device="cpu", engine="lite"),
        EngineConfig(device="cpu", fp16=False),
        EngineConfig(device="cpu", runtime="torch"),
        EngineConfig(device="cpu", vae_region="off"),
        EngineConfig(device="cpu", models=ModelPaths("v1")),
        EngineConfig(device="cpu", models=ModelPaths(whisper_dir=Path("w"))),
    ],
)
def test_auto_never_uses_a_worker_with_other_settings(tmp_path, listener, config):
    told = announcement(listener.server_port)
    listener.nonce = told.nonce
    with announced(tmp_path, told):
        assert find_worker("auto", tmp_path, config) is None


def test_auto_never_uses_a_worker_of_another_version_or_device(tmp_path, listener):
    for changes in ({"version": "0.9"}, {"devices": ["cuda:7"]}):
        told = Announcement(**{**vars(announcement(listener.server_port)), **changes})
        listener.nonce = told.nonce
        with announced(tmp_path, told):
            assert find_worker("auto", tmp_path, CONFIG) is None
    assert __version__ != "0.9"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("工作 client")
    shutil.copy(PORTRAIT, folder / "小哈 (1).jpg")
    shutil.copy(SPEECH, folder / "s.flac")
    return folder


@pytest.fixture(scope="module")
def worker(workplace):
    served = start(workplace, "--device", "cpu")
    yield served
    if served.process.poll() is None:
        served.process.kill()
        served.process.wait()


def command(workplace: Path, *arguments: str, template_id: str = TEMPLATE) -> subprocess.Popen:
    script = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), *arguments]
    common = ["--template_id", template_id, "--cache_dir", "cache", "--device", "cpu"]
    return subprocess.Popen(
        script + common, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )


def finished(process: subprocess.Popen):
    out, err = process.communicate(timeout=120)
    return process.returncode, json.loads(out), err


INFERENCE = ("--inference", "--audio_path", "s.flac", "--output_path", "out/a.mp4")


def frames_made(worker: Served) -> float:
    text = worker.call("GET", "/metrics")[2].decode()
    return float(
        next(line.split()[1] for line in text.splitlines() if line.startswith("musetalk_frames_total"))
    )


def test_the_worker_s_answer_is_the_command_s_own(workplace, worker):
    preprocess = ("--preprocess", "--template_image_path", "小哈 (1).jpg")
    first = finished(command(workplace, *preprocess))
    assert first[0] == 0 and first[1]["cached"] is False
    again, here = (finished(command(workplace, *preprocess, "--worker", how)) for how in ("auto", "off"))
    assert again[0] == here[0] == 0 and again[1]["cached"] is here[1]["cached"] is True
    assert again[1].keys() == here[1].keys()
    before = frames_made(worker)
    style = ("--articulation", "1.4")
    code, answer, _ = finished(command(workplace, *INFERENCE, *style))
    assert code == 0 and frames_made(worker) == before + 190, "the worker did it"
    code, here, _ = finished(command(workplace, *INFERENCE[:-1], "out/b.mp4", *style, "--worker", "off"))
    assert code == 0 and frames_made(worker) == before + 190
    differing = {key for key in here if here[key] != answer[key]}
    assert answer.keys() == here.keys() and differing <= {
        *("output_path", "processing_time", "rtf", "frames_per_second", "time_to_first_frame", "stages"),
        "message",
    }
    assert answer["output_path"] == "out/a.mp4" and answer["audio_path"] == "s.flac"
    assert (workplace / "out" / "a.mp4").read_bytes() == (workplace / "out" / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "changed", [("--audio_path", "missing.wav"), ("--fps", "1e9"), ("--output_path", "out/a.txt")]
)
def test_failures_are_those_of_the_command(workplace, worker, changed):
    told = [finished(command(workplace, *INFERENCE, *changed, "--worker", how)) for how in ("auto", "off")]
    assert told[0] == told[1] and told[0][0] in (3, 7)


def test_a_named_worker_that_is_not_there_is_an_error(workplace):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code, answer, _ = finished(command(workplace, *INFERENCE, "--worker", f"127.0.0.1:{port}"))
    assert code == 5 and str(port) in answer["error"]


def test_a_named_worker_is_used(workplace, worker):
    before = frames_made(worker)
    address = f"127.0.0.1:{worker.http_port}"
    assert finished(command(workplace, *INFERENCE, "--worker", address))[0] == 0
    assert frames_made(worker) == before + 190


@pytest.fixture(scope="module")
def long_sound(workplace) -> tuple[str, ...]:
    from tests.server.test_videos import long_sound as write

    write(workplace / "long.wav", LONG)
    return ("--inference", "--audio_path", "long.wav", "--output_path", "out/long.mp4")


def begun(workplace: Path) -> None:
    """Waits until the long video is being written."""
    deadline = time.monotonic() + 60
    while not list((workplace / "out").glob(".long.*")):
        assert time.monotonic() < deadline


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_cancels_the_worker_s_work(workplace, worker, long_sound):
    (workplace / "out").mkdir(exist_ok=True)
    process = command(workplace, *long_sound)
    begun(workplace)
    process.send_signal(signal.SIGINT)
    code, answer, _ = finished(process)
    assert code == 130 and answer["error_code"] == "interrupted"
    until_idle(worker)
    assert not list((workplace / "out").glob("*long*"))


def until_idle(worker: Served) -> None:
    deadline = time.monotonic() + 10
    while worker.call("GET", "/api/status")[2]["running"]:
        assert time.monotonic() < deadline


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_cancels_a_preprocessing_that_the_worker_does(workplace, worker):
    write_clip(workplace / "clip.mp4", 500)
    clip = ("--preprocess", "--template_image_path", "clip.mp4")
    process = command(workplace, *clip, template_id="clip")
    while not worker.call("GET", "/api/status")[2]["running"]:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finished(process)[0] == 130
    until_idle(worker)
    assert not list((workplace / "cache").glob("*clip*"))


def write_clip(path: Path, n_frames: int) -> None:
    """A still face for long."""
    picture = np.asarray(Image.open(PORTRAIT).convert("RGB"))[..., ::-1].copy()
    height, width = picture.shape[:2]
    with VideoWriter(path, width, height, Fraction(25), None, EncodingConfig(), "bgr24") as writer:
        for _ in range(n_frames):
            writer.write(picture)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_worker_that_dies_is_replaced_by_the_command_itself_and_that_is_said(workplace, worker, long_sound):
    """The last test here: it kills the worker that the others used."""
    process = command(workplace, *long_sound)
    begun(workplace)
    worker.stop(signal.SIGKILL)
    code, answer, errors = finished(process)
    assert code == 0 and answer["frames"] == LONG * 25 and errors.count("改为本地执行") == 1
    assert len(list(read_video(workplace / "out" / "long.mp4"))) == LONG * 25
    assert finished(command(workplace, *INFERENCE))[0] == 0, "what it left behind is not believed"
