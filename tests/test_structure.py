"""The house's own rules, held by reading the code: imports point one way, scripts stay thin."""

from __future__ import annotations

import ast

import pytest

from musetalk.config import REPOSITORY

PACKAGE = REPOSITORY / "musetalk"
LAYERS = (
    {"errors", "config", "files", "geometry", "device", "pipeline"},
    {
        "template",
        "store",
        "template_pickle",
        "legacy_tensors",
        "media",
        "whisper",
        "faces",
        "engines",
        "compositor",
    }
    | {"weights"},
    {"preprocessing", "template_source", "inference", "measurement", "benchmark_chart"},
    {"service"},
    {"contact_sheet"},
    {"cli"},
    {"benchmark", "benchmark_scene", "benchmark_plain", "demo"},
)
HEAVY = {
    "torch",
    "cv2",
    "mediapipe",
    "transformers",
    "diffusers",
    "onnxruntime",
    "openvino",
    "PIL",
    "matplotlib",
}


def module_of(path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, *, top_level_only: bool = False):
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int | None:
    return next((i for i, modules in enumerate(LAYERS) if module in modules), None)


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    own = layer(module_of(path))
    if own is None:
        return
    for name in imports(path):
        if name.startswith("musetalk."):
            target = layer(name.split(".")[1])
            assert target is None or target <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_frameworks_are_imported_where_they_are_used(path):
    only_when_asked = {
        "networks.py",
        "bisenet.py",
        "mmpose_standins.py",
        "openvino_runtime.py",
        "mouth_model.py",
    }
    if path.name not in only_when_asked:
        assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(script):
    assert len(script.read_text("utf-8").splitlines()) <= 20
