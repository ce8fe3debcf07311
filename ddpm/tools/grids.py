r"""Pictures for people: grids with the prompt beneath each picture, films, text within a PNG."""

import json
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ddpm.tools.files import write_atomically

PAPER = (56, 56, 56)  # a grid glares neither on a white page nor on a black one
INK = (235, 235, 235)
GAP = 8  # pixels between pictures
LINE = 14  # pixels from one line of a label to the next
MOST_LINES = 6  # of a label


def to_uint8(x: Tensor) -> np.ndarray:
    r"""(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, rounded and clipped."""
    x = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return x.permute(0, 2, 3, 1).byte().numpy()


def labelled_grid(
    x: Tensor, labels: Sequence[str], columns: int | None = None, side: int = 128
) -> Image.Image:
    r"""Pictures (B, 3, H, W) in [-1, 1] in rows, enlarged to about `side` pixels, each with its label beneath.

    Without `columns` the grid is nearly square, and at most 8 pictures wide.
    """
    if len(labels) != len(x):
        raise ValueError(f"expected a label for each of {len(x)} pictures, got {len(labels)}")
    if columns is None:
        columns = min(8, round(len(x) ** 0.5 + 0.49))
    columns = max(1, min(columns, len(x)))
    scale = max(1, side // x.shape[-1])
    width, height = x.shape[-1] * scale, x.shape[-2] * scale
    font = ImageFont.load_default(12)
    texts = [_wrapped(label, font, width) for label in labels]
    row_height = height + LINE * max((len(lines) for lines in texts), default=0) + GAP
    rows = -(-len(x) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * row_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(to_uint8(x), texts, strict=True)):
        row, column = divmod(i, columns)
        left = GAP + column * (width + GAP)
        top = GAP + row * row_height
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        for k, text in enumerate(lines):
            draw.text((left, top + height + 2 + k * LINE), text, INK, font)
    return sheet


def strip(frames: Sequence[Tensor], side: int = 64) -> Image.Image:
    r"""A film as one picture: one row a prompt, one column a step; frames are (B, 3, H, W) in [-1, 1]."""
    scale = max(1, side // frames[0].shape[-1])
    columns = [np.concatenate(to_uint8(frame), axis=0) for frame in frames]
    sheet = Image.fromarray(np.concatenate(columns, axis=1))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def save_gif(
    path: Path,
    frames: Sequence[Tensor],
    labels: Sequence[str],
    milliseconds: int = 120,
    text: dict | None = None,
):
    r"""A film as a GIF of labelled grids; the last frame stays for two seconds. `text` is its comment, as JSON."""
    first, *others = [labelled_grid(frame, labels) for frame in frames]
    durations = [milliseconds] * len(others) + [2000]
    film = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    film |= {"comment": json.dumps(text)} if text else {}
    write_atomically(path, partial(first.save, format="GIF", **film))


def save_png(path: Path, image: Image.Image, text: dict[str, str] | None = None):
    r"""Write a PNG whose text chunks hold `text`: prompt, seed and settings. NUL, which ends a text, becomes U+FFFD."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode().replace("\0", "\ufffd"))
    write_atomically(path, partial(image.save, format="PNG", pnginfo=info))


def save_each(folder: Path, x: Tensor, texts: Sequence[dict[str, str]], first: int = 0):
    r"""Write each of the pictures (B, 3, H, W) in [-1, 1] as a PNG of its number, from `first`, with its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, text) in enumerate(zip(to_uint8(x), texts, strict=True), first):
        save_png(folder / f"{i:04d}.png", Image.fromarray(picture), text)


def save_film(path: Path, frames: Sequence[Tensor], labels: Sequence[str], text: dict[str, str]):
    r"""A film as a GIF, or as one PNG with a column for each step, by the file's name."""
    if path.suffix.lower() == ".gif":
        save_gif(path, frames, labels, text=text)
    else:
        save_png(path, strip(frames), text)


def _wrapped(label: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    r"""The label in at most `MOST_LINES` lines, each no wider than `width` pixels."""
    printable = "".join(c if c.isprintable() else " " for c in label[:500])
    letters = max(8, int(width / max(font.getlength("n"), 1)))
    lines = textwrap.wrap(printable, letters)
    while letters > 8 and any(font.getlength(line) > width for line in lines):
        letters -= 1
        lines = textwrap.wrap(printable, letters)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][: letters - 3] + "..."]
    return lines
