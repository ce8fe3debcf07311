r"""What is computed once: pictures decoded, latents encoded, captions embedded; memory-mapped files in one folder.

Each file's name holds a hash of everything its content depends on, so a change makes a new file and never a wrong one.
A file appears under its name only when it is whole. Pixels, latents and states stay in the files; in memory a picture
costs its name and its caption.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.captions import describe
from ddpm.config import Config, UserError, parse_json
from ddpm.data import TEST, TRAIN, VALID, BadImage, ImageTable, open_table, read_image
from ddpm.faces import draw_many, drawn_rows
from ddpm.files import reserve, write_atomically
from ddpm.model import autocast
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.vae import KLVAE, DiagonalGaussian

VERSION = 2  # of the files' layout, of the crop and of the drawing
AT_ONCE = 64  # pictures encoded, and captions embedded, in one go
PER_ROW = 4  # drawn faces that share one row of attributes, and so one caption
Progress = Callable[[Iterable, int, str], Iterable]


def silent(things: Iterable, total: int, label: str) -> Iterable:
    r"""The progress display of a caller that wants none."""
    return things


def key_of(*parts) -> str:
    r"""A short hash of everything a cache depends on."""
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:16]


def cached_array(path: Path, shape: tuple[int, ...], dtype, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    r"""The array in `path`, read-only and memory-mapped; `fill` writes it first where the file is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)

        def build(temporary: Path):
            array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            reserve(temporary)
            fill(array)
            array.flush()

        write_atomically(path, build, math.prod(shape) * np.dtype(dtype).itemsize)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # no pickles, and no more than the file holds
    except (ValueError, OSError, OverflowError) as error:
        raise UserError(f"expected an array of numbers in the cache {path}, got {error}; delete the file") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"expected {shape} {np.dtype(dtype)} in the cache {path}, got {array.shape} {array.dtype}; delete the file"
        )
    return array


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


def load_pictures(config: Config, table: ImageTable | None, folder: Path, progress: Progress = silent) -> Pictures:
    r"""The run's data set, decoded or drawn at its size; `table` is what `open_data` found."""
    t, size = config.training, config.model.image_size
    if table is None:
        return drawn_pictures(folder, t.drawn_images, t.seed, size, progress)
    return photographs(folder, table, size, t.crop, t.max_bad_images, progress)


def drawn_pictures(folder: Path, count: int, seed: int, size: int = 64, progress: Progress = silent) -> Pictures:
    r"""`count` drawn faces: 90 % train, 5 % valid, 5 % test.

    They are split by groups of PER_ROW pictures that share a row of attributes. Rows are drawn independently, so equal
    ones may fall into two splits by chance; the evaluation counts which prompts are unseen. Of fewer than 20 PER_ROW
    pictures the last tenth is valid, which may cut a group, and none is test.
    """
    attributes = drawn_rows(count, seed, PER_ROW)
    first = next(draw_many(attributes, seed, size))  # another way of drawing is another cache
    key = key_of("drawn", count, seed, size, hashlib.sha256(attributes.tobytes() + first.tobytes()).hexdigest())

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
    folder: Path, table: ImageTable, size: int = 64, crop: int = 0, max_bad: float = 0.01, progress: Progress = silent
) -> Pictures:
    r"""The pictures of a table that `data.open_table` read, each decoded once.

    Unreadable ones are skipped and named in `bad`; UserError when they are more than the share `max_bad`.
    """
    stats = [os.stat(table.root / name) for name in table.files]
    key = key_of(
        "photographs", size, crop, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(table.files, stats, strict=True)]
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
        raise UserError(f"expected skipped pictures and reasons in {listing}, got {error}; delete the file") from None
    _refuse_bad(table, bad, max_bad, of=len(table))
    skipped = {name for name, _ in bad}
    good = np.array([name not in skipped for name in table.files])
    pictures = Pictures(pixels, good, table.split, table.attributes, table.captions, bad, key)
    if not len(pictures.rows(TRAIN)):
        raise UserError(
            f"expected pictures of the train split in {table.root}, found none; see the split or partition file"
        )
    return pictures


def _decode(table: ImageTable, pixels: np.ndarray, size: int, crop: int, max_bad: float, progress: Progress) -> list:
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


@dataclass(frozen=True)
class Latents:
    r"""Every picture and its mirror image as the VAE sees them.

    Attributes: `moments`, (N, 2, 2, c, h, w) float16, memory-mapped: picture, mirrored or not, mu or logvar.
    """

    moments: np.ndarray

    def gaussian(self, rows: np.ndarray, flip: Tensor) -> DiagonalGaussian:
        r"""q(z | x) of some pictures, mirrored where `flip` (B,) says so; not scaled."""
        mu, logvar = torch.from_numpy(self.moments[rows, flip.long().numpy()]).float().unbind(1)
        return DiagonalGaussian(mu, logvar)


@torch.no_grad()
def encode_latents(
    folder: Path, vae: KLVAE, pictures: Pictures, precision: str = "fp32", progress: Progress = silent,
    batch: int = AT_ONCE,
) -> Latents:  # fmt: skip
    r"""Encode all pictures, both ways round, once."""
    device = next(vae.parameters()).device
    digest = hashlib.sha256()
    for _, tensor in sorted(vae.state_dict().items()):
        digest.update(tensor.cpu().contiguous().numpy())
    count, side = len(pictures.pixels), pictures.pixels.shape[1] // vae.factor
    key = key_of("latents", pictures.key, digest.hexdigest(), precision)

    def fill(moments: np.ndarray):
        for begin in progress(range(0, count, batch), -(-count // batch), f"encoding pictures, {batch} at a time"):
            x = pictures.batch(np.arange(begin, min(begin + batch, count))).to(device)
            for flipped, view in enumerate((x, x.flip(3))):
                with autocast(device, precision):
                    z = vae.encode(view.contiguous(memory_format=torch.channels_last))
                both = torch.stack([z.mu, z.logvar], dim=1)
                moments[begin : begin + batch, flipped] = both.float().cpu().numpy()

    shape = (count, 2, 2, vae.latent_channels, side, side)
    return Latents(cached_array(folder / f"latents-{key}.npy", shape, np.float16, fill))


class Texts:
    r"""Sentences to context vectors, each distinct sentence embedded once, the empty one among them.

    Callable: sentences -> (B, 77, 512) float32. When `limit_gb` is less than the file would take, sentences go through
    the tower at every call instead. In bf16 a CPU with matrix units embeds more than three times as many a second, and
    of what tells one sentence from another a hundredth is rounded away.
    """

    def __init__(
        self, folder: Path, tower: TextTower, sentences: Iterable[str], precision: str = "fp32", limit_gb: float = 8.0,
        progress: Progress = silent, batch: int = AT_ONCE,
    ):  # fmt: skip
        self.tower, self.precision = tower, precision
        self.device = next(tower.parameters(), torch.empty(0)).device
        distinct = sorted({"", *sentences})
        self.cached = len(distinct) * TOKENS * WIDTH * 2 <= limit_gb * 2**30
        if not self.cached:
            return
        self.row = {sentence: i for i, sentence in enumerate(distinct)}
        key = key_of("texts", tower.fingerprint(), precision, distinct)

        def fill(states: np.ndarray):
            starts = range(0, len(distinct), batch)
            for begin in progress(starts, len(starts), f"embedding captions, {batch} at a time"):
                states[begin : begin + batch] = self.embed(distinct[begin : begin + batch]).cpu().numpy()

        shape = (len(distinct), TOKENS, WIDTH)
        self.states = cached_array(folder / f"texts-{key}.npy", shape, np.float16, fill)

    def embed(self, sentences: Sequence[str]) -> Tensor:
        r"""Through the tower."""
        with autocast(self.device, self.precision):
            return self.tower(list(sentences))

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        if not self.cached or any(s not in self.row for s in sentences):
            return self.embed(sentences)
        return torch.from_numpy(self.states[[self.row[s] for s in sentences]]).float()
