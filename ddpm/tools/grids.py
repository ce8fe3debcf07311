r"""Tensors to pictures for people: grids with the prompt beneath each picture, films, PNG text."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ddpm.tools.files import write_atomically

PAPER, INK = (255, 255, 255), (40, 40, 40)


def to_uint8(x: Tensor) -> np.ndarray:
    r"""(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, rounded and clipped."""
    x = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return x.permute(0, 2, 3, 1).byte().numpy()


def labelled_grid(
    x: Tensor, labels: Sequence[str], columns: int | None = None, side: int = 128
) -> Image.Image:
    r"""Pictures (B, 3, H, W) in [-1, 1] in rows, enlarged to about `side` pixels, each with its label beneath."""
    if len(labels) != len(x):
        raise ValueError(f"expected a label for each of {len(x)} pictures, got {len(labels)}")
    columns = min(len(x), columns or max(1, min(8, round(len(x) ** 0.5 + 0.49)))) or 1
    scale = max(1, side // x.shape[-1])
    width, height, gap = x.shape[-1] * scale, x.shape[-2] * scale, 8
    font = ImageFont.load_default(12)
    texts = [_wrapped(label, font, width) for label in labels]
    line = 14
    text_height = line * max((len(lines) for lines in texts), default=0)
    rows = -(-len(x) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(to_uint8(x), texts, strict=True)):
        left, top = (gap + i % columns * (width + gap), gap + i // columns * (height + text_height + gap))
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        for k, text in enumerate(lines):
            draw.text((left, top + height + 2 + k * line), text, INK, font)
    return sheet


def strip(frames: Sequence[Tensor], side: int = 64) -> Image.Image:
    r"""A film as one picture: one row a prompt, one column a step; frames are (B, 3, H, W) in [-1, 1]."""
    scale = max(1, side // frames[0].shape[-1])
    rows = np.concatenate([np.concatenate(list(to_uint8(frame)), axis=0) for frame in frames], axis=1)
    sheet = Image.fromarray(rows)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def save_gif(path: Path, frames: Sequence[Tensor], labels: Sequence[str], milliseconds: int = 120):
    r"""A film as a GIF of labelled grids; the last frame stays for two seconds."""
    images = [labelled_grid(frame, labels) for frame in frames]
    durations = [milliseconds] * (len(images) - 1) + [2000]
    write_atomically(
        path,
        lambda to: images[0].save(
            to, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
        ),
    )


def save_png(path: Path, image: Image.Image, text: dict[str, str] | None = None):
    r"""Write a PNG whose text chunks hold `text`: prompt, seed and settings. NUL, which ends a text, becomes U+FFFD."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode().replace("\0", "\ufffd"))
    write_atomically(path, lambda to: image.save(to, format="PNG", pnginfo=info))


def _wrapped(label: str, font, width: int, lines: int = 6) -> list[str]:
    r"""The label in lines no wider than `width` pixels, at most `lines` of them."""
    printable = "".join(c if c.isprintable() else " " for c in label[:500])
    letters = max(8, int(width / max(font.getlength("n"), 1)))
    wrapped = textwrap.wrap(printable, letters)
    while any(font.getlength(text) > width for text in wrapped) and letters > 8:
        letters -= 1
        wrapped = textwrap.wrap(printable, letters)
    return (
        wrapped
        if len(wrapped) <= lines
        else [*wrapped[: lines - 1], wrapped[lines - 1][: letters - 3] + "..."]
    )
