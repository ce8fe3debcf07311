r"""What `python -m ddpm.evaluation` does: open a run, choose held-out pictures, measure part after part, write."""

import argparse
import platform
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddpm import __version__
from ddpm.celeba.dataset import IN_MEMORY, Pictures, fingerprint, load_pictures, reopen_data
from ddpm.celeba.lists import TEST, VALID
from ddpm.config import Config
from ddpm.evaluation.adherence import adherence, wordings
from ddpm.evaluation.choices import CURVES, SCOPES
from ddpm.evaluation.curves import curve
from ddpm.evaluation.likeness import frechet, neighbours, spread
from ddpm.evaluation.metrics import MIN_EACH
from ddpm.evaluation.networks import bits, latents, loss, vae
from ddpm.evaluation.report import summary, write, write_unfinished
from ddpm.evaluation.shared import DRAWING, Evaluation, LeftOut
from ddpm.model import SHIPPED, TextToImage
from ddpm.tools import text_weights
from ddpm.tools.arrays import key_of
from ddpm.tools.command import check_writable, progress_bar, say
from ddpm.tools.devices import choose_device, choose_precision
from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of
from ddpm.tools.seeding import generator
from ddpm.training.run_folder import trained_on

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
    model, config, pictures, data = open_run(options)
    rows = choose_rows(pictures, options)
    model.to(device, memory_format=torch.channels_last)
    evaluation = Evaluation(model, pictures, rows, options, config.training)
    say(f"{len(rows)} {options.split} pictures of {config.training.data}, {options.precision} on {device}")
    if evaluation.planned:
        say(f"drawing will take about {evaluation.minutes_of_drawing():.1f} minutes")

    result = {"format": 2, "settings": settings_of(evaluation, config, data)}
    try:
        measure(evaluation, result)
        write(options.out, result, evaluation.files)
    except BaseException:  # also Ctrl-C: the parts so far may be hours of work
        if set(options.only) & set(result):
            say(f"the parts so far are in {write_unfinished(options.out, result)}")
        raise
    say(f"wrote {options.out}")


def measure(evaluation: Evaluation, result: dict):
    r"""Put the figures of each part that was asked for into `result`, and say them."""
    left_out = {}
    seconds = {}
    for part in ("prepare", *evaluation.options.only):
        started = time.monotonic()
        try:
            figures = MEASURES[part](evaluation)
        except LeftOut as reason:
            left_out[part] = str(reason)
            say(f"{part} left out: {reason}")
        else:
            if part != "prepare":
                result[part] = figures
            for line in summary(part, figures):
                say(line)
        seconds[part] = round(time.monotonic() - started, 1)
        say(f"{part}: {seconds[part]:.0f} s")
    if DRAWING & set(evaluation.options.only) and ("full", evaluation.main) in evaluation.drawn:
        evaluation.files["pictures.png"] = evaluation.grid()
    result |= {"left_out": left_out, "seconds": seconds}


def choose_folders(options: argparse.Namespace):
    r"""Fill in --out and --cache where they are not given; UserError where --out cannot be written to.

    What ships is measured into runs/, because the package's own folder stays as it is.
    """
    run = options.run
    ships = run.resolve() == SHIPPED.resolve()
    options.out = options.out or (Path("runs/shipped-evaluation") if ships else run / "evaluation")
    options.cache = options.cache or (Path("runs/cache") if ships else run.absolute().parent / "cache")
    check_writable(options.out)


def open_run(options: argparse.Namespace) -> tuple[TextToImage, Config, Pictures, dict[str, str]]:
    r"""The run's model, its data and digests of these; UserError where model or data is not whole.

    Data that changed since the training is a warning, because then the held-out pictures may have been trained on.
    """
    model = TextToImage.load(options.run, options.weights)
    T = model.schedule.timesteps
    if options.steps > T:
        raise UserError(f"expected --steps from 1 to {T}, the model's chain, got {options.steps}")
    config = Config.read(options.run / "config.json")
    if options.data is not None:
        config = config.changed(data=str(options.data))
    table = reopen_data(config)
    pictures = load_pictures(config, table, options.cache, progress_bar)
    data = fingerprint(table, pictures)
    before = trained_on(options.run)
    in_memory = before.pop(IN_MEMORY, pictures.key)
    if in_memory != pictures.key and options.data is None:
        raise UserError(
            f"expected the pictures that {options.run} was trained on, which a program gave, got those of "
            f"{config.training.data}; name a folder of such pictures with --data"
        )
    if changed := [part for part, digest in before.items() if data.get(part) != digest]:
        names = " and ".join(changed)
        what = f"the {names} of {config.training.data} changed since {options.run} was trained"
        warnings.warn(f"{what}, so held-out pictures may have been trained on", stacklevel=2)
    return model, config, pictures, data


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


def settings_of(evaluation: Evaluation, config: Config, data: dict[str, str]) -> dict:
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
        "crop": config.training.crop or "148 of 178 x 218, else the largest square",
        "text_weights": config.model.text_weights,
        "device": str(model.device),
        "ddpm": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "digests": {
            "vae": digest_of([model.vae.state_dict(), model.latent_scale]),
            "unet": digest_of(model.unet.state_dict()),
            "data": key_of(data),
            "text": text_weights.fingerprint(model.text),
        },
    }
