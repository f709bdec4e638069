"""A preprocessed template: per-frame arrays over one ping-pong cycle, and the dict that is pickled.

The cycle is the N frames forward, then backward, so that a short clip loops without a jump. Repeated
frames are the same objects, so a frame costs its memory once; `unique` says which positions share one.

A clip keeps its own time (`timeline`) and its cycle is walked by it, whatever the output's rate. Pictures
have none, nor have caches of before: theirs are shown one per output frame.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from musetalk.config import MIN_SIDE
from musetalk.errors import CacheError
from musetalk.geometry import NO_FACE, Box, clamp_box
from musetalk.templates.timeline import Timeline

LIST_KEYS = (
    "frame_list_cycle",
    "coord_list_cycle",
    "input_latent_list_cycle",
    "mask_list_cycle",
    "mask_coords_list_cycle",
)
TIME_KEY = "frame_times"
TURN_KEY = "turn"


def ping_pong(items: Sequence[Any]) -> list[Any]:
    """`items` forward, then backward."""
    return [*items, *reversed(items)]


def _box(values: Sequence[Any]) -> Box:
    x1, y1, x2, y2 = (int(value) for value in values)
    return x1, y1, x2, y2


def _first_face(bboxes: Sequence[Box]) -> Box:
    return next((box for box in bboxes if box != NO_FACE), NO_FACE)


def _timeline(data: Mapping[str, Any], length: int) -> Timeline | None:
    """The time that a cache dict keeps of its cycle of `length` positions; None where it keeps none."""
    if TIME_KEY not in data:
        return None
    timeline = Timeline.from_dict(data[TIME_KEY])
    if 2 * len(timeline.spans) != length:
        raise ValueError(f"{len(timeline.spans)} times for a cycle of {length}")
    return timeline


def _turn(data: Mapping[str, Any]) -> int:
    turn = data.get(TURN_KEY, 0)
    if turn not in (0, 1, 2, 3):
        raise ValueError(f"a turn of {turn!r}")
    return int(turn)


@dataclass(frozen=True)
class Template:
    """What inference needs to know of one portrait or clip; all lists cover the cycle.

    Attributes:
        frames: (H, W, 3) uint8 BGR, all of one size.
        bboxes: face boxes (x1, y1, x2, y2); `NO_FACE` where a frame shows none.
        latents: what the engine consumes per frame; None where there is no face.
        masks: uint8 blend masks of the crop box's size.
        crop_boxes: (x1, y1, x2, y2) of each mask; may reach outside the frame.
        original_bbox: the first face's box.
        processed_at: unix seconds.
        timeline: the clip's own time; None shows one template frame per output frame.
        turn: quarter turns anticlockwise that bring `frames`, in which the face is upright, back to how the
            source shows them.
        region_verdict: what preprocessing found of decoding only what the masks use; unchecked metadata.
        unique: for each position, the first position that holds the same frame.
    """

    frames: list[np.ndarray]
    bboxes: list[Box]
    latents: list[Any]
    masks: list[np.ndarray]
    crop_boxes: list[Box]
    original_bbox: Box
    processed_at: float = field(default_factory=time.time)
    timeline: Timeline | None = None
    turn: int = 0
    region_verdict: object = None
    unique: list[int] = field(init=False)

    def __post_init__(self) -> None:
        first: dict[int, int] = {}
        object.__setattr__(self, "unique", [first.setdefault(id(f), i) for i, f in enumerate(self.frames)])

    @classmethod
    def from_frames(
        cls,
        frames: Sequence[np.ndarray],
        bboxes: Sequence[Box],
        latents: Sequence[Any],
        masks: Sequence[np.ndarray],
        crop_boxes: Sequence[Box],
        timeline: Timeline | None = None,
        turn: int = 0,
    ) -> Template:
        """The ping-pong cycle over N frames in their order, shown at their own time where they have one."""
        return cls(
            frames=ping_pong(frames),
            bboxes=ping_pong(bboxes),
            latents=ping_pong(latents),
            masks=ping_pong(masks),
            crop_boxes=ping_pong(crop_boxes),
            original_bbox=_first_face(bboxes),
            timeline=timeline,
            turn=turn,
        )

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def unique_count(self) -> int:
        """How many different frames the cycle shows."""
        return len(set(self.unique))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of all positions, repeated ones counted once."""
        kept = sorted(set(self.unique))
        arrays = [
            array for name in (self.frames, self.masks, self.latents) for array in (name[i] for i in kept)
        ]
        return sum(getattr(array, "nbytes", 0) for array in arrays)

    @property
    def frame_size(self) -> tuple[int, int]:
        """(width, height) in pixels of what is shown, turned as the source is."""
        height, width = self.frames[0].shape[:2]
        return (height, width) if self.turn % 2 else (width, height)

    def position(self, output_index: int, fps: Fraction) -> int:
        """The cycle position that output frame `output_index` shows at `fps` frames per second."""
        if self.timeline is None:
            return self.unique[output_index % len(self.frames)]
        return self.unique[self.timeline.position(output_index / fps)]

    def has_face(self, position: int) -> bool:
        """Whether the frame at a cycle position shows a face."""
        return self.bboxes[position] != NO_FACE

    def to_dict(self) -> dict[str, Any]:
        """The documented cache dict: plain containers and numpy arrays."""
        extra: dict[str, Any] = {} if self.timeline is None else {TIME_KEY: self.timeline.to_dict()}
        if self.turn:
            extra[TURN_KEY] = self.turn
        return {
            "frame_list_cycle": self.frames,
            "coord_list_cycle": self.bboxes,
            "input_latent_list_cycle": self.latents,
            "mask_list_cycle": self.masks,
            "mask_coords_list_cycle": self.crop_boxes,
            "original_bbox": self.original_bbox,
            "processed_at": self.processed_at,
            **extra,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Template:
        """A template from a cache dict, its lists checked against each other.

        The keys beside the lists may be absent, as in caches of the original system.

        Raises:
            CacheError: a key is missing, the lists differ in length or hold something else.
        """
        try:
            lists = [data[key] for key in LIST_KEYS]
            lengths = {len(values) for values in lists}
            if len(lengths) != 1 or 0 in lengths:
                raise ValueError(f"list lengths {sorted(lengths)}")
            frames, bboxes, latents, masks, crop_boxes = lists
            boxes = [_box(box) for box in bboxes]
            template = cls(
                frames=list(frames),
                bboxes=boxes,
                latents=list(latents),
                masks=list(masks),
                crop_boxes=[_box(box) for box in crop_boxes],
                original_bbox=_box(data.get("original_bbox", _first_face(boxes))),
                processed_at=float(data.get("processed_at", 0)),
                timeline=_timeline(data, len(frames)),
                turn=_turn(data),
            )
            template._check_images()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise CacheError(
                f"the template cache is damaged 模板缓存已损坏: {e}",
                "run preprocessing again 请重新运行预处理",
            ) from e
        return template

    def _check_images(self) -> None:
        height, width = self.frames[0].shape[:2]
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"frames of {width}×{height} pixels")
        for position in sorted(set(self.unique)):
            frame, mask = self.frames[position], self.masks[position]
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                raise ValueError(f"frame {position} is {frame.dtype} {frame.shape}")
            if self.has_face(position):
                x1, y1, x2, y2 = self.crop_boxes[position]
                if mask.dtype != np.uint8 or mask.shape != (y2 - y1, x2 - x1):
                    raise ValueError(f"mask {position} is {mask.dtype} {mask.shape}")
                left, top, right, bottom = self.bboxes[position]
                if not (x1 <= left < right <= x2 and y1 <= top < bottom <= y2):
                    raise ValueError(f"face box {position} is not inside its crop box")
                if clamp_box(self.bboxes[position], height, width) == NO_FACE:
                    raise ValueError(f"face box {position} is outside its frame")
