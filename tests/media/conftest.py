"""What the tests of several media share."""

from __future__ import annotations

import os
import select
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


def ends(pid: int) -> bool:
    """Whether the process, which isn't our child, ends within half a minute."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 30)[0])
    finally:
        os.close(handle)
