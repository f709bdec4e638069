"""Pickled torch tensors become arrays, and nothing in a hostile pickle runs or reads out of bounds."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.config import REPOSITORY
from musetalk.templates.legacy_tensors import tensor_constructor

LEGACY = REPOSITORY / "tests" / "data" / "e2e" / "template_cache" / "legacy_preprocessed.pkl"


def any_size(_bytes: int) -> None:
    """Allows an array of any size."""


REBUILD = tensor_constructor("torch._utils", "_rebuild_tensor_v2", any_size)
VALUES = np.arange(12, dtype=np.float32)


class LegacyUnpickler(pickle.Unpickler):
    """Tensors through the module under test, everything else as it is."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("torch", "collections")):
            return tensor_constructor(module, name, any_size)
        return super().find_class(module, name)


def load(data: bytes) -> Any:
    return LegacyUnpickler(io.BytesIO(data)).load()


def test_the_original_systems_latents_are_read_as_torch_reads_them() -> None:
    pytest.importorskip("torch", reason="needs the full environment (make install-full)")
    data = LEGACY.read_bytes()
    found, expected = load(data), pickle.loads(data)
    for array, tensor in zip(
        found["input_latent_list_cycle"], expected["input_latent_list_cycle"], strict=True
    ):
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_views_and_precisions_keep_their_values(dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")
    tensor = torch.arange(24, dtype=getattr(torch, dtype)).reshape(4, 6)[1:, ::2].T
    np.testing.assert_array_equal(load(pickle.dumps(tensor)), tensor.float().numpy())


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (0, (2,), (12,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (1 << 62,), (0,)),
        (0, (0,), (1,)),
        (0, (2, 2), (1,)),
        (1 << 70, (1,), (1,)),
    ],
)
def test_views_beyond_the_storage_are_refused(offset: int, size: tuple, stride: tuple) -> None:
    with pytest.raises(pickle.UnpicklingError):
        REBUILD(VALUES, offset, size, stride, False, None)


def test_a_view_within_the_storage_is_copied() -> None:
    found = REBUILD(VALUES, 1, (2, 3), (3, 1), False, None)
    np.testing.assert_array_equal(found, [[1, 2, 3], [4, 5, 6]])
    assert not np.shares_memory(found, VALUES)


def test_a_storage_that_inflates_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="needs the full environment (make install-full)")
    stored, deflated = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1_000_000).storage(), stored)
    with (
        zipfile.ZipFile(stored) as old,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert len(deflated.getvalue()) < 10_000
    with pytest.raises(pickle.UnpicklingError):
        tensor_constructor("torch.storage", "_load_from_bytes", any_size)(deflated.getvalue())


def test_code_inside_a_storage_does_not_run(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the full environment (make install-full)")

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was run"),)

    with pytest.raises(pickle.UnpicklingError):
        tensor_constructor("torch.storage", "_load_from_bytes", any_size)(pickle.dumps(Code(), protocol=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name"), [("torch", "load"), ("torch.hub", "load"), ("torch._utils", "_rebuild_parameter")]
)
def test_no_other_name_is_served(module: str, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=name):
        tensor_constructor(module, name, any_size)
