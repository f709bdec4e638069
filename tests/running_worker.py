"""A resident worker as a process of its own, for the tests that call one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from musetalk.config import REPOSITORY

READY = re.compile(r"http://127\.0\.0\.1:(\d+) · tcp 127\.0\.0\.1:(\d+)")


@dataclass
class RunningWorker:
    """A worker of a test's own: its process, its ports and its folder."""

    process: subprocess.Popen[bytes]
    folder: Path
    http_port: int
    tcp_port: int

    @property
    def address(self) -> str:
        """Where HTTP is."""
        return f"http://127.0.0.1:{self.http_port}"


def start_worker(folder: Path, *arguments: str) -> RunningWorker:
    """A worker on free ports, ready to serve."""
    command = [sys.executable, str(REPOSITORY / "integrated_musetalk_service.py"), "--serve"]
    command += ["--engine", "lite", "--device", "cpu", "--max_sessions", "8"]
    command += ["--http_port", "0", "--port", "0", "--cache_dir", str(folder / "cache"), *arguments]
    environment = {**os.environ, "MUSE_VIDEOS_DIR": str(folder / "videos")}
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )
        assert process.stderr is not None
        for line in process.stderr:
            log.write(line)
            if found := READY.search(line.decode("utf-8")):
                return RunningWorker(process, folder, int(found[1]), int(found[2]))
    raise AssertionError(f"the worker ended: {(folder / 'worker.log').read_text('utf-8')}")
