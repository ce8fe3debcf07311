r"""Short trainings side by side, each in the same minutes: what docs/experiments.md is made of. Run by hand.

    python tests/trials.py                              # the names
    python tests/trials.py muon adamw --minutes 2.5     # on an idle machine; the first time makes the caches
    python tests/trials.py muon --run runs/NAME         # the data, the preset and the VAE of a run

A trial of the UNet trains on the latents of the VAE that ships and draws the full captions of held-out faces; its
figures are the mean balanced accuracy with which the attribute classifier finds in the pictures what the captions say
(0.5 is chance), and their Frechet distance from the held-out faces. A trial of the VAE is told by its PSNR on these.
"""

import argparse
import time
from pathlib import Path

import torch

from ddpm.celeba.dataset import load_pictures, open_data
from ddpm.celeba.lists import TEST, TRAIN, VALID
from ddpm.config import Config
from ddpm.evaluation.choices import EXTRACTORS
from ddpm.evaluation.classifier import attribute_classifier, truths
from ddpm.evaluation.features import feature_extractor
from ddpm.evaluation.metrics import balanced_accuracy, frechet_distance, gaussian_of
from ddpm.model import TextToImage
from ddpm.tools import command, devices, text_weights
from ddpm.training.caches import Texts, encode_latents
from ddpm.training.loops import train_unet, train_vae
from ddpm.training.optimization import Bound, Optimization
from ddpm.training.validation import measure_latent_scale, reconstruction_quality

CPU = torch.device("cpu")
TRIALS = {  # settings over those of the preset, which is drawn64 without --run; names that begin with vae train the VAE
    "muon": {},
    "muon, lr 0.002": {"muon_lr": 0.002},
    "muon, lr 0.004": {"muon_lr": 0.004},
    "muon, lr 0.007": {"muon_lr": 0.007},
    "muon, lr 0.015": {"muon_lr": 0.015},
    "adamw": {"muon_lr": 0.0},
    "adamw, lr 0.003": {"muon_lr": 0.0, "lr": 0.003},
    "muon, ema 0.995": {"ema_decay": 0.995},
    "batch 16": {"batch_size": 16},
    "batch 64": {"batch_size": 64},
    "eps, cosine": {"prediction": "eps"},
    "eps, linear": {"prediction": "eps", "schedule": "linear"},
    "v, linear": {"schedule": "linear"},
    "v, linear, error of eps": {"schedule": "linear", "weighting": "eps"},
    "v, cosine, min-SNR": {"weighting": "min_snr"},
    "three levels": {"channels": (64, 128, 192), "attention_levels": (1, 2)},
    "attention everywhere": {"attention_levels": (0, 1)},
    "vae, muon": {},
    "vae, muon, lr 0.015": {"muon_lr": 0.015},
    "vae, adamw": {"muon_lr": 0.0},
    "vae, muon, l2": {"reconstruction": "l2"},
}


def bound_of(minutes: float) -> Bound:
    start = time.monotonic()
    return Bound(10**9, time.monotonic, start, start + 60 * minutes)


def base(run: Path | None) -> tuple[str, str, TextToImage]:
    r"""Preset and data of the trials, and the model whose VAE they take: those of a run, or drawn faces."""
    if run is None:
        return "drawn64", "drawn", TextToImage.load()
    config = Config.read(run / "config.json")
    return config.preset, config.training.data, TextToImage.load(run)


def trial(name: str, a: argparse.Namespace, precision: str) -> str:
    r"""Run one trial; its line for the table."""
    preset, data, trained = base(a.run)
    config = Config.from_preset(preset, **{"data": data, "seed": a.seed} | TRIALS[name])
    pictures = load_pictures(config, open_data(config), a.cache, command.progress_bar)
    torch.manual_seed(a.seed)
    model = TextToImage(config.model, text_weights.random_tower())
    if name.startswith("vae"):
        opt = Optimization(model.vae, config, config.training.vae_lr, bound_of(a.minutes), False, precision)
        for _ in train_vae(model, pictures, config, opt, precision):
            pass
        model.vae.eval()
        psnr, ssim = reconstruction_quality(model, pictures, pictures.rows(VALID)[:256], precision)
        return f"{opt.step} steps, PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"
    model.vae = trained.vae
    latents = encode_latents(a.cache, model.vae, pictures, precision, command.progress_bar)
    model.latent_scale = measure_latent_scale(latents, pictures.rows(TRAIN))
    held = pictures.rows(TEST)[:391]
    prompts = [pictures.full_caption(i) for i in held]
    sentences = {pictures.caption(i, a.seed) for i in pictures.rows(TRAIN)} | set(prompts)
    texts = Texts(a.cache, model.text, sentences, precision, progress=command.progress_bar)
    classifier = attribute_classifier(a.cache, pictures, CPU, precision, progress=command.progress_bar)
    opt = Optimization(model.unet, config, config.training.lr, bound_of(a.minutes), True, precision)
    for _ in train_unet(model, latents, texts, pictures, config, opt, precision):
        pass
    extract = classifier.features if a.extractor == "classifier" else feature_extractor(a.extractor, CPU)
    with opt.ema.applied(model.unet), torch.no_grad():
        x = model.sample(prompts, seed=a.seed, precision=precision)
        seen = torch.cat([classifier(part) for part in x.split(64)]) > 0
        drawn, real = (torch.cat([extract(part) for part in y.split(64)]) for y in (x, pictures.batch(held)))
    accuracy = balanced_accuracy(truths(pictures, held)[:, classifier.columns], seen)
    late = ", ".join(n for n, v in zip(classifier.names, accuracy.tolist(), strict=True) if v < 0.75)
    distance = frechet_distance(*gaussian_of(drawn), *gaussian_of(real))
    return f"{opt.step} steps, adherence {accuracy.mean():.3f}, distance {distance:.1f}; below 0.75: {late or 'none'}"


def known(name: str) -> str:
    if name not in TRIALS:
        raise argparse.ArgumentTypeError(f"expected trials out of {', '.join(TRIALS)}, got {name}")
    return name


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trials", nargs="*", type=known, metavar="TRIAL", help=", ".join(TRIALS))
    p.add_argument("--minutes", type=float, default=2.5, help="of training [2.5]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    run = "a run whose data, preset and VAE they take; without, drawn faces"
    p.add_argument("--run", type=Path, help=run)
    extractor = "of the distance [classifier]"
    p.add_argument("--extractor", choices=EXTRACTORS, default="classifier", help=extractor)
    p.add_argument("--cache", type=Path, default=Path("runs/cache"), help="[runs/cache]")
    return p


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    command.keep_freed_memory()
    precision = devices.choose_precision("auto", CPU)
    for name in a.trials:
        print(f"{name}: {trial(name, a, precision)}", flush=True)
    if not a.trials:
        print("\n".join(TRIALS))


if __name__ == "__main__":
    main()
