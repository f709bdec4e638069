"""Which detector and parser are made for which request."""

from __future__ import annotations

from pathlib import Path

import pytest

from musetalk.config import EngineName, FaceDetectorRequest
from musetalk.errors import InputError, WeightsError
from musetalk.faces.choice import (
    BISENET_WEIGHTS,
    DWPOSE_WEIGHTS,
    LANDMARK_WEIGHTS,
    S3FD_WEIGHTS,
    create_detector,
    create_label_mapper,
)


@pytest.mark.parametrize("engine", ["lite", "musetalk"])
def test_without_weights_auto_needs_none(tmp_path: Path, engine: EngineName) -> None:
    assert create_detector("auto", engine, "cpu", video=False, models=tmp_path).name == "mediapipe"
    assert create_label_mapper("auto", engine, "cpu", models=tmp_path).name == "landmarks"


def test_lite_takes_the_mesh_even_where_weights_are(tmp_path: Path) -> None:
    for name in (DWPOSE_WEIGHTS, S3FD_WEIGHTS, BISENET_WEIGHTS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"never read")
    assert create_detector("auto", "lite", "cpu", video=True, models=tmp_path).name == "mediapipe"
    assert create_label_mapper("auto", "lite", "cpu", models=tmp_path).name == "landmarks"


@pytest.mark.parametrize(
    ("request_", "names"),
    [("dwpose", (DWPOSE_WEIGHTS, S3FD_WEIGHTS)), ("s3fd", (S3FD_WEIGHTS, LANDMARK_WEIGHTS))],
)
def test_an_explicit_detector_without_weights_is_an_error(
    tmp_path: Path, request_: FaceDetectorRequest, names: tuple[str, ...]
) -> None:
    with pytest.raises(WeightsError) as caught:
        create_detector(request_, "musetalk", "cpu", video=False, models=tmp_path)
    assert all(Path(name).name in caught.value.message for name in names)
    assert "python -m musetalk.weights download" in caught.value.hint


def test_an_explicit_parser_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="79999_iter") as caught:
        create_label_mapper("bisenet", "musetalk", "cpu", models=tmp_path)
    assert "python -m musetalk.weights download" in caught.value.hint


@pytest.mark.parametrize("request_", ["dwpose", "s3fd"])
def test_lite_refuses_detectors_without_a_mesh(tmp_path: Path, request_: FaceDetectorRequest) -> None:
    with pytest.raises(InputError, match="lite"):
        create_detector(request_, "lite", "cpu", video=False, models=tmp_path)
