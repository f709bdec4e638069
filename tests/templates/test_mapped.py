"""Large templates are mapped: equal to what was written, as views that nobody may write to."""

from __future__ import annotations

import mmap
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.errors import CacheError
from musetalk.templates import pickle as template_pickle
from musetalk.templates.pickle import load_template_dict
from musetalk.templates.store import TemplateStore
from musetalk.templates.template import LIST_KEYS
from tests.conftest import make_template

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a mapped file can't be replaced on Windows")
SIZE = (320, 200)  # a frame of it lies in the file on its own


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemplateStore:
    """One template, which counts as large."""
    monkeypatch.setattr(template_pickle, "MAPPED_FILE", 1)
    store = TemplateStore(tmp_path)
    with store.lock("t"):
        store.publish("t", make_template(3, SIZE, faceless=(1,)), {"template_id": "t"})
    return store


def mapped_by(array: np.ndarray) -> bool:
    """Whether an array's bytes are a map's, not memory of its own."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)


def test_a_mapped_template_equals_the_one_that_was_written(store: TemplateStore) -> None:
    written, (loaded, _) = make_template(3, SIZE, faceless=(1,)), store.load("t")
    assert loaded.unique == written.unique and loaded.bboxes == written.bboxes
    for key in LIST_KEYS:
        for known, array in zip(written.to_dict()[key], loaded.to_dict()[key], strict=True):
            np.testing.assert_array_equal(array, known)


def test_its_frames_are_parts_of_the_file_that_nobody_may_write_to(store: TemplateStore) -> None:
    template, _ = store.load("t")
    assert all(mapped_by(frame) and not frame.flags.writeable for frame in template.frames)
    with pytest.raises(ValueError, match="read-only"):
        template.frames[0][:] = 0


def test_a_small_template_is_read_as_before(store: TemplateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_pickle, "MAPPED_FILE", 1 << 30)
    template, _ = store.load("t")
    assert not any(mapped_by(frame) for frame in template.frames)


def test_an_open_template_outlives_its_cache(store: TemplateStore) -> None:
    template, _ = store.load("t")
    before = template.frames[0].copy()
    with store.lock("t"):
        store.publish("t", make_template(5, SIZE), {"template_id": "t"})
    store.clean("t")
    np.testing.assert_array_equal(template.frames[0], before)


def test_a_changed_byte_is_found(store: TemplateStore) -> None:
    data = bytearray(store.pickle_path("t").read_bytes())
    data[len(data) // 2] ^= 1
    store.pickle_path("t").write_bytes(data)
    with pytest.raises(CacheError, match="checksum"):
        store.load("t")


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo never",)


@pytest.mark.parametrize(
    "value", [_Hostile(), {"frame_list_cycle": [_Hostile()]}, [1, 2], np.array([_Hostile()], dtype=object)]
)
def test_a_mapped_file_may_ask_for_no_more_than_another(tmp_path: Path, monkeypatch, value: object) -> None:
    monkeypatch.setattr(template_pickle, "MAPPED_FILE", 1)
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(value, protocol=5))
    with (tmp_path / "t.pkl").open("rb") as stream, pytest.raises(CacheError):
        load_template_dict(stream, None)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_file_is_damaged(store: TemplateStore, share: float) -> None:
    path = store.pickle_path("t")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with path.open("rb") as stream, pytest.raises(CacheError):
        load_template_dict(stream, None)
