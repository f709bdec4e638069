"""The house's own rules, held by reading the code: imports point one way, scripts stay thin."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from musetalk.config import REPOSITORY

PACKAGE = REPOSITORY / "musetalk"
LAYERS = (
    ("errors",),
    ("config",),
    ("geometry", "files", "device", "pipeline", "native_messages"),
    ("announcement",),
    ("worker_client",),
    ("media", "templates", "weights", "warp"),
    ("checkpoints", "whisper"),
    ("faces",),
    ("engines", "compositor"),
    ("preprocessing", "rendering"),
    ("file_rendering", "open_templates"),
    ("measurement", "measurement_chart"),
    ("inference",),
    ("service",),
    ("server", "batch"),
    ("cli",),
    ("tools", "training"),
    ("benchmark",),
)
"""The top-level modules and packages, from the ground up: each imports only what stands below it."""
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
ONLY_WHEN_ASKED = {
    "engines/musetalk/architectures/blocks.py",
    "engines/musetalk/architectures/unet.py",
    "engines/musetalk/architectures/vae.py",
    "engines/musetalk/architectures/whisper.py",
    "engines/musetalk/networks.py",
    "engines/musetalk/openvino_runtime.py",
    "faces/bisenet.py",
    "faces/covered_mouth.py",
    "faces/mmpose_standins.py",
    "training/covers.py",
    "training/mouth_model.py",
}
"""Modules that a framework may be imported at the top of, since they are imported only to use it."""
NO_PATHS = {"parameter.output(0)", "self._waiting"}
"""What has a `replace` or `remove` of its own."""
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    """A source file's dotted name below the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer(module: str) -> int:
    top = module.split(".")[0]
    if module == f"{top}.__main__":
        return len(LAYERS)  # a program: nothing imports it, and it may import what it presents
    return next((i for i, names in enumerate(LAYERS) if top in names), -1)


def _own_imports(path: Path) -> Iterator[str]:
    modules = {_name(source) for source in SOURCES}
    for name in _imports(path):
        target = name.removeprefix("musetalk.")
        if target != name:
            while target not in modules:
                target = target.rpartition(".")[0]
            yield target


def test_every_module_has_its_place():
    tops = {_name(path).split(".")[0] for path in SOURCES} - {""}
    assert tops == {name for names in LAYERS for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    own = _name(path)
    for target in _own_imports(path):
        inside = own.split(".")[0] == target.split(".")[0]
        assert inside or _layer(target) < _layer(own), f"{own} imports {target}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_engines_and_programs_beside_the_product_know_an_engine_from_inside(path):
    if _name(path).split(".")[0] not in {"engines", "training", "tools", "benchmark"}:
        rooms = [name for name in _own_imports(path) if name.startswith(("engines.lite", "engines.musetalk"))]
        assert not rooms


def test_no_module_imports_itself_by_a_detour():
    graph = {_name(path): set(_own_imports(path)) - {_name(path), ""} for path in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_frameworks_are_imported_where_they_are_used(path):
    if path.relative_to(PACKAGE).as_posix() not in ONLY_WHEN_ASKED:
        assert not {name.split(".")[0] for name in _imports(path, top_level_only=True)} & HEAVY


def _impatient_calls(path: Path) -> Iterator[int]:
    """Lines that rename or remove without trying again where Windows says that the file is open."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, receiver = node.func.attr, ast.unparse(node.func.value)
            renames = name == "replace" and len(node.args) == 1 and not node.keywords
            moves = name in ("remove", "move") and receiver in ("os", "shutil")
            changes = renames or moves or name in ("unlink", "rename", "rmdir", "rmtree")
            if changes and receiver not in NO_PATHS:
                yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_renamed_and_removed_patiently(path):
    if path.relative_to(PACKAGE).as_posix() != "files.py":
        assert not list(_impatient_calls(path)), "use musetalk.files"


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(script):
    assert len(script.read_text("utf-8").splitlines()) <= 20
