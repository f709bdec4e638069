"""Three workers behind deploy/haproxy.cfg: sessions stay where they began, a death costs only its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import REPOSITORY, EngineConfig
from musetalk.media.video import read_video
from musetalk.service import IntegratedMuseTalkService
from tests.conftest import PORTRAIT
from tests.served import Served, start

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy")

CALLERS = 5
SESSIONS = 8  # of each caller
SEGMENTS = 3
CONFIGURATION = REPOSITORY / "deploy" / "haproxy.cfg"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass
class Balanced:
    """Workers by the names that the balancer gives them, and the balancer's ports."""

    workers: dict[str, Served]
    http_port: int
    lines_port: int
    videos: Path

    def call(
        self, path: str, body: dict[str, Any] | None = None, method: str = "POST"
    ) -> tuple[dict[str, Any], str]:
        """A call's answer and the worker that gave it."""
        headers = {"Content-Type": "application/json"} if body else {}
        return self.send(path, json.dumps(body).encode() if body else b"", headers, method)

    def send(
        self, path: str, body: bytes, headers: dict[str, str], method: str = "POST"
    ) -> tuple[dict[str, Any], str]:
        """As `call`, of any body."""
        address = f"http://127.0.0.1:{self.http_port}{path}"
        request = urllib.request.Request(address, body or None, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read()), answer.headers["X-Worker"]


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    """Three workers for the tests that leave them as they are."""
    with started(tmp_path_factory.mktemp("balanced")) as running:
        yield running


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Balanced]:
    """Three workers of a test's own."""
    with started(tmp_path) as running:
        yield running


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Balanced]:
    """Three workers that share the folders of templates and videos, behind the balancer."""
    config = EngineConfig(engine="lite", device="cpu")
    (folder / "videos").mkdir()
    IntegratedMuseTalkService(folder / "cache", config=config).preprocess_template("anna", PORTRAIT)
    workers: dict[str, Served] = {}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name in ("worker1", "worker2", "worker3"):
            workers[name] = start(folder, "--engine", "lite", "--max_sessions", "8")
            processes.append(workers[name].process)
        http_port, lines_port = free_port(), free_port()
        places = {"BIND_HTTP": f"127.0.0.1:{http_port}", "BIND_LINES": f"127.0.0.1:{lines_port}"}
        for name, worker in workers.items():
            places[f"{name.upper()}_HTTP"] = f"127.0.0.1:{worker.http_port}"
            places[f"{name.upper()}_LINES"] = f"127.0.0.1:{worker.tcp_port}"
        balancer = subprocess.Popen(
            ["haproxy", "-db", "-f", str(CONFIGURATION)],
            env={**os.environ, **places},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        processes.append(balancer)
        _wait_for(http_port, balancer)
        yield Balanced(workers, http_port, lines_port, folder / "videos")
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            continue
        return
    raise AssertionError("the balancer ended")


@dataclass
class Session:
    """What became of one session.

    Attributes:
        workers: that answered its calls; the first one holds it.
        failure: how it was lost; None when it wasn't.
    """

    workers: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    frames: int = 0
    failure: str | None = None
    done: bool = False


class Caller(threading.Thread):
    """Renders one session after the other; one that is lost is left and the next begun."""

    def __init__(self, balanced: Balanced, audio: Path, moved: threading.Semaphore) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self._balanced = balanced
        self._audio = audio
        self._moved = moved

    def run(self) -> None:
        for _ in range(SESSIONS):
            self.sessions.append(Session())
            try:
                self._hold(self.sessions[-1])
            except (OSError, urllib.error.HTTPError) as e:
                self.sessions[-1].failure = f"{e} {e.read() if isinstance(e, urllib.error.HTTPError) else ''}"
            self._moved.release()

    def _hold(self, session: Session) -> None:
        name = str(uuid.uuid4())
        self._call(session, "/api/start_session", {"session_id": name, "template_id": "anna"})
        for i in range(SEGMENTS):
            segment = {"session_id": name, "audio_path": str(self._audio), "segment_index": i}
            answer = self._call(session, "/api/process_segment", {**segment, "is_final": i == SEGMENTS - 1})
            session.videos.append(answer["video_path"])
            session.frames += answer["frames"]
            self._moved.release()
        self._call(session, f"/api/end_session/{name}")
        session.done = True

    def _call(self, session: Session, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer, worker = self._balanced.call(path, body)
        session.workers.append(worker)
        return answer


def drain(balanced: Balanced, name: str) -> None:
    address = f"http://127.0.0.1:{balanced.workers[name].http_port}/worker/drain"
    with urllib.request.urlopen(urllib.request.Request(address, method="POST"), timeout=60) as answer:
        assert json.loads(answer.read())["status"] == "draining"


def seen_later(balanced: Balanced, left: set[str]) -> set[str]:
    """The workers that answer once the balancer, which looks every second, knows who is `left`."""
    seen: list[str] = []
    while len(seen) < 40 or set(seen[-40:]) - left:
        seen.append(balanced.call("/api/status", method="GET")[1])
        assert len(seen) < 20_000
    return {balanced.call("/api/status", method="GET")[1] for _ in range(20)}


def test_a_killed_worker_costs_the_sessions_it_held_and_a_draining_one_none(
    mortal: Balanced, write_tone
) -> None:
    moved = threading.Semaphore(0)
    callers = [Caller(mortal, write_tone(4_800), moved) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for _ in range(2 * CALLERS * SEGMENTS):
        assert moved.acquire(timeout=120)
    held = [caller.sessions[-1].workers[0] for caller in callers if caller.sessions[-1].workers]
    killed = max(set(held), key=held.count)
    mortal.workers[killed].process.kill()
    mortal.workers[killed].process.wait()
    before = sum(len(caller.sessions) for caller in callers)
    for caller in callers:
        caller.join(300)
    sessions = [session for caller in callers for session in caller.sessions]
    assert len(sessions) == CALLERS * SESSIONS and before < len(sessions)
    lost = [session for session in sessions if session.failure]
    assert len(lost) <= CALLERS
    for session in lost:
        assert set(session.workers) == {killed}, session
    kept = [session for session in sessions if not session.failure]
    assert {worker for session in kept for worker in session.workers} >= mortal.workers.keys() - {killed}
    for session in kept:
        assert session.done and len(set(session.workers)) == 1
        assert session.frames == 22  # floor(3 × 0.3 s × 25)
    videos = [name for session in kept for name in session.videos]
    assert len(set(videos)) == len(videos) == SEGMENTS * len(kept)
    assert all(Path(name).is_file() for name in videos)
    drained, last = sorted(mortal.workers.keys() - {killed})
    drain(mortal, drained)
    assert seen_later(mortal, {last}) == {last}


def test_what_a_worker_begins_stays_with_it(balanced: Balanced) -> None:
    begun = [balanced.call("/v1/sessions", {"template_id": "anna", "width": 64}) for _ in range(6)]
    assert len({worker for _, worker in begun}) > 1
    for answer, worker in begun:
        for method in ("GET", "GET", "DELETE"):
            told, by = balanced.call(f"/v1/sessions/{answer['session_id']}", method=method)
            assert by == worker and told["session_id"] == answer["session_id"]


def form(audio: Path) -> tuple[bytes, dict[str, str]]:
    """The body and header of a job."""
    field = '--x\r\nContent-Disposition: form-data; name="template_id"\r\n\r\nanna\r\n'
    file = '--x\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n'
    content = field.encode() + file.encode() + audio.read_bytes() + b"\r\n--x--\r\n"
    return content, {"Content-Type": "multipart/form-data; boundary=x"}


def test_a_job_and_its_repetition_stay_with_their_worker(balanced: Balanced, write_tone) -> None:
    content, headers = form(write_tone(8_000))
    jobs = {
        key: balanced.send("/v1/videos", content, {**headers, "Idempotency-Key": key})
        for key in ("a", "b", "c", "d", "e")
    }
    assert len({worker for _, worker in jobs.values()}) > 1
    for key, (job, worker) in jobs.items():
        again, by = balanced.send("/v1/videos", content, {**headers, "Idempotency-Key": key})
        assert (again["id"], by) == (job["id"], worker)
        for _ in range(3):
            told, by = balanced.call(f"/v1/videos/{job['id']}", method="GET")
            assert (told["id"], by) == (job["id"], worker)


def test_every_protocol_comes_through_and_every_worker_serves_every_video(
    balanced: Balanced, write_tone, tmp_path: Path
) -> None:
    audio = write_tone(8_000)
    with socket.create_connection(("127.0.0.1", balanced.lines_port), 60) as lines:
        lines.sendall(b'{"command":"ping"}\n')
        assert json.loads(lines.makefile("rb").readline())["message"] == "pong"
    request = {"template_id": "anna", "audio_path": str(audio), "output_path": str(tmp_path / "f.mp4")}
    body = json.dumps(request).encode()
    with socket.create_connection(("127.0.0.1", balanced.http_port), 60) as framed:
        framed.sendall(struct.pack("<I", len(body)) + body)
        received = framed.makefile("rb").read()
    assert struct.unpack("<I", received[:4])[0] == len(received) - 4
    assert json.loads(received[4:])["Success"] and len(list(read_video(tmp_path / "f.mp4"))) == 12
    (balanced.videos / "a (1).mp4").write_bytes(b"0123456789")
    for worker in balanced.workers.values():
        with urllib.request.urlopen(
            f"http://127.0.0.1:{worker.http_port}/videos/a%20(1).mp4", timeout=60
        ) as video:
            assert video.read() == b"0123456789"
