"""From a file's bytes to an RGB image: every kind a data set may hold, and words for what is refused."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cibr.data.dataset import SkipSample

# What Pillow decodes by itself. Others, EPS among them, would run a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ENDINGS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
MAX_BYTES = 256 << 20  # of one file: nothing larger is read
MAX_ASPECT = 100  # a resize of the short side to s pixels makes 100 s^2 of a longer one


def read_image_file(path: Path) -> bytes:
    """Raises SkipSample for what is missing, no plain file (a pipe would never end), or too large."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise SkipSample("image path that is no file")
        if found.st_size > MAX_BYTES:
            raise SkipSample("image file larger than 256 MB")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SkipSample(f"image file that cannot be opened ({type(error).__name__})") from error


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The image in RGB, upright, its first frame, on white where it is transparent.

    Raises SkipSample for what is no image, has more than `max_pixels`, one side of a pixel, or extreme proportions.
    """
    if not data:
        raise SkipSample("image of zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on oddities it copes with
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(*image.size, max_pixels)
            return _to_rgb(_upright(image))
    except SkipSample:
        raise
    except Image.DecompressionBombError as error:
        raise SkipSample("image with too many pixels") from error
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        raise SkipSample(f"unreadable image ({type(error).__name__})") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Before anything is decoded."""
    if width * height > max_pixels:
        raise SkipSample("image with too many pixels")
    short, long = sorted((width, height))
    if short < 2:
        raise SkipSample("image with a side of one pixel")
    if long > MAX_ASPECT * short:
        raise SkipSample("image more than 100 times as long as wide")


def _upright(image: Image.Image) -> Image.Image:
    """As the camera was held, if it says so."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: the picture is still there
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise SkipSample("image of floating-point numbers, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise SkipSample("image of more than 16 bits a channel")
    return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
