"""What the worker promises by itself: places, files beside sessions and a stop, without an engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from musetalk.config import EngineConfig, ServerConfig
from musetalk.errors import BusyError, ClientLimitError
from musetalk.server.capacity import Cost
from musetalk.server.worker import Worker


def made(folder: Path, devices: tuple[str, ...] = ("cpu",), **server) -> Worker:
    """A worker that carries two sessions of 25 frames/s."""
    worker = Worker(folder, EngineConfig(device="cpu"), ServerConfig(**server), devices)
    worker.rate = 50.0
    for place in worker.places:
        place.rate = 50.0
    return worker


@pytest.fixture
def worker(tmp_path):
    worker = made(tmp_path)
    yield worker
    worker.close()


def test_files_have_their_turn_while_sessions_render(worker):
    for _ in range(2):
        worker.take_place("anna")
    assert worker.work_slots == 1
    with worker.segment_work(threading.Event()), ThreadPoolExecutor(1) as threads:
        cancel = threading.Event()

        def work() -> int:
            with worker.work(cancel):
                return len(worker.line)

        turn = threads.submit(work)
        try:
            assert turn.result(10) == 2
        finally:
            cancel.set()


def test_a_session_takes_its_frames_and_files_have_what_is_left(worker):
    everything = worker.work_slots
    seat = worker.take_place("anna", 25)
    assert worker.work_slots == max(1, everything // 2)
    with pytest.raises(BusyError, match="fit here") as refused:
        worker.take_place("anna", 30)
    assert refused.value.retry_after > 0 and worker.refused == 1
    other = worker.take_place("anna", 25)
    assert worker.work_slots == 1 and worker.sessions == 2
    with pytest.raises(BusyError):
        worker.take_place("anna", 1)
    for taken in (seat, other):
        worker.give_place_back(taken)
    assert worker.work_slots == everything and worker.taken == 0
    worker.take_place("anna", 50)


def test_one_address_takes_as_many_places_as_it_may(tmp_path):
    worker = made(tmp_path, client_sessions=1)
    seat = worker.take_place("anna", client="a")
    with pytest.raises(ClientLimitError):
        worker.take_place("anna", client="a")
    worker.take_place("anna", client="b")
    worker.give_place_back(seat)
    worker.take_place("anna", client="a")
    worker.close()


def test_devices_share_the_processors(tmp_path, monkeypatch):
    monkeypatch.setattr("musetalk.server.worker.usable_cores", lambda: 10)
    worker = made(tmp_path, ("cpu", "cpu"))
    worker._plan([Cost(0.01, card=0.004), Cost(0.01, card=0.016)])
    assert [round(place.rate) for place in worker.places] == [100, 25], "each by its own card"
    assert worker.rate == pytest.approx(125) and worker.capacity == 5
    worker._plan([Cost(0.04, card=0.004), Cost(0.04, card=0.004)])
    assert worker.rate == pytest.approx(100), "not twice the processors that there are once"
    worker._plan([Cost(1.0), Cost(1.0)])
    assert worker.capacity == 1, "one at least"
    worker.close()


def test_a_stop_waits_for_sessions_that_speak_and_for_no_idle_caller(tmp_path):
    worker = made(tmp_path, grace=600)
    worker.take_place("anna")  # its caller may send a segment or not
    seat = worker.take_place("anna", live=True)
    assert not worker.ends_session(speaking=False)
    with ThreadPoolExecutor(1) as thread:
        drained = thread.submit(worker.drain)
        while not worker.stopping:
            pass
        assert worker.ends_session(speaking=False) and not worker.ends_session(speaking=True)
        assert not drained.done()
        worker.give_place_back(seat)
        assert drained.result(60) is True
    worker.close()


def test_a_session_that_speaks_beyond_the_grace_is_cut_off(tmp_path):
    worker = made(tmp_path, grace=0)
    worker.take_place("anna", live=True)
    assert worker.drain() is False
    assert worker.ends_session(speaking=True) and worker.cut_off
    worker.close()
