"""A worker as its callers meet it: a process of its own, on ports that the system chose."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import REPOSITORY
from musetalk.service import IntegratedMuseTalkService
from musetalk.tools.demo import PORTRAIT

READY = re.compile(r"http://([\d.]+):(\d+) · tcp [\d.]+:(\d+)")
START_SECONDS = 120


@dataclass
class Served:
    """A running worker.

    Attributes:
        folder: the working directory, which holds `cache` and `videos`.
        said: what it said on stderr so far.
    """

    process: subprocess.Popen[str]
    folder: Path
    http_port: int = 0
    tcp_port: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def videos(self) -> Path:
        return self.folder / "videos"

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers in small letters and the JSON or bytes of one HTTP call."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json; charset=utf-8"
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        told = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        if told.get("content-type", "").startswith("application/json"):
            return answer.status, told, json.loads(content)
        return answer.status, told, content

    def post(self, path: str, body: Any = None) -> Any:
        """The JSON of a POST that succeeds."""
        status, _, answer = self.call("POST", path, body)
        assert status == 200, answer
        return answer

    def lines(self) -> socket.socket:
        """A connection to the port that speaks by lines."""
        return socket.create_connection(("127.0.0.1", self.tcp_port), timeout=60)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


def start(folder: Path, *arguments: str, **environment: str) -> Served:
    """Starts a worker and waits until it is ready."""
    command = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), "--serve"]
    command += ["--cache_dir", "cache", "--videos_dir", "videos", "--http_port", "0", "--port", "0"]
    if "--max_sessions" not in arguments:
        command += ["--max_sessions", "3"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    served = Served(process, folder)
    ready = threading.Event()

    def listen() -> None:
        for line in process.stderr or ():
            served.said.append(line.rstrip("\n"))
            found = READY.search(line)
            if found:
                served.http_port, served.tcp_port = int(found[2]), int(found[3])
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    assert ready.wait(START_SECONDS) and served.http_port, "\n".join(served.said)
    return served


@pytest.fixture(scope="session")
def furnished(tmp_path_factory) -> Path:
    """A working directory with spaces and Chinese in its name whose cache holds the template `小哈 (1)`."""
    folder = tmp_path_factory.mktemp("工作 worker (x)")
    (folder / "videos").mkdir()
    IntegratedMuseTalkService(folder / "cache", "cpu").preprocess_template("小哈 (1)", PORTRAIT)
    return folder


@pytest.fixture(scope="session")
def served(furnished: Path) -> Iterator[Served]:
    """A worker that many tests share."""
    worker = start(furnished)
    yield worker
    if worker.process.poll() is None:
        worker.process.kill()
        worker.process.wait()
