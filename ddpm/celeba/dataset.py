r"""What is computed once: pictures decoded, latents encoded, captions embedded; memory-mapped files in one folder.

Each file's name holds a hash of everything its content depends on, so a change makes a new file and never a wrong one.
A file appears under its name only when it is whole. Pixels, latents and states stay in the files; in memory a picture
costs its name and its caption."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.captions import describe
from ddpm.celeba.faces import draw_many, drawn_rows
from ddpm.celeba.images import BadImage, read_image
from ddpm.celeba.lists import TEST, TRAIN, VALID, ImageTable, open_table
from ddpm.config import Config
from ddpm.tools.arrays import Progress, cached_array, key_of, silent
from ddpm.tools.errors import UserError
from ddpm.tools.files import write_atomically
from ddpm.tools.strict_json import parse_json

PER_ROW = 4  # drawn faces that share one row of attributes, and so one caption


@dataclass(frozen=True)
class Pictures:
    r"""A data set ready to train on.

    Attributes:
        pixels: (N, S, S, 3) uint8, memory-mapped; a row of zeros where the picture could not be read.
        good: (N,) bool, whether the picture could be read.
        split: (N,) uint8, 0 train, 1 valid, 2 test.
        attributes: (N, 40) uint8, or None where the data came with captions.
        captions: one sentence a picture, or None.
        bad: (file, reason) of what was skipped.
        key: names this very data in other caches.
    """

    pixels: np.ndarray
    good: np.ndarray
    split: np.ndarray
    attributes: np.ndarray | None
    captions: tuple[str, ...] | None
    bad: tuple[tuple[str, str], ...]
    key: str

    def rows(self, split: int) -> np.ndarray:
        r"""Numbers of the readable pictures of a split."""
        return np.flatnonzero((self.split == split) & self.good)

    def subset(self, rows: np.ndarray) -> "Pictures":
        r"""These rows as a data set of their own; `bad` is empty, because a subset skips nothing itself."""
        return Pictures(
            pixels=self.pixels[rows],
            good=self.good[rows],
            split=self.split[rows],
            attributes=None if self.attributes is None else self.attributes[rows],
            captions=None if self.captions is None else tuple(self.captions[i] for i in rows),
            bad=(),
            key=key_of(self.key, "rows", rows.tolist()),
        )

    def caption(self, i: int, seed: int, variant: int = 0) -> str:
        r"""Training caption of picture i: its own sentence, or its attributes told in wording number `variant`.

        The wording follows from the attributes, not from the picture: equal rows share their captions, and each
        is embedded once.
        """
        if self.captions is not None:
            return self.captions[i]
        row = self.attributes[i]
        return describe(row, seed=[seed, variant, *np.packbits(row).tolist()])

    def full_caption(self, i: int) -> str:
        r"""The fixed caption of picture i, for validation."""
        return self.captions[i] if self.captions is not None else describe(self.attributes[i])

    def batch(self, rows: np.ndarray, flip: Tensor | None = None) -> Tensor:
        r"""Pictures as (B, 3, S, S) float32 in [-1, 1], mirrored where `flip` (B,) says so."""
        x = torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x if flip is None else torch.where(flip[:, None, None, None], x.flip(3), x)


def open_data(config: Config) -> ImageTable | None:
    r"""The table of the run's data folder, or None for drawn faces."""
    return None if config.training.data == "drawn" else open_table(config.training.data)


def load_pictures(
    config: Config, table: ImageTable | None, folder: Path, progress: Progress = silent
) -> Pictures:
    r"""The run's data set, decoded or drawn at its size; `table` is what `open_data` found."""
    t, size = config.training, config.model.image_size
    if table is None:
        return drawn_pictures(folder, t.drawn_images, t.seed, size, progress)
    return photographs(folder, table, size, t.crop, t.max_bad_images, progress)


def drawn_pictures(
    folder: Path, count: int, seed: int, size: int = 64, progress: Progress = silent
) -> Pictures:
    r"""`count` drawn faces: 90 % train, 5 % valid, 5 % test.

    They are split by groups of PER_ROW pictures that share a row of attributes. Rows are drawn independently, so equal
    ones may fall into two splits by chance; the evaluation counts which prompts are unseen. Of fewer than 20 PER_ROW
    pictures the last tenth is valid, which may cut a group, and none is test.
    """
    attributes = drawn_rows(count, seed, PER_ROW)
    first = next(draw_many(attributes, seed, size))  # another way of drawing is another cache
    key = key_of(
        "drawn", count, seed, size, hashlib.sha256(attributes.tobytes() + first.tobytes()).hexdigest()
    )

    def fill(pixels: np.ndarray):
        for i, face in enumerate(progress(draw_many(attributes, seed, size), count, "drawing faces")):
            pixels[i] = face

    pixels = cached_array(folder / f"pictures-{key}.npy", (count, size, size, 3), np.uint8, fill)
    part = np.arange(count) // PER_ROW % 20
    split = np.where(part == 18, VALID, np.where(part == 19, TEST, TRAIN)).astype(np.uint8)
    if count < 20 * PER_ROW:
        split[-max(1, count // 10) :] = VALID
    return Pictures(pixels, np.ones(count, bool), split, attributes, None, (), key)


def photographs(
    folder: Path,
    table: ImageTable,
    size: int = 64,
    crop: int = 0,
    max_bad: float = 0.01,
    progress: Progress = silent,
) -> Pictures:
    r"""The pictures of a table that `data.open_table` read, each decoded once.

    Unreadable ones are skipped and named in `bad`; UserError when they are more than the share `max_bad`.
    """
    stats = [os.stat(table.root / name) for name in table.files]
    key = key_of(
        "photographs",
        size,
        crop,
        [(n, s.st_size, s.st_mtime_ns) for n, s in zip(table.files, stats, strict=True)],
    )
    listing = folder / f"pictures-{key}.json"

    def fill(pixels: np.ndarray):
        bad = _decode(table, pixels, size, crop, max_bad, progress)
        write_atomically(listing, json.dumps(bad).encode())

    path = folder / f"pictures-{key}.npy"
    if path.exists() and not listing.exists():  # in this order: the listing is written first
        path.unlink(missing_ok=True)
    pixels = cached_array(path, (len(table), size, size, 3), np.uint8, fill)
    try:
        bad = tuple((name, reason) for name, reason in parse_json(listing.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"expected skipped pictures and reasons in {listing}, got {error}; delete the file"
        ) from None
    _refuse_bad(table, bad, max_bad, of=len(table))
    skipped = {name for name, _ in bad}
    good = np.array([name not in skipped for name in table.files])
    pictures = Pictures(pixels, good, table.split, table.attributes, table.captions, bad, key)
    if not len(pictures.rows(TRAIN)):
        raise UserError(
            f"expected pictures of the train split in {table.root}, found none; see the split or partition file"
        )
    return pictures


def _decode(
    table: ImageTable, pixels: np.ndarray, size: int, crop: int, max_bad: float, progress: Progress
) -> list:
    r"""Fill `pixels`; Pillow leaves Python's lock while it decodes, so threads are enough; each takes a run of them."""
    threads = os.cpu_count() or 1

    def some(rows: range) -> list:
        bad = []
        for i in rows:
            try:
                pixels[i] = read_image(table.root / table.files[i], size, crop)
            except BadImage as error:
                bad.append((table.files[i], str(error)))
        return bad

    bad, step = [], 128 * threads
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(table), step)
        for begin in progress(starts, len(starts), f"decoding pictures, {step} at a time"):
            end = min(begin + step, len(table))
            runs = [range(first, min(first + 128, end)) for first in range(begin, end, 128)]
            bad += [one for found in pool.map(some, runs) for one in found]
            _refuse_bad(table, bad, max_bad, of=len(table))
    return bad


def _refuse_bad(table: ImageTable, bad: Sequence, max_bad: float, of: int):
    if len(bad) > max_bad * of:
        few = ", ".join(f"{name} ({reason})" for name, reason in bad[:3])
        raise UserError(
            f"expected at most {max_bad:.1%} unreadable pictures of {of} in {table.root}, got {len(bad)} so far: "
            f"{few}; mend them, or raise --max-bad-images"
        )
