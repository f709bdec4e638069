"""Weight files: read whatever their form, parameters bit for bit the file's, and nothing in them run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk import checkpoints
from musetalk.errors import DeviceError, WeightsError
from tests.engines.conftest import NEEDS_FULL

torch = pytest.importorskip("torch", reason=NEEDS_FULL)
pytest.importorskip("safetensors", reason=NEEDS_FULL)

from safetensors.torch import save_file  # noqa: E402

from musetalk.engines.musetalk.networks import Network  # noqa: E402

SIDE = 300  # a layer of 360 kB: whole pages lie inside each tensor
LAYERS = 4


def _layers() -> Any:
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))


def _tensors(dtype: Any, tied: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(SIDE, SIDE, generator=generator).to(dtype) for _ in range(LAYERS)]
    return {f"{i}.weight": made[0 if tied else i] for i in range(LAYERS)}


def _save(tensors: dict[str, Any], form: str, folder: Path) -> Path:
    if form == "safetensors":
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "net.safetensors")
        return folder / "net.safetensors"
    torch.save(tensors, folder / "net.pth", _use_new_zipfile_serialization=form == "zip")
    return folder / "net.pth"


def _checksums(module: Any) -> dict[str, float]:
    return {key: tensor.double().sum().item() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("form", ["safetensors", "zip", "older"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("running", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("retried", [False, True], ids=["at once", "retried"])
def test_loaded_parameters_are_the_files(
    tmp_path: Path, form: str, stored: str, running: str, tied: bool, retried: bool
) -> None:
    tensors = _tensors(getattr(torch, stored), tied)
    expected = {key: t.to(getattr(torch, running)).double().sum().item() for key, t in tensors.items()}
    path = _save(tensors, form, tmp_path)
    failures = [RuntimeError("interrupted")] if retried else []

    def prepare(_module: object) -> None:
        if failures:
            raise failures.pop()

    network = Network(_layers(), lambda: checkpoints.read_tensors(path), prepare)
    if retried:
        with pytest.raises(RuntimeError, match="interrupted"):
            network.load("cpu", running)
    assert _checksums(network.load("cpu", running)) == expected


def test_a_training_checkpoints_other_objects_stay_inert(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"state_dict": _tensors(torch.float32, False), "progress": Fraction(1, 3)}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert checkpoints.read_tensors(path).keys() == {f"{i}.weight" for i in range(LAYERS)}


def test_memory_that_is_missing_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(_tensors(torch.float32, False), "older", tmp_path)

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(DeviceError) as error:
        checkpoints.read_tensors(path)
    assert error.value.exit_code == 5 and "减少batch_size或启用fp16" in error.value.hint


def test_whole_numbers_are_no_weights() -> None:
    with pytest.raises(WeightsError, match=r"shape weight .* of whole numbers instead of"):
        checkpoints.check_keys(
            torch.nn.Linear(2, 2, bias=False),
            {"weight": torch.ones(2, 2, dtype=torch.int64)},
            Path("net.pth"),
        )


class Code:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


def _in_archive(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"conv_in.weight": torch.zeros(2)}, buffer)
    changed = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
    return changed.getvalue()


BAD_CHECKPOINTS: dict[str, tuple[Callable[[bytes, Path], bytes], str]] = {
    "code": (lambda _good, marker: pickle.dumps(Code(marker), protocol=2), "code"),
    "code in an archive": (lambda _good, marker: _in_archive(pickle.dumps(Code(marker), protocol=2)), "code"),
    "truncated": (lambda good, _marker: good[: len(good) // 2], "damaged"),
    "web page": (lambda _good, _marker: b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    "empty": (lambda _good, _marker: b"", "empty"),
    "noise": (lambda _good, _marker: np.random.RandomState(1).bytes(5000), "no checkpoint"),
    "code of another protocol": (
        lambda _good, marker: pickle.dumps(Code(marker), protocol=4),
        "nothing in it was run",
    ),
    "no tensors": (lambda _good, _marker: _in_archive(pickle.dumps([1, 2], protocol=2)), "named tensors"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_named_and_nothing_in_it_runs(tmp_path: Path, kind: str) -> None:
    make, words = BAD_CHECKPOINTS[kind]
    marker, bad = tmp_path / "was run", tmp_path / "unet.pth"
    torch.save({f"{i}.weight": torch.ones(64, 64) for i in range(20)}, bad)
    bad.write_bytes(make(bad.read_bytes(), marker))
    with pytest.raises(WeightsError) as error:
        checkpoints.read_tensors(bad)
    assert error.value.exit_code == 5
    assert str(bad) in error.value.message and words in error.value.message
    assert "musetalk.weights download" in error.value.hint
    assert not marker.exists()


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.ones(256, 256)}, bad)
    bad.write_bytes(bad.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match="damaged"):
        checkpoints.read_tensors(bad)
