r"""Train a text-to-image model: the VAE first, then the UNet on its latents.

    python train.py                           drawn faces, no download, minutes on a laptop's CPU
    python train.py --data PATH               CelebA in any layout, or your own images with a csv
    python train.py --resume runs/NAME        go on as if never stopped
"""

import argparse
import csv
import io
import json
import os
import sys
import time
from pathlib import Path

from ddpm import cli
from ddpm.config import PRESETS, Config, UserError, add_flags, given_flags

STAGES = ("vae", "unet")
COLUMNS = ("stage", "step", "seconds", "loss", "lr", "grad_norm", "images_per_second", "psnr", "ssim", "val_loss")


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, help="named settings; drawn64 for drawn faces, celeba64 (the spec) with --data")
    p.add_argument("--out", help="run folder to make [runs/PRESET]")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    p.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="which stage to train [all]")
    p.add_argument("--max-steps", type=int, metavar="N", help="bound each stage to N steps; may be given again with --resume")
    p.add_argument("--stop-after", type=int, metavar="N", help="end this command after N steps, saved; the schedule stays")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute [auto]")
    p.add_argument("--cache", metavar="DIR", help="folder of decoded pictures, latents and captions [runs/cache]")
    p.add_argument("--download", action="store_true", help="try to download CelebA into the folder --data first")
    p.add_argument("--dry-run", action="store_true", help="print shapes, parameters, memory and time a step; write nothing")
    add_flags(p)
    return p


def configuration(arguments: argparse.Namespace) -> Config:
    r"""The run's configuration from its preset, or from the run that is resumed, and the flags."""
    flags = given_flags(arguments)
    for name in ("max_steps", "stop_after"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"expected --{name.replace('_', '-')} of at least 1, got {value}")
    bound = {} if arguments.max_steps is None else {"vae_steps": arguments.max_steps, "unet_steps": arguments.max_steps, "epochs": 0}
    if bound and "max_minutes" not in flags:
        bound["max_minutes"] = 0.0
    if arguments.resume is None:
        preset = arguments.preset or ("celeba64" if flags.get("data", "drawn") != "drawn" else "drawn64")
        return Config.from_preset(preset, **(flags | bound))
    if arguments.out is not None or arguments.preset is not None:
        raise UserError("expected --resume alone or --out and --preset, got both; a resumed run keeps its folder and preset")
    if not Path(arguments.resume).is_dir():
        raise UserError(f"expected a run folder after --resume, {arguments.resume} is not there; start one with --out {arguments.resume}")
    config = Config.read(Path(arguments.resume) / "config.json")
    stored = {**vars(config.model), **vars(config.training)}
    free = {"max_minutes", "save_every", "sample_every", "vae_steps", "unet_steps"}
    differing = [n for n, v in flags.items() if n not in free and v != stored[n]]
    if differing:
        told = ", ".join(f"{n} (is {stored[n]}, asked {flags[n]})" for n in differing)
        raise UserError(f"a resumed run keeps its settings; these differ: {told}; leave them out, or start anew with --out")
    return config.with_training(**({n: v for n, v in flags.items() if n in free} | bound))


class Run:
    r"""The run's folder: configuration, weights, resume state, metrics, pictures."""

    def __init__(self, folder: Path, config: Config, resume: bool, started: float):
        self.folder, self.config = folder, config
        self.rows, self.state = [], None
        if resume:
            self._reopen()
        else:
            self._check_new()
        self.started = started - (self.state["elapsed"] if self.state else 0.0)

    def _check_new(self):
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"expected a new folder for the run, {self.folder} exists; choose another --out, or --resume {self.folder}")
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(f"expected a folder that can be written to, {there} cannot; choose another --out")

    def create(self):
        r"""Make the folder, once everything that can be refused has been looked at."""
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.write("config.json", self.config.to_json().encode())

    def write(self, name: str, content):
        from ddpm.model import write_atomically

        write_atomically(self.folder / name, content)

    def _reopen(self):
        import torch

        path = self.folder / "state.pt"
        if path.is_file():
            try:
                self.state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"could not read {path} ({str(error).splitlines()[0][:100]}); it is damaged: start anew with --out") from None
        metrics = self.folder / "metrics.csv"
        if metrics.is_file() and self.state:
            place = (STAGES.index(self.state["stage"]), self.state["step"])
            with open(metrics, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get("stage") in STAGES]
            self.rows = [row for row in rows if (STAGES.index(row["stage"]), int(row["step"])) <= place]

    def clock(self) -> float:
        r"""Seconds of all sessions of this run."""
        return time.monotonic() - self.started

    def log(self, **row):
        self.rows.append({name: row.get(name, "") for name in COLUMNS})

    def save_metrics(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        self.write("metrics.csv", text.getvalue().encode())
        plot_losses(self.folder / "loss.png", self.rows)

    def save_state(self, stage: str, optimization):
        import torch

        state = {"stage": stage, "step": optimization.step, "elapsed": self.clock(), stage: optimization.state_dict()}
        self.write("state.pt", lambda to: torch.save(state, to))
        self.save_metrics()


def plot_losses(path: Path, rows: list[dict]):
    r"""Loss and validation figures over the steps of both stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ddpm.model import write_atomically

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, stage, validation, label in zip(axes, STAGES, ("psnr", "val_loss"), ("PSNR, dB (valid)", "loss (valid)"), strict=True):
        mine = [row for row in rows if row["stage"] == stage]
        loss = [(int(r["step"]), float(r["loss"])) for r in mine if r["loss"] != ""]
        held_out = [(int(r["step"]), float(r[validation])) for r in mine if r[validation] != ""]
        axis.set(title=f"{stage} stage", xlabel="step", ylabel="loss")
        if loss:
            axis.plot(*zip(*loss, strict=True), lw=0.7, color="#4477aa", label="loss (train)")
            axis.set_yscale("log")
        if held_out:
            other = axis.twinx() if validation == "psnr" else axis
            other.plot(*zip(*held_out, strict=True), "o-", ms=3, color="#cc6677", label=label)
            other.set_ylabel(label if validation == "psnr" else "loss")
            other.legend(loc="upper right")
    write_atomically(path, lambda to: figure.savefig(to, format="png", dpi=110))
    plt.close(figure)


def progress_bar(things, total: int, label: str):
    from tqdm import tqdm

    return tqdm(things, label, total, leave=False, disable=None)


def say(text: str):
    from tqdm import tqdm

    tqdm.write(text)


def load_pictures(config: Config, table, cache: Path):
    from ddpm.cache import drawn_pictures, photographs

    t, size = config.training, config.model.image_size
    if table is None:
        return drawn_pictures(cache, t.drawn_images, t.seed, size, progress_bar)
    pictures = photographs(cache, table, size, t.crop, t.max_bad_images, progress_bar)
    if pictures.bad:
        few = ", ".join(f"{name} ({reason})" for name, reason in pictures.bad[:3])
        say(f"skipped {len(pictures.bad)} unreadable pictures: {few}")
    return pictures


def stage_steps(config: Config, stage: str, pictures) -> int:
    from ddpm.data import TRAIN

    t = config.training
    if not t.epochs:
        return getattr(t, f"{stage}_steps")
    batch = t.vae_batch_size if stage == "vae" else t.batch_size
    return t.epochs * (t.steps_per_epoch or max(1, len(pictures.rows(TRAIN)) // batch))


class Trainer:
    r"""Runs the stages over the generators of `ddpm.training`, logging, validating and saving."""

    def __init__(self, run: Run, model, pictures, cache: Path, precision: str, stop_after: int | None):
        self.run, self.model, self.pictures, self.cache = run, model, pictures, cache
        self.config, self.precision = run.config, precision
        self.left = stop_after

    def optimization(self, stage: str, network, lr: float, ema: bool):
        r"""The stage's optimizer and bound, gone on with where the run stopped in this stage."""
        from ddpm.training import Bound, Optimization

        t = self.config.training
        end = None
        if t.max_minutes:
            end = 60 * t.max_minutes * (t.vae_share if stage == "vae" else 0.98)  # the rest: last pictures, saving
        bound = Bound(stage_steps(self.config, stage, self.pictures), self.run.clock, self.run.clock(), end)
        opt = Optimization(network, self.config, lr, bound, ema, self.precision)
        state = self.run.state
        if state and state["stage"] == stage:
            opt.load_state_dict(state[stage])
        return opt

    def train(self, stage: str, opt, reports, validate) -> bool:
        r"""Take steps until the stage's bound; False when --stop-after came first."""
        from tqdm import tqdm

        t = self.config.training
        total = None if opt.bound.until is not None else opt.bound.steps
        bar = tqdm(total=total, initial=opt.step, desc=stage, unit="step", disable=None)
        mean, validated, last = None, False, time.monotonic()
        batch, told = t.vae_batch_size if stage == "vae" else t.batch_size, last
        for report in reports:
            seconds = time.monotonic() - last
            last = time.monotonic()
            mean = report.loss if mean is None else 0.98 * mean + 0.02 * report.loss
            if not report.finite:
                say(f"skipped {stage} step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}")
            row = {"stage": stage, "step": report.step, "seconds": f"{self.run.clock():.1f}", "loss": f"{report.loss:.6g}",
                   "lr": f"{report.lr:.4g}", "grad_norm": f"{report.grad_norm:.4g}",
                   "images_per_second": f"{batch / max(seconds, 1e-9):.1f}"}  # fmt: skip
            bar.update()
            if bar.disable and time.monotonic() - told >= 30:
                told = time.monotonic()
                say(f"{stage} step {report.step}: loss {mean:.4f}, {row['images_per_second']} images/s{self.time_left(opt, report.progress)}")
            left = self.time_left(opt, report.progress)
            bar.set_postfix_str(f"loss {mean:.4f}, {row['images_per_second']} images/s{left}", refresh=False)
            self.left = None if self.left is None else self.left - 1
            stop = self.left == 0
            validated = report.step % t.sample_every == 0
            if validated:
                row |= validate()
            self.run.log(**row)
            if stop or report.step % t.save_every == 0:
                self.run.save_state(stage, opt)
            if stop:
                bar.close()
                say(f"stopped after --stop-after steps, at {stage} step {report.step}; go on with train.py --resume {self.run.folder}")
                return False
            last = time.monotonic() if validated else last
        bar.close()
        if not validated:
            self.run.log(stage=stage, step=opt.step, seconds=f"{self.run.clock():.1f}", **validate())
        self.run.save_state(stage, opt)
        return True

    @staticmethod
    def time_left(opt, progress: float) -> str:
        if opt.bound.until is None:
            return ""  # tqdm shows it
        return f", {max(0.0, opt.bound.until - opt.bound.clock()) / 60:.1f} min left"

    def train_vae(self) -> bool:
        from ddpm.data import VALID
        from ddpm.evaluation import reconstruction_quality
        from ddpm.training import train_vae

        rows = self.pictures.rows(VALID)[:256]
        opt = self.optimization("vae", self.model.vae, self.config.training.vae_lr, ema=False)

        def validate(rows=rows) -> dict:
            self.model.vae.eval()
            psnr, ssim = reconstruction_quality(self.model, self.pictures, rows, self.precision)
            say(f"vae step {opt.step}: held-out PSNR {psnr:.2f} dB, SSIM {ssim:.4f} on {len(rows)} pictures")
            return {"psnr": f"{psnr:.3f}", "ssim": f"{ssim:.4f}"}

        reports = train_vae(self.model, self.pictures, self.config, opt, self.precision)
        if not self.train("vae", opt, reports, validate):
            return False
        self.model.vae.eval()
        latents = self.encode()
        self.model.save_vae(self.run.folder)
        say(f"latent scale {self.model.latent_scale:.4f}, latents {tuple(latents.moments.shape[3:])}")
        return True

    def encode(self):
        r"""All latents, and their scale measured on the train split."""
        from ddpm.cache import encode_latents
        from ddpm.data import TRAIN
        from ddpm.evaluation import measure_latent_scale

        latents = encode_latents(self.cache, self.model.vae, self.pictures, self.precision, progress_bar)
        self.model.latent_scale = measure_latent_scale(latents, self.pictures.rows(TRAIN))
        return latents

    def train_unet(self) -> bool:
        from ddpm.cache import Texts
        from ddpm.data import TRAIN, VALID
        from ddpm.evaluation import loss_by_timestep
        from ddpm.model import save_weights
        from ddpm.training import train_unet

        t, model, pictures = self.config.training, self.model, self.pictures
        model.vae.eval()
        latents = self.encode()
        train, valid = pictures.rows(TRAIN), pictures.rows(VALID)[:64]
        sentences = {pictures.caption(i, t.seed, v) for i in train for v in range(t.caption_variants)}
        sentences |= {pictures.full_caption(i) for i in valid}
        texts = Texts(self.cache, model.text, sentences, t.text_cache_gb, progress_bar)
        prompts = [pictures.full_caption(i) for i in valid[:: max(1, len(valid) // 16)][:16]]
        opt = self.optimization("unet", model.unet, t.lr, ema=True)

        def validate() -> dict:
            model.unet.eval()
            with opt.ema.applied(model.unet):
                losses = loss_by_timestep(model, latents, texts, pictures, valid, self.precision, seed=t.seed)
                save_weights(self.run.folder / "ema.safetensors", model.unet.state_dict())
                self.sample_grid(opt.step, prompts)
            save_weights(self.run.folder / "unet.safetensors", model.unet.state_dict())
            mean = sum(losses) / len(losses)
            say(f"unet step {opt.step}: validation loss {mean:.4f}; by tenths of t {' '.join(f'{v:.3f}' for v in losses)}")
            return {"val_loss": f"{mean:.5f}"}

        reports = train_unet(model, latents, texts, pictures, self.config, opt, self.precision)
        return self.train("unet", opt, reports, validate)

    def sample_grid(self, step: int, prompts: list[str]):
        from ddpm.pictures import labelled_grid, save_png

        x = self.model.sample(prompts, seed=self.config.training.seed, precision=self.precision)
        text = {"prompts": json.dumps(prompts), "sampler": "dpm++, 20 steps, guidance 3, EMA", "step": str(step)}
        save_png(self.run.folder / "samples" / f"step_{step:06d}.png", labelled_grid(x, prompts, 8), text)


def dry_run(config: Config, device, precision: str):
    r"""Build the model, take steps on made-up pictures, and tell what training would need; nothing is written."""
    import torch

    from ddpm.model import TextToImage, autocast

    m, t = config.model, config.training
    model = TextToImage(m).to(device, memory_format=torch.channels_last)
    model.unet.set_gradient_checkpointing(t.gradient_checkpointing)
    part = t.batch_size // t.accumulation
    x = torch.randn(part, 3, m.image_size, m.image_size, device=device)
    z, times = torch.randn(part, *model.latent_shape, device=device), torch.zeros(part, dtype=torch.long, device=device)
    context = torch.randn(part, 77, 512, device=device)
    stages = {
        "vae": (model.vae, lambda: (model.vae.decode(model.vae.encode(x).mode()) - x).square().mean()),
        "unet": (model.unet.train(), lambda: model.unet(z, times, context).float().square().mean()),
    }
    print(f"preset {config.preset}: pictures {m.image_size} x {m.image_size} x 3, latents {model.latent_shape}, text 77 x 512")
    for name, (network, loss) in stages.items():
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        seconds = []
        for _ in range(3):
            start = time.monotonic()
            for _ in range(t.accumulation):
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, precision):
                    value = loss()
                value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - start)
            network.zero_grad()
            kept_bytes, _ = sum(kept.values()), kept.clear()
        parameters = sum(p.numel() for p in network.parameters())
        weights = parameters * 4 * (5 if name == "unet" else 4)  # weights, gradients, two moments, EMA
        print(
            f"{name}: {parameters:,} parameters; weights, gradients, optimizer {weights / 2**20:.0f} MiB; "
            f"kept for backward {kept_bytes / 2**20:.0f} MiB; peak about {(weights + kept_bytes) / 2**20:.0f} MiB; "
            f"{min(seconds):.2f} s a step of {t.batch_size} ({t.accumulation} parts) in {precision} on {device}"
        )


def main(argv: list[str] | None = None):
    started = time.monotonic()  # --max-minutes counts from here
    arguments = parser().parse_args(argv)
    config = configuration(arguments)
    resuming = arguments.resume is not None
    folder = Path(arguments.resume or arguments.out or Path("runs") / config.preset)
    import torch

    device = cli.choose_device(arguments.device)
    precision = cli.choose_precision(config.training.precision, device)
    if arguments.dry_run:
        return dry_run(config, device, precision)
    run = Run(folder, config, resuming, started)
    from ddpm.data import TRAIN, VALID, download_celeba, open_table
    from ddpm.model import TextToImage
    from ddpm.text import TextTower

    drawn = config.training.data == "drawn"
    if arguments.download:
        if drawn:
            raise UserError("expected --data FOLDER to download CelebA into, got none")
        download_celeba(config.training.data)
    table = None if drawn else open_table(config.training.data)
    torch.manual_seed(config.training.seed)
    own_text = folder / "text.safetensors"
    model = TextToImage(config.model, TextTower.from_file(own_text) if own_text.is_file() else None)
    cache = Path(arguments.cache or folder.parent / "cache")
    pictures = load_pictures(config, table, cache)
    run.create()
    say(f"run {folder}, preset {config.preset}, {precision} on {device}")
    say(f"{len(pictures.rows(TRAIN)):,} pictures to train on, {len(pictures.rows(VALID)):,} to validate")
    if Path(config.model.text_weights).is_file() and not own_text.is_file():
        run.write(own_text.name, model.text.save)  # the run stays whole when the file goes
    model.to(device, memory_format=torch.channels_last)
    model.unet.set_gradient_checkpointing(config.training.gradient_checkpointing)
    trainer = Trainer(run, model, pictures, cache, precision, arguments.stop_after)

    has_vae = (folder / "vae.safetensors").is_file()
    if has_vae and (arguments.stage != "vae" or not run.state or run.state["stage"] == "unet"):
        model.load_vae(folder)
    elif arguments.stage == "unet":
        raise UserError(f"expected {folder / 'vae.safetensors'} for the second stage; train it first: --stage vae --out {folder}, then --resume {folder}")
    elif not trainer.train_vae():
        return None
    if arguments.stage != "vae" and trainer.train_unet():
        say(f'done in {run.clock() / 60:.1f} minutes; try: python sample.py "a smiling woman with blond hair" --model {folder}')
    return None


if __name__ == "__main__":
    sys.exit(cli.run(main))
