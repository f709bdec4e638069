"""DWPose landmarks inside the S3FD box rule: how the reference finds faces.

DWPose (Yang et al. 2023) is a whole-body pose estimator of 133 points run by mmpose on the whole frame,
as the reference runs it; 68 of its points are the face. It always answers, so whether there is a face,
and how many, is S3FD's to say; the box that overlaps the landmarks most is the one they belong to.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from musetalk.checkpoints import load_strictly, read_tensors
from musetalk.errors import EngineError
from musetalk.faces import mmpose_standins
from musetalk.faces.base import Face, by_size
from musetalk.faces.s3fd import S3fdBoxes
from musetalk.geometry import bounding_box, overlap

_CONFIG = (
    ".mim/configs/wholebody_2d_keypoint/rtmpose/ubody/rtmpose-l_8xb32-270e_coco-ubody-wholebody-384x288.py"
)
_FACE_POINTS = slice(23, 91)  # of COCO-WholeBody's 133


class DwposeDetector:
    """One face per frame: DWPose's landmarks with S3FD's box.

    Raises:
        EngineError: mmpose or face-alignment isn't installed.
        WeightsError: weights are missing, damaged or of another network.
    """

    name = "dwpose"

    def __init__(self, dwpose_weights: Path, s3fd_weights: Path, device: str) -> None:
        self._boxes = S3fdBoxes(s3fd_weights, device)
        self._network = load_estimator(dwpose_weights, device)

    def detect(self, frame: np.ndarray) -> list[Face]:
        """The face of `frame` (H, W, 3) uint8 BGR, or none."""
        boxes = self._boxes.boxes(frame)
        if not boxes:
            return []
        landmarks = face_landmarks(self._network, frame)
        around = bounding_box(landmarks)
        ranked = sorted(
            by_size(Face(landmarks, box) for box in boxes), key=lambda f: -overlap(f.detection, around)
        )
        return ranked[:1]


def face_landmarks(network: Any, frame: np.ndarray) -> np.ndarray:
    """The face's 68 points (68, 2) float32 of `frame` (H, W, 3) uint8 BGR."""
    with _quietly():
        from mmpose.apis import inference_topdown

        [sample] = inference_topdown(network, frame)
    return np.asarray(sample.pred_instances.keypoints[0, _FACE_POINTS], dtype=np.float32)


def make_estimator(device: str) -> Any:
    """DWPose's network by the configuration that mmpose carries, without trained weights.

    Raises:
        EngineError: mmpose can't be imported.
    """
    with _quietly():
        try:
            mmpose_standins.install()
            import mmpose
            from mmengine.config import Config
            from mmpose.apis import init_model
        except ImportError as e:
            raise EngineError(
                f"mmpose can't be imported: {e}",
                "run make install-full, or use --face_detector mediapipe 请安装或改用mediapipe",
            ) from e
        config = Config.fromfile(Path(mmpose.__file__).parent / _CONFIG)
        del config.model.backbone["_scope_"]  # names mmdet, where mmpose has the same backbone
        return init_model(config, None, device=device)


def load_estimator(weights: Path, device: str) -> Any:
    """DWPose's network with the weights of a file.

    Raises:
        EngineError: mmpose can't be imported.
        WeightsError: the weights are missing, damaged or of another network.
    """
    state = read_tensors(weights)
    network = make_estimator(device)
    load_strictly(network, state, weights)
    return network


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """mmpose's and its dependencies' deprecation warnings go nowhere, their prints to stderr.

    Standard output belongs to the result; mmengine's logger takes the stream it finds at its birth.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
