"""Who does what: no process, no clock, every order of events played by hand."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from musetalk.batch.clips import Outcome, failure
from musetalk.batch.jobs import Job, Settings, make_jobs
from musetalk.batch.schedule import ATTEMPTS, Schedule
from musetalk.errors import DeviceError, InputError, MuseTalkError, NoFaceError

FINE = Outcome(1.0, frames=10)
DEATH = failure(MuseTalkError("dead"))


def jobs_for(*templates: str) -> list[Job]:
    rows = [{"template": name, "audio": "a", "output": f"{i}.mp4"} for i, name in enumerate(templates)]
    jobs, refused = make_jobs(rows, Settings())
    assert not refused
    return jobs


def test_a_template_stays_with_the_worker_that_opened_it():
    schedule = Schedule(jobs_for(*"aaabbbccc"))
    opened = defaultdict(set)
    while not schedule.finished:
        for worker in ("one", "two", "three"):
            task = schedule.next_task(worker)
            assert task is not None
            opened[task.job.template_id].add(worker)
        for worker in ("three", "one", "two"):
            assert len(schedule.done(worker, FINE)) == 1
    assert all(len(workers) == 1 for workers in opened.values()) and len(opened) == 3


def test_an_idle_worker_helps_where_most_is_left():
    schedule = Schedule(jobs_for(*"aabbbbbb"))
    assert schedule.next_task("one").job.template_id == "b"
    assert schedule.next_task("two").job.template_id == "a"
    schedule.done("two", FINE)
    assert schedule.next_task("two").job.template_id == "a"
    schedule.done("two", FINE)
    assert schedule.next_task("two").job.template_id == "b"


def test_a_picture_is_made_once_and_its_rows_wait_for_that():
    schedule = Schedule(jobs_for("f.png", "f.png", "f.png"))
    first = schedule.next_task("one")
    assert first.kind == "prepare" and schedule.next_task("two") is None
    assert schedule.done("one", Outcome(3.0)) == []
    assert [schedule.next_task(name).kind for name in ("two", "one")] == ["render", "render"]


def test_rows_of_a_picture_without_a_face_fail_together():
    schedule = Schedule(jobs_for("f.png", "f.png", "good"))
    for _ in range(2):
        task = schedule.next_task("one")
        settled = schedule.done("one", failure(NoFaceError("no face")) if task.kind == "prepare" else FINE)
        if task.kind == "prepare":
            assert [row.job.row for row in settled] == [1, 2]
            assert {row.outcome.error_code for row in settled} == {"no_face"}
    assert schedule.finished


def test_a_bad_row_is_not_tried_again_and_a_bad_worker_is():
    schedule = Schedule(jobs_for("a", "b"))
    first = schedule.next_task("one")
    (settled,) = schedule.done("one", failure(InputError("no sound")))
    assert settled.attempts == 1 and settled.job is first.job
    second = schedule.next_task("one")
    assert schedule.done("one", failure(DeviceError("out of memory"))) == []
    assert schedule.next_task("one") is None  # it failed here
    again = schedule.next_task("two")
    assert (again.job, again.attempt) == (second.job, 2)
    (settled,) = schedule.done("two", failure(DeviceError("out of memory")))
    assert settled.attempts == ATTEMPTS and schedule.finished and schedule.retried == 1


def test_a_worker_that_is_alone_tries_again_itself():
    schedule = Schedule(jobs_for("a"))
    schedule.next_task("one")
    schedule.done("one", failure(DeviceError("out of memory")))
    assert schedule.next_task("one", alone=True).attempt == 2


def test_what_a_dead_worker_had_goes_to_others():
    schedule = Schedule(jobs_for(*"aaa"), depth=3)
    held = [schedule.next_task("one") for _ in range(3)]
    assert schedule.next_task("one") is None  # bounded
    assert schedule.lose("one", DEATH) == []
    taken = [schedule.next_task("two") for _ in range(3)]
    assert Counter(task.job.row for task in taken) == Counter(task.job.row for task in held)
    attempts = {task.job.row: task.attempt for task in taken}
    assert attempts[held[0].job.row] == 2 and set(attempts.values()) == {1, 2}


def test_a_row_that_kills_twice_is_set_aside():
    schedule = Schedule(jobs_for("a", "b"))
    deadly = schedule.next_task("one")
    schedule.lose("one", DEATH)
    assert schedule.next_task("two").job is deadly.job
    (settled,) = schedule.lose("two", DEATH)
    assert settled.outcome is DEATH and settled.attempts == 2
    assert schedule.next_task("three").job is not deadly.job


def test_a_preparation_that_kills_twice_takes_its_rows_along():
    schedule = Schedule(jobs_for("f.png", "f.png"))
    schedule.next_task("one")
    schedule.lose("one", DEATH)
    assert schedule.next_task("two").kind == "prepare"
    assert len(schedule.lose("two", DEATH)) == 2 and schedule.finished


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_row_is_settled_once(seed):
    chance = random.Random(seed)
    names = [chance.choice(["a", "b", "c.png", "d.png", "e"]) for _ in range(60)]
    schedule, settled = Schedule(jobs_for(*names), depth=chance.choice([1, 2, 3])), Counter()
    workers, born = ["w0", "w1", "w2"], 3
    for _ in range(10_000):
        if schedule.finished:
            break
        for worker in workers:
            schedule.next_task(worker, alone=len(workers) == 1)
        worker = chance.choice(workers)
        if chance.random() < 0.1:
            rows = schedule.lose(worker, DEATH)
            workers[workers.index(worker)], born = f"w{born}", born + 1
        elif schedule.holds(worker):
            bad = chance.choice([DeviceError("x"), InputError("y")])
            rows = schedule.done(worker, failure(bad) if chance.random() < 0.1 else FINE)
        else:
            continue
        settled.update(row.job.row for row in rows)
    assert schedule.finished and settled == Counter(range(1, 61))
