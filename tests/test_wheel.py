"""The wheel, built and installed as pip does it, used from a folder that knows nothing of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from musetalk.config import LITE_MODELS, REPOSITORY
from musetalk.media.video import read_video
from tests.conftest import PORTRAIT, SPEECH

SOURCES = ("musetalk", "models/lite", "README.md", "LICENSE", "NOTICES.md", "pyproject.toml", "setup.py")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
QUICKLY = {"PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INDEX": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, since a build leaves its own files beside them."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools (pip install -r requirements-dev.txt)")
    folder = tmp_path_factory.mktemp("build")
    names = (path.name for pattern in ("*.py", "requirements*.txt") for path in REPOSITORY.glob(pattern))
    for name in {*SOURCES, *names}:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(REPOSITORY / name, folder / name)
    build = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".")
    subprocess.run(build, cwd=folder, check=True, env={**os.environ, **QUICKLY})
    return next((folder / "wheels").glob("enhanced_musetalk-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the wheel installed."""
    folder = tmp_path_factory.mktemp("site packages")
    install = (*PIP, "install", "--no-deps", "--no-compile", "--target", str(folder), str(wheel))
    subprocess.run(install, check=True, env={**os.environ, **QUICKLY})
    return folder


def run(installed: Path, cwd: Path, *arguments: str) -> dict[str, Any]:
    """A command of the installed package; its answer."""
    done = subprocess.run(
        [sys.executable, "-m", "integrated_musetalk_service", *arguments],
        cwd=cwd,
        env={**os.environ, **QUICKLY, "PYTHONPATH": str(installed)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_every_module_and_every_bundled_model_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "musetalk").rglob("*.py")}
    kept = [path for path in LITE_MODELS.rglob("*") if path.suffix in (".onnx", ".npy", ".jpg", ".flac")]
    assert len(kept) > 5
    models = {f"musetalk/models/lite/{path.relative_to(LITE_MODELS).as_posix()}" for path in kept}
    assert modules | models <= held
    assert {f"{path.stem}.py" for path in REPOSITORY.glob("*_*.py")} <= held
    assert not [name for name in held if name.startswith(("tests/", "setup.py"))]


def test_requirements_of_the_wheel_are_those_of_the_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    files = {path.stem.removeprefix("requirements-") for path in REPOSITORY.glob("requirements-*.txt")}
    assert {"full", "dev"} <= files
    for extra in files - {"lite", "no-deps"}:
        assert f"Provides-Extra: {extra}" in lines
    assert any(line.startswith("numpy") and "extra" not in line for line in required)
    assert any(line.startswith("torch==") and "full" in line for line in required)
    assert not any(line.startswith(("pytest", "torch")) and "extra" not in line for line in required)


def test_the_installed_package_renders_and_leaves_its_own_folder_alone(
    installed: Path, tmp_path: Path
) -> None:
    before = tree(installed)
    info = run(installed, tmp_path, "--service_info")
    assert {"name": "lite", "available": True, "reason": ""} in info["engines"]
    assert not [engine for engine in info["engines"] if str(installed) in engine["reason"]]
    template = ("--template_id", "t", "--engine", "lite")
    run(installed, tmp_path, "--preprocess", *template, "--template_image_path", str(PORTRAIT))
    answer = run(installed, tmp_path, "--inference", *template, "--audio_path", str(SPEECH))
    assert answer["frames"] == len(list(read_video(tmp_path / "output" / "t.mp4"))) == 190
    assert (tmp_path / "template_cache" / "t_preprocessed.pkl").is_file()
    assert tree(installed) == before
