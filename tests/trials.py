r"""Short trainings side by side, each in the same minutes: what docs/experiments.md is made of. Run by hand.

    python tests/trials.py                              # the names
    python tests/trials.py muon adamw --minutes 2.5     # on an idle machine; the first time makes the caches
    python tests/trials.py muon --run runs/NAME         # the settings, the data and the VAE of a run

Each is a run, in runs/trials. A trial of the UNet has the VAE that ships and ends with an evaluation: do pictures of
held-out captions show what the captions say, and how far are they from held-out pictures? A trial of the VAE ends with
its PSNR on held-out pictures.
"""

import argparse
import sys
from pathlib import Path

from ddpm.celeba.dataset import load_pictures, open_data
from ddpm.celeba.lists import TRAIN
from ddpm.config import Config
from ddpm.evaluation import __main__ as evaluation
from ddpm.evaluation.choices import EXTRACTORS
from ddpm.model import SHIPPED, TextToImage
from ddpm.tools import command, devices
from ddpm.tools.files import check_new_folder
from ddpm.training.caches import Texts, encode_latents
from ddpm.training.session import train

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


def config_of(name: str, a: argparse.Namespace) -> Config:
    r"""The settings of a run, or those of drawn64 for drawn faces, with the trial's over them."""
    base = (
        Config.from_preset("drawn64", data="drawn") if a.run is None else Config.read(a.run / "config.json")
    )
    settings = base.settings()
    settings |= {"init": "", "seed": a.seed, "max_minutes": a.minutes}
    settings |= {"vae_steps": 10**9, "unet_steps": 10**9, "epochs": 0}  # the minutes alone end it
    if name.startswith("vae"):
        settings["max_minutes"] /= base.training.vae_share  # of which the VAE has this share
    return Config.from_preset(base.preset or "drawn64", **settings | TRIALS[name])


def trial(name: str, a: argparse.Namespace):
    r"""Train and measure one trial, which says what it finds."""
    config = config_of(name, a)
    folder = a.out / name.replace(",", "").replace(" ", "-")
    check_new_folder(folder, "choose another --out")
    pictures = load_pictures(config, open_data(config), a.cache, command.progress_bar)
    if name.startswith("vae"):
        for _ in train(config, folder, stage="vae", cache=a.cache, pictures=pictures):
            pass
        return
    trained = TextToImage.load(a.run or SHIPPED)
    folder.mkdir(parents=True)
    trained.save_vae(folder)
    precision = devices.choose_precision(config.training.precision, devices.choose_device("auto"))
    # The caches are made before the minutes begin.
    encode_latents(a.cache, trained.vae, pictures, precision, command.progress_bar)
    variants = range(config.training.caption_variants)
    captions = {pictures.caption(i, a.seed, k) for i in pictures.rows(TRAIN) for k in variants}
    Texts(a.cache, trained.text, captions, precision, progress=command.progress_bar)
    for _ in train(config, folder, resume=True, stage="unet", cache=a.cache, pictures=pictures):
        pass
    how = ["--only", "adherence,frechet", "--extractor", a.extractor, "--seed", a.seed, "--cache", a.cache]
    evaluation.main([str(word) for word in (folder, *how)])


def known(name: str) -> str:
    if name not in TRIALS:
        raise argparse.ArgumentTypeError(f"expected trials out of {', '.join(TRIALS)}, got {name}")
    return name


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trials", nargs="*", type=known, metavar="TRIAL", help=", ".join(TRIALS))
    p.add_argument("--minutes", type=float, default=2.5, help="of training [2.5]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    run = "a run whose settings, data and VAE they take; without, drawn faces"
    p.add_argument("--run", type=Path, help=run)
    extractor = "of the distance [classifier]"
    p.add_argument("--extractor", choices=EXTRACTORS, default="classifier", help=extractor)
    p.add_argument("--cache", type=Path, default=Path("runs/cache"), help="[runs/cache]")
    p.add_argument("--out", type=Path, default=Path("runs/trials"), help="folder for the runs [runs/trials]")
    return p


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    command.keep_freed_memory()
    for name in a.trials:
        command.say(f"trial {name}")
        trial(name, a)
    if not a.trials:
        command.say("\n".join(TRIALS))


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
