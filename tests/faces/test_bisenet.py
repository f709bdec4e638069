"""BiSeNet against the reference's goldens, for weights that are filled by rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from musetalk.errors import WeightsError
from musetalk.faces.base import Face

torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")

from musetalk.faces.bisenet import BisenetLabelMapper, load_bisenet, parse  # noqa: E402

DATA = Path(__file__).parent.parent / "data"
SHAPES: dict[str, list[int]] = json.loads((DATA / "bisenet_keys.json").read_text())
GOLDENS = np.load(DATA / "bisenet.npz")


def _filled(key: str, shape: list[int]) -> np.ndarray:
    """The golden's weights: seeded by the key's name, scaled by what the key is."""
    random = np.random.RandomState(crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (1 + 0.1 * random.rand(*shape)).astype(np.float32)
    if len(shape) == 4:
        return (random.randn(*shape) * math.sqrt(2 / math.prod(shape[1:]))).astype(np.float32)
    offset = 1.0 if key.endswith("weight") else 0.0
    return (offset + 0.1 * random.randn(*shape)).astype(np.float32)


@pytest.fixture(scope="module")
def state() -> dict:
    return {key: torch.from_numpy(np.asarray(_filled(key, shape))) for key, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def weights(state: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bisenet") / "79999_iter.pth"
    torch.save(state, path)
    return path


def test_logits_and_labels_equal_the_reference(weights: Path) -> None:
    logits = parse(load_bisenet(weights, "cpu"), GOLDENS["image_rgb"])
    np.testing.assert_allclose(logits[:, ::32, ::32], GOLDENS["logits_16"], atol=1e-3)
    assert (logits.argmax(axis=0) == GOLDENS["labels"]).mean() >= 0.999


def test_the_mapper_parses_the_crop_as_rgb(weights: Path) -> None:
    image = GOLDENS["image_rgb"]
    frame = np.pad(image[:, :, ::-1], ((7, 9), (5, 3), (0, 0)))
    face = Face(np.zeros((68, 2), np.float32), (0, 0, 1, 1))
    label_map = BisenetLabelMapper(weights, "cpu").label_map(frame, face, (5, 7, 517, 519))
    assert label_map.dtype == np.uint8
    assert (label_map == GOLDENS["labels"]).mean() >= 0.999


def test_the_older_file_format_loads(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "79999_iter.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    loaded = load_bisenet(path, "cpu").state_dict()
    assert loaded.keys() >= state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ffm.conv1.weight": None}, "missing ffm.conv1.weight"),
        ({"head.weight": torch.zeros(3)}, "extra head.weight"),
        ({"ffm.conv1.weight": torch.zeros(64, 256, 3, 3)}, "shape ffm.conv1.weight (64, 256, 3, 3)"),
    ],
)
def test_a_checkpoint_of_another_network_is_named(
    state: dict, tmp_path: Path, change: dict, named: str
) -> None:
    path = tmp_path / "79999_iter.pth"
    torch.save({key: value for key, value in {**state, **change}.items() if value is not None}, path)
    with pytest.raises(WeightsError, match="79999_iter") as caught:
        load_bisenet(path, "cpu")
    assert named in caught.value.message
    assert "musetalk.weights download" in caught.value.hint


class _Hostile:
    """Pickles as a call that would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "79999_iter.pth", tmp_path / "trace"
    for zipped in (True, False):
        torch.save({"state_dict": _Hostile(trace)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError):
            load_bisenet(path, "cpu")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"PK\x03\x04 cut off"])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "79999_iter.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="79999_iter"):
        load_bisenet(path, "cpu")


def test_a_truncated_checkpoint(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "79999_iter.pth"
    path.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match="79999_iter"):
        load_bisenet(path, "cpu")


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="79999_iter"):
        load_bisenet(tmp_path / "79999_iter.pth", "cpu")
