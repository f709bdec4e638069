"""Further workers for the tests that want one of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.served import Served, start


@pytest.fixture
def start_worker(furnished: Path) -> Iterator[Callable[..., Served]]:
    """Starts further workers over the same folder; they are killed in the end."""
    started: list[Served] = []

    def begin(*arguments: str, **environment: str) -> Served:
        started.append(start(furnished, *arguments, **environment))
        return started[-1]

    yield begin
    for worker in started:
        worker.process.kill()
        worker.process.wait()
