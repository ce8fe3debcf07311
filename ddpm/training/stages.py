r"""The two stages of a run: each takes its steps, logs, validates, draws and saves them."""

import copy
import json
import math
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.config import WORDS_FILE
from ddpm.model import TextToImage
from ddpm.tools.command import Stopped, StopRequest, bar, on_signals, progress_bar, say
from ddpm.tools.errors import UserError
from ddpm.tools.files import CannotWrite, digest_of, write_atomically
from ddpm.tools.grids import labelled_grid, save_png
from ddpm.tools.weights import load_weights, save_weights
from ddpm.training.batches import seconds_of_training, stage_steps
from ddpm.training.caches import Encoded, Latents, Texts
from ddpm.training.distillation import (
    HELD_OUT,
    Trajectories,
    captions_of,
    loss_by_step,
    rows_of,
    train_distilled,
)
from ddpm.training.loops import train_unet, train_vae
from ddpm.training.optimization import Bound, NotFinite, Optimization, Report
from ddpm.training.parallel import Group, LostGroup, is_lost
from ddpm.training.run_folder import Run
from ddpm.training.validation import loss_by_timestep, measure_latent_scale, reconstruction_quality

Step = tuple[str, Report]  # of the stage vae or unet
BEGUN_UNET = "begun_unet"  # of a checkpoint of the first stage: the UNet's weights from --init
TEACHER_FILE = "teacher.safetensors"  # of a distillation, which needs it to its end
RISEN = 1.02  # times the least validation loss; above, the UNet overfits
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

    def latents(self) -> Latents:
        return Latents(Encoded(self.cache, self.model.vae.eval(), self.pictures, self.precision))

    def texts(self) -> Texts:
        limit_gb = self.run.config.training.text_cache_gb
        return Texts(self.cache, self.model.text, (), self.precision, limit_gb)


class Stage:
    r"""One stage of a run; a subclass trains its network and validates it."""

    def __init__(self, session: Session, name: str, network: nn.Module, lr: float, batch_size: int, ema):
        self.session = session
        self.run = session.run
        self.config = session.run.config
        self.settings = session.run.config.training
        self.model = session.model
        self.pictures = session.pictures
        self.precision = session.precision
        self.group = session.group
        self.name = name
        self.batch_size = batch_size
        self.inference_batch = inference_batch(batch_size, self.settings.accumulation)
        self.stop = StopRequest()
        self.more: dict = {}  # what the checkpoint holds beside the optimization
        self.mean_loss = math.nan
        self.opt = Optimization(network, self.config, lr, self.bound(), ema, self.precision, self.group)
        self.run.restore(name, self.opt)

    def bound(self) -> Bound:
        r"""The stage's bound in steps and, with --max-minutes, on the main process's clock."""
        until = None
        if self.settings.max_minutes:
            whole = 60 * self.settings.max_minutes
            is_vae = self.name == "vae"
            until = whole * self.settings.vae_share if is_vae else seconds_of_training(self.settings)
        run, group = self.run, self.group  # not self: that cycle would keep the stage's optimizer in memory

        def clock() -> float:
            return group.broadcast(run.clock())

        steps = stage_steps(self.config, self.name, len(self.pictures.rows(TRAIN)))
        return Bound(steps, clock, clock(), until)

    def validate(self) -> dict:
        r"""Figures of the held-out pictures, by column of the metrics."""
        raise NotImplementedError

    def take(self, reports: Iterator[Report]) -> Generator[Step, None, bool]:
        r"""Take steps until the stage's bound, and save; False when --stop-after came first.

        Raises: Stopped after a signal, NotFinite after too many skipped steps; both when the last step is saved, as it
        is when the caller asks for no more steps.
        """
        with on_signals(self.stop):
            try:
                is_over = yield from self.take_steps(reports)
            except (Stopped, NotFinite, GeneratorExit):
                self.save()
                raise
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                self.save()  # the group exchanges numbers before a step changes anything
                raise LostGroup(error, f" at {self.name} step {self.opt.step}") from None
            self.save()
        self.check_stop()
        if is_over and not self.opt.step:
            advice = "more --max-minutes leave time; --dry-run says how they will be spent"
            say(f"warning: the minutes were over before the first step of the {self.name}; {advice}")
        if not is_over:
            say(f"stopped at {self.name} step {self.opt.step}; {self.run.advice()}")
        return is_over

    def take_steps(self, reports: Iterator[Report]) -> Generator[Step, None, bool]:
        r"""The loop of `take`; it ends after a whole step or within a validation, which the resumed run repeats."""
        if self.opt.step and self.opt.step % self.settings.sample_every == 0:
            self.validate_once()
        total = self.opt.bound.steps if self.opt.bound.until is None else None
        with bar(total=total, initial=self.opt.step, desc=self.name, unit="step") as shown:
            began = time.monotonic()
            for report in reports:
                seconds = max(time.monotonic() - began, 1e-9)
                if not report.finite:
                    say(f"skipped {self.description(report)}")
                self.show(shown, report, seconds)
                self.log(report, seconds)
                if report.step % self.settings.sample_every == 0:
                    self.validate_once()
                self.check_stop()
                if self.session.steps_left is not None:
                    self.session.steps_left -= 1
                    if self.session.steps_left == 0:
                        yield self.name, report
                        return False
                if report.step % self.settings.save_every == 0:
                    self.save()
                yield self.name, report
                began = time.monotonic()
        self.validate_once()
        return True

    def save(self):
        self.run.save(self.name, self.opt, **self.more)

    def check_stop(self):
        r"""Raise Stopped if a signal asked for it, in all processes or none."""
        signum = int(self.group.max(self.stop.signum))
        if signum:
            raise Stopped(signum, f"stopped at {self.name} step {self.opt.step}")

    def validate_once(self):
        r"""Validate this step, unless it has been; the figures join its row of the metrics."""
        row = self.run.row(self.name, self.opt.step)
        if self.run.writes and not (row["psnr"] or row["val_loss"]):
            self.run.keep_lock()
            if self.run.saved != (self.name, self.opt.step):
                self.save()  # a validation takes long, and may need more memory than there is
            try:
                row.update(self.validate())
            except CannotWrite:  # of a grid or of weights; the checkpoint may have room
                self.save()
                raise

    def description(self, report: Report) -> str:
        r"""One line on a step that was not finite, with its pictures and timesteps."""
        files = self.session.files
        pictures = " ".join(str(i) if files is None else files[i] for i in report.rows)
        timesteps = "" if report.t is None else f"; t {' '.join(map(str, report.t.tolist()))}"
        return (
            f"{self.name} step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}; "
            f"pictures {pictures}{timesteps}"
        )

    def show(self, shown, report: Report, seconds: float):
        r"""Show the running mean of the loss and the speed in the bar."""
        if report.finite:
            is_first = math.isnan(self.mean_loss)
            self.mean_loss = report.loss if is_first else 0.98 * self.mean_loss + 0.02 * report.loss
        status = f"loss {self.mean_loss:.4f}, {self.batch_size / seconds:.0f} images/s"
        until = self.opt.bound.until
        if until is not None:
            status += f", {max(0.0, until - self.run.clock()) / 60:.1f} min left"
        shown.set_postfix_str(status, refresh=False)
        shown.update()

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


def inference_batch(batch_size: int, accumulation: int) -> int:
    r"""How many pictures go through a network together when nothing is kept for a backward pass."""
    return min(64, 2 * batch_size // accumulation)


class VaeStage(Stage):
    r"""First stage: the VAE, and the scale of its latents."""

    def __init__(self, session: Session):
        settings = session.run.config.training
        super().__init__(session, "vae", session.model.vae, settings.vae_lr, settings.vae_batch_size, False)
        self.held_out = session.pictures.held_out(256)
        if settings.init:  # that run may be gone, or trained on, when this one is resumed
            self.more = {BEGUN_UNET: session.model.unet.state_dict()}

    def train(self) -> Generator[Step, None, bool]:
        r"""Train, encode and write vae.safetensors; False when it was stopped before its end."""
        reports = train_vae(self.model, self.pictures, self.config, self.opt)
        if not (yield from self.take(reports)):
            return False
        if self.run.writes and float(self.run.row("vae", self.opt.step)["psnr"]) < ENOUGH_PSNR:
            advice = "the VAE blurs what the UNet draws; give the first stage more time"
            say(f"warning: below {ENOUGH_PSNR} dB {advice}")
        finish_vae(self.session)
        return True

    def validate(self) -> dict:
        self.model.vae.eval()
        how = (self.precision, self.inference_batch, progress_bar)
        psnr, ssim = reconstruction_quality(self.model, self.pictures, self.held_out, *how)
        figures = f"held-out PSNR {psnr:.2f} dB, SSIM {ssim:.4f} on {len(self.held_out)} pictures"
        say(f"vae step {self.opt.step}: {figures}")
        return {"psnr": f"{psnr:.3f}", "ssim": f"{ssim:.4f}"}


def finish_vae(session: Session):
    r"""Measure the scale of the VAE's latents, and write vae.safetensors."""
    model = session.model
    if not model.config.few_steps:  # else it is the teacher's
        with session.group.main_process_first():  # which encodes them
            rows = session.pictures.rows(TRAIN)
            model.latent_scale = measure_latent_scale(session.latents(), rows, progress_bar)
    if session.run.writes:
        model.save_vae(session.run.folder)
    say(f"latents {model.latent_shape}, scale {model.latent_scale:.4f}")


class UnetStage(Stage):
    r"""Second stage: the UNet, on the latents of the VAE."""

    parts = "tenths of t"  # of which the validation gives a loss each

    def __init__(self, session: Session):
        model = session.model
        settings = session.run.config.training
        self.held_out = session.pictures.held_out(64)
        self.texts = session.texts()
        captions = sorted({session.pictures.full_caption(i) for i in self.held_out})
        self.prompts = captions[:: max(1, len(captions) // 16)][:16]
        words = sorted(session.pictures.words())
        if session.run.writes and (session.run.config.model.text_weights == "random" or not words):
            write_atomically(session.run.folder / WORDS_FILE, ("\n".join(words) + "\n").encode())
        super().__init__(session, "unet", model.unet, settings.lr, settings.batch_size, True)
        self.more = {"trained_vae": {"weights": model.vae.state_dict(), "latent_scale": model.latent_scale}}
        self.prepare()

    def prepare(self):
        r"""Open what the steps read."""
        self.data = (self.model, self.session.latents(), self.texts, self.pictures)

    def reports(self) -> Iterator[Report]:
        r"""The loop over the steps."""
        return train_unet(*self.data, self.config, self.opt)

    def losses(self) -> list[float]:
        r"""Validation losses, by `parts`."""
        how = {"precision": self.precision, "seed": self.settings.seed, "batch": self.inference_batch}
        how |= {"weighting": self.settings.weighting, "progress": progress_bar}
        return loss_by_timestep(*self.data, self.held_out, **how)

    def train(self) -> Generator[Step, None, bool]:
        r"""Train; False when it was stopped before its end."""
        return self.take(self.reports())

    def validate(self) -> dict:
        r"""Also writes both weights and a grid of samples."""
        unet = self.model.unet.eval()
        batch = self.inference_batch
        save_weights(self.run.folder / "unet.safetensors", unet.state_dict())
        with self.opt.ema.applied(unet):
            losses = self.losses()
            save_weights(self.run.folder / "ema.safetensors", unet.state_dict())
            self.draw_samples(max(1, batch // 2))  # guidance runs the UNet on twice as many
        mean = sum(losses) / len(losses)
        each = " ".join(f"{loss:.3f}" for loss in losses)
        say(f"unet step {self.opt.step}: validation loss {mean:.4f}; by {self.parts} {each}")
        before = [(float(row["val_loss"]), row["step"]) for row in self.run.rows if row["val_loss"]]
        if before and mean > RISEN * min(before)[0]:
            least, step = min(before)
            advice = (
                "the UNet begins to learn these pictures by heart; train for fewer steps, or on more pictures"
            )
            say(f"warning: the validation loss was {least:.4f} at step {step}; {advice}")
        return {"val_loss": f"{mean:.5f}"}

    def draw_samples(self, batch: int):
        r"""Draw a grid with the averaged weights, always from the same noise and prompts."""

        def leave(_):
            shown.update()
            if self.stop.signum and self.group.size == 1:  # several processes stop together, after a step
                self.check_stop()

        how = {"seed": self.settings.seed, "precision": self.precision, "batch_size": batch}
        sampler, steps, guidance, noise_scale = self.config.model.drawing
        with bar(total=steps * -(-len(self.prompts) // batch), desc="drawing samples", leave=False) as shown:
            x = self.model.sample(self.prompts, callback=leave, **how)
        text = {"prompt": json.dumps(self.prompts)}
        text["settings"] = (
            f"{sampler}, {steps} steps, guidance {guidance:g}, noise scale {noise_scale:g}, EMA"
        )
        text["step"] = str(self.opt.step)
        path = self.run.folder / "samples" / f"step_{self.opt.step:06d}.png"
        save_png(path, labelled_grid(x, self.prompts, 8), text)


class FewStepsStage(UnetStage):
    r"""Second stage of a model of few steps: the UNet learns from a teacher, see `distillation`."""

    parts = "steps, the first at the most noise,"

    def prepare(self):
        teacher = copy.deepcopy(self.model.unet).eval().requires_grad_(False)
        file = self.run.folder / TEACHER_FILE
        if self.opt.step:
            load_weights(file, teacher)
        elif self.run.writes:  # the student is still its teacher
            save_weights(file, teacher.state_dict())
        self.rows = rows_of(self.pictures, self.config)
        captions = captions_of(self.pictures, self.rows, self.config)
        data = (self.texts, captions, self.config.model, self.settings.seed, self.precision)
        with self.group.main_process_first():  # which draws the held-out ones
            self.trajectories = Trajectories(self.session.cache, teacher, self.model.schedule, *data)
            self.trajectories(np.arange(len(captions))[-HELD_OUT:])

    def reports(self) -> Iterator[Report]:
        data = (self.model, self.trajectories, self.rows, self.texts)
        return train_distilled(*data, self.config, self.opt)

    def losses(self) -> list[float]:
        data = (self.model, self.trajectories, self.texts)
        return loss_by_step(*data, self.precision, self.inference_batch)


def restore_vae(session: Session, stage: str) -> bool:
    r"""Load the VAE if its training is over; returns whether it is. The checkpoint's copy has precedence.

    Args: stage: what was asked for; with `vae` the first stage goes on, if its bound was moved.
    """
    run, model = session.run, session.model
    path = run.folder / "vae.safetensors"
    state = run.state
    is_there = session.group.broadcast(path.is_file())  # in all processes or none
    if stage == "unet" and state is None and not is_there:  # it is the one of --init
        finish_vae(session)
        return True
    if not run.in_second_stage and (not is_there or (state and stage == "vae")):
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
