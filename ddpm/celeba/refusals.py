r"""What is told of data that cannot be used: one line, with what was expected, what came and what to do next."""

import re
from collections.abc import Sequence
from pathlib import Path

from ddpm.tools.errors import UserError


class DataError(UserError):
    r"""The data cannot be used; one line: what was expected, what came, what to do next."""


def _wrong(where, expected: str, got: str, next_step: str) -> DataError:
    return DataError(f"{where}: expected {expected}, got {got}; {next_step}")


def _short(text: str) -> str:
    text = repr(text)  # one line, whatever is in it
    return text if len(text) <= 100 else text[:96] + "..." + text[-1]


def _few(names: Sequence) -> str:
    return ", ".join(map(str, names[:4])) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _head_of(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(512)


def _kind(head: bytes) -> str:
    r"""What a file's first bytes show it to be, of the things saved by mistake; else an empty string."""
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)", head, re.IGNORECASE):
        return "an HTML page (a saved error or quota page)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file)"
    archives = {b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
    return next((f"a {name} archive" for magic, name in archives.items() if head.startswith(magic)), "")
