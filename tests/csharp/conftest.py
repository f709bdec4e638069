"""The C# clients, compiled once."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
