"""Still images → BGR frames.

Pillow and not OpenCV, because the size is known from the header before anything is decoded, and
because orientation, palettes, CMYK and animations are told apart. Transparency is laid over white,
as a page would show it.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from musetalk.config import MAX_SIDE, MIN_SIDE
from musetalk.errors import InputError
from musetalk.media.ffmpeg import check_input_file

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "WEBP", "TIFF")
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def read_image(path: Path | str) -> np.ndarray:
    """The picture in `path` as a frame: uint8 (H, W, 3) BGR, upright by its EXIF orientation.

    JPEG, PNG, WebP, BMP, GIF, TIFF and PNM; grey, 16-bit (scaled), palette and CMYK become BGR;
    transparency is laid over white; of an animation the first picture is taken.

    Raises:
        InputError: missing, empty, no image, damaged, or a side outside MIN_SIDE…MAX_SIDE.
    """
    from PIL import Image

    path = check_input_file(path, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                check_frame_size(path, "image", *image.size)
                rgb = _upright_rgb(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise _wrong_size(path, "image", "has too many pixels") from e
    except Image.UnidentifiedImageError as e:
        raise InputError(
            f"{path} is not an image that can be read", "give a JPEG, PNG or WebP picture 请提供有效的图片"
        ) from e
    except _DAMAGE as e:
        raise InputError(
            f"image {path} is damaged or truncated: {e}", "export or copy it again 请检查模板图片质量"
        ) from e
    return np.ascontiguousarray(rgb[:, :, ::-1])


def check_frame_size(path: Path, kind: str, width: int, height: int) -> None:
    """Raise InputError unless both sides are within MIN_SIDE…MAX_SIDE pixels."""
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        raise _wrong_size(path, kind, f"is {width}×{height} pixels")


def _wrong_size(path: Path, kind: str, finding: str) -> InputError:
    return InputError(
        f"{kind} {path} {finding}", f"give one whose sides are {MIN_SIDE} to {MAX_SIDE} pixels 请调整尺寸"
    )


def _upright_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) RGB."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("F", "I") or upright.mode.startswith("I;16"):
        return np.repeat(_eight_bits(np.asarray(upright))[:, :, None], 3, axis=2)
    if upright.has_transparency_data:
        return _over_white(np.asarray(upright.convert("RGBA")))
    return np.asarray(upright.convert("RGB"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey levels of 16 bits (held in integers) or of [0, 1] (held in floats) as uint8."""
    full_scale = 1.0 if values.dtype.kind == "f" else 65535.0
    return np.rint(np.clip(values / full_scale, 0.0, 1.0) * 255.0).astype(np.uint8)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[:, :, 3:].astype(np.uint16)
    blended = rgba[:, :, :3] * alpha + 255 * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)
