"""Raw samples on stdin are spoken by a live session; the command says how far they were shown."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from musetalk.config import REPOSITORY
from musetalk.errors import InputError
from musetalk.tools.speak import socket_address
from tests.served import Served


def spoken(served: Served, seconds: float, rate: int, session: str) -> subprocess.CompletedProcess[bytes]:
    samples = (8000 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 200 / rate)).astype("<i2")
    return subprocess.run(
        [sys.executable, "-m", "musetalk.tools.speak", "--session", session, "--sample_rate", str(rate)],
        input=samples.tobytes(),
        capture_output=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("seconds", "rate"), [(0.6, 16_000), (0.6, 24_000), (0, 16_000)])
def test_what_comes_on_stdin_is_spoken_to_its_end(served, seconds, rate):
    session = served.call("POST", "/v1/sessions", {"template_id": "小哈 (1)"})[2]
    address = f"http://127.0.0.1:{served.http_port}/v1/sessions/{session['session_id']}"
    run = spoken(served, seconds, rate, address)
    served.call("DELETE", f"/v1/sessions/{session['session_id']}")
    assert run.returncode == 0, run.stderr.decode()
    answer = json.loads(run.stdout)
    assert (answer["success"], answer["sent_seconds"]) == (True, seconds)
    assert answer["position"] == pytest.approx(seconds, abs=0.001)


def test_a_session_that_is_not_there_is_said_so(served):
    run = spoken(served, 0.1, 16_000, f"http://127.0.0.1:{served.http_port}/v1/sessions/none")
    assert run.returncode == 3 and json.loads(run.stdout)["error_code"] == "bad_input"


@pytest.mark.parametrize(
    ("given", "socket"),
    [
        ("http://a:1/v1/sessions/x", "ws://a:1/v1/sessions/x/audio"),
        ("https://a/v1/sessions/x/?token=t", "wss://a/v1/sessions/x/audio?token=t"),
        ("ws://a/v1/sessions/x/audio", "ws://a/v1/sessions/x/audio"),
    ],
)
def test_a_session_is_named_by_its_address(given, socket):
    assert socket_address(given) == socket


@pytest.mark.parametrize("given", ["", "x", "ftp://a/v1/sessions/x", "http://a/health"])
def test_what_is_no_session_is_refused(given):
    with pytest.raises(InputError):
        socket_address(given)
