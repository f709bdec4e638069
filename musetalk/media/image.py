"""Still images → BGR frames.

Pillow and not OpenCV, because the size is known from the header before anything is decoded, and
because orientation, palettes, CMYK, colour profiles and animations are told apart. Transparency is laid
over white, as a page would show it, unless a background is given.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from musetalk.config import MAX_SIDE, MIN_SIDE
from musetalk.errors import InputError
from musetalk.media.ffmpeg import check_input_file
from musetalk.media.kind import is_heif
from musetalk.media.layers import WHITE, Background, background_file, over

if TYPE_CHECKING:
    from PIL import Image, ImageCms

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "WEBP", "TIFF", "AVIF")
HEIF_PACKAGE = "pillow-heif==1.8.1"
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # whose further pictures follow in time
SAME_COLOUR = 1  # levels by which a profile's colours may differ from sRGB's and still be left as they are
_COLOUR = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")
_ORIENTATION = 0x0112  # EXIF tag
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


log = logging.getLogger(__name__)


def read_image(
    path: Path | str, *, max_side: int | None = None, background: Background = WHITE
) -> np.ndarray:
    """The picture in `path` as a frame: uint8 (H, W, 3) BGR, upright by its EXIF orientation.

    JPEG, PNG, WebP, BMP, GIF, TIFF, PNM, AVIF and, with the package for it, HEIC; grey, 16-bit (scaled),
    palette and CMYK become BGR, colours of another profile sRGB's; of an animation the first picture is
    taken.

    Args:
        max_side: pixels; a larger picture is made smaller.
        background: what shows through where it is transparent.

    Raises:
        InputError: missing, empty, no image, damaged, or a side outside MIN_SIDE…MAX_SIDE.
    """
    import cv2

    frame = _read(check_input_file(path, "image"), background)
    height, width = frame.shape[:2]
    size = shrunk_size(width, height, max_side)
    return frame if size == (width, height) else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def check_background(text: str) -> Path | None:
    """The picture that a background names; None where it is a colour.

    Raises:
        InputError: there is no such picture.
    """
    path = background_file(text)
    if path is None:
        return None
    try:
        return check_input_file(path, "background")
    except InputError as e:
        raise InputError(e.message, "give a colour as #rrggbb, or a picture's path 颜色或图片路径") from e


def read_background(text: str) -> Background:
    """The background that ``#rrggbb`` or a picture's path says.

    Raises:
        InputError: neither.
    """
    path = check_background(text)
    if path is not None:
        return Background(read_image(path))
    found = _COLOUR.fullmatch(text)
    if found is None:
        raise InputError(f"background is {text[:40]!r}", "give a colour as #rrggbb, or a picture's path")
    red, green, blue = (int(digits, 16) for digits in found.groups())
    return Background(np.array([[[blue, green, red]]], np.uint8))


def shrunk_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Width and height in the same proportion with no side above `max_side`; as they are where none is."""
    longer = max(width, height)
    if max_side is None or longer <= max_side:
        return width, height
    return max(round(width * max_side / longer), 1), max(round(height * max_side / longer), 1)


def image_size(path: Path | str) -> tuple[int, int]:
    """Width and height that `read_image` will give without `max_side`, from the header alone.

    Raises:
        InputError: as `read_image`, but for what only decoding shows.
    """
    path = check_input_file(path, "image")
    with _opened(path) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


def _read(path: Path, background: Background) -> np.ndarray:
    with _opened(path) as image:
        if image.format in ANIMATIONS and getattr(image, "is_animated", False):
            log.warning("%s is animated, its first picture is taken 动图只取第一帧；请转为视频", path)
        return np.ascontiguousarray(_upright_bgr(image, background, path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture opened by Pillow; whatever goes wrong with it, here or in the block, becomes InputError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _heif_image(path) if is_heif(path) else Image.open(path, formats=FORMATS) as image:
                check_frame_size(path, "image", *image.size)
                yield image
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


def _heif_image(path: Path) -> Image.Image:
    """A HEIC picture, which Pillow reads with another package only."""
    try:
        import pillow_heif
    except ImportError as e:
        raise InputError(
            f"image {path} is HEIC, which needs the Python package pillow-heif",
            f"run: pip install {HEIF_PACKAGE}, or save it as JPEG 请安装或转换为JPEG",
        ) from e
    return pillow_heif.open_heif(path).to_pillow()


def check_frame_size(path: Path, kind: str, width: int, height: int) -> None:
    """Raise InputError unless both sides are within MIN_SIDE…MAX_SIDE pixels."""
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        raise _wrong_size(path, kind, f"is {width}×{height} pixels")


def _wrong_size(path: Path, kind: str, finding: str) -> InputError:
    return InputError(
        f"{kind} {path} {finding}", f"give one whose sides are {MIN_SIDE} to {MAX_SIDE} pixels 请调整尺寸"
    )


def _upright_bgr(image: Image.Image, background: Background, path: Path) -> np.ndarray:
    """uint8 (H, W, 3) BGR."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("F", "I") or upright.mode.startswith("I;16"):
        return np.repeat(_eight_bits(np.asarray(upright))[:, :, None], 3, axis=2)
    profile = image.info.get("icc_profile")
    if upright.has_transparency_data:
        rgba = np.asarray(upright.convert("RGBA"))
        opaque = upright.convert("L" if upright.mode == "LA" else "RGB")
        colours = _to_srgb(opaque, profile, path).convert("RGB") if profile else None
        bgra = (rgba if colours is None else np.dstack([np.asarray(colours), rgba[:, :, 3]]))[
            :, :, [2, 1, 0, 3]
        ]
        return over(bgra, background)
    managed = _to_srgb(upright, profile, path) if profile else upright
    return np.asarray(managed.convert("RGB"))[:, :, ::-1]


def _to_srgb(image: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """`image` in sRGB's colours by its ICC `profile`; as it is where the profile is sRGB's or of no use."""
    from PIL import ImageCms

    held = image if image.mode in ("RGB", "CMYK", "L", "LAB") else image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), held.mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as e:
        log.warning("the colour profile of %s can't be used: %s", path, e)
        return image
    if held.mode == "RGB" and _is_same(transform):
        return image
    converted = ImageCms.applyTransform(held, transform)
    assert converted is not None, "it isn't done in place"
    return converted


def _is_same(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform leaves RGB colours as they are, tried on a lattice of them."""
    from PIL import Image, ImageCms

    levels = np.linspace(0, 255, 6).astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 36, 3)
    shown = ImageCms.applyTransform(Image.fromarray(lattice), transform)
    return bool(np.abs(np.asarray(shown).astype(int) - lattice).max() <= SAME_COLOUR)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey levels of 16 bits (held in integers) or of [0, 1] (held in floats) as uint8."""
    full_scale = 1.0 if values.dtype.kind == "f" else 65535.0
    return np.rint(np.clip(values / full_scale, 0.0, 1.0) * 255.0).astype(np.uint8)
