r"""Whole commands and the decoding of photographs: what a person waits for before the network does anything."""

import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from ddpm.celeba.dataset import photographs
from ddpm.celeba.lists import open_table
from ddpm.model import TextToImage

from .measure import ROOT, Row, alternate, compared, spread
from .pillow_alone import load

PROMPT = "a smiling woman with blond hair and eyeglasses"
HELPS = (["train.py"], ["sample.py"], ["-m", "ddpm.evaluation"], ["-m", "ddpm.export"])


def decode(quick: bool, celeba: str | None, **_) -> Iterator[Row]:
    r"""Decode, crop, resize and cache photographs, against two processes of Pillow that only decode them."""
    if not celeba:
        raise FileNotFoundError("DDPM_CELEBA names no folder of CelebA")
    table = open_table(celeba)
    table = table.take(slice(0, 1500 if quick else 3000))
    paths = [str(table.root / name) for name in table.files]
    spawn = multiprocessing.get_context("spawn")  # a fork would take our threads' locks along
    two = ProcessPoolExecutor(2, spawn)
    with two, tempfile.TemporaryDirectory() as folder:
        made = iter(range(10**6))

        def ours():
            photographs(Path(folder) / str(next(made)), table)

        a, b = alternate([ours, lambda: list(two.map(load, paths, chunksize=32))], rounds=3 if quick else 7)
    what = f"{len(table):,} JPEGs decoded, cropped, resized, cached; other: two processes of Pillow that only decode"
    yield compared("decode", what, a, b, len(table), "pictures/s", 0.9)


def run(*words: str) -> None:
    r"""A command of Python to its end, from the repository's folder; raises when it fails."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


def start(quick: bool, model: str | None, **_) -> Iterator[Row]:
    r"""sample.py as a whole process against imports and the network's own time; --help of every command."""
    rounds = 3 if quick else 7
    try:
        loaded = TextToImage.load(model)
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None
    flags = ["--model", model] if model else []
    with tempfile.TemporaryDirectory() as folder:
        sample = ["sample.py", PROMPT, "--steps", "20", *flags, "--out", f"{folder}/sample.png"]
        actions = [
            lambda: run(*sample),
            lambda: run("-c", "import torch, open_clip"),
            lambda: loaded.sample([PROMPT], steps=20),
        ]
        whole, imports, network = alternate(actions, rounds)
    floor = [i + n for i, n in zip(imports, network, strict=True)]
    ratios = [w / f for w, f in zip(whole, floor, strict=True)]
    what = "sample.py PROMPT --steps 20, whole process, against `import torch, open_clip` and the network"
    sides = (f"{median(whole):.2f} s", f"{median(imports):.2f} s + {median(network):.2f} s")
    yield spread("start", what, sides, ratios, 1.5)
    for words in HELPS:
        yield help_of(words, rounds)


def help_of(words: Sequence[str], rounds: int) -> Row:
    r"""How long --help takes, beside Python that does nothing."""
    times, bare = alternate([lambda: run(*words, "--help"), lambda: run("-c", "pass")], rounds)
    sides = (f"{median(times):.2f} s", f"python: {median(bare):.2f} s")
    return spread("start", f"{' '.join(words)} --help", sides, times, 0.5, unit="s")
