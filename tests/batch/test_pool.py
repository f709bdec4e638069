"""Processes: how many, and what becomes of them and their rows."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from pathlib import Path

import pytest

from musetalk.batch.clips import Setup
from musetalk.batch.crew import Event, Lost, Ready, carry_out
from musetalk.batch.jobs import Settings, make_jobs
from musetalk.batch.pool import MUSETALK_BYTES, ProcessCrew, local_pool, pool_devices, pool_size
from musetalk.batch.schedule import Schedule, Settled
from musetalk.errors import EngineError
from musetalk.service import IntegratedMuseTalkService

GIGABYTE = 1 << 30


def silent() -> None:
    """Sets up nothing in a process."""


def deadly() -> None:
    """Ends a process that has hardly begun."""
    os._exit(3)


@pytest.mark.parametrize(
    ("jobs", "cores", "memory", "process_bytes", "expected"),
    [
        (100, 8, 64 * GIGABYTE, GIGABYTE, 8),
        (3, 8, 64 * GIGABYTE, GIGABYTE, 3),
        (100, 8, 16 * GIGABYTE, MUSETALK_BYTES, 3),
        (100, 8, GIGABYTE, MUSETALK_BYTES, 1),
        (100, 8, 0, MUSETALK_BYTES, 8),
    ],
)
def test_processes_fit_jobs_cores_and_memory(jobs, cores, memory, process_bytes, expected):
    assert pool_size(jobs, cores, memory, process_bytes) == expected


def test_cards_are_shared_as_their_memory_allows_and_taken_in_turns():
    cards = (24 * GIGABYTE, 12 * GIGABYTE)
    places = pool_devices(None, cards, 10 * GIGABYTE, 100)
    assert places == ["cuda:0", "cuda:1", "cuda:0"]
    assert pool_devices(None, cards, 10 * GIGABYTE, 2) == ["cuda:0", "cuda:1"]
    assert pool_devices(5, cards, 10 * GIGABYTE, 100) == [*places, "cuda:0", "cuda:1"]
    assert pool_devices(None, (GIGABYTE,), 10 * GIGABYTE, 9) == ["cuda:0"]


def test_who_asks_for_a_number_of_processes_gets_it(tmp_path):
    jobs, _ = make_jobs([{"template": "t", "audio": "a", "output": "o"}], Settings())
    assert local_pool(jobs, IntegratedMuseTalkService(tmp_path, "cpu"), 3).devices == [None] * 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache folder with the template `t`."""
    from musetalk.tools.demo import PORTRAIT

    folder = tmp_path_factory.mktemp("batch cache")
    IntegratedMuseTalkService(folder, "cpu").preprocess_template("t", PORTRAIT)
    return folder


def test_a_killed_process_is_replaced_and_its_row_done_by_another(cache, write_tone, tmp_path):
    audio = write_tone(8000)
    rows = [{"template": "t", "audio": str(audio), "output": str(tmp_path / f"{i}.mp4")} for i in range(3)]
    schedule, settled, events = Schedule(make_jobs(rows, Settings())[0]), list[Settled](), list[Event]()
    with contextlib.closing(ProcessCrew(Setup(cache), [None], silent)) as crew:

        def notice(event: Event) -> None:
            if isinstance(event, Ready) and not events:
                os.kill(crew.pids[0], signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
            events.append(event)

        carry_out(schedule, crew, settled.append, notice)
        pids = crew.pids
    assert [type(event) for event in events[:3]] == [Ready, Lost, Ready]
    assert sorted((row.job.row, row.outcome.frames) for row in settled) == [(1, 12), (2, 12), (3, 12)]
    assert sorted(row.attempts for row in settled) == [1, 1, 2]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_that_die_at_once_end_the_batch(tmp_path):
    rows = [{"template": "t", "audio": "a", "output": "o"}]
    schedule = Schedule(make_jobs(rows, Settings())[0])
    with contextlib.closing(ProcessCrew(Setup(tmp_path), [None], deadly)) as crew:
        with pytest.raises(EngineError, match="ended with 3"):
            carry_out(schedule, crew, functools.partial(pytest.fail))
        assert len(crew.pids) == 1
