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
        next(items)
        for _ in range(5):
            assert moved.acquire(timeout=5)
        assert not moved.acquire(timeout=0.2)
        assert len(made) == 5  # one consumed, three queued, one in hand


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


def test_clock_adds_up_work_per_stage_and_keeps_intervals_on_request():
    clock = StageClock(record=True)
    assert list(clock.timed("count", range(4))) == [0, 1, 2, 3]
    assert len(clock.intervals["count"]) == 5  # four items and the end
    assert clock.seconds["count"] == pytest.approx(
        sum(end - start for start, end in clock.intervals["count"])
    )
