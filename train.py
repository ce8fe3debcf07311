r"""Train a text-to-image model: the VAE first, then the UNet on its latents.

python train.py                           drawn faces, no download, minutes on a laptop's CPU
python train.py --data PATH               CelebA in any layout, or your own images with a csv
python train.py --resume runs/NAME        go on as if never stopped
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ddpm import cli
from ddpm.cli import progress_bar, say
from ddpm.config import PRESETS, Config, UserError, add_flags, given_flags

ENOUGH_PSNR = 20  # decibels on held-out pictures; below, the second stage learns to draw blur


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, help="named settings [drawn64; with --data celeba64, the spec]")
    p.add_argument("--out", help="run folder to make [runs/PRESET]")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    p.add_argument("--stage", choices=("vae", "unet", "all"), default="all", help="which stage to train [all]")
    p.add_argument(
        "--max-steps", type=int, metavar="N", help="bound each stage to N steps; moves a resumed run's bound"
    )
    p.add_argument("--stop-after", type=int, metavar="N", help="end this command after N steps, saved; resume goes on")
    p.add_argument("--device", choices=cli.DEVICES, default="auto", help="where to compute [auto]")
    p.add_argument("--cache", metavar="DIR", help="folder of decoded pictures, latents and captions [runs/cache]")
    p.add_argument("--download", action="store_true", help="try to download CelebA into the folder --data first")
    p.add_argument(
        "--dry-run", action="store_true", help="print shapes, parameters, memory, time a step; write nothing"
    )
    add_flags(p)
    return p


def configuration(a: argparse.Namespace) -> Config:
    r"""The run's configuration: its preset's, or that of the run to resume, under the flags that were given."""
    flags = given_flags(a)
    for name, value in (("--max-steps", a.max_steps), ("--stop-after", a.stop_after)):
        if value is not None and value < 1:
            raise UserError(f"expected {name} of at least 1, got {value}")
    if a.max_steps is not None:
        flags = {"max_minutes": 0.0} | flags | {"vae_steps": a.max_steps, "unet_steps": a.max_steps, "epochs": 0}
    if a.resume is None:
        preset = a.preset or ("celeba64" if flags.get("data", "drawn") != "drawn" else "drawn64")
        return Config.from_preset(preset, **flags)
    if a.out is not None or a.preset is not None:
        raise UserError("expected --resume without --out and --preset, got both; a resumed run keeps them")
    if not Path(a.resume).is_dir():
        raise UserError(f"expected the folder of a run after --resume, {a.resume} is none; start one with --out")
    return resumed_configuration(Config.read(Path(a.resume) / "config.json"), flags)


def resumed_configuration(config: Config, flags: dict) -> Config:
    r"""The stored configuration with its bounds moved; anything else that differs is refused by name."""
    movable = {"max_minutes", "vae_steps", "unet_steps", "epochs", "save_every", "sample_every"}
    stored = {**vars(config.model), **vars(config.training)}
    differing = [f"{n} (is {stored[n]}, asked {v})" for n, v in flags.items() if n not in movable and v != stored[n]]
    if differing:
        raise UserError(f"a resumed run keeps its settings, got others: {', '.join(differing)}; leave them out")
    return config.with_training(**{n: v for n, v in flags.items() if n in movable})


class Trainer:
    r"""Runs the stages over the generators of `ddpm.training`; logs, validates, draws and saves."""

    def __init__(self, run, model, pictures, cache: Path, precision: str, stop_after: int | None):
        self.run, self.model, self.pictures, self.cache = run, model, pictures, cache
        self.config, self.precision, self.left = run.config, precision, stop_after

    def optimization(self, stage: str, network, lr: float, ema: bool):
        r"""The stage's optimizer and bound, from the checkpoint where it stopped in this stage."""
        from ddpm.training import Bound, Optimization, stage_steps

        t, until = self.config.training, None
        if t.max_minutes:
            whole = 60 * t.max_minutes
            until = whole * t.vae_share if stage == "vae" else whole - max(10, 0.02 * whole)  # to save and draw
        bound = Bound(stage_steps(self.config, stage, self.pictures), self.run.clock, self.run.clock(), until)
        opt = Optimization(network, self.config, lr, bound, ema, self.precision)
        if self.run.state and self.run.state["stage"] == stage:
            opt.load_state_dict(self.run.state[stage])
        return opt

    def train(self, opt, reports: Iterable, batch: int, validate: Callable[[], dict], stage: str) -> bool:
        r"""Take steps until the stage's bound; False when --stop-after came first."""
        from tqdm import tqdm

        t, now = self.config.training, time.monotonic
        total = opt.bound.steps if opt.bound.until is None else None
        bar = tqdm(total=total, initial=opt.step, desc=stage, unit="step", disable=None)
        mean, validated, last = None, False, now()
        told = last
        for report in reports:
            rate, last = batch / max(now() - last, 1e-9), now()
            mean = report.loss if mean is None else 0.98 * mean + 0.02 * report.loss
            if not report.finite:
                say(f"skipped {stage} step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}")
            left = max(0.0, opt.bound.until - self.run.clock()) / 60 if opt.bound.until else None
            status = f"loss {mean:.4f}, {rate:.0f} images/s" + (f", {left:.1f} min left" if opt.bound.until else "")
            bar.set_postfix_str(status, refresh=False)
            bar.update()
            if bar.disable and last - told >= 30:  # no terminal: a line now and then instead of a bar
                told = last
                say(f"{stage} step {report.step}: {status}")
            if self.left is not None:
                self.left -= 1
            validated = report.step % t.sample_every == 0
            self.log(report, rate, **(validate() if validated else {}))
            if self.left == 0 or report.step % t.save_every == 0:
                self.run.save(stage, opt)
            if self.left == 0:
                bar.close()
                say(f"stopped at {stage} step {report.step}; go on with python train.py --resume {self.run.folder}")
                return False
            last = now()
        bar.close()
        if not validated:
            self.run.log(stage=stage, step=opt.step, seconds=f"{self.run.clock():.1f}", **validate())
        self.run.save(stage, opt)
        return True

    def log(self, report, rate: float, **held_out):
        self.run.log(
            stage=report.stage, step=report.step, seconds=f"{self.run.clock():.1f}", loss=f"{report.loss:.6g}",
            lr=f"{report.lr:.4g}", grad_norm=f"{report.grad_norm:.4g}", images_per_second=f"{rate:.1f}", **held_out,
        )  # fmt: skip

    def train_vae(self) -> bool:
        r"""First stage; False when it was stopped before its end."""
        from ddpm.data import VALID
        from ddpm.metrics import reconstruction_quality
        from ddpm.training import train_vae

        t, model, valid = self.config.training, self.model, self.pictures.rows(VALID)
        opt = self.optimization("vae", model.vae, t.vae_lr, ema=False)

        def validate(rows=valid[:256]) -> dict:
            model.vae.eval()
            psnr, ssim = reconstruction_quality(model, self.pictures, rows, self.precision)
            say(f"vae step {opt.step}: held-out PSNR {psnr:.2f} dB, SSIM {ssim:.4f} on {len(rows)} pictures")
            return {"psnr": f"{psnr:.3f}", "ssim": f"{ssim:.4f}"}

        reports = train_vae(model, self.pictures, self.config, opt, self.precision)
        if not self.train(opt, reports, t.vae_batch_size, validate, "vae"):
            return False
        if float(validate(valid)["psnr"]) < ENOUGH_PSNR:
            say(f"warning: below {ENOUGH_PSNR} dB the VAE blurs what the UNet draws; give the first stage more time")
        self.encode()
        model.save_vae(self.run.folder)
        say(f"latents {model.latent_shape}, scale {model.latent_scale:.4f}")
        return True

    def encode(self):
        r"""All latents; their scale is measured on the train split and kept in the model."""
        from ddpm.cache import encode_latents
        from ddpm.data import TRAIN
        from ddpm.metrics import measure_latent_scale

        self.model.vae.eval()
        latents = encode_latents(self.cache, self.model.vae, self.pictures, self.precision, progress_bar)
        self.model.latent_scale = measure_latent_scale(latents, self.pictures.rows(TRAIN))
        return latents

    def train_unet(self) -> bool:
        r"""Second stage; False when it was stopped before its end."""
        from ddpm.cache import Texts
        from ddpm.data import TRAIN, VALID
        from ddpm.metrics import loss_by_timestep
        from ddpm.model import save_weights
        from ddpm.training import train_unet

        t, model, pictures = self.config.training, self.model, self.pictures
        latents, train, valid = self.encode(), pictures.rows(TRAIN), pictures.rows(VALID)[:64]
        sentences = {pictures.caption(i, t.seed, v) for i in train for v in range(t.caption_variants)}
        told = {pictures.full_caption(i) for i in valid}
        texts = Texts(self.cache, model.text, sentences | told, t.text_cache_gb, progress_bar)
        prompts = sorted(told)[:: max(1, len(told) // 16)][:16]
        opt = self.optimization("unet", model.unet, t.lr, ema=True)

        def validate() -> dict:
            model.unet.eval()
            save_weights(self.run.folder / "unet.safetensors", model.unet.state_dict())
            with opt.ema.applied(model.unet):
                losses = loss_by_timestep(model, latents, texts, pictures, valid, self.precision, seed=t.seed)
                save_weights(self.run.folder / "ema.safetensors", model.unet.state_dict())
                self.draw_samples(opt.step, prompts)
            mean, tenths = sum(losses) / len(losses), " ".join(f"{loss:.3f}" for loss in losses)
            say(f"unet step {opt.step}: validation loss {mean:.4f}; by tenths of t {tenths}")
            return {"val_loss": f"{mean:.5f}"}

        reports = train_unet(model, latents, texts, pictures, self.config, opt, self.precision)
        return self.train(opt, reports, t.batch_size, validate, "unet")

    def draw_samples(self, step: int, prompts: list[str]):
        r"""A grid of the averaged weights' pictures, always from the same noise and prompts."""
        from ddpm.pictures import labelled_grid, save_png

        x = self.model.sample(prompts, seed=self.config.training.seed, precision=self.precision)
        settings = {"prompt": json.dumps(prompts), "settings": "dpm++, 20 steps, guidance 3, EMA", "step": str(step)}
        save_png(self.run.folder / "samples" / f"step_{step:06d}.png", labelled_grid(x, prompts, 8), settings)


def load_pictures(config: Config, table, cache: Path):
    r"""The decoded data set; skipped pictures are told."""
    from ddpm.cache import load_pictures

    pictures = load_pictures(config, table, cache, progress_bar)
    if pictures.bad:
        few = ", ".join(f"{name} ({reason})" for name, reason in pictures.bad[:3])
        say(f"skipped {len(pictures.bad)} unreadable pictures: {few}")
    return pictures


def download(folder: str):
    r"""CelebA into the data folder."""
    from ddpm.data import download_celeba

    if folder == "drawn":
        raise UserError("expected --data FOLDER to download CelebA into, got none")
    download_celeba(folder)


def main(argv: list[str] | None = None):
    started = time.monotonic()  # --max-minutes counts from here
    a = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("expected one process, got several from torchrun; training on several is not there yet")
    config = configuration(a)
    folder = Path(a.resume or a.out or Path("runs") / config.preset)
    device = cli.choose_device(a.device)
    precision = cli.choose_precision(config.training.precision, device)
    if a.dry_run:
        from ddpm.estimate import estimate

        for line in estimate(config, device, precision):
            print(line)
        return
    import torch

    from ddpm.cache import open_data
    from ddpm.data import TRAIN, VALID
    from ddpm.model import TextToImage
    from ddpm.run import Run
    from ddpm.text import TextTower

    run = Run(folder, config, a.resume is not None, started)
    if a.download:
        download(config.training.data)
    table = open_data(config)
    own_text, own_vae = folder / "text.safetensors", folder / "vae.safetensors"
    if a.stage == "unet" and not own_vae.is_file():
        raise UserError(f"expected {own_vae} for the second stage; train it with --stage vae first, then --resume")
    torch.manual_seed(config.training.seed)
    model = TextToImage(config.model, TextTower.from_file(own_text) if own_text.is_file() else None)
    cache = Path(a.cache or folder.parent / "cache")
    pictures = load_pictures(config, table, cache)

    run.create()
    say(f"run {folder}, preset {config.preset}, {precision} on {device}")
    say(f"{len(pictures.rows(TRAIN)):,} pictures to train on, {len(pictures.rows(VALID)):,} to validate")
    if Path(config.model.text_weights).is_file() and not own_text.is_file():
        run.write(own_text.name, model.text.save)  # the run stays whole when the file goes
    model.to(device, memory_format=torch.channels_last)
    model.unet.set_gradient_checkpointing(config.training.gradient_checkpointing)
    trainer = Trainer(run, model, pictures, cache, precision, a.stop_after)

    vae_is_done = own_vae.is_file() and not (a.stage == "vae" and run.state and run.state["stage"] == "vae")
    if vae_is_done:
        model.load_vae(folder)
    elif not trainer.train_vae():
        return
    if a.stage != "vae" and trainer.train_unet():
        say(f"done in {run.clock() / 60:.1f} minutes; try:")
        say(f'  python sample.py "a smiling woman with blond hair and eyeglasses" --model {folder}')


if __name__ == "__main__":
    sys.exit(cli.run(main))
