r"""Data that cannot be used is refused in one line: what was expected, what was found, what to do next."""

import re
from collections.abc import Sequence

from ddpm.tools.errors import UserError

AGAIN = "fetch it again"


class DataError(UserError):
    r"""The data cannot be used."""

    def __init__(self, where: object, expected: str, got: str, advice: str):
        super().__init__(f"{where}: expected {expected}, got {got}; {advice}")


def quoted(text: object) -> str:
    r"""A text in quotes, on one line and cut after 100 characters."""
    text = repr(str(text))
    return text if len(text) <= 100 else text[:96] + "..." + text[-1]


def first_few(names: Sequence) -> str:
    r"""Up to four names, and how many more there are."""
    return ", ".join(map(str, names[:4])) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def kind_of(head: bytes) -> str:
    r"""What a file saved by mistake is, by its first bytes; an empty string for any other file."""
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)", head, re.IGNORECASE):
        return "an HTML page (a saved error or quota page)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file)"
    archives = {b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
    return next((f"a {name} archive" for magic, name in archives.items() if head.startswith(magic)), "")
