"""Finding and parsing faces: who does it is chosen here, without importing a detector.

`auto` does what the reference does where its weights and packages are present, and otherwise what runs
everywhere. The lite engine always gets MediaPipe's mesh, because the mesh is what it warps.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from musetalk.config import EngineName, FaceDetectorRequest, FaceParserRequest
from musetalk.device import usable_by_torch
from musetalk.errors import EngineError, InputError
from musetalk.weights.files import look_up, missing_weights_error

if TYPE_CHECKING:
    from musetalk.faces.base import FaceDetector, LabelMapper

log = logging.getLogger(__name__)

MODELS = Path("models")
DWPOSE_WEIGHTS = "dwpose/dw-ll_ucoco_384.pth"
S3FD_WEIGHTS = "face-alignment/s3fd-619a316812.pth"
LANDMARK_WEIGHTS = "face-alignment/2DFAN4-11f355bf06.pth.tar"
BISENET_WEIGHTS = "face-parse-bisent/79999_iter.pth"
_DWPOSE_PACKAGES = ("torch", "mmpose", "face_alignment")


def create_detector(
    request: FaceDetectorRequest, engine: EngineName, device: str, video: bool, models: Path = MODELS
) -> FaceDetector:
    """A detector for one template.

    Args:
        request: `auto` takes dwpose where its weights and packages are present and the engine is
            musetalk, else mediapipe.
        engine: that the template is for.
        device: where networks run, e.g. "cpu", "cuda:0"; the CPU where torch can't use it.
        video: whether it is shown a video's frames in order.
        models: the folder of the official weights; a relative one is looked up as all model paths are.

    Raises:
        InputError: the lite engine can't use the detector that is asked for.
        WeightsError: a detector is asked for whose weights are missing or damaged.
        EngineError: its packages aren't installed.
    """
    chosen = _choose_detector(request, engine, models)
    log.info("face detector: %s", chosen)
    if chosen == "dwpose":
        dwpose, s3fd = _present(models, DWPOSE_WEIGHTS, S3FD_WEIGHTS)
        from musetalk.faces.dwpose import DwposeDetector

        return DwposeDetector(dwpose, s3fd, usable_by_torch(device))
    if chosen == "s3fd":
        s3fd, landmarks = _present(models, S3FD_WEIGHTS, LANDMARK_WEIGHTS)
        from musetalk.faces.s3fd import S3fdDetector

        return S3fdDetector(s3fd, landmarks, usable_by_torch(device))
    from musetalk.faces.mediapipe import MediapipeDetector

    return MediapipeDetector(video)


def create_label_mapper(
    request: FaceParserRequest, engine: EngineName, device: str, models: Path = MODELS
) -> LabelMapper:
    """A label mapper for one template.

    Args:
        request: `auto` takes bisenet where its weights and torch are present and the engine is
            musetalk, else landmarks.
        engine: that the template is for.
        device: where networks run.
        models: the folder of the official weights.

    Raises:
        WeightsError: bisenet is asked for and its weights are missing or damaged.
        EngineError: bisenet is asked for and torch isn't installed.
    """
    usable = not _missing(models, BISENET_WEIGHTS) and _installed("torch")
    if request == "bisenet" or (request == "auto" and engine == "musetalk" and usable):
        [weights] = _present(models, BISENET_WEIGHTS)
        if not _installed("torch"):
            raise EngineError(
                "--face_parser bisenet needs torch, which is not installed 未安装torch",
                "run make install-full, or use --face_parser landmarks",
            )
        from musetalk.faces.bisenet import BisenetLabelMapper

        log.info("face parser: bisenet")
        return BisenetLabelMapper(weights, usable_by_torch(device))
    from musetalk.faces.parsing import LandmarkLabelMapper

    log.info("face parser: landmarks")
    return LandmarkLabelMapper()


def _choose_detector(request: FaceDetectorRequest, engine: EngineName, models: Path) -> FaceDetectorRequest:
    if engine == "lite" and request in ("dwpose", "s3fd"):
        raise InputError(
            f"the lite engine can't use --face_detector {request}: it warps MediaPipe's face mesh",
            "use --face_detector mediapipe, or --engine musetalk",
        )
    if request != "auto":
        return request
    usable = not _missing(models, DWPOSE_WEIGHTS, S3FD_WEIGHTS) and _installed(*_DWPOSE_PACKAGES)
    return "dwpose" if engine == "musetalk" and usable else "mediapipe"


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _missing(models: Path, *names: str) -> list[Path]:
    return [path for name in names if not (path := look_up(models / name)).is_file()]


def _present(models: Path, *names: str) -> list[Path]:
    missing = _missing(models, *names)
    if missing:
        raise missing_weights_error(missing)
    return [look_up(models / name) for name in names]
