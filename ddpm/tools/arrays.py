r"""Arrays that are computed once and kept in a folder of memory-mapped files."""

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ddpm.tools.errors import UserError
from ddpm.tools.files import reserve, write_atomically

VERSION = 3  # of the files' layout, of the crop and of the drawing
CHECKSUM = 4  # bytes behind the array
Progress = Callable[[Iterable, int, str], Iterable]


def silent(things: Iterable, total: int, label: str) -> Iterable:
    r"""The progress display of a caller that wants none."""
    return things


def key_of(*parts) -> str:
    r"""A short hash of everything a cache depends on."""
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:16]


def cached_array(path: Path, shape: tuple[int, ...], dtype, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    r"""The array in `path`, read-only and memory-mapped; `fill` writes it first where the file is not there.

    Raises: UserError where the file is another array, or its checksum does not fit.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)

        def build(temporary: Path):
            array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            reserve(temporary)
            fill(array)
            array.flush()
            with open(temporary, "ab") as file:
                file.write(checksum(array))

        write_atomically(path, build, math.prod(shape) * np.dtype(dtype).itemsize)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # no pickles, and no more than the file holds
        with open(path, "rb") as file:
            file.seek(-CHECKSUM, os.SEEK_END)
            stored = file.read()
    except (ValueError, OSError, OverflowError) as error:
        raise UserError(
            f"expected an array of numbers in the cache {path}, got {error}; delete the file"
        ) from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"expected {shape} {np.dtype(dtype)} in the cache {path}, got {array.shape} {array.dtype}; delete the file"
        )
    if stored != checksum(array):
        raise UserError(f"the cache {path} is damaged: its checksum does not fit; delete the file")
    return array


def checksum(array: np.ndarray) -> bytes:
    r"""CRC-32 of an array's bytes, read a part at a time at the speed of the disk or of memory."""
    content = memoryview(array.reshape(-1).view(np.uint8))
    crc = 0
    for start in range(0, len(content), 2**24):
        crc = zlib.crc32(content[start : start + 2**24], crc)
    return crc.to_bytes(CHECKSUM, "big")
