"""Requests that the worker's own description calls right, and ones near them: none may break anything."""

from __future__ import annotations

import random

import pytest

EXAMPLES = 8  # of each call
LEFT_OUT = "/worker/drain"  # after it everything is refused, as it should be


def test_no_described_call_makes_the_worker_fail(start_worker):
    """Drawn from a seed, so that each run asks the same."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (requirements-dev.txt)")
    from hypothesis import HealthCheck, Phase, given, settings

    worker = start_worker()
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{worker.http_port}/openapi.json")
    seen: dict[str, set[int]] = {}

    def ask(case) -> None:
        status = case.call(timeout=60).status_code
        seen.setdefault(f"{case.method} {case.path}", set()).add(status)
        assert status < 500, case.as_curl_command()

    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == LEFT_OUT:
            continue
        state = random.getstate()
        asked = given(case=operation.as_strategy())(ask)
        settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )(asked)()
        random.setstate(state)
    assert len(seen) > 25 and worker.call("GET", "/health")[0] == 200
