"""The operators' picture of a template: what was found, drawn on its first face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from musetalk.geometry import crop_box

if TYPE_CHECKING:
    from musetalk.preprocessing.following import TemplateSource

PREVIEW_SIDE = 720  # pixels, the longer side at most
PREVIEW_QUALITY = 85  # of the JPEG


def draw_preview(clip: TemplateSource, masks: Sequence[np.ndarray]) -> bytes:
    """A JPEG of the first face: box green, landmarks yellow, the mask's outline red."""
    import cv2

    index = clip.faced[0]
    image = clip.frames[index].copy()
    x1, y1, x2, y2 = clip.bboxes[index]
    cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), (0, 255, 0), 2)
    for x, y in clip.face(index).landmarks68.round().astype(int).tolist():
        cv2.circle(image, (x, y), 2, (0, 255, 255), -1)
    outlines, _ = cv2.findContours(
        np.asarray(masks[index] > 127, np.uint8),
        cv2.RETR_EXTERNAL,
        cv2.CHAIN_APPROX_NONE,
        offset=crop_box(clip.bboxes[index])[:2],
    )
    cv2.drawContours(image, outlines, -1, (0, 0, 255), 2)
    scale = min(1.0, PREVIEW_SIDE / max(image.shape[:2]))
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, PREVIEW_QUALITY])[1].tobytes()
