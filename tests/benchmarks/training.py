r"""Our training loop: what it spends beside the network, what checkpointing saves, whether the data's size shows."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.celeba.dataset import Pictures, pictures_in_memory
from ddpm.config import Config
from ddpm.model import TextToImage
from ddpm.tools.devices import autocast, choose_precision
from ddpm.training.batches import batch_rows, permutation
from ddpm.training.caches import Encoded, Latents, Texts
from ddpm.training.loops import train_unet
from ddpm.training.parallel import ALONE
from ddpm.training.run_folder import Run
from ddpm.training.stages import Session, Stage

from .measure import ROOT, Row, alternate, seconds, spread
from .networks import CPU, SPEC, nowhere_zero, spec_networks

FEW, MANY = 10_000, 200_000


class PlainTower(nn.Module):
    r"""In the text tower's place where captions are embedded already: states that cost nothing."""

    quick_gelu = False

    def tokenize(self, prompts: list[str]):
        pass

    def forward(self, prompts: list[str]) -> Tensor:
        return torch.ones(len(prompts), 77, 512)


def hollow(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    r"""A memory-mapped file of zeros that takes no room on the disk."""
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    return np.load(path, mmap_mode="r")


def made_up(folder: Path, config: Config, count: int, captions: int) -> tuple[Pictures, Latents, Texts, set]:
    r"""`count` pictures with latents of the configuration's shape, which share `captions` rows; and their captions."""
    m = config.model
    settings = config.training
    rows = np.random.default_rng(0).random((captions, 40)) < 0.2
    attributes = rows.astype(np.uint8)[np.arange(count) % captions]
    pixels = hollow(folder / f"pixels{count}.npy", (count, m.image_size, m.image_size, 3), np.uint8)
    split = np.zeros(count, np.uint8)
    pictures = Pictures(pixels, np.ones(count, bool), split, attributes, None, (), f"made up {count}")
    shape = (count, 2, 2, m.latent_channels, m.latent_size, m.latent_size)
    latents = Latents(hollow(folder / f"latents{count}.npy", shape, np.float16))
    told = {pictures.caption(i, settings.seed) for i in range(captions)}
    return pictures, latents, Texts(folder, PlainTower(), told, limit_gb=settings.text_cache_gb), told


class Training:
    r"""The second stage as train.py runs it, on made-up data: steps, with their logging, and nothing else."""

    def __init__(self, folder: Path, config: Config, count: int, captions: int = 500):
        precision = choose_precision(config.training.precision, CPU)
        torch.manual_seed(0)
        model = TextToImage(config.model, PlainTower())
        nowhere_zero(model.unet)
        pictures, self.latents, texts, self.captions = made_up(folder, config, count, captions)
        run = Run(folder / f"run{count}", config, False, time.monotonic())
        self.session = Session(run, model, pictures, None, folder, precision, ALONE)
        settings = config.training
        self.stage = Stage(self.session, "unet", model.unet, settings.lr, settings.batch_size, ema=True)
        self.opt = self.stage.opt
        self.reports = train_unet(model, self.latents, texts, pictures, config, self.opt)

    def steps(self, count: int):
        r"""Take and log that many steps."""
        self.session.steps_left = count
        for _ in self.stage.take_steps(self.reports):
            pass


def caches(quick: bool, **_) -> Iterator[Row]:
    r"""Latents and captions of a batch that the caches have, against those that the networks make first."""
    config = Config.from_preset("celeba64-laptop")
    precision = choose_precision("auto", CPU)
    rounds, size = (3 if quick else 8), config.training.batch_size
    model = TextToImage(config.model).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (rounds * size, 64, 64, 3), np.uint8)
    captions = [f"a face with the number {i}" for i in range(len(pixels))]
    batches = np.split(np.arange(len(pixels)), rounds)
    with tempfile.TemporaryDirectory() as folder:
        pictures = pictures_in_memory(pixels, captions)
        latents = Latents(Encoded(Path(folder), model.vae, pictures, precision))
        texts = Texts(Path(folder), model.text, (), precision)
        looked_up = {
            "latents": lambda rows: latents.gaussian(rows, torch.zeros(size, dtype=torch.bool)),
            "captions": lambda rows: texts([captions[i] for i in rows]),
        }
        for what, look_up in looked_up.items():
            made, read = ([seconds(partial(look_up, rows)) for rows in batches] for _ in range(2))
            sides = [f"{1000 * median(side):.1f} ms" for side in (read, made)]
            ratios = [a / b for a, b in zip(read, made, strict=True)]
            yield spread("caches", f"{size} {what}, read against made and kept", sides, ratios, 0.1)


@contextmanager
def clocked(owner, name: str) -> Iterator[list[float]]:
    r"""Within this context `owner.name` notes the seconds of its calls."""
    method, spent = getattr(owner, name), []

    def timed(*arguments):
        begun = time.perf_counter()
        result = method(*arguments)
        spent.append(time.perf_counter() - begun)
        return result

    setattr(owner, name, timed)
    try:
        yield spent
    finally:
        delattr(owner, name)


def spec(**changes) -> Config:
    r"""The spec's configuration, with random text weights: none are used."""
    never = {"save_every": 10**6, "sample_every": 10**6}
    return Config.from_preset("celeba64", text_weights="random", **never, **changes)


def overhead(quick: bool, **_) -> Iterator[Row]:
    r"""A logged step but for network, backward pass and optimizer: data, captions, noise, EMA, the log."""
    shares, rests, wholes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder), spec(), FEW)
        training.latents.moments.max()  # read once, so that it is in memory, as is a file that was written just now
        training.steps(2)
        for _ in range(5 if quick else 15):
            opt = training.opt
            with (
                clocked(opt.network, "forward") as forward,
                clocked(opt, "backward") as backward,
                clocked(opt, "end_step") as end,
                clocked(opt.ema, "update") as ema,
            ):
                whole = seconds(lambda: training.steps(1))
            wholes.append(whole)
            rests.append(whole - sum(forward) - sum(backward) - sum(end) + sum(ema))
            shares.append(100 * rests[-1] / whole)
    what = "share of a logged training step, batch 16, that is not UNet, loss, backward or optimizer"
    sides = (f"{1000 * median(rests):.1f} ms", f"of {1000 * median(wholes):.0f} ms")
    yield spread("overhead", what, sides, shares, 3.0, unit="%")


def kept_and_step(unet: nn.Module, on: bool, precision: str) -> tuple[Callable[[], None], dict[int, int]]:
    r"""Forward and backward pass of batch 2, and the storages that its forward pass keeps for the backward one."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(2, SPEC.latent_channels, SPEC.latent_size, SPEC.latent_size, generator=g)
    z, context = (z.contiguous(memory_format=torch.channels_last), torch.randn(2, 77, 512, generator=g))
    own, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(hooks=None):
        unet.train().set_gradient_checkpointing(on)
        watched = torch.autograd.graph.saved_tensors_hooks(*hooks) if hooks else nullcontext()
        with watched, autocast(CPU, precision):
            loss = unet(z, torch.tensor([3, 700]), context).float().square().mean()
        loss.backward()
        unet.zero_grad(set_to_none=True)

    step((keep, lambda tensor: tensor))
    return step, kept


def checkpointing(quick: bool, **_) -> Iterator[Row]:
    r"""Memory that the backward pass keeps, and time, with gradient checkpointing against without; batch 2."""
    _, unet = spec_networks()
    unet.to(memory_format=torch.channels_last)
    precision = choose_precision("auto", CPU)
    (with_, kept), (without, all_kept) = (kept_and_step(unet, on, precision) for on in (True, False))
    share = 100 * sum(kept.values()) / sum(all_kept.values())
    sides = [f"{sum(storages.values()) / 2**20:.1f} MiB" for storages in (kept, all_kept)]
    what = f"memory kept for the backward pass, batch 2, {precision}, with checkpointing against without"
    yield spread("checkpointing", what, sides, [share], 30.0, unit="%")
    a, b = alternate([with_, without], rounds=5 if quick else 15)
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    what = "time of forward and backward pass, with checkpointing against without"
    yield spread("checkpointing", what, [f"{median(side):.3f} s" for side in (a, b)], ratios, 1.35)


RESIDENT = "import sys; sys.path[:1] = ['tests', '.']; from benchmarks import training; print(training.grown({count}))"


def resident(count: int) -> float:
    r"""MiB that a process of its own grows to in a few steps with `count` pictures, imports included."""
    words = [sys.executable, "-c", RESIDENT.format(count=count)]
    printed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def grown(count: int) -> float:
    r"""Train a little, every picture with a caption of its own and all captions held, as train.py does; peak in MiB.

    The kernel's own figure for this process, which begins at 0; what `getrusage` tells begins at the parent's.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder), spec(batch_size=2, text_cache_gb=0.0), count, captions=count)
        training.steps(3)
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def data_size(quick: bool, **_) -> Iterator[Row]:
    r"""Resident memory and time of a step, and what drawing a batch's rows costs, with 200,000 pictures and 10,000."""
    what = f"with {MANY:,} pictures against {FEW:,}"
    many, few = resident(MANY), resident(FEW)
    more = 100 * (many / few - 1)
    sides = (f"{many:.0f} MiB", f"{few:.0f} MiB")
    yield spread(
        "data-size", f"resident memory at its peak, spec, batch 2, {what}", sides, [more], 5.0, unit="%"
    )
    with tempfile.TemporaryDirectory() as folder:
        config = spec(batch_size=2, text_cache_gb=0.0)
        runs = [Training(Path(folder), config, count, captions=count) for count in (MANY, FEW)]
        a, b = alternate([lambda run=run: run.steps(4) for run in runs], rounds=6 if quick else 20)
    more = [100 * (x / y - 1) for x, y in zip(a, b, strict=True)]
    sides = [f"{median(side):.3f} s" for side in (a, b)]
    yield spread(
        "data-size", f"time of four training steps, spec, batch 2, {what}", sides, more, 5.0, unit="%"
    )
    a, b = (first_rows(count) for count in (MANY, FEW))
    sides = [f"{median(side):.2f} ms" for side in (a, b)]
    yield spread("data-size", f"batch_rows where an epoch begins, {what}", sides, a, unit="ms")


def first_rows(count: int) -> list[float]:
    r"""Milliseconds that `batch_rows` takes for the first batch of an epoch, several times."""
    rows, spent = np.arange(count), []
    for _ in range(20):
        permutation.cache_clear()
        spent.append(1000 * seconds(lambda: batch_rows(rows, 16, 0, 0, "unet")))
    return spent
