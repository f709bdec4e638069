"""What a template is made from: files and folders of images, their order, their hash, their bounds."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from musetalk.config import EngineConfig, PreprocessingConfig
from musetalk.errors import InputError
from musetalk.preprocessing import following
from musetalk.preprocessing.following import find_faces
from musetalk.preprocessing.source import SourceFrames, source_files, source_sha256


def write_image(path, level: int, size: tuple[int, int] = (32, 40)) -> None:
    assert cv2.imwrite(str(path), np.full((*size, 3), level, np.uint8))


def test_images_of_a_folder_come_in_natural_order_and_nothing_else_does(tmp_path):
    for i, name in enumerate(("2.png", "10.png", "a².png")):
        write_image(tmp_path / name, 10 * i)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._2.png").write_bytes(b"left by a copy from another system")
    assert [path.name for path in source_files(tmp_path)] == ["2.png", "10.png", "a².png"]
    assert [int(frame[0, 0, 0]) for frame in SourceFrames(tmp_path)] == [0, 10, 20]


def test_hash_follows_names_and_contents_of_the_images_alone(tmp_path):
    (tmp_path / "1.png").write_bytes(b"one")
    hashes = [source_sha256(tmp_path)]
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    hashes.append(source_sha256(tmp_path))
    (tmp_path / "2.png").write_bytes(b"two")
    hashes.append(source_sha256(tmp_path))
    assert len(set(hashes)) == 3
    (tmp_path / "notes.txt").write_text("no image")
    assert source_sha256(tmp_path) == hashes[-1]


@pytest.mark.parametrize("name", ["missing.jpg", "x" * 300 + ".jpg", "nul\0.jpg", "empty", "empty/none.jpg"])
def test_source_that_is_not_there_is_bad_input(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        source_sha256(tmp_path / name)
    assert caught.value.hint


def test_frames_of_different_sizes_are_bad_input(tmp_path):
    write_image(tmp_path / "1.png", 0)
    write_image(tmp_path / "2.png", 0, (48, 40))
    with pytest.raises(InputError, match="differ in size"):
        find_faces(tmp_path, PreprocessingConfig(), "lite", EngineConfig(), "cpu")


def test_template_that_no_memory_would_hold_is_bad_input(tmp_path, monkeypatch):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", 0)
    monkeypatch.setattr(following, "MAX_TEMPLATE_BYTES", 3 * 32 * 40 * 3)
    with pytest.raises(InputError, match="over 3 frames"):
        find_faces(tmp_path, PreprocessingConfig(), "lite", EngineConfig(), "cpu")
