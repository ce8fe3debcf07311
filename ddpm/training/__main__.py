r"""Train a text-to-image model: the VAE first, then the UNet on its latents.

python train.py                           drawn faces, no download, minutes on a laptop's CPU
python train.py --data PATH               CelebA in any layout, or your own images with a csv
python train.py --resume runs/NAME        go on as if never stopped
python train.py --distill runs/NAME       the same model in 4 network calls a picture
"""

import argparse
import os
import sys
import time
from pathlib import Path

from ddpm.config import DISTILL, MOVABLE, PRESETS, SHIPPED, TEXT_FILE, Config, add_flags, given_flags
from ddpm.tools import command
from ddpm.tools.errors import UserError, is_name


def parser() -> argparse.ArgumentParser:
    p = command.Parser(__doc__)
    p.prog = command.TRAIN
    p.add_argument(
        "--preset", choices=PRESETS, help="named settings [drawn64; with --data celeba64, the spec]"
    )
    p.add_argument(
        "--config", type=command.path, metavar="FILE", help="settings of a run's config.json for a preset's"
    )
    distill = "learn to draw as this run does, in --few-steps calls; `shipped` is what ships"
    p.add_argument("--distill", type=command.path, metavar="RUN", help=distill)
    p.add_argument("--out", type=command.path, metavar="RUN", help="run folder to make [runs/PRESET]")
    p.add_argument("--resume", type=command.path, metavar="RUN", help="go on with the run in this folder")
    p.add_argument(
        "--stage", choices=("vae", "unet", "all"), default="all", help="which stage to train [all]"
    )
    p.add_argument(
        "--max-steps", type=int, metavar="N", help="bound each stage to N steps; moves a resumed run's bound"
    )
    p.add_argument(
        "--stop-after", type=int, metavar="N", help="end this command after N steps, saved; resume goes on"
    )
    p.add_argument("--device", choices=command.DEVICES, default="auto", help="where to compute [auto]")
    p.add_argument(
        "--cache",
        type=command.path,
        metavar="DIR",
        help="folder of decoded pictures, latents, captions [cache, beside the run]",
    )
    p.add_argument(
        "--download", action="store_true", help="try to download CelebA into the folder --data first"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print shapes, parameters, memory, time a step; write nothing"
    )
    add_flags(p)
    return p


def configuration(arguments: argparse.Namespace) -> Config:
    r"""The configuration of the preset, or of the run to resume, changed by the flags that were given."""
    flags = given_flags(arguments)
    config = chosen(arguments, flags)
    steps = [name for name in ("vae_steps", "unet_steps") if name in flags]
    if steps and config.training.epochs and arguments.max_steps is None:
        flag = f"--{steps[0].replace('_', '-')}"
        bound = f"{config.training.epochs} epochs, which bound both stages"
        raise UserError(f"expected --epochs 0 with {flag}, got {bound}; give --epochs 0, or leave {flag} out")
    return config


def chosen(arguments: argparse.Namespace, flags: dict) -> Config:
    r"""The configuration that `arguments` name, with `flags` over it."""
    for name in ("max_steps", "stop_after"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"expected --{name.replace('_', '-')} of at least 1, got {value}")
    if arguments.max_steps is not None:
        if flags.get("epochs"):
            raise UserError("expected --max-steps or --epochs, got both; leave one out")
        steps = {"vae_steps": arguments.max_steps, "unet_steps": arguments.max_steps, "epochs": 0}
        flags = {"max_minutes": 0.0} | steps | flags
    if arguments.resume is not None:
        return resumed_configuration(arguments, flags)
    if arguments.distill is not None:
        if arguments.preset or arguments.config or "init" in flags:
            raise UserError(
                "expected --distill without --preset, --config, --init; it takes that run's settings"
            )
        if not flags.get("few_steps", 1):
            raise UserError("expected --few-steps of at least 1 with --distill, got 0")
        is_shipped = str(arguments.distill) == "shipped"
        folder = SHIPPED if is_shipped else arguments.distill
        return settings_of(folder / "config.json", DISTILL | {"init": str(arguments.distill)} | flags)
    if arguments.config is not None:
        if arguments.preset is not None:
            raise UserError("expected --preset or --config, got both")
        return settings_of(arguments.config, {"init": ""} | flags)
    default = "drawn64" if flags.get("data", "drawn") == "drawn" else "celeba64"
    return Config.from_preset(arguments.preset or default, **flags)


def settings_of(file: Path, changes: dict) -> Config:
    r"""The settings in a run's config.json with `changes` over them."""
    given = Config.read(file)
    values = given.settings()
    if not (is_name(given.model.text_weights) or changes.get("few_steps")):
        values["text_weights"] = str(file.absolute().parent / TEXT_FILE)  # a student's is its teacher's
    preset = given.preset if given.preset in PRESETS else "celeba64"
    return Config.from_preset(preset, **values | changes)


def resumed_configuration(arguments: argparse.Namespace, flags: dict) -> Config:
    r"""The stored configuration with its bounds moved. Any other difference is refused by name."""
    folder = arguments.resume
    if arguments.out or arguments.preset or arguments.config or arguments.distill:
        raise UserError(
            "expected --resume without --out, --preset, --config, --distill; a resumed run keeps its own"
        )
    if not folder.is_dir():
        raise UserError(
            f"expected the folder of a run after --resume, {folder} is none; start one with --out"
        )
    config = Config.read(folder / "config.json")
    stored = config.settings()
    differing = [
        f"--{name.replace('_', '-')} (is {stored[name]}, asked {value})"
        for name, value in flags.items()
        if name not in MOVABLE and value != stored[name]
    ]
    if differing:
        raise UserError(
            f"a resumed run keeps its settings, got others: {', '.join(differing)}; leave them out"
        )
    is_over = (folder / "vae.safetensors").is_file() and arguments.stage != "vae"
    asked = given_flags(arguments).get("vae_steps", stored["vae_steps"])
    if is_over and asked != stored["vae_steps"]:
        raise UserError(
            f"expected no --vae-steps, because the VAE of {folder} is finished, got {asked}; leave it out "
            "(until the second stage begins, --stage vae trains it further)"
        )
    return config.changed(**{name: value for name, value in flags.items() if name in MOVABLE})


def default_folder(teacher: Path | None, config: Config) -> Path:
    r"""runs/PRESET, or beside a teacher its name with the number of steps."""
    if teacher is None:
        return Path("runs") / config.preset
    name = f"{teacher.resolve().name}-{config.model.few_steps}-steps"
    return (Path("runs") if str(teacher) == "shipped" else teacher.resolve().parent) / name


def main(argv: list[str] | None = None):
    started = time.monotonic()  # --max-minutes counts from here
    arguments = parser().parse_args(argv)
    config = configuration(arguments)
    from ddpm.training import session  # late, because --help must not wait for torch

    if arguments.dry_run:
        if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(f"expected --dry-run in one process, got {count}; leave torchrun out")
        session.print_needs(config, arguments.device, arguments.stage)
        return
    steps = session.train(
        config,
        arguments.resume or arguments.out or default_folder(arguments.distill, config),
        resume=arguments.resume is not None,
        stage=arguments.stage,
        stop_after=arguments.stop_after,
        device=arguments.device,
        cache=arguments.cache,
        download=arguments.download,
        started=started,
    )
    for _ in steps:
        pass


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
