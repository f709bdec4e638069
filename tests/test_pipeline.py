"""Overlapped stages: order, bounds, first error, prompt stop."""

from __future__ import annotations

import threading

import pytest

from musetalk.pipeline import Pipeline, StageClock


def test_items_arrive_in_order_through_chained_stages():
    with Pipeline() as pipeline:
        first = pipeline.overlap(range(500), "first", 2)
        second = pipeline.overlap((item * 2 for item in first), "second", 2)
        assert list(second) == [2 * i for i in range(500)]


def test_a_stage_stays_within_its_depth_of_the_consumer():
    made: list[int] = []
    moved = threading.Semaphore(0)

    def numbers():
        for i in range(100):
            made.append(i)
            moved.release()
            yield i

    with Pipeline() as pipeline:
        items = pipeline.overlap(numbers(), "numbers", 3)
        for consumed in range(1, 96):
            assert next(items) == consumed - 1
            while len(made) < consumed + 4:
                assert moved.acquire(timeout=60)
            assert len(made) == consumed + 4  # three queued, one in hand


def test_the_first_error_is_raised_where_the_chain_is_consumed():
    def broken():
        yield 1
        raise LookupError("the first")

    with Pipeline() as pipeline:
        first = pipeline.overlap(broken(), "first", 1)
        second = pipeline.overlap((item for item in first), "second", 1)
        third = pipeline.overlap((item for item in second), "third", 1)
        with pytest.raises(LookupError, match="the first"):
            list(third)


def test_leaving_the_block_closes_every_stage_and_ends_its_thread():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Pipeline() as pipeline:
        next(pipeline.overlap(endless(), "endless stage", 1))
    assert closed.wait(5)
    assert all(thread.name != "endless stage" for thread in threading.enumerate())


def test_call_returns_the_result_and_raises_the_error_of_its_function():
    with Pipeline() as pipeline:
        assert pipeline.call(lambda: 42, "answer") == 42
        with pytest.raises(ZeroDivisionError):
            pipeline.call(lambda: 1 / 0, "division")


class Stopwatch:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def stopwatch(monkeypatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr("musetalk.pipeline.time", watch)
    return watch


def test_clock_counts_the_making_of_items_and_not_what_is_done_with_them(stopwatch):
    def slow():
        for seconds in (1, 2, 4):
            stopwatch.now += seconds
            yield seconds
        stopwatch.now += 8

    clock = StageClock(record=True)
    for _ in clock.timed("work", slow()):
        stopwatch.now += 50
    assert clock.seconds == {"work": 15}
    assert clock.intervals["work"] == [(0, 1), (51, 53), (103, 107), (157, 165)]


def test_clock_counts_a_stage_that_failed_and_keeps_stages_apart(stopwatch):
    clock = StageClock()
    with pytest.raises(LookupError), clock.stage("load"):
        stopwatch.now += 3
        raise LookupError
    with clock.stage("encode"):
        stopwatch.now += 0.5
    assert clock.seconds == {"load": 3, "encode": 0.5} and clock.intervals == {}
    assert clock.summary() == "load 3.00 s, encode 0.50 s"


def test_what_a_stage_says_of_being_cancelled_is_no_failure():
    cancel = threading.Event()

    def stage():
        yield 1
        cancel.set()
        raise RuntimeError("cancelled")

    with Pipeline(cancel) as pipeline:
        assert list(pipeline.overlap(stage(), "stage", 1)) in ([], [1])
