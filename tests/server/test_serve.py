"""The worker's life as its operator sees it: ready, second on a port, drained, killed and started again."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from musetalk.config import REPOSITORY
from musetalk.media.video import read_video
from musetalk.tools.demo import SPEECH
from tests.server.test_tcp import TEMPLATE, Client, inference


def test_ready_is_said_with_addresses_and_seconds(served):
    ready = next(line for line in served.said if "ready in" in line)
    assert f":{served.http_port}" in ready and f":{served.tcp_port}" in ready


@pytest.mark.parametrize("taken", ["http_port", "port"])
def test_a_second_worker_on_a_port_says_so_in_one_sentence(served, tmp_path, taken):
    ports = {"http_port": "0", "port": "0"}
    ports[taken] = str(served.http_port if taken == "http_port" else served.tcp_port)
    command = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), "--serve"]
    command += ["--http_port", ports["http_port"], "--port", ports["port"], "--max_sessions", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    answer = json.loads(done.stdout)
    assert done.returncode == 7 and answer["error_code"] == "output" and ports[taken] in answer["error"]
    assert ports[taken] in done.stderr.decode().splitlines()[0]


def test_a_stop_finishes_what_runs_and_refuses_what_comes(start_worker, tmp_path):
    worker = start_worker()
    with worker.lines() as busy, worker.lines() as other:
        client = Client(busy)
        client.send(**inference(tmp_path))
        while not worker.call("GET", "/api/status")[2]["running"]:
            pass
        worker.process.send_signal(signal.SIGTERM)
        while not any("stopping" in line for line in worker.said):
            pass
        refused = Client(other).ask(**inference(tmp_path, "b.mp4"))
        assert refused["success"] is False and refused["error_code"] == "busy"
        assert client.reply()["success"] is True
    assert worker.process.wait(60) == 0
    assert len(list(read_video(tmp_path / "a.mp4"))) == 190 and not (tmp_path / "b.mp4").exists()
    assert json.loads(worker.process.stdout.read())["finished"] is True


def test_a_stop_ends_within_its_grace(start_worker, tmp_path):
    worker = start_worker("--grace", "0")
    with worker.lines() as busy:
        Client(busy).send(**inference(tmp_path))
        while not worker.call("GET", "/api/status")[2]["running"]:
            pass
        assert worker.stop() == 0
    assert json.loads(worker.process.stdout.read())["finished"] is False
    assert not (tmp_path / "a.mp4").exists(), "no half file under its name"


def told_by(connection: Any) -> Iterator[dict[str, Any]]:
    """Events of a session's socket until it is closed."""
    from websockets.exceptions import ConnectionClosed

    with contextlib.suppress(ConnectionClosed):
        for message in connection:
            yield json.loads(message)


def test_a_stop_lets_a_live_session_finish_what_it_says(start_worker, tmp_path):
    sync = pytest.importorskip("websockets.sync.client")
    worker = start_worker("--grace", "600")
    idle = {"session_id": "waits for its caller", "template_id": TEMPLATE}
    worker.post("/api/start_session", idle)
    live = worker.call("POST", "/v1/sessions", {"template_id": TEMPLATE})[2]
    address = f"ws://127.0.0.1:{worker.http_port}{live['addresses']['audio']}"
    with sync.connect(address) as socket_in:
        worker.call("POST", live["addresses"]["speech"], SPEECH.read_bytes(), {"Content-Type": "audio/flac"})
        events = told_by(socket_in)
        next(event for event in events if event.get("state") == "talking")
        worker.process.send_signal(signal.SIGTERM)
        told = list(events)
    last = [event for event in told if event["type"] == "playback"][-1]
    assert last["done"] is True and last["position"] == pytest.approx(7.6, abs=0.1)
    assert told[-1]["type"] == "ended" and "stopped" in told[-1]["message"]
    assert worker.process.wait(60) == 0
    assert json.loads(worker.process.stdout.read())["finished"] is True


def test_shutdown_by_line_ends_it(start_worker):
    worker = start_worker()
    with worker.lines() as connection:
        assert Client(connection).ask(command="shutdown")["success"] is True
    assert worker.process.wait(60) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_worker_leaves_its_ports_and_no_half_file(start_worker, tmp_path):
    worker = start_worker()
    ports = ("--http_port", str(worker.http_port), "--port", str(worker.tcp_port))
    with worker.lines() as busy:
        Client(busy).send(**inference(tmp_path))
        while not list(tmp_path.iterdir()):
            pass
        worker.stop(signal.SIGKILL)
    assert not (tmp_path / "a.mp4").exists()
    again = start_worker(*ports)
    assert again.http_port == worker.http_port
    with again.lines() as connection:
        assert Client(connection).ask(**inference(tmp_path))["success"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"], "what the killed one left is swept"


def test_environment_names_the_folders_of_containers(start_worker, tmp_path):
    worker = start_worker(MUSE_TEMP_DIR=str(tmp_path))
    (tmp_path / "s.flac").write_bytes(SPEECH.read_bytes())
    worker.post("/api/start_session", {"session_id": "s", "template_id": TEMPLATE})
    body = {"session_id": "s", "audio_path": "/app/temp/s.flac", "segment_index": 0, "is_final": True}
    assert worker.post("/api/process_segment", body)["frames"] == 190


def test_a_client_that_never_ends_its_headers_is_only_one_connection(served):
    stalled = [socket.create_connection(("127.0.0.1", served.http_port)) for _ in range(40)]
    try:
        for connection in stalled:
            connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        answers: list[int] = []
        call = lambda: answers.append(served.call("GET", "/health")[0])  # noqa: E731
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * 8
    finally:
        for connection in stalled:
            connection.close()
