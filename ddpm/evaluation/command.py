r"""What `python -m ddpm.evaluation` does: open a run, choose held-out pictures, measure part after part, write."""

import argparse
import platform
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddpm import __version__
from ddpm.celeba.dataset import Pictures, load_pictures, reopen_data
from ddpm.celeba.lists import TEST, VALID
from ddpm.config import Config
from ddpm.evaluation.adherence import adherence, wordings
from ddpm.evaluation.choices import CURVES, SCOPES
from ddpm.evaluation.curves import curve
from ddpm.evaluation.likeness import frechet, neighbours, spread
from ddpm.evaluation.metrics import MIN_EACH
from ddpm.evaluation.networks import bits, latents, loss, vae
from ddpm.evaluation.report import summary, write
from ddpm.evaluation.shared import DRAWING, Evaluation, LeftOut
from ddpm.model import SHIPPED, TextToImage
from ddpm.tools.arrays import key_of
from ddpm.tools.command import check_writable, progress_bar, say
from ddpm.tools.devices import choose_device, choose_precision
from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of
from ddpm.tools.seeding import generator

SPLITS = {"valid": VALID, "test": TEST}
MEASURES = {
    f.__name__: f
    for f in (Evaluation.prepare, adherence, wordings, frechet, spread, neighbours, vae, latents, loss, bits)
}
MEASURES |= {x: partial(curve, x=x) for x in CURVES}


def evaluate(options: argparse.Namespace):
    r"""Measure the run that the command names, and write what was found."""
    choose_folders(options)
    device = choose_device(options.device)
    options.precision = choose_precision(options.precision, device)
    model, config, pictures = open_run(options)
    rows = choose_rows(pictures, options)
    model.to(device, memory_format=torch.channels_last)
    evaluation = Evaluation(model, pictures, rows, options, config.training.flip)
    say(f"{len(rows)} {options.split} pictures of {config.training.data}, {options.precision} on {device}")
    if evaluation.planned:
        say(f"drawing will take about {evaluation.minutes_of_drawing():.1f} minutes")

    result = {"format": 2, "settings": settings_of(evaluation, config)}
    left_out = {}
    seconds = {}
    for part in ("prepare", *options.only):
        started = time.monotonic()
        try:
            figures = MEASURES[part](evaluation)
        except LeftOut as reason:
            left_out[part] = str(reason)
            say(f"{part} left out: {reason}")
        else:
            if part != "prepare":
                result[part] = figures
            for line in summary(part, figures):  # at once, because what comes after may fail
                say(line)
        seconds[part] = round(time.monotonic() - started, 1)
        say(f"{part}: {seconds[part]:.0f} s")
    if DRAWING & set(options.only):
        evaluation.files["pictures.png"] = evaluation.grid()
    write(options.out, {**result, "left_out": left_out, "seconds": seconds}, evaluation.files)
    say(f"wrote {options.out}")


def choose_folders(options: argparse.Namespace):
    r"""Fill in --out and --cache where they are not given; UserError where --out cannot be written to.

    What ships is measured into runs/, because the package's own folder stays as it is.
    """
    run = options.run
    ships = run.resolve() == SHIPPED.resolve()
    options.out = options.out or (Path("runs/shipped-evaluation") if ships else run / "evaluation")
    options.cache = options.cache or (Path("runs/cache") if ships else run.absolute().parent / "cache")
    check_writable(options.out)


def open_run(options: argparse.Namespace) -> tuple[TextToImage, Config, Pictures]:
    r"""The run's model and its data; UserError where either is not whole."""
    model = TextToImage.load(options.run, options.weights)
    T = model.schedule.timesteps
    if options.steps > T:
        raise UserError(f"expected --steps from 1 to {T}, the model's chain, got {options.steps}")
    config = Config.read(options.run / "config.json")
    if options.data is not None:
        config = config.with_training(data=str(options.data))
    return model, config, load_pictures(config, reopen_data(config), options.cache, progress_bar)


def choose_rows(pictures: Pictures, options: argparse.Namespace) -> np.ndarray:
    r"""n rows of the split; without --n as many as the scope has prompts, or as there are.

    They are shuffled by the seed, because the curves take the first of them, and drawn faces stand four of a prompt
    together.
    """
    rows = pictures.rows(SPLITS[options.split])
    n = min(SCOPES[options.scope].prompts, len(rows)) if options.n is None else options.n
    if len(rows) < MIN_EACH:
        raise UserError(
            f"expected at least {MIN_EACH} pictures in the {options.split} split, got {len(rows)}; see --split"
        )
    if not MIN_EACH <= n <= len(rows):
        raise UserError(
            f"expected --n from {MIN_EACH} to {len(rows)}, the pictures of the {options.split} split, got {n}"
        )
    order = torch.randperm(len(rows), generator=generator(options.seed, "evaluation", "rows"))
    return rows[order[:n].numpy()]


def settings_of(evaluation: Evaluation, config: Config) -> dict:
    r"""What a person needs to get the same figures again, and to see whether weights and data are the same."""
    model = evaluation.model
    unneeded = ("only", "data", "cache", "out", "device")
    return {
        **{flag: value for flag, value in vars(evaluation.options).items() if flag not in unneeded},
        "run": str(evaluation.options.run),
        "n": evaluation.n,
        "preset": config.preset,
        "data": config.training.data,
        "image_size": config.model.image_size,
        "crop": config.training.crop or "automatic",
        "text_weights": config.model.text_weights,
        "device": str(model.device),
        "ddpm": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "digests": {
            "vae": digest_of([model.vae.state_dict(), model.latent_scale]),
            "unet": digest_of(model.unet.state_dict()),
            "data": key_of(evaluation.pictures.key),
        },
    }
