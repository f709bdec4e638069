"""What lies behind transparent pixels, of pictures and clips alike: white, a colour or a picture.

Alpha is taken as straight, not premultiplied, as PNG, ProRes 4444 and VP9 keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Background:
    """A colour, or a picture that is made to cover the frame.

    Attributes:
        pixels: uint8 BGR, (1, 1, 3) of a colour, (H, W, 3) of a picture.
    """

    pixels: np.ndarray

    def behind(self, height: int, width: int) -> np.ndarray:
        """uint8 BGR that spreads over (height, width, 3): the picture's middle, as large as covers it."""
        import cv2

        own_height, own_width = self.pixels.shape[:2]
        if (own_height, own_width) in ((1, 1), (height, width)):
            return self.pixels
        scale = max(height / own_height, width / own_width)
        size = max(round(own_width * scale), width), max(round(own_height * scale), height)
        covering = cv2.resize(
            self.pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        )
        top, left = (size[1] - height) // 2, (size[0] - width) // 2
        return covering[top : top + height, left : left + width]


WHITE = Background(np.full((1, 1, 3), 255, np.uint8))


def background_file(text: str) -> Path | None:
    """The picture that `text` names; None where it is a colour."""
    return None if text.startswith("#") else Path(text)


def over(bgra: np.ndarray, background: Background) -> np.ndarray:
    """`bgra` (H, W, 4) uint8 laid over `background`: (H, W, 3) uint8 BGR, rounded."""
    height, width = bgra.shape[:2]
    alpha = bgra[:, :, 3:].astype(np.uint16)
    blended = bgra[:, :, :3] * alpha + background.behind(height, width) * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)
