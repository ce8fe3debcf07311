r"""A data set ready to train on: every picture decoded or drawn once, into a memory-mapped file."""

import contextlib
import hashlib
import json
import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.captions import describe, plain_words, vocabulary
from ddpm.celeba.faces import draw_many, drawn_rows, drawn_split
from ddpm.celeba.images import BadImage, read_image
from ddpm.celeba.lists import TRAIN, VALID, ImageTable, open_table
from ddpm.celeba.refusals import DataError
from ddpm.config import Config
from ddpm.tools.arrays import Progress, cached_array, checksum, key_of, silent
from ddpm.tools.command import say
from ddpm.tools.errors import UserError
from ddpm.tools.files import write_atomically
from ddpm.tools.strict_json import parse_json

IN_MEMORY = "pictures in memory"  # of a `fingerprint`: no folder has them
AT_A_TIME = 16  # pictures that one thread decodes before it reports


@dataclass(frozen=True)
class Pictures:
    r"""N pictures of side S with what is known of each.

    Attributes:
        pixels: (N, S, S, 3) uint8, memory-mapped; a row of zeros where the picture could not be read.
        good: (N,) bool, whether the picture could be read.
        split: (N,) uint8, 0 train, 1 valid, 2 test.
        attributes: (N, 40) uint8, or None where the data has captions.
        captions: one or more wordings a picture, or None.
        bad: (file, reason) of what was skipped.
        key: the name of this data in other caches.
    """

    pixels: np.ndarray
    good: np.ndarray
    split: np.ndarray
    attributes: np.ndarray | None
    captions: tuple[tuple[str, ...], ...] | None
    bad: tuple[tuple[str, str], ...]
    key: str

    def rows(self, split: int) -> np.ndarray:
        r"""Numbers of the readable pictures of a split."""
        return np.flatnonzero((self.split == split) & self.good)

    def held_out(self, count: int) -> np.ndarray:
        r"""At most `count` rows of the valid split, evenly spaced, because pictures may be sorted by class."""
        rows = self.rows(VALID)
        return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]

    def subset(self, rows: np.ndarray) -> "Pictures":
        r"""These rows as a data set of their own. Its `bad` is empty, because a subset skips nothing itself."""
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
        r"""Training caption of picture i in wording number `variant`: one of its own, or one of its attributes.

        The wording follows from the attributes and not from the picture, so equal rows share captions, each of which
        is embedded once.
        """
        if self.captions is not None:
            return self.captions[i][variant % len(self.captions[i])]
        row = self.attributes[i]
        return describe(row, seed=[seed, variant, *np.packbits(row).tolist()])

    def full_caption(self, i: int) -> str:
        r"""The fixed caption of picture i, for validation."""
        return self.captions[i][0] if self.captions is not None else describe(self.attributes[i])

    def words(self) -> set[str]:
        r"""The words of all training captions."""
        if self.captions is None:
            return vocabulary()
        own = {caption for i in self.rows(TRAIN) for caption in self.captions[i]}
        return set().union(*map(plain_words, own))

    def batch(self, rows: np.ndarray, flip: Tensor | None = None) -> Tensor:
        r"""Pictures as (B, 3, S, S) float32 in [-1, 1], mirrored where `flip` (B,) says so."""
        x = torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return x if flip is None else torch.where(flip[:, None, None, None], x.flip(3), x)


def open_data(config: Config) -> ImageTable | None:
    r"""The table of the run's data folder, or None for drawn faces. `max_pictures` leaves some of the train split."""
    if config.training.data == "drawn":
        return None
    table = open_table(config.training.data)
    train = np.flatnonzero(table.split == TRAIN)
    if 0 < config.training.max_pictures < len(train):
        count = config.training.max_pictures
        left_out = np.random.default_rng(config.training.seed).permutation(train)[count:]
        table = table.take(np.delete(np.arange(len(table)), left_out))
        say(f"trains on {count:,} of {len(train):,} pictures; --max-pictures 0 takes all")
    most = max(map(len, table.captions or [()]))
    used = config.training.caption_variants
    if most > used:
        advice = f"--caption-variants {min(most, 1000)} takes more, in turns of the epochs"
        warnings.warn(f"{used} of up to {most} wordings of a picture are used; {advice}", stacklevel=2)
    return table


def reopen_data(config: Config) -> ImageTable | None:
    r"""`open_data` for a run that has begun; if its data has moved, the refusal names --data."""
    try:
        return open_data(config)
    except DataError as error:
        raise UserError(f"{error}; or say with --data where the run's data is now") from None


def fingerprint(table: ImageTable | None, pictures: Pictures, in_memory: bool = False) -> dict[str, str]:
    r"""Digests that tell whether a run goes on with the data it began with, wherever the folder is now."""
    if table is None:
        return {IN_MEMORY if in_memory else "pictures": pictures.key}
    labels = table.captions if table.attributes is None else table.attributes.tobytes()
    return {
        "pictures": key_of(table.files, checksum(pictures.pixels)),
        "captions": key_of(labels),
        "split": key_of(table.split.tobytes()),
    }


def load_pictures(
    config: Config, table: ImageTable | None, folder: Path, progress: Progress = silent
) -> Pictures:
    r"""The run's data set, decoded or drawn at its size; `table` is what `open_data` found."""
    settings = config.training
    size = config.model.image_size
    if table is None:
        return drawn_pictures(folder, settings.drawn_images, settings.seed, size, progress)
    return photographs(folder, table, size, settings.crop, settings.max_bad_images, progress)


def drawn_pictures(
    folder: Path, count: int, seed: int, size: int = 64, progress: Progress = silent
) -> Pictures:
    r"""`count` drawn faces, split by `faces.drawn_split`."""
    attributes = drawn_rows(count, seed)
    first = next(draw_many(attributes, seed, size))  # another way of drawing is another cache
    digest = hashlib.sha256(attributes.tobytes() + first.tobytes()).hexdigest()
    key = key_of("drawn", count, seed, size, digest)

    def draw(pixels: np.ndarray):
        for i, face in enumerate(progress(draw_many(attributes, seed, size), count, "drawing faces")):
            pixels[i] = face

    pixels = cached_array(folder / f"pictures-{key}.npy", (count, size, size, 3), np.uint8, draw)
    return Pictures(pixels, np.ones(count, bool), drawn_split(count), attributes, None, (), key)


def pictures_in_memory(pixels: np.ndarray, captions: Sequence[str]) -> Pictures:
    r"""A data set of (N, S, S, 3) uint8 pictures with a caption each. Every tenth is held out for validation.

    Raises: UserError for another shape or type, or another number of captions.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (pixels.shape[1],) * 2 + (3,):
        raise UserError(f"expected pictures as (N, S, S, 3) of uint8, got {pixels.shape} of {pixels.dtype}")
    if len(captions) != len(pixels):
        raise UserError(f"expected {len(pixels)} captions, one a picture, got {len(captions)}")
    if others := [caption for caption in captions if not isinstance(caption, str)]:
        raise UserError(f"expected captions as texts, got {others[0]!r}; write it as a str")
    split = np.where(np.arange(len(pixels)) % 10 == 9, VALID, TRAIN).astype(np.uint8)
    wordings = tuple((caption,) for caption in captions)
    good = np.ones(len(pixels), bool)
    return Pictures(pixels, good, split, None, wordings, (), key_of("in memory", wordings, checksum(pixels)))


def photographs(
    folder: Path,
    table: ImageTable,
    size: int = 64,
    crop: int = 0,
    max_bad: float = 0.01,
    progress: Progress = silent,
) -> Pictures:
    r"""The pictures of a table that `open_table` read, each decoded once.

    Unreadable ones are skipped and named in `bad`.

    Raises:
        UserError: a fraction of more than `max_bad` is unreadable, or nothing is in the train split.
    """
    key = key_of("photographs", size, crop, _source(table))
    path = folder / f"pictures-{key}.npy"
    listing = folder / f"pictures-{key}.json"

    def decode(pixels: np.ndarray):
        bad = _decode(table, pixels, size, crop, max_bad, progress)
        write_atomically(listing, json.dumps(bad).encode())

    if path.exists() and not listing.exists():  # in this order: the listing is written first
        path.unlink(missing_ok=True)
    pixels = cached_array(path, (len(table), size, size, 3), np.uint8, decode)
    bad = _read_bad(listing, table)
    _check_bad(table, bad, max_bad)
    skipped = dict(bad)
    good = np.array([name not in skipped for name in table.files])
    pictures = Pictures(pixels, good, table.split, table.attributes, table.captions, bad, key)
    if not len(pictures.rows(TRAIN)):
        advice = "see the split or partition file"
        raise UserError(f"expected pictures of the train split in {table.root}, found none; {advice}")
    return pictures


def _source(table: ImageTable) -> str:
    r"""A digest of names, sizes and times, which can all agree, and of up to a megabyte of some 256 files."""
    digest = hashlib.sha256()
    every = max(1, len(table) // 256)
    for i, name in enumerate(table.files):
        path = table.file(i)
        status = None
        with contextlib.suppress(OSError):  # a link that leads nowhere is an unreadable picture
            status = os.stat(path)
        digest.update(repr((name, status and (status.st_size, status.st_mtime_ns))).encode())
        if status and stat.S_ISREG(status.st_mode) and i % every == 0:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                digest.update(file.read(2**20))
    return digest.hexdigest()


def _decode(
    table: ImageTable, pixels: np.ndarray, size: int, crop: int, max_bad: float, progress: Progress
) -> list[tuple[str, str]]:
    r"""Fill `pixels` in threads, because Pillow leaves Python's lock while it decodes; returns what is bad."""

    def decode(batch: list[tuple[int, Path | bytes]]) -> list[tuple[str, str]]:
        bad = []
        for i, source in batch:
            try:
                pixels[i] = read_image(source, size, crop)
            except BadImage as error:
                bad.append((table.files[i], str(error)))
        return bad

    bad = []
    batches = _in_threads(decode, table.batches(AT_A_TIME))
    count = -(-len(table) // AT_A_TIME)  # about as many, because each parquet file ends with a smaller one
    for found in progress(batches, count, f"decoding pictures, {AT_A_TIME} at a time"):
        bad += found
        _check_bad(table, bad, max_bad)
    return bad


def _in_threads(action: Callable, things: Iterable) -> Iterator:
    r"""What `action` returns for each thing, in order. Few things wait at once, because they may be large."""
    pool = ThreadPoolExecutor(os.cpu_count())
    waiting = deque()
    try:
        for thing in things:
            waiting.append(pool.submit(action, thing))
            if len(waiting) > 2 * os.cpu_count():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_bad(listing: Path, table: ImageTable) -> tuple[tuple[str, str], ...]:
    try:
        bad = tuple(
            (str(name), str(reason)) for name, reason in parse_json(listing.read_text(encoding="utf-8"))
        )
        if unknown := {name for name, _ in bad} - set(table.files):
            raise ValueError(f"{min(unknown)!r}, which is no picture of the list")
    except (OSError, ValueError, TypeError) as error:
        expected = f"skipped pictures and reasons in {listing}"
        raise UserError(f"expected {expected}, got {error}; delete the file") from None
    return bad


def _check_bad(table: ImageTable, bad: Sequence[tuple[str, str]], max_bad: float):
    if len(bad) > max_bad * len(table):
        few = ", ".join(f"{name} ({reason})" for name, reason in bad[:3])
        raise UserError(
            f"expected at most {max_bad:.1%} unreadable pictures of {len(table)} in {table.root}, "
            f"got {len(bad)} so far: {few}; mend them, or raise --max-bad-images"
        )
