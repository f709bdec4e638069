"""The command as a person runs it, against the command that makes one clip."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from musetalk.batch.__main__ import batch_main
from musetalk.cli import execute
from musetalk.config import REPOSITORY
from musetalk.files import file_sha256
from musetalk.media.video import read_video
from musetalk.service import IntegratedMuseTalkService
from musetalk.tools.demo import PORTRAIT

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
DEADLINE = 60.0  # seconds


@dataclass
class Batch:
    """A working directory with the template `小哈`, a sound and the table `jobs.csv`."""

    folder: Path
    audio: Path

    def table(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = [{"template": "小哈", "audio": str(self.audio), **row} for row in rows]
        names = list(dict.fromkeys(name for row in rows for name in row))
        with (self.folder / "jobs.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def start(self, *arguments: str, stdin: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "musetalk.batch", *arguments, "--cache_dir", "cache"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=stdin, stdout=pipe, stderr=pipe
        )

    def run(self, *arguments: str, text: str | None = None) -> tuple[int, dict[str, Any], str]:
        """Exit code, answer and stderr."""
        process = self.start(*arguments, stdin=None if text is None else subprocess.PIPE)
        out, errors = process.communicate(None if text is None else text.encode(), timeout=120)
        return process.returncode, json.loads(out), errors.decode()

    def entries(self, name: str = "jobs.csv") -> list[dict[str, Any]]:
        lines = (self.folder / f"{name}.manifest.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def wait_for_entries(self, count: int) -> None:
        path, deadline = self.folder / "jobs.csv.manifest.jsonl", time.monotonic() + DEADLINE
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    IntegratedMuseTalkService(folder, "cpu").preprocess_template("小哈", PORTRAIT)
    return folder


@pytest.fixture
def batch(tmp_path, cache, write_tone) -> Batch:
    folder = tmp_path / "批 量 (x)"
    folder.mkdir()
    (folder / "cache").symlink_to(cache)
    return Batch(folder, write_tone(8_000))


def serial(batch: Batch, output: str, *arguments: str) -> Path:
    """The clip that the one-clip command makes."""
    script = REPOSITORY / "integrated_musetalk_service.py"
    command = [sys.executable, str(script), "--inference", "--template_id", "小哈", "--worker", "off"]
    command += ["--cache_dir", "cache", "--audio_path", str(batch.audio), "--output_path", output]
    subprocess.run([*command, *arguments], cwd=batch.folder, check=True, capture_output=True)
    return batch.folder / output


def test_clips_are_those_of_the_command_and_bad_rows_are_set_aside(batch):
    rows = [{"output": "1.mp4"}, {"output": "2.mp4", "crf": "30"}, {"output": "3.mp4", "audio": "no.wav"}]
    rows += [{"output": "4.mp4", "template": "nobody"}, {"output": "5.mp4", "crf": "99"}]
    rows += [{"output": f"deep/{name}.mp4", "template": str(PORTRAIT), "fps": "30"} for name in "67"]
    batch.table(rows)
    code, answer, errors = batch.run("jobs.csv", "--processes", "2", "--report", "r.json")
    assert (code, answer["success"], answer["error_code"]) == (3, False, "bad_input")
    assert (answer["rows"], answer["done"], answer["failed"], answer["workers"]) == (7, 4, 3, 2)
    codes = {row["row"]: row["error_code"] for row in answer["failures"]}
    assert codes == {3: "bad_input", 4: "cache_missing", 5: "bad_input"}
    assert all(row["message"] in errors and row["hint"] in errors for row in answer["failures"])
    same = {
        "1.mp4": ("serial.mp4",),
        "2.mp4": ("crisp.mp4", "--crf", "30"),
        "deep/6.mp4": ("30.mp4", "--fps", "30"),
    }
    for name, arguments in same.items():
        assert file_sha256(batch.folder / name) == file_sha256(serial(batch, *arguments))
    assert file_sha256(batch.folder / "deep/7.mp4") == file_sha256(batch.folder / "deep/6.mp4")
    report = json.loads((batch.folder / "r.json").read_text("utf-8"))
    assert [entry["row"] for entry in report["entries"]] == list(range(1, 8))
    assert len({entry["template_id"] for entry in report["entries"][5:]}) == 1


def test_resume_leaves_out_what_is_done_and_whole(batch):
    batch.table([{"output": f"{i}.mp4"} for i in range(3)])
    code, answer, _ = batch.run("jobs.csv", "--processes", "1")
    assert code == 0 and answer["success"] and answer["done"] == 3
    (batch.folder / "1.mp4").write_bytes(b"cut")
    batch.table([{"output": f"{i}.mp4", "crf": crf} for i, crf in enumerate(["", "", "40", ""])])
    code, answer, _ = batch.run("jobs.csv", "--processes", "1", "--resume")
    assert code == 0 and (answer["skipped"], answer["done"]) == (1, 3)
    assert Counter(Path(entry["output"]).name for entry in batch.entries()) == {
        **{"0.mp4": 1, "1.mp4": 2, "2.mp4": 2, "3.mp4": 1}
    }
    assert batch.run("jobs.csv", "--resume")[1]["skipped"] == 4


def test_rows_come_from_standard_input(batch):
    row = {"template": "小哈", "audio": batch.audio.as_uri(), "output": (batch.folder / "o.mov").as_uri()}
    code, answer, errors = batch.run("-", text=json.dumps(row))
    assert code == 0 and answer["workers"] == 1, errors
    assert len(list(read_video(batch.folder / "o.mov"))) == answer["frames"] == 12
    assert (batch.folder / "o.mov").stat().st_size == batch.entries("batch")[0]["size"]


def test_rows_reach_other_file_systems(batch, tmp_path):
    pytest.importorskip("fsspec", reason="needs fsspec (requirements-remote.txt)")
    far = tmp_path / "far"
    row = {"template": "小哈", "audio": f"local://{batch.audio}", "output": f"local://{far}/o.mp4"}
    code, _, errors = batch.run("-", "--resume", text=json.dumps(row))
    assert code == 0 and [path.name for path in far.iterdir()] == ["o.mp4"], errors
    assert batch.run("-", "--resume", text=json.dumps(row))[1]["skipped"] == 1
    assert file_sha256(far / "o.mp4") == file_sha256(serial(batch, "serial.mp4"))


@pytest.mark.parametrize("text", ["template,audio,output,fsp\nt,a,o,25", "", "template,audio,output\n"])
def test_a_table_that_cannot_be_meant_starts_nothing(tmp_path, text):
    table = tmp_path / "jobs.csv"
    table.write_text(text, "utf-8")
    answer, code = execute(batch_main, [str(table)])
    assert (code, answer["error_code"]) == (3, "bad_input") and answer["hint"]
    assert list(tmp_path.iterdir()) == [table]


def test_usage_is_explained(tmp_path):
    answer, code = execute(batch_main, ["jobs.csv", "--processes", "none"])
    assert (code, answer["error_code"]) == (2, "usage")
    answer, code = execute(batch_main, [str(tmp_path / "nothing.csv")])
    assert code == 3 and "nothing.csv" in answer["message"]


def children(pid: int) -> list[int]:
    """Processes below one, on Linux."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = (
                int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if folder.name.isdigit()
                else 0
            )
        except OSError:
            continue
        if parent == pid:
            found += [int(folder.name), *children(int(folder.name))]
    return found


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


@POSIX
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_batch_leaves_no_process_and_no_half_file_and_goes_on(batch, number):
    batch.table([{"output": f"out/{i}.mp4"} for i in range(8)])
    process = batch.start("jobs.csv", "--processes", "2")
    batch.wait_for_entries(1)
    below = children(process.pid)
    assert len(below) >= 2
    process.send_signal(number)
    out, _ = process.communicate(timeout=DEADLINE)
    wait_for_end(below)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number
        answer = json.loads(out)
        assert answer["error_code"] == "interrupted" and "--resume" in answer["hint"]
    assert all(path.suffix == ".mp4" and path.name[0] != "." for path in (batch.folder / "out").iterdir())
    done = len(batch.entries())
    assert 1 <= done < 8
    code, answer, errors = batch.run("jobs.csv", "--processes", "2", "--resume")
    assert code == 0 and (answer["skipped"], answer["done"]) == (done, 8 - done), errors
    assert Counter(entry["row"] for entry in batch.entries()) == Counter(range(1, 9))
    assert len({file_sha256(batch.folder / f"out/{i}.mp4") for i in range(8)}) == 1
