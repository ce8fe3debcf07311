r"""Short trainings side by side, each in the same minutes: what docs/experiments.md is made of. Run by hand.

    python tests/trials.py                              # the names
    python tests/trials.py muon adamw --minutes 2.5     # on an idle machine; the first time makes the caches

A trial of the UNet trains on the latents of the VAE that ships and draws the full captions of held-out faces; its
figure is the mean balanced accuracy with which the attribute classifier finds in the pictures what the captions say
(0.5 is chance). A trial of the VAE is told by its PSNR on held-out faces.
"""

import argparse
import time
from pathlib import Path

import torch

from ddpm import cli
from ddpm.cache import Texts, encode_latents, load_pictures
from ddpm.classifier import attribute_classifier, truths
from ddpm.config import Config
from ddpm.data import TEST, TRAIN, VALID
from ddpm.metrics import balanced_accuracy, measure_latent_scale, reconstruction_quality
from ddpm.model import TextToImage
from ddpm.text import TextTower
from ddpm.training import Bound, Optimization, train_unet, train_vae

CPU = torch.device("cpu")
TRIALS = {  # settings over those of drawn64; names that begin with vae train the VAE
    "muon": {},
    "muon, lr 0.002": {"muon_lr": 0.002},
    "muon, lr 0.015": {"muon_lr": 0.015},
    "adamw": {"muon_lr": 0.0},
    "adamw, lr 0.003": {"muon_lr": 0.0, "lr": 0.003},
    "batch 16": {"batch_size": 16},
    "batch 64": {"batch_size": 64},
    "eps, cosine": {"prediction": "eps"},
    "eps, linear": {"prediction": "eps", "schedule": "linear"},
    "v, linear": {"schedule": "linear"},
    "three levels": {"channels": (64, 128, 192), "attention_levels": (1, 2)},
    "attention everywhere": {"attention_levels": (0, 1)},
    "vae, muon": {},
    "vae, muon, lr 0.015": {"muon_lr": 0.015},
    "vae, adamw": {"muon_lr": 0.0},
    "vae, muon, l2": {"reconstruction": "l2"},
}


def seconds_bound(seconds: float) -> Bound:
    start = time.monotonic()
    return Bound(10**9, time.monotonic, start, start + seconds)


def trial(name: str, seconds: float, cache: Path, precision: str, seed: int) -> str:
    r"""Run one trial; its line for the table."""
    config = Config.from_preset("drawn64", seed=seed, **TRIALS[name])
    pictures = load_pictures(config, None, cache, cli.progress_bar)
    torch.manual_seed(seed)
    model = TextToImage(config.model, TextTower.random())
    if name.startswith("vae"):
        opt = Optimization(model.vae, config, config.training.vae_lr, seconds_bound(seconds), False, precision)
        for _ in train_vae(model, pictures, config, opt, precision):
            pass
        model.vae.eval()
        psnr, ssim = reconstruction_quality(model, pictures, pictures.rows(VALID)[:256], precision)
        return f"{opt.step} steps, PSNR {psnr:.2f} dB, SSIM {ssim:.4f}"
    model.vae = TextToImage.load().vae
    latents = encode_latents(cache, model.vae, pictures, precision, cli.progress_bar)
    model.latent_scale = measure_latent_scale(latents, pictures.rows(TRAIN))
    held = pictures.rows(TEST)[:391]
    prompts = [pictures.full_caption(i) for i in held]
    sentences = {pictures.caption(i, seed) for i in pictures.rows(TRAIN)} | set(prompts)
    texts = Texts(cache, model.text, sentences, precision, progress=cli.progress_bar)
    classifier = attribute_classifier(cache, pictures, CPU, precision, progress=cli.progress_bar)
    opt = Optimization(model.unet, config, config.training.lr, seconds_bound(seconds), True, precision)
    for _ in train_unet(model, latents, texts, pictures, config, opt, precision):
        pass
    with opt.ema.applied(model.unet), torch.no_grad():
        x = model.sample(prompts, seed=seed, precision=precision)
        seen = torch.cat([classifier(part) for part in x.split(64)]) > 0
    accuracy = balanced_accuracy(truths(pictures, held)[:, classifier.columns], seen)
    late = ", ".join(n for n, a in zip(classifier.names, accuracy.tolist(), strict=True) if a < 0.75)
    return f"{opt.step} steps, adherence {accuracy.mean():.3f}; below 0.75: {late or 'none'}"


def known(name: str) -> str:
    if name not in TRIALS:
        raise argparse.ArgumentTypeError(f"expected trials out of {', '.join(TRIALS)}, got {name}")
    return name


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trials", nargs="*", type=known, metavar="TRIAL", help=", ".join(TRIALS))
    p.add_argument("--minutes", type=float, default=2.5, help="of training [2.5]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument("--cache", type=Path, default=Path("runs/cache"), help="[runs/cache]")
    return p


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    cli.keep_freed_memory()
    precision = cli.choose_precision("auto", CPU)
    for name in a.trials:
        print(f"{name}: {trial(name, 60 * a.minutes, a.cache, precision, a.seed)}", flush=True)
    if not a.trials:
        print("\n".join(TRIALS))


if __name__ == "__main__":
    main()
