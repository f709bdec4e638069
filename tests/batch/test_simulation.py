"""Virtual batches against sums done by hand, and against a real one's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from musetalk.batch.__main__ import batch_main
from musetalk.batch.jobs import Settings, make_jobs
from musetalk.batch.simulation import Plan, Times, replay, simulate, simulated
from musetalk.cli import execute
from musetalk.errors import InputError

TIMES = Times(start=10, prepare=100, open=5, clip=1, frame=0.1)


def run(templates: list[str], frames: list[int], workers: int, lifetime: float = 0.0):
    rows = [{"template": name, "audio": "a", "output": f"{i}.mp4"} for i, name in enumerate(templates)]
    jobs, _ = make_jobs(rows, Settings())
    return simulated(jobs, dict(enumerate(frames, 1)), Plan(workers, lifetime=lifetime, times=TIMES))


def test_one_worker_does_everything_after_the_other():
    told = run(["a", "a", "b.png"], [10, 20, 30], 1)
    assert told["seconds"] == 10 + 100 + (5 + 1 + 1) + (1 + 2) + (5 + 1 + 3)
    assert told["busy"] == pytest.approx((told["seconds"] - 10) / told["seconds"], abs=1e-3)
    assert (told["done"], told["templates_opened"]) == (3, 2)


def test_two_workers_share_the_templates_and_then_the_rows():
    assert run(["a", "b"], [10, 10], 2)["seconds"] == 10 + 5 + 1 + 1
    told = run(["a", "a"], [10, 10], 2)
    assert (told["seconds"], told["templates_opened"]) == (17, 2)


def test_rows_of_workers_that_die_are_done_by_others():
    told = run(list("abcd") * 50, [100] * 200, 8, lifetime=500 / 3600)
    assert told["workers_lost"] >= 1 and told["done"] + told["failed"] == 200
    assert told["seconds"] > run(list("abcd") * 50, [100] * 200, 8)["seconds"]
    assert told == run(list("abcd") * 50, [100] * 200, 8, lifetime=500 / 3600)  # the same chance again


def test_more_workers_are_faster_until_templates_are_what_waits():
    seconds = [simulate(Plan(workers, 400, 20))["seconds"] for workers in (1, 4, 16)]
    assert seconds[0] > 3.5 * seconds[1] > 3.5 * 3 * seconds[2]


def report_of(tmp_path: Path, **changes: object) -> Path:
    entries = [{"state": "done", "template_id": "t", "frames": 10}] * 3 + [{"state": "failed"}]
    content = {"times": {"start": 1, "prepare": 0, "open": 2, "clip": 1, "frame": 0.1}, "entries": entries}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_report_is_simulated_by_its_own_times(tmp_path):
    arguments = ["--simulate", "1", "--times", str(report_of(tmp_path))]
    answer, code = execute(batch_main, arguments)
    assert (code, answer["seconds"], answer["rows"]) == (0, 1 + 2 + 3 * 2, 3)


@pytest.mark.parametrize(
    "changes", [{"entries": []}, {"times": {"walk": 1}}, {"entries": [{"state": "done"}]}]
)
def test_what_is_no_report_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match="report"):
        replay(json.loads(report_of(tmp_path, **changes).read_text()), 1)


def test_the_command_needs_rows_or_a_simulation():
    answer, code = execute(batch_main, [])
    assert (code, answer["error_code"]) == (2, "usage")
    answer, code = execute(batch_main, ["--simulate", "8", "--clips", "100", "--templates", "5"])
    assert code == 0 and answer["done"] == 100
