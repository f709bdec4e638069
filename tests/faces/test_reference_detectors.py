"""DWPose and S3FD run whole, through their real packages, on checkpoints of random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from musetalk.errors import WeightsError
from musetalk.faces.choice import DWPOSE_WEIGHTS, LANDMARK_WEIGHTS, S3FD_WEIGHTS, create_detector

REASON = "needs the full environment (make install-full)"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("mmengine", reason=REASON)
pytest.importorskip("face_alignment", reason=REASON)

ANCHOR = 512  # pixels, side of the face boxes that the doctored S3FD sees everywhere


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with checkpoints in the official formats."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN
    from mmengine.logging import HistoryBuffer

    from musetalk.faces.dwpose import make_estimator

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name in (DWPOSE_WEIGHTS, S3FD_WEIGHTS, LANDMARK_WEIGHTS):
        (folder / name).parent.mkdir(exist_ok=True)
    boxes = s3fd()
    for parameter in boxes.parameters():
        torch.nn.init.zeros_(parameter)
    boxes.conv7_2_mbox_conf.bias.data[1] = 10.0
    torch.save(boxes.state_dict(), folder / S3FD_WEIGHTS, _use_new_zipfile_serialization=False)
    torch.save(FAN(4).state_dict(), folder / LANDMARK_WEIGHTS)
    network = make_estimator("cpu")
    training = {"message_hub": HistoryBuffer([1.0, 2.0], [1, 1]), "meta": {"epoch": 3}}
    torch.save({"state_dict": network.state_dict(), **training}, folder / DWPOSE_WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (160, 192, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nothing_on_stdout(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Standard output belongs to the result: no library may write to it."""
    yield
    assert capfd.readouterr().out == ""


def test_dwpose_gives_its_face_points_with_the_nearest_box(models: Path, frame: np.ndarray) -> None:
    from mmpose.apis import inference_topdown

    from musetalk.faces.dwpose import make_estimator

    detector = create_detector("auto", "musetalk", "cpu", video=False, models=models)
    [face] = detector.detect(frame)
    network = make_estimator("cpu")
    network.load_state_dict(
        torch.load(models / DWPOSE_WEIGHTS, weights_only=False, map_location="cpu")["state_dict"]
    )
    keypoints = inference_topdown(network, frame)[0].pred_instances.keypoints
    assert keypoints.shape == (1, 133, 2)
    np.testing.assert_allclose(face.landmarks68, keypoints[0, 23:91], atol=1e-3)
    assert detector.name == "dwpose"
    assert face.mesh is None
    assert ANCHOR // 4 < face.detection[2] - face.detection[0] <= ANCHOR


def test_s3fd_gives_boxes_with_68_points(models: Path, frame: np.ndarray) -> None:
    detector = create_detector("s3fd", "musetalk", "cpu", video=False, models=models)
    [face] = detector.detect(frame[:48, :48])
    assert detector.name == "s3fd"
    assert face.landmarks68.shape == (68, 2) and face.landmarks68.dtype == np.float32
    assert np.isfinite(face.landmarks68).all()
    assert 0 <= face.detection[0] < face.detection[2]


def test_without_a_box_there_is_no_face(models: Path, frame: np.ndarray, tmp_path: Path) -> None:
    blind = torch.load(models / S3FD_WEIGHTS, weights_only=True)
    for key, tensor in blind.items():
        if key.endswith("conf.bias"):
            tensor[:] = torch.tensor([9.0] * (len(tensor) - 1) + [-9.0])
    for name in (LANDMARK_WEIGHTS, S3FD_WEIGHTS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(models / LANDMARK_WEIGHTS, tmp_path / LANDMARK_WEIGHTS)
    torch.save(blind, tmp_path / S3FD_WEIGHTS)
    assert create_detector("s3fd", "musetalk", "cpu", video=False, models=tmp_path).detect(frame) == []


def test_weights_of_another_network_are_named(models: Path, tmp_path: Path) -> None:
    for name in (DWPOSE_WEIGHTS, S3FD_WEIGHTS):
        (tmp_path / name).parent.mkdir()
        torch.save({"state_dict": {"a.weight": torch.zeros(2)}}, tmp_path / name)
    with pytest.raises(WeightsError, match="s3fd-619a316812") as caught:
        create_detector("dwpose", "musetalk", "cpu", video=False, models=tmp_path)
    assert "extra a.weight" in caught.value.message
