"""The C# clients, compiled once, and a worker for them to call."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import EngineConfig
from musetalk.service import IntegratedMuseTalkService
from tests.conftest import PORTRAIT
from tests.running_worker import RunningWorker, start_worker

HERE = Path(__file__).parent
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
