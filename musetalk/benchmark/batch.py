"""What a batch costs and survives: `python -m musetalk.benchmark.batch processes|memory|ray --out FOLDER`.

processes: the one-clip command against 1, 2, … processes on the same clips, with the bytes compared.
memory: thousands of short clips, and what the processes hold meanwhile.
ray: two nodes on this machine; an actor, a node and the driver are killed, and the batch is resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musetalk.batch.simulation import replay
from musetalk.config import REPOSITORY, EngineConfig
from musetalk.files import file_sha256, remove_file
from musetalk.media.audio import SAMPLE_RATE, read_waveform
from musetalk.service import IntegratedMuseTalkService
from musetalk.templates.store import TemplateStore
from musetalk.tools.demo import PORTRAIT, SPEECH
from musetalk.weights.files import official_paths

DEADLINE = 1800.0  # seconds
POLL = 0.05  # seconds
Row = dict[str, str]


@dataclass(frozen=True)
class Place:
    """A working folder: cache, sounds, tables, videos."""

    folder: Path

    @property
    def cache(self) -> Path:
        """The template caches."""
        return self.folder / "cache"

    def sounds(self, count: int, seconds: float) -> list[Path]:
        """Stretches of the bundled speech, as WAV files; they repeat after a while."""
        import numpy as np

        speech = np.concatenate(list(read_waveform(SPEECH)))
        n, paths = int(seconds * SAMPLE_RATE), []
        for number in range(count):
            start = number * SAMPLE_RATE // 4 % (len(speech) - n)
            paths.append(self.folder / f"sound-{seconds}-{number}.wav")
            with wave.open(str(paths[-1]), "wb") as file:
                file.setparams((1, 2, SAMPLE_RATE, n, "NONE", ""))
                file.writeframes((speech[start : start + n] * 32767).astype("<i2").tobytes())
        return paths

    def templates(self, prefix: str, count: int, config: EngineConfig) -> list[str]:
        """Templates of the bundled portrait, made once and published under many names."""
        store, names = TemplateStore(self.cache), [f"{prefix}-{number}" for number in range(count)]
        service = IntegratedMuseTalkService(self.cache, config=config)
        service.preprocess_template(names[0], PORTRAIT)
        template, metadata = store.load(names[0])
        for name in names[1:]:
            with store.lock(name):
                store.publish(name, template, {**metadata, "template_id": name})
        return names

    def table(self, name: str, rows: Sequence[Row]) -> Path:
        """Rows as CSV."""
        path = self.folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
            writer.writeheader()
            writer.writerows(rows)
        return path

    def start(self, table: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """The batch command on a table."""
        command = [sys.executable, "-m", "musetalk.batch", str(table), "--cache_dir", str(self.cache)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        log = (self.folder / f"{table.stem}.log").open("ab")
        with log:
            return subprocess.Popen(
                [*command, *arguments], stdout=subprocess.PIPE, stderr=log, env=environment, cwd=self.folder
            )

    def run(self, table: Path, *arguments: str) -> dict[str, Any]:
        """The batch command's answer."""
        with self.start(table, *arguments) as process:
            return json.loads(process.communicate()[0])

    def one_clip(self, row: Row, output: Path) -> None:
        """The one-clip command."""
        script = REPOSITORY / "integrated_musetalk_service.py"
        command = [
            sys.executable,
            str(script),
            "--inference",
            "--worker",
            "off",
            "--cache_dir",
            str(self.cache),
        ]
        command += [
            "--template_id",
            row["template"],
            "--audio_path",
            row["audio"],
            "--output_path",
            str(output),
        ]
        for name, value in row.items():
            if name not in ("template", "audio", "output") and value:
                command += [f"--{name}", value]
        subprocess.run(command, check=True, capture_output=True)


def rows_of(
    place: Place, name: str, templates: Sequence[str], sounds: Sequence[Path], count: int
) -> list[Row]:
    """Rows over all templates and sounds in turns."""
    return [
        {
            "template": templates[number % len(templates)],
            "audio": str(sounds[number % len(sounds)]),
            "output": str(place.folder / name / f"{number}.mp4"),
        }
        for number in range(count)
    ]


def measure_processes(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """The one-clip command against a growing number of processes."""
    templates = place.templates("lite", 4, EngineConfig("lite", "cpu"))
    sounds = place.sounds(options.clips, options.seconds)
    rows = rows_of(place, "serial", templates, sounds, options.clips)
    start = time.perf_counter()
    for row in rows:
        place.one_clip(row, Path(row["output"]))
    serial = time.perf_counter() - start
    told: dict[str, Any] = {
        "clips": options.clips,
        "serial_seconds": round(serial, 2),
        "load": os.getloadavg()[0],
    }
    for count in options.processes:
        name = f"processes-{count}"
        batch = rows_of(place, name, templates, sounds, options.clips)
        report = place.folder / f"{name}.json"
        start = time.perf_counter()
        table = place.table(name, batch)
        answer = place.run(table, "--processes", str(count), "--report", str(report))
        wall = time.perf_counter() - start
        again = replay(json.loads(report.read_text("utf-8")), count)
        same = sum(
            file_sha256(Path(one["output"])) == file_sha256(Path(other["output"]))
            for one, other in zip(rows, batch, strict=True)
        )
        told[name] = {
            "seconds": round(wall, 2),
            "times_serial": round(serial / wall, 2),
            "overhead_per_clip": round(between_clips(Path(f"{table}.manifest.jsonl")), 4),
            "simulated_seconds": again["seconds"],
            "answered_seconds": answer["seconds"],
            "bytes_equal": same,
            "times": answer["times"],
        }
    return told


def between_clips(manifest: Path) -> float:
    """Seconds that a worker loses from one clip's end to the next one's beginning, the median."""
    ends: dict[str, float] = {}
    lost = []
    for entry in map(json.loads, manifest.read_text("utf-8").splitlines()):
        if entry["worker"] in ends:
            lost.append(entry["time"] - ends[entry["worker"]] - entry["seconds"])
        ends[entry["worker"]] = entry["time"]
    return statistics.median(lost)


def measure_memory(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """What the processes hold while thousands of short clips go through them."""
    templates = place.templates("lite", 4, EngineConfig("lite", "cpu"))
    rows = rows_of(place, "memory", templates, place.sounds(20, options.seconds), options.clips)
    table = place.table("memory", rows)
    manifest = Path(f"{table}.manifest.jsonl")
    remove_file(manifest)
    marks = [options.clips * part // 10 for part in range(1, 10)]
    held: dict[int, float] = {}
    with place.start(table, "--processes", str(options.processes[-1])) as process:
        for mark in marks:
            wait_until(functools.partial(_has_lines, manifest, mark))
            held[mark] = round(sum(map(_resident_mb, [process.pid, *descendants(process.pid)])), 1)
        answer = json.loads(process.communicate()[0])
    return {
        "clips": answer["done"],
        "failed": answer["failed"],
        "mb_after": held,
        "seconds": answer["seconds"],
    }


def measure_ray(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """A batch through the death of an actor, of a node and of its driver."""
    from musetalk.tools.random_weights import write_random_weights

    models = official_paths(place.folder / "models", "v15")
    if not (place.folder / "models").exists():
        write_random_weights(place.folder / "models")
    lite = place.templates("lite", 18, EngineConfig("lite", "cpu"))
    full = place.templates("full", 2, EngineConfig("musetalk", "cpu", models=models))
    short, shorter = place.sounds(10, options.seconds), place.sounds(10, 0.2)
    share = options.clips // 10  # of two templates in twenty
    rows = rows_of(place, "ray", lite, short, options.clips - share)
    named = {
        name: str(value) for name, value in vars(models).items() if value is not None and name != "version"
    }
    slow = rows_of(place, "ray/musetalk", full, shorter, share)
    rows += [{**row, "engine": "musetalk", **named} for row in slow]
    table = place.table("ray", rows)
    manifest = Path(f"{table}.manifest.jsonl")
    remove_file(manifest)
    told: dict[str, Any] = {"clips": len(rows), "templates": len({*lite, *full})}
    with two_nodes() as (address, kill_second):
        arguments = ("--ray", address, "--processes", "3", "--cpus_per_actor", "1")
        process = place.start(table, *arguments)
        wait_until(functools.partial(_has_lines, manifest, len(rows) // 8))
        os.kill(actors()[0], signal.SIGKILL)
        wait_until(functools.partial(_has_lines, manifest, len(rows) // 4))
        kill_second()
        wait_until(functools.partial(_has_lines, manifest, len(rows) // 2))
        process.kill()
        process.wait()
        before = _done(manifest)
        wait_until(lambda: not actors())
        answer = place.run(table, *arguments, "--resume")
        wait_until(lambda: not actors())
        told["orphans"] = len(actors()) + sum("ffmpeg" in line for line in _commands(place.folder).values())
    done = _done(manifest)
    told |= {"done_before_the_driver_died": sum(before.values()), "answer": _brief(answer)}
    told["rendered_twice"] = sum(count - 1 for count in done.values())
    told["rows_done"] = len(done)
    told["bytes_equal"], told["of"] = _compared(place, rows)
    told["half_files"] = sum(path.name.startswith(".") for path in (place.folder / "ray").rglob("*"))
    return told


def _compared(place: Place, rows: Sequence[Row]) -> tuple[int, int]:
    """How many clips are, byte for byte, what the one-clip command makes of their row."""
    serial: dict[tuple[str, ...], str] = {}
    same = 0
    for row in rows:
        key = tuple(value for name, value in row.items() if name not in ("output", "template"))
        if key not in serial:  # all templates of an engine are the same portrait
            output = place.folder / "serial.mp4"
            place.one_clip(row, output)
            serial[key] = file_sha256(output)
        same += file_sha256(Path(row["output"])) == serial[key]
    return same, len(rows)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, Callable[[], None]]]:
    """A Ray of two nodes on this machine: its address, and what kills the second."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(True, head_node_args={"num_cpus": 2, **small})
    try:
        second = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        yield cluster.address, lambda: cluster.remove_node(second, allow_graceful=False)
    finally:
        cluster.shutdown()


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something that has to happen.

    Raises:
        TimeoutError: it doesn't.
    """
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it didn't happen in time")
        time.sleep(POLL)


def _has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def _done(manifest: Path) -> Counter[str]:
    """How often each clip was made."""
    keys: Counter[str] = Counter()
    for line in manifest.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            keys[entry["key"]] += entry["state"] == "done"
    return keys


def _brief(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: answer[name] for name in ("done", "skipped", "failed", "workers_lost", "retried", "seconds")
    }


def _commands(folder: Path | None = None) -> dict[int, str]:
    """The command lines of this machine's processes, on Linux; those that name a folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if folder is None or str(folder) in text:
                found[int(path.parent.name)] = text
    return found


def actors() -> list[int]:
    """Processes of Ray's that are workers of a batch."""
    return [pid for pid, text in _commands().items() if text.startswith("ray::ClipActor")]


def descendants(pid: int) -> list[int]:
    """Processes below one, on Linux."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def _resident_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        if "ffmpeg" not in text and (held := re.search(r"VmRSS:\s*(\d+) kB", text)):
            return int(held[1]) / 1024
    return 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m musetalk.benchmark.batch", description=__doc__)
    scenes = {"processes": measure_processes, "memory": measure_memory, "ray": measure_ray}
    parser.add_argument("scene", choices=scenes)
    parser.add_argument("--out", type=Path, required=True, help="a folder for everything that is made")
    parser.add_argument("--clips", type=int, default=0, help="(default 40, 2000 for memory, 200 for ray)")
    parser.add_argument("--seconds", type=float, default=0.0, help="of a clip (default 2, 0.3 for memory)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(argv)
    options.clips = options.clips or {"processes": 40, "memory": 2000, "ray": 200}[options.scene]
    options.seconds = options.seconds or {"processes": 2.0, "memory": 0.3, "ray": 1.0}[options.scene]
    options.out.mkdir(parents=True, exist_ok=True)
    told = scenes[options.scene](Place(options.out.absolute()), options)
    sys.stdout.write(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
