r"""Refusals: what a person can mend, in one printable line."""

import re


def printable(text: str, length: int = 2000) -> str:
    r"""`text` as one line for a terminal: what is not printable is escaped, the middle of a long line is left out.

    A file name or a setting may be a stranger's, and hold the escape codes that rewrite a screen.

    >>> printable("no\n such   file: \x1b[2J")
    'no such file: \\x1b[2J'
    """
    text = " ".join(text.split())
    if len(text) > length:
        text = f"{text[: length // 2]} ... {text[-length // 2 :]}"
    return escaped(text)


def escaped(text: str) -> str:
    r"""`text` with all but spaces, line ends and what is printable escaped."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class UserError(ValueError):
    r"""What a person can mend: one printable line with what was expected, what was found and what to do next."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def is_name(weights: str) -> bool:
    r"""Whether text weights are given by a name, `random` or a tag, and not by a path."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", weights) is not None
