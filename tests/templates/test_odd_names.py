"""Names that aren't UTF-8, as Linux keeps what another system called in GBK."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.config import EncodingConfig
from musetalk.errors import OutputError
from musetalk.media.image import read_image
from musetalk.media.video import VideoWriter, read_video
from musetalk.templates import store as store_module
from musetalk.templates.store import TemplateStore
from tests.conftest import make_template
from tests.media.test_audio import read_all, sound, write_wav

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in Unicode")
GBK = os.fsdecode("小哈".encode("gbk"))


def write_video(path: Path, audio: Path | None = None) -> None:
    with VideoWriter(path, 64, 48, Fraction(25), audio, EncodingConfig()) as writer:
        for _ in range(5):
            writer.write(np.full((72, 64), 128, np.uint8))


def test_media_are_read_and_written(tmp_path: Path) -> None:
    write_wav(tmp_path / f"{GBK}.wav", sound(3200, 1, 16_000), 16_000)
    write_video(tmp_path / f"{GBK}.mp4", tmp_path / f"{GBK}.wav")
    assert len(list(read_video(tmp_path / f"{GBK}.mp4"))) == 5
    assert len(read_all(tmp_path / f"{GBK}.wav")) == 3200
    (tmp_path / f"{GBK}.png").write_bytes(cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes())
    assert read_image(tmp_path / f"{GBK}.png").shape == (20, 30, 3)


def test_a_template_of_such_a_source_in_such_a_folder(tmp_path: Path) -> None:
    store = TemplateStore(tmp_path / GBK)
    with store.lock("t"):
        store.publish("t", make_template(), {"template_id": "t", "template_image_path": f"{GBK}.jpg"})
    assert store.check("t").valid
    text = store.metadata_path("t").read_text("utf-8")
    assert r"\udc" in text and json.loads(text)["template_image_path"] == f"{GBK}.jpg"
    _, metadata = store.load("t")
    assert metadata["template_image_path"] == f"{GBK}.jpg"


def test_a_refresh_that_fails_leaves_the_good_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that can't be written, of pickle, metadata or preview."""
    store = TemplateStore(tmp_path)
    with store.lock("t"):
        store.publish("t", make_template(3), {"template_id": "t"}, b"preview")

    def full(_metadata: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_json_bytes", full)
    with store.lock("t"), pytest.raises(OutputError):
        store.publish("t", make_template(5), {"template_id": "t"}, b"preview")
    monkeypatch.undo()
    assert store.check("t").valid and len(store.load("t")[0]) == 6
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("gone", ["pickle_path", "metadata_path"])
def test_what_does_not_exist_is_not_said_to_exist(tmp_path: Path, gone: str) -> None:
    store = TemplateStore(tmp_path)
    with store.lock("t"):
        store.publish("t", make_template(), {"template_id": "t"})
    getattr(store, gone)("t").unlink()
    check = store.check("t")
    assert not check.valid
    assert check.exists is ("不存在" not in check.message)
