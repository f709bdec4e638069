"""deploy/haproxy.cfg before stand-ins: an id's calls reach the worker that made it, drained or not."""

from __future__ import annotations

import http.client
import http.server
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from tests.deploy.test_balancer import CONFIGURATION, _wait_for, free_port

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy")


class StandIn(http.server.BaseHTTPRequestHandler):
    """A worker that only says what it made and whether it takes more."""

    drained: ClassVar[set[int]] = set()

    def do_GET(self) -> None:
        busy = self.path == "/readyz" and self.server.server_address[1] in self.drained
        self._answer(503 if busy else 200)

    def do_POST(self) -> None:
        self._answer(201, f"{self.path}/{secrets.token_hex(8)}")

    def _answer(self, status: int, location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if location:
            self.send_header("Location", location)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def balanced() -> Iterator[tuple[int, dict[str, int]]]:
    """The balancer's port, and the ports of the stand-ins by their names."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn) for _ in range(3)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = {f"worker{n}": server.server_address[1] for n, server in enumerate(servers, 1)}
    port = free_port()
    places = {"BIND_HTTP": f"127.0.0.1:{port}", "BIND_LINES": f"127.0.0.1:{free_port()}"}
    places |= {f"{name.upper()}_HTTP": f"127.0.0.1:{at}" for name, at in ports.items()}
    balancer = subprocess.Popen(["haproxy", "-db", "-f", str(CONFIGURATION)], env={**os.environ, **places})
    try:
        _wait_for(port, balancer)
        yield port, ports
    finally:
        balancer.kill()
        balancer.wait()
        StandIn.drained.clear()
        for server in servers:
            server.shutdown()
            server.server_close()


def call(port: int, method: str, path: str) -> tuple[str, str]:
    """The answer's worker and location."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Content-Length": "0"})
    answer = connection.getresponse()
    connection.close()
    return answer.getheader("X-Worker", ""), answer.getheader("Location", "")


@pytest.mark.parametrize("kind", ["sessions", "videos"])
def test_calls_of_an_id_reach_the_worker_that_made_it_even_while_it_is_drained(balanced, kind):
    port, ports = balanced
    made = [call(port, "POST", f"/v1/{kind}") for _ in range(6)]
    assert len({worker for worker, _ in made}) > 1
    for worker, location in made:
        assert {call(port, "GET", location + end)[0] for end in ("", "/x", "/y/z")} == {worker}
    drained, location = made[0]
    StandIn.drained.add(ports[drained])
    deadline = time.monotonic() + 60
    while drained in {call(port, "POST", f"/v1/{kind}")[0] for _ in range(6)}:
        assert time.monotonic() < deadline, "it still gets new ones"
    assert {call(port, "GET", location)[0] for _ in range(3)} == {drained}
