r"""One picture to a square of pixels; the one crop of this project."""

import contextlib
import io
import os
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm.celeba.refusals import DataError, kind_of, quoted

MIN_SIDE = 8
MAX_SIDE = 8192
MAX_PIXELS = 50_000_000
MAX_BYTES = 2**29
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class BadImage(ValueError):
    r"""One picture cannot be used; the message is a short reason, without the file's name."""


def crop_and_resize(image: Image.Image, size: int = 64, crop: int = 0) -> Image.Image:
    r"""The centre square of a picture, in RGB, at `size` x `size`: the one crop, for data and for statistics.

    CelebA's aligned photographs, 178 x 218, are cropped to the 148 x 148 in the middle (left 15, top 35).
    Figures from different crops cannot be compared. For example, a Frechet distance on 178 x 178 or on DDIM's
    128 x 128 is another quantity. The picture is turned upright by its EXIF. Transparent pixels become white. Of 16
    bits the upper 8 are kept. The resize is an antialiased bicubic filter, after a box filter where the square is at
    least six times too large.

    Args:
        image: any Pillow image.
        size: side of the result, at least 1.
        crop: side of the square that is kept, at most that of the picture; 0 means 148 for a picture of
            exactly 178 x 218, and the largest square for any other.
    Returns:
        A new RGB image, `size` x `size`; with the same bytes if the picture was one already.
    Raises:
        BadImage: floating-point pixels, or integers beyond 16 bits, because their range is unknown.
        DataError: size below 1 or crop below 0.

    >>> crop_and_resize(Image.new("L", (178, 218))).size
    (64, 64)
    """
    if size < 1 or crop < 0:
        raise DataError("crop", "size >= 1 and crop >= 0", f"size {size}, crop {crop}", "correct that")
    image = _upright(image)
    width, height = image.size
    side = min(width, height, crop or (148 if (width, height) == (178, 218) else width))
    left, top = (width - side) // 2, (height - side) // 2
    image = _rgb(image.crop((left, top, left + side, top + side)))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    image.info = {}  # the EXIF orientation is used up
    return image


def _upright(image: Image.Image) -> Image.Image:
    image = image.copy()
    with contextlib.suppress(Exception):  # Pillow raises all sorts for a broken EXIF
        ImageOps.exif_transpose(image, in_place=True)  # it turns first, and then writes the EXIF anew
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels of unknown range")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImage("integer pixels beyond 16 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    elif "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(source, size: int = 64, crop: int = 0) -> np.ndarray:
    r"""One picture by `crop_and_resize`.

    The size in the header is checked before anything is decoded, so that no picture fills the memory.

    Args:
        source: the path of a file, or its content as bytes: JPEG, PNG, WebP, BMP, GIF (its first frame) or TIFF.
        size, crop: as in `crop_and_resize`.
    Returns:
        `(size, size, 3)` uint8, 0..255.
    Raises:
        BadImage: whatever is wrong with the file, as a short reason: missing, zero bytes, an HTML page,
            truncated, below 8 or above 8,192 pixels a side, above 50 megapixels, not a picture.
        DataError: size below 1 or crop below 0.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _open_file(source) as file:
            return np.array(crop_and_resize(_open_image(file), size, crop))
    except (BadImage, DataError):
        raise
    except Exception as error:  # Pillow on damaged files: OSError, SyntaxError, struct.error, ...
        if "truncated" in str(error).lower():
            raise BadImage("truncated") from error
        raise BadImage(f"cannot be read: {type(error).__name__} {quoted(error)}") from error


def _open_file(path) -> BinaryIO:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise BadImage("a link that leads nowhere" if os.path.islink(path) else "missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a file")
    if status.st_size > MAX_BYTES:
        raise BadImage(f"too large: above {MAX_BYTES // 2**20} MiB")
    return open(path, "rb")


def _open_image(file: BinaryIO) -> Image.Image:
    r"""Read the header and no more; BadImage if there is none, or the picture is too small or too large."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(512)
        raise BadImage(kind_of(head) or ("not a picture" if head else "zero bytes")) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("too large: above 50 megapixels") from None
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small: {width} x {height}, below {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width} x {height}, above {MAX_SIDE} pixels a side or 50 megapixels")
    return image
