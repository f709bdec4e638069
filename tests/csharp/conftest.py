"""The C# clients, compiled once, and a worker for them to call."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import REPOSITORY, EngineConfig
from musetalk.service import IntegratedMuseTalkService
from tests.conftest import PORTRAIT

HERE = Path(__file__).parent
READY = re.compile(r"http://127\.0\.0\.1:(\d+) · tcp 127\.0\.0\.1:(\d+)")
PROJECT = """<Project Sdk="Microsoft.NET.Sdk">
  <PropertyGroup><OutputType>Exe</OutputType><TargetFramework>net8.0</TargetFramework></PropertyGroup>
</Project>
"""

Client = Callable[..., list[dict[str, Any]]]


def compile_client(folder: Path) -> list[str]:
    """The command that runs the clients' driver."""
    sources = [str(path) for path in sorted(HERE.glob("*.cs"))]
    if shutil.which("mcs") and shutil.which("mono"):
        program = folder / "client.exe"
        subprocess.run(
            ["mcs", "-warnaserror+", f"-out:{program}", "-r:System.Net.Http", *sources], check=True
        )
        return ["mono", str(program)]
    if shutil.which("dotnet"):
        for source in sources:
            shutil.copy(source, folder)
        (folder / "client.csproj").write_text(PROJECT)
        subprocess.run(["dotnet", "build", "-o", str(folder / "out")], cwd=folder, check=True)
        return ["dotnet", str(folder / "out" / "client.dll")]
    pytest.skip("needs Mono's mcs and mono, or dotnet")


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Runs the driver with arguments; returns the answers that it printed."""
    command = compile_client(tmp_path_factory.mktemp("csharp"))

    def run(*arguments: object) -> list[dict[str, Any]]:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
        return [json.loads(line) for line in done.stdout.decode().splitlines()]

    return run


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


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker whose folder has a space and Chinese in its name, and in it the template `anna (2)`."""
    folder = tmp_path_factory.mktemp("工作 worker")
    config = EngineConfig(engine="lite", device="cpu")
    IntegratedMuseTalkService(folder / "cache", config=config).preprocess_template("anna (2)", PORTRAIT)
    running = start_worker(folder)
    yield running
    running.process.terminate()
    running.process.communicate(timeout=60)
