r"""Train a text-to-image model: the VAE first, then the UNet on its latents.

python train.py                           drawn faces, no download, minutes on a laptop's CPU
python train.py --data PATH               CelebA in any layout, or your own images with a csv
python train.py --resume runs/NAME        go on as if never stopped
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ddpm.config import MOVABLE, PRESETS, Config, add_flags, given_flags, is_name
from ddpm.tools import command as cli
from ddpm.tools import devices, text_weights
from ddpm.tools.command import Stopped, StopRequest, on_signals, progress_bar, say
from ddpm.tools.errors import UserError

ENOUGH_PSNR = 20  # decibels on held-out pictures; below, the second stage learns to draw blur


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(__doc__)
    p.add_argument(
        "--preset", choices=PRESETS, help="named settings [drawn64; with --data celeba64, the spec]"
    )
    p.add_argument("--out", help="run folder to make [runs/PRESET]")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    p.add_argument(
        "--stage", choices=("vae", "unet", "all"), default="all", help="which stage to train [all]"
    )
    p.add_argument(
        "--max-steps", type=int, metavar="N", help="bound each stage to N steps; moves a resumed run's bound"
    )
    p.add_argument(
        "--stop-after", type=int, metavar="N", help="end this command after N steps, saved; resume goes on"
    )
    p.add_argument("--device", choices=cli.DEVICES, default="auto", help="where to compute [auto]")
    p.add_argument(
        "--cache", metavar="DIR", help="folder of decoded pictures, latents, captions [cache, beside the run]"
    )
    p.add_argument(
        "--download", action="store_true", help="try to download CelebA into the folder --data first"
    )
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
        flags = (
            {"max_minutes": 0.0} | flags | {"vae_steps": a.max_steps, "unet_steps": a.max_steps, "epochs": 0}
        )
    if a.resume is None:
        preset = a.preset or ("celeba64" if flags.get("data", "drawn") != "drawn" else "drawn64")
        return Config.from_preset(preset, **flags)
    if a.out is not None or a.preset is not None:
        raise UserError("expected --resume without --out and --preset, got both; a resumed run keeps them")
    if not Path(a.resume).is_dir():
        raise UserError(
            f"expected the folder of a run after --resume, {a.resume} is none; start one with --out"
        )
    return resumed_configuration(Config.read(Path(a.resume) / "config.json"), flags)


def resumed_configuration(config: Config, flags: dict) -> Config:
    r"""The stored configuration with its bounds moved; anything else that differs is refused by name."""
    stored = {**vars(config.model), **vars(config.training)}
    differing = [
        f"{n} (is {stored[n]}, asked {v})" for n, v in flags.items() if n not in MOVABLE and v != stored[n]
    ]
    if differing:
        raise UserError(
            f"a resumed run keeps its settings, got others: {', '.join(differing)}; leave them out"
        )
    return config.with_training(**{n: v for n, v in flags.items() if n in MOVABLE})


class Trainer:
    r"""Runs the stages over the generators of `ddpm.training`; logs, validates, draws and saves.

    Args: names: of the pictures' files; None: they are drawn, and told by their numbers.
    """

    def __init__(
        self,
        run,
        model,
        pictures,
        names: Sequence[str] | None,
        cache: Path,
        precision: str,
        stop_after: int | None,
        group,
    ):
        self.group = group
        self.run, self.model, self.pictures, self.names, self.cache = (run, model, pictures, names, cache)
        self.config, self.precision, self.left = run.config, precision, stop_after
        self.stop = StopRequest()

    def optimization(self, stage: str, network, lr: float, ema: bool):
        r"""The stage's optimizers and bound, from the checkpoint where it stopped in this stage."""
        from ddpm.training.batches import stage_steps
        from ddpm.training.optimization import Bound, Optimization

        t, until = self.config.training, None
        if t.max_minutes:
            whole = 60 * t.max_minutes
            until = (
                whole * t.vae_share if stage == "vae" else whole - max(10, 0.02 * whole)
            )  # to save and draw

        def clock() -> float:
            return self.group.of_first(self.run.clock())

        bound = Bound(stage_steps(self.config, stage, self.pictures), clock, clock(), until)
        opt = Optimization(network, self.config, lr, bound, ema, self.precision, self.group)
        self.run.restore(stage, opt)
        return opt

    def train(
        self, opt, reports: Iterator, batch: int, validate: Callable[[], dict], stage: str, **more
    ) -> bool:
        r"""Take steps until the stage's bound, and save; False when --stop-after came first.

        Args: more: what the checkpoint holds beside the optimization.

        Raises: Stopped after a signal, NotFinite after too many skipped steps; both when the last step is saved.
        """
        from ddpm.training.optimization import NotFinite
        from ddpm.training.parallel import is_lost

        self.stop = StopRequest()
        with on_signals(self.stop):
            try:
                whole = self.take_steps(
                    opt, reports, batch, validate, stage, lambda: self.run.save(stage, opt, **more)
                )
            except (Stopped, NotFinite):
                self.run.save(stage, opt, **more)
                raise
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                self.run.save(
                    stage, opt, **more
                )  # processes speak with each other before a step changes anything
                raise LostGroup(
                    f"lost the other processes at {stage} step {opt.step} ({first_line(error)})"
                ) from None
            self.run.save(stage, opt, **more)
        self.check_stop(stage, opt.step)
        if not whole:
            say(f"stopped at {stage} step {opt.step}; {self.run.advice()}")
        return whole

    def take_steps(
        self, opt, reports: Iterator, batch: int, validate: Callable, stage: str, save: Callable
    ) -> bool:
        r"""The loop of `train`; it ends after a whole step or within a validation, which the resumed run repeats."""
        t = self.config.training
        if opt.step and opt.step % t.sample_every == 0:
            self.held_out(stage, opt.step, validate)
        with Progress(opt, stage, batch, self.run.clock) as progress:
            for report, seconds in timed(reports):
                if not report.finite:
                    say(f"skipped {self.told(report)}")
                progress.show(report, seconds)
                self.log(report, batch / seconds)
                if report.step % t.sample_every == 0:
                    self.held_out(stage, report.step, validate)
                self.check_stop(stage, report.step)
                if self.left is not None:
                    self.left -= 1
                    if self.left == 0:
                        return False
                if report.step % t.save_every == 0:
                    save()
        self.held_out(stage, opt.step, validate)
        return True

    def check_stop(self, stage: str, step: int):
        r"""Raise Stopped where a signal asked for it, in all processes or none."""
        signum = int(self.group.largest(self.stop.signum))
        if signum:
            raise Stopped(signum, f"stopped at {stage} step {step}")

    def held_out(self, stage: str, step: int, validate: Callable[[], dict]):
        r"""Validate this step, unless it has been; the figures join its row of the metrics."""
        row = self.run.row(stage, step)
        if self.run.writes and not (row["psnr"] or row["val_loss"]):
            row.update(validate())

    def told(self, report) -> str:
        r"""A step that was not finite, with the pictures and times it saw, in one line."""
        names = [str(i) if self.names is None else self.names[i] for i in report.rows]
        times = "" if report.times is None else f"; t {' '.join(map(str, report.times.tolist()))}"
        return (
            f"{report.stage} step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}; "
            f"pictures {' '.join(names)}{times}"
        )

    def log(self, report, rate: float):
        self.run.log(
            stage=report.stage,
            step=report.step,
            seconds=f"{self.run.clock():.1f}",
            loss=f"{report.loss:.6g}",
            lr=f"{report.lr:.4g}",
            grad_norm=f"{report.grad_norm:.4g}",
            images_per_second=f"{rate:.1f}",
        )

    def vae_is_trained(self, again: bool) -> bool:
        r"""Load the VAE where its stage is over: from the checkpoint of the second stage, else from its file.

        Args: again: the first stage is to go on if it was the last.
        """
        from ddpm.tools.files import digest_of

        path, state = self.run.folder / "vae.safetensors", self.run.state
        if state and state["stage"] == "unet":
            self.load_vae_of_state(path, state)
            return True
        if not path.is_file() or (again and state):
            return False
        try:
            self.model.load_vae(self.run.folder)
        except UserError as error:
            if not state:
                raise
            warnings.warn(f"{error}; it is made again from the checkpoint of the first stage", stacklevel=2)
            return False
        with (
            self.run.fitting()
        ):  # a stage that goes on beyond its first bound leaves the file of that bound behind
            return not state or digest_of(state["vae"]["network"]) == digest_of(self.model.vae.state_dict())

    def load_vae_of_state(self, path: Path, state: dict):
        r"""The VAE that the UNet was trained with so far; its file is written again where it holds another."""
        from ddpm.tools.files import digest_of

        def digest() -> str:
            return digest_of([self.model.vae.state_dict(), self.model.latent_scale])

        try:
            self.model.load_vae(self.run.folder)
            in_file, reason = digest(), "it is not the VAE of the checkpoint"
        except UserError as error:
            in_file, reason = None, str(error)
        with self.run.fitting():
            self.model.vae.load_state_dict(state["trained_vae"]["weights"])
            self.model.latent_scale = state["trained_vae"]["latent_scale"]
        if in_file != digest() and self.run.writes:
            warnings.warn(f"wrote {path} again from the checkpoint: {reason}", stacklevel=2)
            self.model.save_vae(self.run.folder)

    def train_vae(self) -> bool:
        r"""First stage; False when it was stopped before its end."""
        from ddpm.celeba.lists import TRAIN, VALID
        from ddpm.training.loops import train_vae
        from ddpm.training.validation import measure_latent_scale, reconstruction_quality

        t, model, valid = self.config.training, self.model, self.pictures.rows(VALID)
        opt = self.optimization("vae", model.vae, t.vae_lr, ema=False)

        def validate(rows=valid[:256]) -> dict:
            model.vae.eval()
            batch = at_once(t.vae_batch_size, t.accumulation)
            psnr, ssim = reconstruction_quality(model, self.pictures, rows, self.precision, batch)
            say(f"vae step {opt.step}: held-out PSNR {psnr:.2f} dB, SSIM {ssim:.4f} on {len(rows)} pictures")
            return {"psnr": f"{psnr:.3f}", "ssim": f"{ssim:.4f}"}

        reports = train_vae(model, self.pictures, self.config, opt, self.precision)
        if not self.train(opt, reports, t.vae_batch_size, validate, "vae"):
            return False
        if self.run.writes and float(validate(valid)["psnr"]) < ENOUGH_PSNR:
            say(
                f"warning: below {ENOUGH_PSNR} dB the VAE blurs what the UNet draws; give the first stage more time"
            )
        latents = self.encode()
        model.latent_scale = measure_latent_scale(latents, self.pictures.rows(TRAIN))
        if self.run.writes:
            model.save_vae(self.run.folder)
        say(f"latents {model.latent_shape}, scale {model.latent_scale:.4f}")
        return True

    def encode(self):
        r"""All latents."""
        from ddpm.training.caches import encode_latents

        self.model.vae.eval()
        with self.group.first_alone():
            return encode_latents(self.cache, self.model.vae, self.pictures, self.precision, progress_bar)

    def train_unet(self) -> bool:
        r"""Second stage; False when it was stopped before its end."""
        from ddpm.celeba.lists import TRAIN, VALID
        from ddpm.tools.weights import save_weights
        from ddpm.training.caches import Texts
        from ddpm.training.loops import train_unet
        from ddpm.training.validation import loss_by_timestep

        t, model, pictures = self.config.training, self.model, self.pictures
        latents, train, valid = self.encode(), pictures.rows(TRAIN), pictures.rows(VALID)[:64]
        sentences = {pictures.caption(i, t.seed, v) for i in train for v in range(t.caption_variants)}
        told = {pictures.full_caption(i) for i in valid}
        with self.group.first_alone():
            texts = Texts(
                self.cache, model.text, sentences | told, self.precision, t.text_cache_gb, progress_bar
            )
        if not texts.cached:
            say("the captions need more than --text-cache-gb: they go through the text tower at every step")
        prompts = sorted(told)[:: max(1, len(told) // 16)][:16]
        opt = self.optimization("unet", model.unet, t.lr, ema=True)

        def validate() -> dict:
            model.unet.eval()
            save_weights(self.run.folder / "unet.safetensors", model.unet.state_dict())
            with opt.ema.applied(model.unet):
                losses = loss_by_timestep(
                    model,
                    latents,
                    texts,
                    pictures,
                    valid,
                    self.precision,
                    seed=t.seed,
                    batch=at_once(t.batch_size, t.accumulation),
                )
                save_weights(self.run.folder / "ema.safetensors", model.unet.state_dict())
                self.draw_samples(opt.step, prompts)
            mean, tenths = sum(losses) / len(losses), " ".join(f"{loss:.3f}" for loss in losses)
            say(f"unet step {opt.step}: validation loss {mean:.4f}; by tenths of t {tenths}")
            return {"val_loss": f"{mean:.5f}"}

        reports = train_unet(model, latents, texts, pictures, self.config, opt, self.precision)
        vae = {"weights": model.vae.state_dict(), "latent_scale": model.latent_scale}
        return self.train(opt, reports, t.batch_size, validate, "unet", trained_vae=vae)

    def draw_samples(self, step: int, prompts: list[str]):
        r"""A grid of the averaged weights' pictures, always from the same noise and prompts."""
        from ddpm.tools.grids import labelled_grid, save_png

        def leave(_):
            if self.stop.signum and self.group.size == 1:  # several processes stop together, after a step
                self.check_stop("unet", step)

        t = self.config.training
        half = max(1, at_once(t.batch_size, t.accumulation) // 2)  # guidance asks twice
        x = self.model.sample(prompts, seed=t.seed, precision=self.precision, callback=leave, batch_size=half)
        settings = {
            "prompt": json.dumps(prompts),
            "settings": "dpm++, 20 steps, guidance 3, EMA",
            "step": str(step),
        }
        save_png(self.run.folder / "samples" / f"step_{step:06d}.png", labelled_grid(x, prompts, 8), settings)


def at_once(batch: int, accumulation: int) -> int:
    r"""Pictures that go through a network together where nothing is learned, and so nothing is kept."""
    return min(64, 2 * batch // accumulation)


def load_pictures(config: Config, table, cache: Path):
    r"""The decoded data set; skipped pictures are told."""
    from ddpm.celeba.dataset import load_pictures
    from ddpm.celeba.lists import TRAIN, VALID

    pictures = load_pictures(config, table, cache, progress_bar)
    counts = [len(pictures.rows(split)) for split in (TRAIN, VALID)]
    if not all(counts):
        raise UserError(
            f"expected pictures to train on and others to validate, got {counts[0]} and {counts[1]}; "
            "give more, or see the split or partition file"
        )
    if pictures.bad:
        few = ", ".join(f"{name} ({reason})" for name, reason in pictures.bad[:3])
        say(f"skipped {len(pictures.bad)} unreadable pictures: {few}")
    return pictures


def download(folder: str):
    r"""CelebA into the data folder."""
    from ddpm.celeba.download import download_celeba

    if folder == "drawn":
        raise UserError("expected --data FOLDER to download CelebA into, got none")
    download_celeba(folder)


def timed(things: Iterator) -> Iterator[tuple]:
    r"""Each of `things` with the seconds it took."""
    began = time.monotonic()
    for thing in things:
        yield thing, max(time.monotonic() - began, 1e-9)
        began = time.monotonic()


class Progress:
    r"""A bar over a stage's steps, or without a terminal a line now and then: running mean of the loss, speed."""

    def __init__(self, opt, stage: str, batch: int, clock: Callable[[], float]):
        self.stage, self.batch, self.clock, self.until = stage, batch, clock, opt.bound.until
        total = opt.bound.steps if self.until is None else None
        self.bar = cli.bar(total=total, initial=opt.step, desc=stage, unit="step")
        self.mean, self.last = None, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error):
        self.bar.close()

    def show(self, report, seconds: float):
        if report.finite:
            self.mean = report.loss if self.mean is None else 0.98 * self.mean + 0.02 * report.loss
        status = (
            f"loss {math.nan if self.mean is None else self.mean:.4f}, {self.batch / seconds:.0f} images/s"
        )
        if self.until is not None:
            status += f", {max(0.0, self.until - self.clock()) / 60:.1f} min left"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.last >= 30:
            self.last = time.monotonic()
            say(f"{self.stage} step {report.step}: {status}")


def train(run, a: argparse.Namespace, group, precision: str):
    r"""Both stages, or those that are asked for, in an opened run."""
    import torch

    from ddpm.celeba.dataset import open_data
    from ddpm.celeba.lists import TRAIN, VALID
    from ddpm.model import TextToImage
    from ddpm.tools.files import remove_leftovers
    from ddpm.training.optimization import check_batches
    from ddpm.training.perceptual import perceptual_loss

    folder, config = run.folder, run.config
    check_batches(config, group)
    with group.first_alone():
        if a.download:
            download(config.training.data)
        table = open_data(config)
    own_text, own_vae = folder / "text.safetensors", folder / "vae.safetensors"
    has_text = a.resume is not None and own_text.is_file()  # in a new folder it is what a killed command left
    second = run.state is not None and run.state["stage"] == "unet"
    if a.stage == "unet" and not own_vae.is_file() and not second:
        raise UserError(
            f"expected {own_vae} for the second stage; train it with --stage vae first, then --resume"
        )
    if a.stage == "vae" and second:
        raise UserError(
            f"expected a run whose first stage goes on, in {folder} the second has begun; choose a new --out"
        )
    torch.manual_seed(config.training.seed)
    if group.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32, where the card has it
    model = TextToImage(config.model, text_weights.tower_from_file(own_text) if has_text else None)
    cache = Path(a.cache or folder.parent / "cache")
    with group.first_alone():
        remove_leftovers(cache)
        pictures = load_pictures(config, table, cache)
        if config.training.perceptual_weight and not second and a.stage != "unet":
            perceptual_loss(group.device)  # fetches its weights, or refuses, while there is no folder yet

    keeps_text = not has_text and not is_name(config.model.text_weights)
    run.create(
        (lambda to: text_weights.save_tower(model.text, to)) if keeps_text else None
    )  # the run stays whole when the file goes
    together = f", {group.size} processes" if group.size > 1 else ""
    say(f"run {folder}, preset {config.preset}, {precision} on {group.device}{together}")
    say(f"{len(pictures.rows(TRAIN)):,} pictures to train on, {len(pictures.rows(VALID)):,} to validate")
    model.to(group.device)
    model.unet.set_gradient_checkpointing(config.training.gradient_checkpointing)
    trainer = Trainer(run, model, pictures, table and table.files, cache, precision, a.stop_after, group)
    if not trainer.vae_is_trained(again=a.stage == "vae") and not trainer.train_vae():
        return
    if a.stage != "vae" and trainer.train_unet():
        say(f"done in {run.clock() / 60:.1f} minutes; try:")
        say(f'  python sample.py "a smiling woman with blond hair and eyeglasses" --model {folder}')


def open_run(Run, group, folder: Path, config: Config, resume: bool, started: float):
    r"""The run in its folder; the first process alone locks it, writes to it and speaks."""
    if group.rank:
        cli.be_quiet()
    with group.first_alone():
        return Run(folder, config, resume, started, writes=group.rank == 0)


class LostGroup(UserError):
    r"""Another process of the group ended or failed."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def main(argv: list[str] | None = None):
    started = time.monotonic()  # --max-minutes counts from here
    a = parser().parse_args(argv)
    config = configuration(a)
    folder = Path(a.resume or a.out or Path("runs") / config.preset)
    device = devices.choose_device(a.device)
    precision = devices.choose_precision(config.training.precision, device)
    if a.dry_run:
        from ddpm.training.dry_run import estimate

        for line in estimate(config, device, precision):
            print(line)
        return
    from ddpm.tools.files import CannotWrite
    from ddpm.training.optimization import NotFinite
    from ddpm.training.parallel import Group, is_lost
    from ddpm.training.run import Run

    with (
        Group.joined(device) as group,
        open_run(Run, group, folder, config, a.resume is not None, started) as run,
    ):
        try:
            train(run, a, group, precision)
        except (CannotWrite, NotFinite, LostGroup) as error:
            raise UserError(f"{error}; {run.advice()}") from None
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise UserError(f"lost the other processes ({first_line(error)}); {run.advice()}") from None
        except Stopped as stop:
            raise Stopped(stop.signum, f"{stop}; {run.advice()}") from None


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
