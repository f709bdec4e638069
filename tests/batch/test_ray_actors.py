"""Actors on a Ray of two nodes, which this machine plays both."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from musetalk.batch.clips import ClipMaker, Setup
from musetalk.batch.crew import Done, Event, Lost, Ready, carry_out
from musetalk.batch.jobs import Job, Settings, make_jobs
from musetalk.batch.pool import CARD_BYTES
from musetalk.batch.ray_actors import Asked, RayCrew, Staff, card_share, contents_of, pack, staff_for
from musetalk.batch.schedule import Schedule, Settled, Task
from musetalk.config import EncodingConfig
from musetalk.errors import CacheMissingError
from musetalk.files import file_sha256
from musetalk.service import IntegratedMuseTalkService
from musetalk.templates.store import TemplateStore
from tests.batch.test_pool import silent

GIGABYTE = 1 << 30
TEMPLATES = ("a", "b", "小哈")
RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (requirements-ray.txt)")


def no_cards() -> list[int]:
    raise AssertionError("nobody is to be asked")


def test_actors_fill_the_cluster():
    assert staff_for(False, 8, 0, Asked(), no_cards) == Staff(8, 1.0, 0.0, 1)
    assert staff_for(False, 8, 0, Asked(3, 2.0), no_cards) == Staff(3, 2.0, 0.0, 2)
    assert staff_for(True, 8, 0, Asked(), no_cards) == Staff(4, 2.0, 0.0, None)
    assert staff_for(True, 0.5, 0, Asked(), no_cards).count == 1


def test_actors_share_cards_as_their_memory_allows():
    quarter = staff_for(True, 64, 2, Asked(), lambda: [4 * CARD_BYTES])
    assert quarter == Staff(8, 1.0, 0.25, 1)
    assert staff_for(True, 3, 2, Asked(), lambda: [4 * CARD_BYTES]).count == 3
    assert staff_for(True, 64, 2, Asked(gpus=0.5), no_cards) == Staff(4, 1.0, 0.5, 1)
    assert card_share(5, [15, 100]) == 0.34 and card_share(5, [5]) == card_share(9, [5]) == 1.0


@dataclass
class Place:
    """A Ray of two nodes and a cache folder with three templates.

    Attributes:
        second: the node that isn't the driver's.
    """

    cluster: Any
    second: Any
    cache: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    import ray
    from ray.cluster_utils import Cluster

    from musetalk.tools.demo import PORTRAIT

    cache = tmp_path_factory.mktemp("ray cache")
    service = IntegratedMuseTalkService(cache, "cpu")
    service.preprocess_template(TEMPLATES[0], PORTRAIT)
    for name in TEMPLATES[1:]:
        _copy_template(service.store, TEMPLATES[0], name)
    quick = {
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
        "health_check_initial_delay_ms": 0,
    }
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(True, head_node_args={"num_cpus": 2, "_system_config": quick, **small})
    try:
        second = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
        ray.init(cluster.address, logging_level="error", log_to_driver=False)
        yield Place(cluster, second, cache)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _copy_template(store: TemplateStore, source: str, name: str) -> None:
    template, metadata = store.load(source)
    with store.lock(name):
        store.publish(name, template, {**metadata, "template_id": name})


def jobs_in(folder: Path, audio: Path, count: int, **cells: str) -> list[Job]:
    rows = [
        {"template": TEMPLATES[i % 3], "audio": str(audio), "output": str(folder / f"{i}.mp4"), **cells}
        for i in range(count)
    ]
    jobs, refused = make_jobs(rows, Settings(encoding=EncodingConfig(threads=3)))
    assert not refused
    return jobs


def carried_out(
    crew: RayCrew, jobs: Sequence[Job], notice: Callable[[Event], None] = lambda event: None
) -> tuple[list[Settled], list[Event]]:
    settled, events = list[Settled](), list[Event]()

    def note(event: Event) -> None:
        events.append(event)
        notice(event)

    with contextlib.closing(crew):
        carry_out(Schedule(jobs, 2), crew, settled.append, note)
    return settled, events


def sums(folder: Path, count: int) -> list[str]:
    return [file_sha256(folder / f"{i}.mp4") for i in range(count)]


@RAY
def test_a_killed_actor_and_a_killed_node_cost_no_clip(place, tmp_path, write_tone):
    (place.cache / ".batch-0123456789abcdef").touch()  # of a driver that was killed
    jobs = jobs_in(tmp_path, write_tone(8000), 18)
    crew = RayCrew(Setup(place.cache), Staff(3, 1.0), silent)
    killed: list[str] = []

    def break_things(event: Event) -> None:
        if isinstance(event, Done) and not killed:
            killed.append("an actor")
            os.kill(crew.places[event.worker][1], signal.SIGKILL)
        elif isinstance(event, Lost) and len(killed) == 1:
            killed.append("a node")
            place.cluster.remove_node(place.second, allow_graceful=False)

    settled, events = carried_out(crew, jobs, break_things)
    assert killed == ["an actor", "a node"] and sum(isinstance(event, Lost) for event in events) >= 2
    assert Counter(row.job.row for row in settled) == Counter(range(1, 19))
    assert {row.outcome.frames for row in settled} == {12}, [row.outcome.message for row in settled]
    (alone,) = jobs_in(tmp_path / "serial", Path(jobs[0].audio), 1)
    outcome = ClipMaker(Setup(place.cache)).render(alone)
    assert {*sums(tmp_path, 18)} == {outcome.sha256}
    assert not [path for path in place.cache.iterdir() if path.name.startswith(".batch-")]
    place.second = place.cluster.add_node(num_cpus=2, object_store_memory=80 << 20)


@RAY
def test_nodes_that_share_no_disks_get_what_they_need_and_send_the_clip_back(place, tmp_path, write_tone):
    import ray

    from musetalk.tools.demo import PORTRAIT

    audio = write_tone(8000)
    jobs = jobs_in(tmp_path / "out", audio, 4)
    jobs += jobs_in(tmp_path / "made", audio, 2, template=str(PORTRAIT))
    jobs += jobs_in(tmp_path / "none", audio, 1, template="nobody")
    settled, events = carried_out(RayCrew(Setup(place.cache), Staff(2, 1.0), silent, shared=False), jobs)
    failed = [row for row in settled if row.outcome.failed]
    assert [(row.job.template_id, row.outcome.error_code) for row in failed] == [("nobody", "cache_missing")]
    (alone,) = jobs_in(tmp_path / "serial", audio, 1)
    outcome = ClipMaker(Setup(place.cache)).render(alone)
    assert {*sums(tmp_path / "out", 4), *sums(tmp_path / "made", 2)} == {outcome.sha256}
    assert all(row.outcome.sha256 == outcome.sha256 for row in settled if row not in failed)
    assert sorted(TemplateStore(place.cache).template_ids()) == sorted(TEMPLATES)  # made over there
    assert [type(event) for event in events if not isinstance(event, Done)] == [Ready, Ready]
    assert ray.is_initialized()


@RAY
def test_what_is_under_way_is_dropped_without_a_trace(place, tmp_path, write_tone):
    (job,) = jobs_in(tmp_path / "out", write_tone(16_000 * 120), 1)
    crew = RayCrew(Setup(place.cache), Staff(1, 1.0), silent)

    def interrupt(event: Event) -> None:
        if isinstance(event, Ready):
            crew.send(event.worker, Task("render", job))
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("out/.0.*")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carried_out(crew, [job], interrupt)
    assert list((tmp_path / "out").iterdir()) == []


@RAY
def test_a_signal_ends_the_command_cleanly_and_it_goes_on(place, tmp_path, write_tone):
    jobs = jobs_in(tmp_path / "out", write_tone(16_000 * 20), 4)
    table = tmp_path / "jobs.jsonl"
    rows = [{"template": job.template_id, "audio": job.audio, "output": job.output} for job in jobs]
    table.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    command = [sys.executable, "-m", "musetalk.batch", str(table), "--cache_dir", str(place.cache)]
    command += ["--ray", place.cluster.address, "--processes", "1", "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    manifest = Path(f"{table}.manifest.jsonl")
    deadline = time.monotonic() + 60
    while not manifest.exists() or not manifest.read_bytes():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    answer = json.loads(out)
    assert (process.returncode, answer["error_code"]) == (143, "interrupted"), errors.decode()
    assert not list(place.cache.glob(".batch-*")) and not list(tmp_path.glob("out/.*"))
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    again = json.loads(done.stdout)
    assert done.returncode == 0 and again["skipped"] == answer["done"] >= 1, done.stderr.decode()
    assert again["skipped"] + again["done"] == 4


def test_a_file_that_cannot_be_read_costs_its_row_and_not_the_batch(tmp_path, monkeypatch):
    good, locked, read = tmp_path / "good.wav", tmp_path / "locked.wav", Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for path in (good, locked):
        path.write_bytes(b"sound")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    places = [str(good), str(locked), str(tmp_path), str(tmp_path / "none.wav"), "s3://bucket/a.wav"]
    assert contents_of(places) == {str(good): b"sound"}


def test_a_template_that_is_missing_cannot_travel(tmp_path):
    with pytest.raises(CacheMissingError):
        pack(TemplateStore(tmp_path), "nobody")
