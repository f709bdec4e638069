"""Jobs in one process: what full disks, dead workers, stuck encoders and hasty callers leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from musetalk.config import EncodingConfig, EngineConfig, PreprocessingConfig, ServerConfig
from musetalk.errors import BusyError, ClientLimitError, OutputError
from musetalk.server import serve
from musetalk.server.clients import Clients
from musetalk.server.jobs import MARKS_FOLDER, RECORD, Asked, ElsewhereError, Jobs, _owner_lock
from musetalk.server.line import Turn
from musetalk.server.videos import videos_router
from musetalk.server.worker import Worker
from musetalk.templates.store import TemplateStore

LONG_AGO = 1_000_000_000  # seconds since 1970


class IdleWorker:
    """A worker that never gets round to anything until it is told to."""

    most_work = 2

    def __init__(self, folder: Path, **limits: float):
        self.server = ServerConfig(videos_dir=folder, **limits)
        self.service = SimpleNamespace(store=TemplateStore(folder / "cache"))
        self.clients = Clients(self.server)
        self.folders = (self.service.store.cache_dir, folder)
        self.promised = 0
        self.turn, self.done = threading.Event(), threading.Event()
        self.stopping = False
        self.left: list[Turn] = []
        self.line = self

    def promise(self, cancel):
        if self.stopping:
            raise BusyError("the worker is being stopped", "")
        self.promised += 1
        return Turn(cancel, math.inf)

    def leave(self, turn):
        self.left.append(turn)

    @contextlib.contextmanager
    def in_turn(self, turn):
        self.turn.wait()
        try:
            yield
        finally:
            self.done.set()


@pytest.fixture
def worker(tmp_path):
    worker = IdleWorker(tmp_path)
    yield worker
    worker.turn.set()


def asked(jobs: Jobs, template_id: str = "anna", portrait: Path | None = None) -> Asked:
    folder = jobs.new_folder()
    return Asked(
        folder,
        folder / "a.wav",
        portrait,
        template_id,
        "25",
        1.0,
        PreprocessingConfig(),
        EncodingConfig(),
        "d",
    )


def recorded(jobs: Jobs, job_id: str) -> str:
    return json.loads((jobs.folder / job_id / RECORD).read_text())["status"]


def made_template(store: TemplateStore, template_id: str) -> Path:
    """A template's metadata, as old as can be."""
    store.cache_dir.mkdir(exist_ok=True)
    path = store.metadata_path(template_id)
    path.write_text("{}")
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def test_only_templates_that_jobs_made_and_no_job_uses_are_swept(worker, tmp_path):
    jobs, store = Jobs(worker, tmp_path / "jobs"), worker.service.store
    names = {
        kind: f"portrait-{letter * 20}" for kind, letter in zip(("old", "used", "own"), "abc", strict=True)
    }
    paths = {kind: made_template(store, name) for kind, name in names.items()}
    paths["named"] = made_template(store, "portrait-anna")
    job, _ = jobs.submit(asked(jobs, names["used"], tmp_path / "face.png"))
    (jobs.folder / MARKS_FOLDER / names["old"]).touch()
    (jobs.folder / MARKS_FOLDER / "portrait-anna").touch()
    for mark in (jobs.folder / MARKS_FOLDER).iterdir():
        os.utime(mark, (LONG_AGO, LONG_AGO))
    jobs.sweep()
    assert {kind for kind, path in paths.items() if path.exists()} == {"used", "own", "named"}
    jobs.remove(job.id)
    jobs.submit(asked(jobs, names["used"]))
    assert (jobs.folder / MARKS_FOLDER / names["used"]).stat().st_mtime > LONG_AGO


def test_jobs_that_run_at_once_are_spread_over_devices(tmp_path):
    config = ServerConfig(videos_dir=tmp_path)
    worker = Worker(tmp_path, EngineConfig(device="cpu"), config, ("cpu", "cpu"))
    jobs, places, both = Jobs(worker, tmp_path / "jobs"), [], threading.Barrier(2)

    def write(running, place, clock):
        places.append(place)
        both.wait(60)

    jobs._write = write
    submitted = [jobs.submit(asked(jobs))[0] for _ in range(2)]
    for running in [jobs.running(job.id) for job in submitted]:
        assert running is None or running.over.wait(60)
    assert [job.status for job in submitted] == ["completed", "completed"]
    assert places[0] is not places[1] and all(place.load == 0 for place in places)
    worker.close()


def test_a_job_whose_worker_died_is_ended_by_the_next_sweep(worker, tmp_path):
    jobs, other = Jobs(worker, tmp_path / "jobs"), Jobs(IdleWorker(tmp_path), tmp_path / "jobs")
    job, _ = other.submit(asked(other))
    jobs.sweep()
    assert recorded(jobs, job.id) == "queued", "its worker lives"
    with pytest.raises(ElsewhereError):
        jobs.remove(job.id)
    other._running[job.id].owner.release()
    jobs.sweep()
    assert recorded(jobs, job.id) == "failed" and jobs.get(job.id).error["code"] == "worker_lost"


def test_a_job_that_ended_while_it_was_looked_at_keeps_its_end(worker, tmp_path, monkeypatch):
    jobs = Jobs(worker, tmp_path / "jobs")
    job, _ = jobs.submit(asked(jobs))
    running = jobs._running.pop(job.id)
    stale = Jobs.newest_first(jobs)
    jobs._end(running.job, "completed", None)
    running.owner.release()
    monkeypatch.setattr(Jobs, "newest_first", lambda self: stale)
    Jobs(worker, jobs.folder).sweep()
    assert recorded(jobs, job.id) == "completed"


@pytest.mark.parametrize("stopping", [False, True])
def test_a_job_that_cannot_be_kept_leaves_no_promise_and_no_lock(worker, tmp_path, monkeypatch, stopping):
    jobs, wanted = Jobs(worker, tmp_path / "jobs"), None
    wanted, worker.stopping = asked(jobs), stopping

    def full(self, job):
        raise OutputError("the disk is full", "")

    if not stopping:
        monkeypatch.setattr(Jobs, "_save", full)
    with pytest.raises((OutputError, BusyError)):
        jobs.submit(wanted)
    assert (worker.promised, jobs.open_count) == (0, 0)
    with _owner_lock(wanted.folder).acquire(timeout=0):
        pass


class StuckWriter:
    """An encoder that takes nothing until it is aborted."""

    def __init__(self, *_, **__):
        self.frame_count = 1
        self.begun, self.aborted = threading.Event(), threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, i420):
        self.begun.set()
        self.aborted.wait(60)
        raise OutputError("the encoder ended early", "")

    def fragments(self):
        self.aborted.wait(60)
        return iter(())

    def abort(self):
        self.aborted.set()


def test_the_deadline_frees_the_slot_of_a_job_whose_encoder_is_stuck(worker, tmp_path):
    jobs = Jobs(worker, tmp_path / "jobs")
    writer, threads = StuckWriter(), threading.active_count()

    def render(running):
        with jobs._pumped(running, writer):
            writer.write(None)

    jobs._render = render
    job, _ = jobs.submit(asked(jobs))
    worker.turn.set()
    assert writer.begun.wait(60)
    jobs.running(job.id).turn.deadline = 0
    jobs.end_overdue()
    assert worker.done.wait(60) and writer.aborted.is_set()
    for thread in threading.enumerate():
        if thread.name == job.id:
            thread.join()
    assert job.error["code"] == "deadline" and jobs.open_count == 0
    assert threading.active_count() == threads, "the pump has ended too"


@pytest.mark.parametrize("end", ["remove", "end_overdue"])
def test_a_job_that_is_stuck_anywhere_frees_its_turn_and_counts_no_more(worker, tmp_path, end):
    """Its thread may be deep in a native call that nothing ends."""
    jobs, begun = Jobs(worker, tmp_path / "jobs"), threading.Event()
    jobs._render = lambda running: begun.set() or worker.unstick.wait(60)
    worker.unstick = threading.Event()
    job, _ = jobs.submit(asked(jobs))
    worker.turn.set()
    assert begun.wait(60)
    jobs.running(job.id).turn.deadline = 0
    jobs.remove(job.id) if end == "remove" else jobs.end_overdue()
    assert len(worker.left) == 1 and jobs.open_count == 0
    assert jobs.remove(job.id) is True, "and can be removed, though its thread may still write"
    (jobs.folder / job.id / "late").touch()
    assert jobs.get(job.id) is None
    worker.unstick.set()
    for thread in threading.enumerate():
        if thread.name == job.id:
            thread.join()
    assert not (jobs.folder / job.id).exists()


def test_a_clock_that_is_set_forward_ends_no_job(worker, tmp_path, monkeypatch):
    jobs = Jobs(worker, tmp_path / "jobs")
    job, _ = jobs.submit(asked(jobs))
    monkeypatch.setattr("musetalk.server.jobs.time.time", lambda: job.deadline + 10**6)
    jobs.end_overdue()
    assert not job.final


def test_a_client_has_as_many_jobs_as_he_may_and_others_have_theirs(tmp_path):
    worker = IdleWorker(tmp_path, client_jobs=2)
    jobs = Jobs(worker, tmp_path / "jobs")
    first = [jobs.submit(dataclasses.replace(asked(jobs), client="a"))[0] for _ in range(2)]
    with pytest.raises(ClientLimitError):
        jobs.submit(dataclasses.replace(asked(jobs), client="a"))
    jobs.submit(dataclasses.replace(asked(jobs), client="b"))
    jobs.remove(first[0].id)
    jobs.submit(dataclasses.replace(asked(jobs), client="a"))
    worker.turn.set()


def test_what_a_job_failed_of_names_no_folder_of_this_machine(worker, tmp_path):
    jobs = Jobs(worker, tmp_path / "jobs")
    cache = worker.service.store.cache_dir

    def fail(running):
        raise OutputError(f"{running.audio} can't be read", f"looked in {cache}, not in {cache}/x")

    jobs._render = fail
    job, _ = jobs.submit(asked(jobs))
    worker.turn.set()
    assert worker.done.wait(60)
    while not job.final:
        pass
    assert job.error == {
        "code": "output",
        "message": "a.wav can't be read",
        "hint": "looked in cache, not in x",
    }


@pytest.mark.parametrize("end", ["remove", "end_overdue"])
def test_a_job_that_is_stopped_cannot_end_as_completed(worker, tmp_path, end):
    jobs = Jobs(worker, tmp_path / "jobs")
    job, _ = jobs.submit(asked(jobs))
    running = jobs.running(job.id)

    class Racing(threading.Event):
        """The job's thread, which sees that it is stopped before anything else is done."""

        def set(self):
            super().set()
            jobs._end(job, "completed", None)

    running.cancel = Racing()
    running.turn.deadline = 0
    jobs.remove(job.id) if end == "remove" else jobs.end_overdue()
    assert job.status == {"remove": "cancelled", "end_overdue": "failed"}[end]


def test_files_that_vanish_meanwhile_do_not_end_a_sweep(worker, tmp_path, monkeypatch):
    jobs = Jobs(worker, tmp_path / "jobs")
    job, _ = jobs.submit(asked(jobs))
    jobs.remove(job.id)
    (jobs.folder / job.id / "gone").symlink_to(tmp_path / "nowhere")
    jobs.sweep()
    assert jobs.get(job.id) is not None


def test_housekeeping_goes_on_after_a_round_that_failed(monkeypatch):
    monkeypatch.setattr(serve, "HOUSEKEEPING_SECONDS", 0)
    asyncio = serve.asyncio

    async def kept() -> tuple[int, int]:
        loop, enough = asyncio.get_running_loop(), asyncio.Event()
        rounds = {"sweeps": 0, "deadlines": 0}

        def count(kind):
            rounds[kind] += 1
            if min(rounds.values()) >= 1 and rounds["sweeps"] >= 2:
                loop.call_soon_threadsafe(enough.set)
            raise FileNotFoundError("it vanished")

        callers = SimpleNamespace(keep_house=lambda: count("sweeps"), end_overdue=lambda: count("deadlines"))
        task = asyncio.create_task(serve.keep_house(callers))
        waiting = asyncio.create_task(enough.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for left in (task, waiting):
            left.cancel()
        return rounds["sweeps"], rounds["deadlines"]

    sweeps, deadlines = asyncio.run(kept())
    assert sweeps >= 2 and deadlines >= 1


@pytest.mark.parametrize(("failure", "status"), [(KeyError("gone"), 404), (ElsewhereError("busy"), 409)])
def test_a_job_that_cannot_be_removed_here_is_told_as_such(worker, tmp_path, monkeypatch, failure, status):
    jobs = Jobs(worker, tmp_path / "jobs")
    job, _ = jobs.submit(asked(jobs))

    def remove(self, job_id):
        raise failure

    monkeypatch.setattr(Jobs, "remove", remove)
    app = FastAPI()
    app.include_router(videos_router(worker, jobs))
    assert TestClient(app).delete(f"/v1/videos/{job.id}").status_code == status
