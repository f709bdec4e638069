"""Blend masks and paste-back: the only place where pixels are blended.

A generated face is pasted into its box and faded in by a mask that covers the lower half of the face.
The arithmetic is the reference's to the bit: its mask is resized by Pillow, its 8-bit blend rounds as
Pillow's `Image.paste` does. Where the mask is 0 or outside the face's box the template's own bytes stay,
so only the mask's box is ever computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from musetalk.config import ParsingMode
from musetalk.faces.labels import LABEL_SIDE, LOWER_LIP, MOUTH, NECK, NOSE, SKIN, UPPER_LIP
from musetalk.geometry import Box, crop_box

if TYPE_CHECKING:
    from musetalk.template import Template

_UPPER_BOUNDARY = 0.5  # of the crop box; above it nothing is blended
_BLUR = 0.1  # kernel side over the crop box's
_CHEEK_EROSION = (35, 3)  # pixels of the label map, applied twice
_CONE_HEIGHT, _TAIL_HEIGHT = 21, 12  # pixels of the label map
_PLANES_BUDGET = 1 << 29  # bytes of converted template frames kept


def crop_frame(frame: np.ndarray, crop: Box) -> np.ndarray:
    """The pixels (h, w, 3) of `crop`, black where it reaches beyond the frame."""
    x1, y1, x2, y2 = crop
    height, width = frame.shape[:2]
    result = np.zeros((y2 - y1, x2 - x1, 3), dtype=np.uint8)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left < right and top < bottom:
        result[top - y1 : bottom - y1, left - x1 : right - x1] = frame[top:bottom, left:right]
    return result


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


def paste_back(frame: np.ndarray, face: np.ndarray, bbox: Box, mask: np.ndarray, crop: Box) -> np.ndarray:
    """A copy of `frame` with `face` blended in.

    Args:
        frame: (H, W, 3) uint8 BGR.
        face: uint8 BGR of any size that shows `bbox`.
        bbox: the face's box; what lies outside the frame is left away.
        mask: uint8 of the size of `crop`.
        crop: the box that `mask` covers.

    Source: MuseTalk, musetalk/utils/blending.py, get_image_blending.
    """
    result = frame.copy()
    patch = _Patch.of(frame, bbox, mask, crop)
    if patch is not None:
        result[patch.rows, patch.columns] = patch.blend(face)
    return result


@dataclass(frozen=True)
class _Patch:
    """The part of one frame that its mask changes, with everything but the face worked out.

    Attributes:
        rows, columns: where in the frame.
        bbox: the face's box.
        weights: (h, w, 3) uint16, the mask.
        background: (h, w, 3) uint16, frame × (255 - mask) + 128.
    """

    rows: slice
    columns: slice
    bbox: Box
    weights: np.ndarray
    background: np.ndarray

    @classmethod
    def of(cls, frame: np.ndarray, bbox: Box, mask: np.ndarray, crop: Box) -> _Patch | None:
        """The patch, or None where the mask changes nothing."""
        import cv2

        x, y, width, height = cv2.boundingRect(mask)
        left, top = max(x + crop[0], bbox[0], 0), max(y + crop[1], bbox[1], 0)
        right = min(x + crop[0] + width, bbox[2], frame.shape[1])
        bottom = min(y + crop[1] + height, bbox[3], frame.shape[0])
        if left >= right or top >= bottom:
            return None
        inside = mask[top - crop[1] : bottom - crop[1], left - crop[0] : right - crop[0]]
        weights = cv2.merge([inside] * 3).astype(np.uint16)
        background = frame[top:bottom, left:right] * (255 - weights) + np.uint16(128)
        return cls(slice(top, bottom), slice(left, right), bbox, weights, background)

    def blend(self, face: np.ndarray) -> np.ndarray:
        """The blended pixels (h, w, 3) uint8, rounded as Pillow rounds: (t + t / 256) / 256."""
        import cv2

        x1, y1, x2, y2 = self.bbox
        if face.shape[:2] != (y2 - y1, x2 - x1):
            face = cv2.resize(face, (x2 - x1, y2 - y1))
        shown = face[
            self.rows.start - y1 : self.rows.stop - y1, self.columns.start - x1 : self.columns.stop - x1
        ]
        total = self.weights * shown
        total += self.background
        total += total >> 8
        total >>= 8
        return total.astype(np.uint8)


class FrameCompositor:
    """Composes output frames from a template's frames and generated faces.

    One object serves one thread. `index` is a position of the template's cycle.
    """

    def __init__(self, template: Template) -> None:
        height, width = template.frames[0].shape[:2]
        self._template = template
        self._height, self._width = height + height % 2, width + width % 2
        self._planes: dict[int, np.ndarray] = {}
        self._patch_of: tuple[int, _Patch | None] = (-1, None)

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """Shape of an I420 buffer: 3/2 of the height × the width, both made even."""
        return self._height * 3 // 2, self._width

    def compose_bgr(self, index: int, face: np.ndarray | None) -> np.ndarray:
        """The blended frame (H, W, 3) uint8 BGR; without a face, a copy of the template's frame."""
        unique = self._template.unique[index]
        frame = self._template.frames[unique].copy()
        patch = self._patch(unique) if face is not None else None
        if patch is not None and face is not None:
            frame[patch.rows, patch.columns] = patch.blend(face)
        return frame

    def compose_i420(self, index: int, face: np.ndarray | None, out: np.ndarray) -> np.ndarray:
        """The blended frame as planar YUV 4:2:0 (BT.601, limited range) written into `out`.

        Equal to converting the whole blended frame with OpenCV's BGR2YUV_I420, an odd side first made
        even by repeating its last row or column. `out` is (H * 3 // 2, W) uint8 contiguous of
        `buffer_shape`, the caller's own, and is returned.
        """
        unique = self._template.unique[index]
        np.copyto(out, self._background(unique))
        patch = self._patch(unique) if face is not None else None
        if patch is not None and face is not None:
            self._write_patch(out, self._template.frames[unique], patch, patch.blend(face))
        return out

    def _patch(self, unique: int) -> _Patch | None:
        if self._patch_of[0] != unique:
            template = self._template
            patch = _Patch.of(
                template.frames[unique],
                template.bboxes[unique],
                template.masks[unique],
                template.crop_boxes[unique],
            )
            self._patch_of = (unique, patch)
        return self._patch_of[1]

    def _background(self, unique: int) -> np.ndarray:
        planes = self._planes.get(unique)
        if planes is None:
            planes = _to_i420(self._template.frames[unique])
            if (len(self._planes) + 1) * planes.nbytes <= _PLANES_BUDGET:
                self._planes[unique] = planes
        return planes

    def _write_patch(self, out: np.ndarray, frame: np.ndarray, patch: _Patch, blended: np.ndarray) -> None:
        """Convert the patch, grown to whole 2 × 2 blocks, and write it into the three planes."""
        top, left = patch.rows.start & ~1, patch.columns.start & ~1
        bottom, right = patch.rows.stop + patch.rows.stop % 2, patch.columns.stop + patch.columns.stop % 2
        block = frame[top:bottom, left:right].copy()
        block[
            patch.rows.start - top : patch.rows.stop - top,
            patch.columns.start - left : patch.columns.stop - left,
        ] = blended
        planes = zip(_planes(out), _planes(_to_i420(block)), (1, 2, 2), strict=True)
        for plane, source, scale in planes:
            plane[top // scale : bottom // scale, left // scale : right // scale] = source


def _to_i420(frame: np.ndarray) -> np.ndarray:
    """The frame as (H * 3 // 2, W) uint8 planar YUV, odd sides made even by repeating the edge."""
    import cv2

    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)


def _planes(buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of the Y (H, W), U and V (H / 2, W / 2) planes of an I420 buffer."""
    height, width = buffer.shape[0] * 2 // 3, buffer.shape[1]
    chroma = buffer[height:].reshape(2, height // 2, width // 2)
    return buffer[:height], chroma[0], chroma[1]
