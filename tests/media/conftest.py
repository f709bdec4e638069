"""What the tests of several media share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Process ids of the children started during the test that still run."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen.__init__

    def record(process: subprocess.Popen[bytes], *arguments: object, **options: object) -> None:
        start(process, *arguments, **options)  # type: ignore[arg-type]
        started.append(process)

    monkeypatch.setattr(subprocess.Popen, "__init__", record)
    return lambda: [process.pid for process in started if process.poll() is None]
