r"""Arrays that are computed once and kept in files: all of them first, or each when it is asked for."""

import errno
import hashlib
import math
import os
import shutil
import warnings
import weakref
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ddpm.tools.errors import UserError
from ddpm.tools.files import CannotWrite, open_own, reserve, write_atomically

VERSION = 3  # of the files' layout, of the crop and of the drawing
CHECKSUM = 4  # bytes behind an array
RESERVE = 2**30  # bytes that a large file of `Records` leaves free on its disk, for checkpoints
TOGETHER = 8  # arrays that `Records` makes in one go
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


class Records:
    r"""Arrays of one shape, by key, in a file that fills itself: each is made when it is first asked for.

    Each lies behind its bytes' CRC-32, which begins with the key. Where that does not fit, the array is not there: it
    was never written (the file has holes), a kill cut it, the disk damaged it, or another key has its place. So a file
    needs no repair, and several processes may fill it.

    Args:
        places: key -> the places in the file, counted in arrays, where its array may lie; all may be taken by others.
        make: TOGETHER keys -> their arrays. The last key is repeated where there are fewer, so that an array does not
            depend on how many others were asked for.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype,
        places: Callable[[Hashable], Sequence[int]],
        make: Callable[[list], np.ndarray],
    ):
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.places = places
        self.make = make
        self.length = CHECKSUM + math.prod(shape) * self.dtype.itemsize
        self.writes = True
        self.written = 0  # bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_own(path)
        except OSError as error:
            advice = "see that its folder is there and can be written to"
            raise CannotWrite(f"could not open {path}: {error.strerror}; {advice}") from None
        weakref.finalize(self, self.file.close)

    def __call__(self, keys: Sequence[Hashable]) -> np.ndarray:
        r"""The arrays of these keys, (len(keys), *shape)."""
        arrays = {key: self.read(key) for key in keys}
        missing = [key for key, array in arrays.items() if array is None]
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            padded = [*some, *some[-1:] * (TOGETHER - len(some))]
            for key, array in zip(some, self.make(padded), strict=False):
                arrays[key] = array.astype(self.dtype)
                self.write(key, arrays[key])
        return np.stack([arrays[key] for key in keys])

    def read(self, key: Hashable) -> np.ndarray | None:
        r"""The array of this key, or None where it is not there."""
        for place in self.places(key):
            record = self.bytes_at(place, self.length)
            if len(record) == self.length and record[:CHECKSUM] == self.checksum(key, record[CHECKSUM:]):
                return np.frombuffer(record, self.dtype, offset=CHECKSUM).reshape(self.shape)
        return None

    def write(self, key: Hashable, array: np.ndarray):
        r"""Keep an array in the first of its places that is empty, or else in the first."""
        if not self.writes:
            return
        places = self.places(key)
        content = array.tobytes()
        empty = [place for place in places if not any(self.bytes_at(place, CHECKSUM))]
        try:
            if shutil.disk_usage(self.path.parent).free < min(RESERVE, self.written):
                raise OSError(errno.ENOSPC, "the rest of its disk is left to checkpoints")
            self.file.seek((empty or places)[0] * self.length)
            self.file.write(self.checksum(key, content) + content)
            self.written += self.length
        except OSError as error:
            self.writes = False
            advice = "what it lacks is computed again whenever it is needed"
            warnings.warn(f"could not write {self.path}: {error.strerror}; {advice}", stacklevel=2)

    def bytes_at(self, place: int, count: int) -> bytes:
        self.file.seek(place * self.length)
        return self.file.read(count)

    def checksum(self, key: Hashable, content: bytes) -> bytes:
        return zlib.crc32(content, zlib.crc32(repr(key).encode())).to_bytes(CHECKSUM, "big")


def checksum(array: np.ndarray) -> bytes:
    r"""CRC-32 of an array's bytes, read a part at a time at the speed of the disk or of memory."""
    content = memoryview(array.reshape(-1).view(np.uint8))
    crc = 0
    for start in range(0, len(content), 2**24):
        crc = zlib.crc32(content[start : start + 2**24], crc)
    return crc.to_bytes(CHECKSUM, "big")
