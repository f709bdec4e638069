"""Face meshes measured once on the project's portraits, so that tests of the rig need no detector."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from musetalk.config import LITE_MODELS
from musetalk.faces.head import SKIN_POINTS
from musetalk.geometry import Box
from musetalk.media.image import read_image

PORTRAITS = LITE_MODELS / "portraits"
MESHES = Path(__file__).parents[2] / "data" / "lite" / "portrait_meshes.npz"


class Portrait(NamedTuple):
    """A portrait with its face.

    Attributes:
        frame: (H, W, 3) uint8 BGR.
        mesh: (478, 3) float32 pixels of the frame, depth last.
        bbox, mask, crop_box: as preprocessing makes them.
    """

    frame: np.ndarray
    mesh: np.ndarray
    bbox: Box
    mask: np.ndarray
    crop_box: Box


def load_portrait(name: str) -> Portrait:
    """The portrait `name` of models/lite/portraits with a mask over its lower face."""
    import cv2

    frame = read_image(PORTRAITS / f"{name}.jpg")
    with np.load(MESHES) as meshes:
        mesh = meshes[name]
    x1, y1 = np.floor(mesh[:SKIN_POINTS, :2].min(axis=0)).astype(int).tolist()
    x2, y2 = np.ceil(mesh[:SKIN_POINTS, :2].max(axis=0)).astype(int).tolist()
    bbox = (x1, (y1 + y2) // 3, x2, y2)
    mask = np.zeros((bbox[3] - bbox[1], x2 - x1), np.uint8)
    middle = (mask.shape[1] // 2, int(mask.shape[0] * 0.55))
    cv2.ellipse(mask, middle, (int(middle[0] * 0.9), int(mask.shape[0] * 0.43)), 0, 0, 360, 255, -1)
    return Portrait(frame, mesh, bbox, cv2.GaussianBlur(mask, (0, 0), 2), bbox)
