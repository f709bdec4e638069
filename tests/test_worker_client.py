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
from pathlib import Path

import pytest

from musetalk import __version__
from musetalk.announcement import (
    FILE_NAME,
    Announcement,
    announce,
    engine_settings,
    find_announcement,
    proof,
    withdraw,
)
from musetalk.config import REPOSITORY, EngineConfig, ModelPaths
from musetalk.media.video import read_video
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


def test_an_announcement_is_for_this_user_alone_and_goes_with_its_worker(tmp_path):
    mine, other = announcement(), announcement()
    announce(tmp_path, mine)
    assert find_announcement(tmp_path) == mine
    if os.name != "nt":
        assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
    announce(tmp_path, other)
    withdraw(tmp_path, mine)
    assert find_announcement(tmp_path) == other, "another worker's stays"
    withdraw(tmp_path, other)
    assert find_announcement(tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1, "nonce": "short"}', "\0" * 100_000])
def test_what_is_no_announcement_is_none(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    (tmp_path / FILE_NAME).chmod(0o600)
    assert find_announcement(tmp_path) is None


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_what_others_may_have_written_is_not_believed(tmp_path):
    announce(tmp_path, announcement())
    (tmp_path / FILE_NAME).chmod(0o620)
    assert find_announcement(tmp_path) is None


def test_a_worker_that_proves_itself_is_used(tmp_path, listener):
    told = announcement(listener.server_port)
    listener.nonce = told.nonce
    announce(tmp_path, told)
    assert find_worker("auto", tmp_path, CONFIG).port == listener.server_port
    assert find_worker("off", tmp_path, CONFIG) is None


def test_whoever_took_the_port_meanwhile_is_not(tmp_path, listener):
    listener.nonce = "another"
    announce(tmp_path, announcement(listener.server_port))
    assert find_worker("auto", tmp_path, CONFIG) is None


def test_a_port_where_nobody_listens_is_passed_over(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    announce(tmp_path, announcement(port))
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
    announce(tmp_path, told)
    assert find_worker("auto", tmp_path, config) is None


def test_auto_never_uses_a_worker_of_another_version_or_device(tmp_path, listener):
    for changes in ({"version": "0.9"}, {"devices": ["cuda:7"]}):
        told = Announcement(**{**vars(announcement(listener.server_port)), **changes})
        listener.nonce = told.nonce
        announce(tmp_path, told)
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


def command(workplace: Path, *arguments: str) -> subprocess.Popen:
    script = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), *arguments]
    common = ["--template_id", TEMPLATE, "--cache_dir", "cache", "--device", "cpu"]
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
    deadline = time.monotonic() + 10
    while worker.call("GET", "/api/status")[2]["running"]:
        assert time.monotonic() < deadline
    assert not list((workplace / "out").glob("*long*"))


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
