r"""The two stages of a run: each takes its steps, logs, validates, draws and saves them."""

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN, VALID
from ddpm.model import TextToImage
from ddpm.tools.command import Stopped, StopRequest, bar, on_signals, progress_bar, say
from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of
from ddpm.tools.grids import labelled_grid, save_png
from ddpm.tools.weights import save_weights
from ddpm.training.batches import stage_steps
from ddpm.training.caches import Latents, Texts, encode_latents
from ddpm.training.loops import train_unet, train_vae
from ddpm.training.optimization import Bound, NotFinite, Optimization, Report
from ddpm.training.parallel import Group, LostGroup, is_lost
from ddpm.training.run_folder import Run
from ddpm.training.validation import loss_by_timestep, measure_latent_scale, reconstruction_quality

ENOUGH_PSNR = 20  # decibels on held-out pictures; below, the second stage learns to draw blur


@dataclass
class Session:
    r"""One command's work on a run: what both stages share.

    Attributes:
        files: names of the pictures, or None for drawn ones, which have numbers.
        steps_left: how many steps this command may still take; None: no limit.
    """

    run: Run
    model: TextToImage
    pictures: Pictures
    files: Sequence[str] | None
    cache: Path
    precision: str
    group: Group
    steps_left: int | None = None


class Stage:
    r"""One stage of a run; a subclass trains its network and validates it."""

    def __init__(
        self, session: Session, name: str, network: nn.Module, lr: float, batch_size: int, ema: bool
    ):
        self.session = session
        self.run = session.run
        self.settings = session.run.config.training
        self.name = name
        self.batch_size = batch_size
        self.stop = StopRequest()
        self.more: dict = {}  # what the checkpoint holds beside the optimization
        bound = self.bound()
        self.opt = Optimization(network, self.run.config, lr, bound, ema, session.precision, session.group)
        self.run.restore(name, self.opt)

    def bound(self) -> Bound:
        r"""The stage's bound in steps and, with --max-minutes, on the main process's clock."""
        until = None
        if self.settings.max_minutes:
            whole = 60 * self.settings.max_minutes
            to_save_and_draw = max(10, 0.02 * whole)
            until = whole * self.settings.vae_share if self.name == "vae" else whole - to_save_and_draw

        def clock() -> float:
            return self.session.group.broadcast(self.run.clock())

        steps = stage_steps(self.run.config, self.name, self.session.pictures)
        return Bound(steps, clock, clock(), until)

    def validate(self) -> dict:
        r"""Figures of the held-out pictures, by column of the metrics."""
        raise NotImplementedError

    def take(self, reports: Iterator[Report]) -> bool:
        r"""Take steps until the stage's bound, and save; False when --stop-after came first.

        Raises: Stopped after a signal, NotFinite after too many skipped steps; both when the last step is saved.
        """
        self.stop = StopRequest()
        with on_signals(self.stop):
            try:
                is_over = self.take_steps(reports)
            except (Stopped, NotFinite):
                self.save()
                raise
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                self.save()  # the group exchanges numbers before a step changes anything
                raise LostGroup(error, f" at {self.name} step {self.opt.step}") from None
            self.save()
        self.check_stop()
        if not is_over:
            say(f"stopped at {self.name} step {self.opt.step}; {self.run.advice()}")
        return is_over

    def take_steps(self, reports: Iterator[Report]) -> bool:
        r"""The loop of `take`; it ends after a whole step or within a validation, which the resumed run repeats."""
        if self.opt.step and self.opt.step % self.settings.sample_every == 0:
            self.validate_once()
        with Progress(self) as progress:
            began = time.monotonic()
            for report in reports:
                seconds = max(time.monotonic() - began, 1e-9)
                if not report.finite:
                    say(f"skipped {self.description(report)}")
                progress.show(report, seconds)
                self.log(report, seconds)
                if report.step % self.settings.sample_every == 0:
                    self.validate_once()
                self.check_stop()
                if self.session.steps_left is not None:
                    self.session.steps_left -= 1
                    if self.session.steps_left == 0:
                        return False
                if report.step % self.settings.save_every == 0:
                    self.save()
                began = time.monotonic()
        self.validate_once()
        return True

    def save(self):
        self.run.save(self.name, self.opt, **self.more)

    def check_stop(self):
        r"""Raise Stopped where a signal asked for it, in all processes or none."""
        signum = int(self.session.group.max(self.stop.signum))
        if signum:
            raise Stopped(signum, f"stopped at {self.name} step {self.opt.step}")

    def validate_once(self):
        r"""Validate this step, unless it has been; the figures join its row of the metrics."""
        row = self.run.row(self.name, self.opt.step)
        if self.run.writes and not (row["psnr"] or row["val_loss"]):
            row.update(self.validate())

    def description(self, report: Report) -> str:
        r"""A step that was not finite, with the pictures and timesteps it saw, in one line."""
        files = self.session.files
        pictures = " ".join(str(i) if files is None else files[i] for i in report.rows)
        timesteps = "" if report.t is None else f"; t {' '.join(map(str, report.t.tolist()))}"
        return (
            f"{self.name} step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}; "
            f"pictures {pictures}{timesteps}"
        )

    def log(self, report: Report, seconds: float):
        self.run.log(
            stage=self.name,
            step=report.step,
            seconds=f"{self.run.clock():.1f}",
            loss=f"{report.loss:.6g}",
            lr=f"{report.lr:.4g}",
            grad_norm=f"{report.grad_norm:.4g}",
            images_per_second=f"{self.batch_size / seconds:.1f}",
        )


class Progress:
    r"""A bar over a stage's steps, or without a terminal a line now and then: running mean of the loss, speed."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.until = stage.opt.bound.until
        total = stage.opt.bound.steps if self.until is None else None
        self.bar = bar(total=total, initial=stage.opt.step, desc=stage.name, unit="step")
        self.mean = math.nan
        self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error):
        self.bar.close()

    def show(self, report: Report, seconds: float):
        if report.finite:
            self.mean = report.loss if math.isnan(self.mean) else 0.98 * self.mean + 0.02 * report.loss
        status = f"loss {self.mean:.4f}, {self.stage.batch_size / seconds:.0f} images/s"
        if self.until is not None:
            status += f", {max(0.0, self.until - self.stage.run.clock()) / 60:.1f} min left"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.last_line >= 30:
            self.last_line = time.monotonic()
            say(f"{self.stage.name} step {report.step}: {status}")


class VaeStage(Stage):
    r"""First stage: the VAE, and the scale of its latents."""

    def __init__(self, session: Session):
        settings = session.run.config.training
        super().__init__(
            session, "vae", session.model.vae, settings.vae_lr, settings.vae_batch_size, ema=False
        )
        self.held_out = session.pictures.rows(VALID)

    def train(self) -> bool:
        r"""Train, encode and write vae.safetensors; False when it was stopped before its end."""
        model, pictures = self.session.model, self.session.pictures
        if not self.take(train_vae(model, pictures, self.run.config, self.opt, self.session.precision)):
            return False
        if self.run.writes and self.quality(self.held_out)[0] < ENOUGH_PSNR:
            advice = "the VAE blurs what the UNet draws; give the first stage more time"
            say(f"warning: below {ENOUGH_PSNR} dB {advice}")
        model.latent_scale = measure_latent_scale(encoded(self.session), pictures.rows(TRAIN))
        if self.run.writes:
            model.save_vae(self.run.folder)
        say(f"latents {model.latent_shape}, scale {model.latent_scale:.4f}")
        return True

    def validate(self) -> dict:
        psnr, ssim = self.quality(self.held_out[:256])
        return {"psnr": f"{psnr:.3f}", "ssim": f"{ssim:.4f}"}

    def quality(self, rows: np.ndarray) -> tuple[float, float]:
        r"""Print PSNR and SSIM of these pictures, and return them."""
        model, pictures, precision = self.session.model, self.session.pictures, self.session.precision
        model.vae.eval()
        batch = inference_batch(self.batch_size, self.settings.accumulation)
        psnr, ssim = reconstruction_quality(model, pictures, rows, precision, batch)
        figures = f"held-out PSNR {psnr:.2f} dB, SSIM {ssim:.4f} on {len(rows)} pictures"
        say(f"vae step {self.opt.step}: {figures}")
        return psnr, ssim


class UnetStage(Stage):
    r"""Second stage: the UNet, on the latents of the VAE."""

    def __init__(self, session: Session):
        model, settings = session.model, session.run.config.training
        self.latents = encoded(session)
        self.held_out = session.pictures.rows(VALID)[:64]
        full_captions = {session.pictures.full_caption(i) for i in self.held_out}
        self.texts = embedded(session, full_captions)
        self.prompts = sorted(full_captions)[:: max(1, len(full_captions) // 16)][:16]
        super().__init__(session, "unet", model.unet, settings.lr, settings.batch_size, ema=True)
        self.more = {"trained_vae": {"weights": model.vae.state_dict(), "latent_scale": model.latent_scale}}

    def train(self) -> bool:
        r"""Train; False when it was stopped before its end."""
        model, pictures, precision = self.session.model, self.session.pictures, self.session.precision
        config = self.run.config
        return self.take(train_unet(model, self.latents, self.texts, pictures, config, self.opt, precision))

    def validate(self) -> dict:
        r"""Also writes both weights and a grid of samples."""
        model, pictures, precision = self.session.model, self.session.pictures, self.session.precision
        folder, seed = self.run.folder, self.settings.seed
        batch = inference_batch(self.batch_size, self.settings.accumulation)
        model.unet.eval()
        save_weights(folder / "unet.safetensors", model.unet.state_dict())
        with self.opt.ema.applied(model.unet):
            held_out = (self.latents, self.texts, pictures, self.held_out)
            losses = loss_by_timestep(model, *held_out, precision, seed=seed, batch=batch)
            save_weights(folder / "ema.safetensors", model.unet.state_dict())
            self.draw_samples(max(1, batch // 2))  # guidance runs the UNet on twice as many
        mean = sum(losses) / len(losses)
        tenths = " ".join(f"{loss:.3f}" for loss in losses)
        say(f"unet step {self.opt.step}: validation loss {mean:.4f}; by tenths of t {tenths}")
        return {"val_loss": f"{mean:.5f}"}

    def draw_samples(self, batch: int):
        r"""A grid of the averaged weights' pictures, always from the same noise and prompts."""

        def leave(_):
            if (
                self.stop.signum and self.session.group.size == 1
            ):  # several processes stop together, after a step
                self.check_stop()

        seed, precision = self.settings.seed, self.session.precision
        x = self.session.model.sample(
            self.prompts, seed=seed, precision=precision, callback=leave, batch_size=batch
        )
        text = {"prompt": json.dumps(self.prompts), "settings": "dpm++, 20 steps, guidance 3, EMA"}
        text["step"] = str(self.opt.step)
        path = self.run.folder / "samples" / f"step_{self.opt.step:06d}.png"
        save_png(path, labelled_grid(x, self.prompts, 8), text)


def inference_batch(batch_size: int, accumulation: int) -> int:
    r"""Pictures that go through a network together where no activations are kept for a backward pass."""
    return min(64, 2 * batch_size // accumulation)


def encoded(session: Session) -> Latents:
    r"""All latents."""
    vae = session.model.vae.eval()
    with session.group.main_process_first():
        return encode_latents(session.cache, vae, session.pictures, session.precision, progress_bar)


def embedded(session: Session, full_captions: set[str]) -> Texts:
    r"""The states of all training captions and of these."""
    settings, pictures, tower = session.run.config.training, session.pictures, session.model.text
    variants = [(i, v) for i in pictures.rows(TRAIN) for v in range(settings.caption_variants)]
    captions = full_captions | {pictures.caption(i, settings.seed, v) for i, v in variants}
    limit_gb = settings.text_cache_gb
    with session.group.main_process_first():
        texts = Texts(session.cache, tower, captions, session.precision, limit_gb, progress_bar)
    if not texts.cached:
        say("the captions need more than --text-cache-gb: they go through the text tower at every step")
    return texts


def restore_vae(run: Run, model: TextToImage, stage: str) -> bool:
    r"""Load the VAE if its training is over; returns whether it is. The checkpoint's copy wins over vae.safetensors.

    Args: stage: what was asked for; with `vae` the first stage goes on, if its bound was moved.
    """
    path = run.folder / "vae.safetensors"
    state = run.state
    if not run.in_second_stage and (not path.is_file() or (state and stage == "vae")):
        return False
    if state is None:
        model.load_vae(run.folder)
        return True
    with run.fitting():
        weights = state["trained_vae"]["weights"] if run.in_second_stage else state["vae"]["network"]
        latent_scale = state["trained_vae"]["latent_scale"] if run.in_second_stage else None
    problem = None
    try:
        model.load_vae(run.folder)
        if digest_of(model.vae.state_dict()) != digest_of(weights):
            problem = "it is not the VAE of the checkpoint"
    except UserError as error:
        problem = str(error)
        if not run.in_second_stage:
            warnings.warn(f"{error}; it is made again from the checkpoint of the first stage", stacklevel=2)
    if not run.in_second_stage:
        return problem is None
    if model.latent_scale != latent_scale:
        problem = problem or "its latent scale is not that of the checkpoint"
    with run.fitting():
        model.vae.load_state_dict(weights)
    model.latent_scale = latent_scale
    if problem and run.writes:
        warnings.warn(f"wrote {path} again from the checkpoint: {problem}", stacklevel=2)
        model.save_vae(run.folder)
    return True
