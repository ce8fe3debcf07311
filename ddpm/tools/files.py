r"""Files that are whole or not there: written beside their place and renamed, locked, and known by their digest."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ddpm.tools.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEFTOVER = re.compile(
    r"\..+\.\d+\.[0-9a-f]{8}\.tmp"
)  # name, process, chance: several may write one file at once
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOTHING = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in an empty folder


class CannotWrite(UserError):
    r"""A file could not be written, as the system says; what was there before still is."""


def write_atomically(
    path: Path, content: bytes | Callable[[Path], None], size: int = 0, keep: Path | None = None
):
    r"""Write a file under a temporary name in its folder, then rename it: it is there whole or not at all.

    Args:
        content: bytes, or a function that writes to the path it is given.
        size: bytes that such a function will write, as far as known, for the message where there is no room for them.
        keep: where the file that was there is renamed to first.

    Raises: CannotWrite where the system refuses: a full disk, a limit, a folder that is gone, a lost network disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with _held(temporary):
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
    except Exception as error:
        number = _error_number(error)
        is_of_the_content = isinstance(error, UserError) and not isinstance(error, CannotWrite)
        if number is None or is_of_the_content:
            raise
        needed = max(size, _size(temporary)) if callable(content) else len(content)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CannotWrite(_refusal(path, number, needed)) from None
    finally:
        with contextlib.suppress(OSError):  # a folder that may no longer be written to
            temporary.unlink(missing_ok=True)


def check_new_folder(folder: str | Path, advice: str = "choose another"):
    r"""Raise UserError, with what to do next, where `folder` is a file or holds anything."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - NOTHING):
        raise UserError(f"expected a new or empty folder, got {folder}, which is there already; {advice}")


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    r"""A temporary folder beside `folder` to write to; it takes that name in the end, or goes if anything fails.

    Raises: UserError where `folder` is neither new nor empty, OSError where there is no place to write to.
    """
    check_new_folder(folder)
    folder = Path(folder).resolve()
    if os.path.ismount(folder):
        raise UserError(f"expected a folder that can be renamed, {folder} is a disk; name a new folder in it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            for name in NOTHING:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def reserve(path: Path):
    r"""Take the disk blocks of a file that has its length but holes: writing to a mapped hole on a full disk kills."""
    length = path.stat().st_size
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, length)
    elif shutil.disk_usage(path.parent).free < length:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def open_own(path: Path):
    r"""A file for reading and writing, made where it is not there. A link is refused, because it may lead anywhere."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def flock(file) -> bool | None:
    r"""Lock an open file until it is closed or its process dies: True; False: another has it; None: no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def remove_leftovers(folder: Path):
    r"""Remove the temporary files of processes that were killed; those of the living are locked."""
    for path in folder.glob(".*.tmp"):
        if LEFTOVER.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "rb+") as file:
                if flock(file):
                    path.unlink()


def check_not_packed(path: Path):
    r"""ValueError for a zip that holds more than its length: what torch.save writes is not packed, a bomb is."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
                raise ValueError("it is packed, which torch.save never does")


def digest_of(value) -> str:
    r"""SHA-256 of tensors and plain values in dictionaries and lists; the order of a dictionary does not count.

    >>> digest_of({"a": torch.zeros(2), "b": 1}) == digest_of({"b": 1, "a": torch.zeros(2)}) != digest_of({"a": 0})
    True
    """
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for item in sorted(value.items(), key=lambda item: repr(item[0])):
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)};".encode())
            for part in value:
                add(part)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    add(value)
    return digest.hexdigest()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    r"""Within this context `path` is there and locked, so that nobody takes it for a leftover."""
    if fcntl is None:
        yield  # where an open file cannot be renamed
        return
    while True:
        with open(path, "wb") as file:  # a cleaner may come between this and the lock, and take the file away
            if (
                flock(file) is not False
                and path.exists()
                and os.path.samestat(os.fstat(file.fileno()), path.stat())
            ):
                yield
                return


def _error_number(error: BaseException | None) -> int | None:
    r"""The system's error number behind an exception; torch and safetensors wrap it in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if wrapped := re.search(r"\(os error (\d+)\)", str(error)):
            return int(wrapped[1])
        error = error.__context__
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refusal(path: Path, number: int, needed: int) -> str:
    reason = f"could not write {path}: {os.strerror(number)}"
    if number not in NO_ROOM:
        return f"{reason}; see that its folder is there and can be written to"
    free = shutil.disk_usage(path.parent).free
    room = f"it needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
    return f"{reason} ({room}); make room there or raise the limit"
