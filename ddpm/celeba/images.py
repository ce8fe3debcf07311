r"""One picture file to a square of pixels; the one crop of this project."""

import os
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpm.celeba.refusals import DataError, _kind, _short, _wrong


class BadImage(ValueError):
    r"""One picture cannot be used; the message is a short reason, without the file's name."""


# ----------------------------------------------------------------------------------------------- pictures

MIN_SIDE, MAX_SIDE, MAX_PIXELS, MAX_BYTES = 8, 8192, 50_000_000, 2**29
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
TURNS = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def crop_and_resize(image: Image.Image, size: int = 64, crop: int = 0) -> Image.Image:
    r"""The centre square of a picture, in RGB, at `size` x `size`: the one crop, for data and for statistics.

    CelebA's aligned photographs, 178 x 218, are cropped to the 148 x 148 in the middle (left 15, top 35).
    Numbers from different crops do not compare: a Frechet distance on 178 x 178 or on DDIM's 128 x 128 is
    another quantity. The picture is turned upright by its EXIF; what is transparent becomes white; of 16 bits
    the upper 8 are kept. Resized by an antialiased bicubic filter, after a box filter where the square is at
    least six times too large.

    Args:
        image: any Pillow image.
        size: side of the result, at least 1.
        crop: side of the square that is kept, never more than the picture has; 0 means 148 for a picture of
            exactly 178 x 218, and the largest square for any other.
    Returns:
        A new RGB image, `size` x `size`; with the same bytes if the picture was one already.
    Raises:
        BadImage: floating-point pixels, or integers beyond 16 bits: their range is unknown.
        DataError: size below 1 or crop below 0.

    >>> crop_and_resize(Image.new("L", (178, 218))).size
    (64, 64)
    """
    if size < 1 or crop < 0:
        raise _wrong("crop", "size >= 1 and crop >= 0", f"size {size}, crop {crop}", "correct that")
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
    image.load()  # Pillow itself turns a TIFF when it loads one
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # broken EXIF, of which Pillow raises all sorts, does not make a picture bad
        return image
    return image if turn is None else image.transpose(turn)


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


def read_image(path, size: int = 64, crop: int = 0) -> np.ndarray:
    r"""Reads one picture by `crop_and_resize`.

    The size in the header is checked before anything is decoded: no picture fills the memory.

    Args:
        path: the file: JPEG, PNG, WebP, BMP, GIF (its first frame) or TIFF.
        size, crop: as in `crop_and_resize`.
    Returns:
        `(size, size, 3)` uint8, 0..255.
    Raises:
        BadImage: whatever is wrong with the file, as a short reason: missing, zero bytes, an HTML page,
            truncated, below 8 or above 8,192 pixels a side, above 50 megapixels, not a picture.
        DataError: size below 1 or crop below 0.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise BadImage("not a file" if not stat.S_ISREG(status.st_mode) else "zero bytes")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"too large: above {MAX_BYTES // 2**20} MiB")
        with open(path, "rb") as file:
            return np.array(crop_and_resize(_open_image(file), size, crop))
    except (BadImage, DataError):
        raise
    except FileNotFoundError:
        raise BadImage("missing") from None
    except Exception as error:  # Pillow on damaged files: OSError, SyntaxError, struct.error, ...
        if "truncated" in str(error).lower():
            raise BadImage("truncated") from error
        raise BadImage(f"cannot be read: {type(error).__name__} {_short(str(error))}") from error


def _open_image(file: BinaryIO) -> Image.Image:
    r"""Reads the header and no more; BadImage if it is none, or of a picture too small or too large."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        raise BadImage(_kind(file.read(512)) or "not a picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("too large: above 50 megapixels") from None
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small: {width} x {height}, below {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width} x {height}, above {MAX_SIDE} pixels a side or 50 megapixels")
    return image
