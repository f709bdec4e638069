"""deploy/ray_serve.py: sessions stay with their replica, and one that dies costs nobody else anything."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from musetalk.config import REPOSITORY
from musetalk.server.clients import Clients
from musetalk.service import IntegratedMuseTalkService
from tests.deploy.test_balancer import free_port

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray (requirements-ray.txt)"
)
DEADLINE = 60.0  # seconds
MOST = 4  # sessions of a replica


@pytest.fixture(scope="module")
def ray_serve() -> Iterator[Any]:
    """The module, as `serve run` imports it."""
    folder = str(REPOSITORY / "deploy")
    sys.path.insert(0, folder)
    import ray_serve

    yield ray_serve
    sys.path.remove(folder)


def test_calls_are_known_by_their_session(ray_serve):
    known = {
        ("/v1/sessions/abc/audio", ""): "abc",
        ("/v1/videos/video_1", ""): "video_1",
        ("/api/end_session/abc", ""): "abc",
        ("/api/process_segment", "abc"): "abc",
        ("/v1/sessions", "abc"): "",
        ("/v1/templates/t", ""): "",
        ("/health", ""): "",
    }
    for (path, session), expected in known.items():
        assert ray_serve.session_of(path, {"session_id": session}, {}) == expected
    assert ray_serve.session_of("/v1/videos", {}, {"idempotency-key": "k"}) == "k"


def test_callers_who_share_the_fronts_address_share_no_limit(ray_serve):
    clients = Clients(ray_serve.settings_of(ray_serve.Options()))
    for kind in ("connections", "uploads", "jobs", "sessions"):
        clients.check("127.0.0.1", kind, 10_000)


class Service:
    """The application behind one address."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any, str]:
        """Status, JSON and the address of the replica that answered; "" where none did."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return answer.status, json.load(answer), answer.headers.get("X-Worker", "")
        except urllib.error.HTTPError as e:
            return e.code, json.load(e), e.headers.get("X-Worker", "")

    def session(self) -> tuple[str, str]:
        """A new session's id and its replica's address."""
        status, answer, address = self.call("POST", "/v1/sessions", {"template_id": "t"})
        assert status == 201, answer
        return answer["session_id"], address


@pytest.fixture(scope="module")
def service(ray_serve, tmp_path_factory) -> Iterator[Service]:
    """One to three replicas of one session each."""
    import ray
    from ray import serve

    from musetalk.tools.demo import PORTRAIT

    folder = tmp_path_factory.mktemp("ray serve")
    IntegratedMuseTalkService(folder / "cache", "cpu").preprocess_template("t", PORTRAIT)
    code = {"env_vars": {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'deploy'}"}}
    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    ray.init("local", num_cpus=5, object_store_memory=80 << 20, runtime_env=code, **quiet)
    port = free_port()
    folders = {f"{name}_dir": str(folder / name) for name in ("cache", "videos", "temp")}
    options = ray_serve.Options(
        min_replicas=1,
        max_replicas=3,
        target=1,
        most=MOST,
        upscale_delay=0,
        downscale_delay=1,
        look_back=1.5,
        grace=120,
        **folders,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_serve.application(options))
        yield Service(port)
        serve.shutdown()
    finally:
        ray.shutdown()


def listener(port: int) -> int:
    """The process that listens on a port of this machine, on Linux."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (socket,) = [
        f"socket:[{cells[9]}]" for cells in lines if cells[3] == "0A" and int(cells[1][-4:], 16) == port
    ]
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(link.readlink()) == socket:
                return int(link.parts[2])
    raise AssertionError(f"nobody listens on {port}")


def running() -> int:
    from ray import serve

    states = serve.status().applications["default"].deployments["Engine"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items()}.get("RUNNING", 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_replicas_come_with_sessions_die_alone_and_go(service):
    assert service.call("GET", "/health")[0] == 200 and running() == 1
    status, answer, _ = service.call("POST", "/v1/sessions", {"template_id": "nobody"})
    assert (status, answer["error_code"]) == (404, "cache_missing")
    places: dict[str, str] = {}
    answers: Counter[int] = Counter()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answers[service.call("GET", "/v1/templates/t")[0]] += 1

    def keep_alive() -> None:
        while not stop.wait(1.0):  # who says nothing for long is taken for gone
            for name in list(places):
                service.call("POST", f"/v1/sessions/{name}/interrupt")

    callers = [threading.Thread(target=work) for work in (load, load, keep_alive)]
    for caller in callers:
        caller.start()
    try:
        while len(places) <= MOST:  # more than one replica takes
            places.update([service.session()])
        assert len(set(places.values())) > 1
        wait_until(lambda: running() == 3)  # one session is the target of each
        for name, address in [*places.items()] * 2:
            assert service.call("GET", f"/v1/sessions/{name}")[::2] == (200, address)
        with connect(f"{service.base.replace('http', 'ws')}/v1/sessions/{name}/video") as viewer:
            assert isinstance(viewer.recv(DEADLINE), str) and b"moov" in viewer.recv(DEADLINE)
        victim = max(places.values(), key=list(places.values()).count)
        os.kill(listener(int(victim.rpartition(":")[2])), signal.SIGKILL)
        before = answers.total()
        wait_until(lambda: answers.total() > before + 20)
        told = {name: service.call("GET", f"/v1/sessions/{name}")[0] for name in places}
        assert told == {name: 404 if address == victim else 200 for name, address in places.items()}
        left = [name for name, status in told.items() if status == 200]
        assert left
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert set(answers) == {200}
    assert {service.call("DELETE", f"/v1/sessions/{name}")[0] for name in left} == {200}
    wait_until(lambda: running() == 1)
