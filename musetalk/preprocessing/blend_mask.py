"""The blend mask of a face: where in its crop box the generated face shows, and how much.

The arithmetic is the reference's to the bit: its mask is resized by Pillow and blurred in 8 bits.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from musetalk.config import EngineConfig, EngineName, ParsingMode, PreprocessingConfig
from musetalk.faces.labels import LABEL_SIDE, LOWER_LIP, MOUTH, NECK, NOSE, SKIN, UPPER_LIP
from musetalk.geometry import Box, crop_box
from musetalk.preprocessing.source import progress

if TYPE_CHECKING:
    from musetalk.preprocessing.following import TemplateSource

_UPPER_BOUNDARY = 0.5  # of the crop box; above it nothing is blended
_BLUR = 0.1  # kernel side over the crop box's
_CHEEK_EROSION = (35, 3)  # pixels of the label map, applied twice
_CONE_HEIGHT, _TAIL_HEIGHT = 21, 12  # pixels of the label map


def prepare_mask(
    label_map: np.ndarray, bbox: Box, mode: ParsingMode, left_cheek_width: int, right_cheek_width: int
) -> tuple[np.ndarray, Box]:
    """The blend mask of a face and the crop box it lies on.

    Args:
        label_map: (512, 512) uint8 CelebAMask-HQ classes of the crop box.
        bbox: the face's box in the frame.
        mode: "jaw" grows the chin downwards and keeps the cheeks narrow, "neck" adds the neck,
            "raw" takes the face as parsed.
        left_cheek_width: pixels of the label map from its middle to the left, "jaw" only.
        right_cheek_width: the same to the right.

    Returns:
        The mask (S, S) uint8, 255 where the generated face shows, and the crop box (side S).

    Source: MuseTalk, musetalk/utils/blending.py, get_image_prepare_material.
    """
    from PIL import Image

    crop = crop_box(bbox)
    side = crop[2] - crop[0]
    if mode == "jaw":
        region = _jaw_region(label_map, left_cheek_width, right_cheek_width)
    else:
        classes = [SKIN, MOUTH, UPPER_LIP, LOWER_LIP] + [NECK] * (mode == "neck")
        region = np.isin(label_map, classes)
    parsed = np.asarray(Image.fromarray(_bytes(region)).resize((side, side)))
    mask = np.zeros_like(parsed)
    top = max(bbox[1] - crop[1], int(side * _UPPER_BOUNDARY))
    inside = slice(top, bbox[3] - crop[1]), slice(bbox[0] - crop[0], bbox[2] - crop[0])
    mask[inside] = parsed[inside]
    return _blurred(mask, int(_BLUR * side // 2 * 2) + 1), crop


def _blurred(mask: np.ndarray, kernel: int) -> np.ndarray:
    """`mask` (S, S) under a Gaussian of `kernel` pixels, computed only where it can be above 0."""
    import cv2

    x, y, width, height = cv2.boundingRect(mask)
    reach = kernel // 2 + 1
    rows = slice(max(y - reach, 0), y + height + reach)
    columns = slice(max(x - reach, 0), x + width + reach)
    result = np.zeros_like(mask)
    if width and height:
        result[rows, columns] = cv2.GaussianBlur(mask[rows, columns], (kernel, kernel), 0)
    return result


def _bytes(region: np.ndarray) -> np.ndarray:
    return region.astype(np.uint8) * 255


def _jaw_region(label_map: np.ndarray, left_cheek_width: int, right_cheek_width: int) -> np.ndarray:
    """The skin grown towards the chin between the cheeks, shrunk sideways on them, and the mouth."""
    import cv2

    grown = cv2.dilate(_bytes(label_map == SKIN), _chin_kernel())
    shrunk = cv2.erode(grown, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, _CHEEK_EROSION), iterations=2)
    columns = np.arange(LABEL_SIDE) - LABEL_SIDE // 2
    cheek = (columns <= -left_cheek_width) | (columns >= right_cheek_width)
    skin = np.where(cheek, shrunk, grown) == 255
    return (skin & (label_map != NOSE)) | np.isin(label_map, [MOUTH, UPPER_LIP, LOWER_LIP])


def _chin_kernel() -> np.ndarray:
    """A cone standing on a tail: dilating by it rounds the chin off instead of squaring it."""
    side = _CONE_HEIGHT + _TAIL_HEIGHT
    offset = np.abs(np.arange(side) - side // 2)
    half_widths = np.minimum(np.arange(side), _CONE_HEIGHT - 1) - _CONE_HEIGHT // 2
    return (offset <= half_widths[:, None]).astype(np.uint8)


def blend_masks(
    clip: TemplateSource,
    settings: PreprocessingConfig,
    engine: EngineName,
    config: EngineConfig,
    device: str,
    cancel: threading.Event | None = None,
) -> list[np.ndarray]:
    """The blend mask per frame (S, S) uint8, empty without a face.

    Raises:
        CancelledRun: `cancel` was set.
        WeightsError, EngineError: the parser that is asked for can't run.
    """
    from musetalk.faces.choice import create_label_mapper

    mapper = create_label_mapper(settings.face_parser, engine, device)
    mode = "raw" if (engine, config.models.version) == ("musetalk", "v1") else settings.parsing_mode
    masks = [np.zeros((0, 0), np.uint8)] * len(clip.frames)
    for i in progress(clip.faced, len(clip.faced), "masks 遮罩", cancel):
        labels = mapper.label_map(clip.frames[i], clip.face(i), crop_box(clip.bboxes[i]))
        masks[i], _ = prepare_mask(
            labels, clip.bboxes[i], mode, settings.left_cheek_width, settings.right_cheek_width
        )
    return masks
