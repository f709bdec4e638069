"""Paste-back: the only place where pixels are blended.

A generated face is pasted into its box and faded in by a mask that covers the lower half of the face.
The arithmetic is the reference's to the bit: its 8-bit blend rounds as Pillow's `Image.paste` does. Where
the mask is 0 or outside the face's box the template's own bytes stay, so only the mask's box is ever
computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from musetalk.geometry import Box

if TYPE_CHECKING:
    from musetalk.templates.template import Template
_PLANES_BUDGET = 1 << 29  # bytes of converted template frames kept


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

    Several threads may compose at once. `index` is a position of the template's cycle.
    """

    def __init__(self, template: Template) -> None:
        width, height = template.frame_size
        self._template = template
        self._height, self._width = height + height % 2, width + width % 2
        self._planes: dict[int, np.ndarray] = {}
        self._patch_of: tuple[int, _Patch | None] = (-1, None)

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """Shape of an I420 buffer: 3/2 of the height × the width, both made even."""
        return self._height * 3 // 2, self._width

    def compose_bgr(self, index: int, face: np.ndarray | None) -> np.ndarray:
        """The blended frame (H, W, 3) uint8 BGR, as the source is turned; without a face, the template's."""
        unique = self._template.unique[index]
        frame = self._template.frames[unique].copy()
        patch = self._patch(unique) if face is not None else None
        if patch is not None and face is not None:
            frame[patch.rows, patch.columns] = patch.blend(face)
        return np.ascontiguousarray(np.rot90(frame, self._template.turn)) if self._template.turn else frame

    def compose_i420(self, index: int, face: np.ndarray | None, out: np.ndarray) -> np.ndarray:
        """The blended frame as planar YUV 4:2:0 (BT.601, limited range) written into `out`.

        Equal to converting the whole blended frame with OpenCV's BGR2YUV_I420, an odd side first made
        even by repeating its last row or column. `out` is (H * 3 // 2, W) uint8 contiguous of
        `buffer_shape`, the caller's own, and is returned.
        """
        if self._template.turn:
            np.copyto(out, _to_i420(self.compose_bgr(index, face)))
            return out
        unique = self._template.unique[index]
        np.copyto(out, self._background(unique))
        patch = self._patch(unique) if face is not None else None
        if patch is not None and face is not None:
            self._write_patch(out, self._template.frames[unique], patch, patch.blend(face))
        return out

    @property
    def kept_bytes(self) -> int:
        """Bytes of the converted template frames that are kept."""
        return sum(planes.nbytes for planes in list(self._planes.values()))

    def _patch(self, unique: int) -> _Patch | None:
        kept = self._patch_of  # one look, since another thread may replace it at any time
        if kept[0] != unique:
            template = self._template
            patch = _Patch.of(
                template.frames[unique],
                template.bboxes[unique],
                template.masks[unique],
                template.crop_boxes[unique],
            )
            kept = self._patch_of = (unique, patch)
        return kept[1]

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
