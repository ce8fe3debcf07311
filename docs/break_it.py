r"""Makes the pictures of break-it.md: what the weights that ship draw when one line of the program is wrong.

    python docs/break_it.py sampling      # docs/images/break-*.jpg, a picture for each mistake
    python docs/break_it.py training      # docs/images/break-training.png: four small runs with a mistake, one without

Seed 0 throughout. Nothing is downloaded.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

from ddpm import TextToImage, diffusion, sampling
from ddpm import model as model_file
from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.dataset import Pictures, drawn_pictures
from ddpm.config import Config
from ddpm.schedule import Schedule
from ddpm.tools.grids import to_uint8
from ddpm.training import optimization
from ddpm.training.caches import Latents
from ddpm.training.loops import train_unet
from ddpm.training.optimization import Bound, Optimization
from ddpm.training.validation import measure_latent_scale

MALE = ATTRIBUTES.index("Male")
IMAGES = Path(__file__).parent / "images"
PROMPTS = [
    "a smiling woman with blond hair and eyeglasses",
    "a bald man with a mustache",
    "an older woman with gray hair",
    "a young man with black hair, wearing a hat",
]
DPM = {"sampler": "dpm++", "steps": 20}
DDPM = {"sampler": "ddpm", "steps": 50, "variance": "beta"}


# ------------------------------------------------------------------------------- sampling: one wrong function each


def decode_unscaled(self: TextToImage, z: Tensor) -> Tensor:
    return self.vae.decode(z)


def decode_then_shift_again(self: TextToImage, z: Tensor) -> Tensor:
    return 2 * self.vae.decode(z / self.latent_scale) - 1


def guided_backwards(network: Callable, context: Tensor, negative: Tensor, scale: float) -> Callable:
    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        uncond, cond = network(z_t, t, negative), network(z_t, t, context)
        return cond + scale * (uncond - cond)

    return denoise


def guided_a_step_late(network: Callable, context: Tensor, negative: Tensor, scale: float) -> Callable:
    right = sampling.guided(network, context, negative, scale)
    return lambda z_t, t: right(z_t, (t - 50).clamp(min=0))  # with 20 steps, a step is 50 of the 1,000 times


def x_0_clipped(schedule: Schedule, x_t, t, output, prediction):
    x_0, eps = diffusion.x_0_and_eps(schedule, x_t, t, output, prediction)
    return x_0.clamp(-1, 1), eps


def x_0_without_the_root(schedule: Schedule, x_t, t, output, prediction):
    alpha_bar = schedule.alpha_bar_at(t, x_t)
    x_0 = alpha_bar * x_t - (1 - alpha_bar).sqrt() * output
    return x_0, (1 - alpha_bar).sqrt() * x_t + alpha_bar * output


def x_0_as_if_eps(schedule: Schedule, x_t, t, output, prediction):
    return diffusion.x_0_and_eps(schedule, x_t, t, output, "eps")


def ddpm_step_with_noise_to_the_end(schedule: Schedule, x_t, t, s, x_0, noise, variance="beta", nu=None):
    mean, _ = diffusion.q_posterior(schedule, x_0, x_t, t, s)
    return (mean + diffusion.reverse_variance(schedule, x_t, t, s, variance, nu).sqrt() * noise).to(x_t.dtype)


def ddpm_step_with_the_variance(schedule: Schedule, x_t, t, s, x_0, noise, variance="posterior", nu=None):
    mean, _ = diffusion.q_posterior(schedule, x_0, x_t, t, s)
    return (mean + diffusion.reverse_variance(schedule, x_t, t, s, variance, nu) * noise).to(x_t.dtype)


SAMPLING = {  # name: (owner, attribute, the wrong function, how to sample)
    "latent-scale": (TextToImage, "decode", decode_unscaled, DPM),
    "range": (TextToImage, "decode", decode_then_shift_again, DPM),
    "guidance": (model_file, "guided", guided_backwards, DPM),
    "late": (model_file, "guided", guided_a_step_late, DPM),
    "clipped": (sampling, "x_0_and_eps", x_0_clipped, DPM),
    "root": (sampling, "x_0_and_eps", x_0_without_the_root, DPM),
    "prediction": (sampling, "x_0_and_eps", x_0_as_if_eps, DPM),
    "last-noise": (sampling, "ddpm_step", ddpm_step_with_noise_to_the_end, DDPM),
    "variance": (sampling, "ddpm_step", ddpm_step_with_the_variance, DDPM),
}


def broken(name: str) -> contextlib.AbstractContextManager:
    r"""A context in which the package makes this mistake."""
    owner, attribute, function, _ = SAMPLING[name]
    return mock.patch.object(owner, attribute, function)


def row(path: Path, x: Tensor):
    r"""Pictures side by side, twice as large."""
    sheet = Image.fromarray(to_uint8(x).transpose(1, 0, 2, 3).reshape(x.shape[2], -1, 3))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.BICUBIC).save(path, quality=90)


def draw(model: TextToImage, how: dict) -> Tensor:
    return model.sample([prompt for prompt in PROMPTS for _ in range(2)], seed=0, **how)


def draw_mistakes():
    model = TextToImage.load()
    row(IMAGES / "break-right.jpg", draw(model, DPM))
    row(IMAGES / "break-right-ddpm.jpg", draw(model, DDPM))
    for name, (*_, how) in SAMPLING.items():
        with broken(name):
            row(IMAGES / f"break-{name}.jpg", draw(model, how))
    model.schedule = Schedule.named("linear")
    row(IMAGES / "break-schedule.jpg", draw(model, DPM))


# ------------------------------------------------------------------------------- training: small runs, one mistake each


class ColdEMA(optimization.EMA):
    r"""An average whose decay does not warm up."""

    @torch.no_grad()
    def update(self, network, n: int):
        torch._foreach_lerp_(
            list(self.shadow.values()), [p.detach() for p in network.parameters()], 1 - self.decay
        )


def small_faces(folder: Path) -> Pictures:
    r"""Drawn faces of 16 x 16 with captions of two words."""
    pictures = drawn_pictures(folder, 800, seed=0, size=16)
    captions = tuple(("a man",) if row[MALE] else ("a woman",) for row in pictures.attributes)
    return Pictures(**{**vars(pictures), "attributes": None, "captions": captions})


def run(pictures: Pictures, mistake: str, steps: int = 300) -> tuple[list[float], Tensor]:
    r"""Losses of a small UNet on pixels, and eight faces that its averaged weights draw: four men, four women."""
    settings = {"image_size": 16, "vae_channels": (32,), "latent_channels": 3, "attention_levels": (1,)}
    settings |= {"unet_steps": steps, "lr": 3e-3, "warmup": 20, "ema_decay": 0.98, "batch_size": 16}
    settings |= {"caption_drop": 0.0} if mistake == "no caption is dropped" else {}
    config = Config.from_preset("tiny", **settings)
    torch.manual_seed(0)
    model = TextToImage(config.model)
    x = pictures.batch(range(len(pictures.pixels)))
    if mistake == "pictures in 0..1":
        x = (x + 1) / 2
    mu = torch.stack([x, x.flip(3)], dim=1)
    latents = Latents(torch.stack([mu, torch.full_like(mu, -30.0)], dim=2).half().numpy())
    scale = 1.0 if mistake == "pictures in 0..1" else measure_latent_scale(latents, pictures.rows(0))
    model.latent_scale = scale
    states = {text: model.text([text])[0] for text in ("a man", "a woman", "")}

    def texts(captions: list[str]) -> Tensor:
        return torch.stack([states[caption] for caption in captions])

    opt = Optimization(model.unet, config, config.training.lr, Bound(steps), ema=True, precision="fp32")
    if mistake == "the average is never warmed up":
        opt.ema = ColdEMA(model.unet, 0.999)
    keeps = contextlib.nullcontext()
    if mistake == "gradients are never set to zero":
        keeps = mock.patch.object(model.unet, "zero_grad", lambda set_to_none=True: None)
    with keeps:
        losses = [report.loss for report in train_unet(model, latents, texts, pictures, config, opt, "fp32")]
    with opt.ema.applied(model.unet), torch.no_grad():
        words = ["a man"] * 4 + ["a woman"] * 4
        denoise = sampling.guided(model.unet.eval(), texts(words), texts([""] * 8), 4.0)
        g = torch.Generator().manual_seed(0)
        *_, last = sampling.sample_loop(
            model.schedule, denoise, torch.randn(8, 3, 16, 16, generator=g), None, "dpm++", 20, "v"
        )
    drawn = last.x / scale
    return losses, 2 * drawn - 1 if mistake == "pictures in 0..1" else drawn


TRAINING = (
    "nothing is wrong",
    "no caption is dropped",
    "the average is never warmed up",
    "pictures in 0..1",
    "gradients are never set to zero",
)


def train_mistakes():
    with tempfile.TemporaryDirectory() as folder:
        pictures = small_faces(Path(folder))
        found = {mistake: run(pictures, mistake) for mistake in TRAINING}
    figure, axes = plt.subplots(len(found), 2, figsize=(8, 7.5), width_ratios=(1, 2), constrained_layout=True)
    for (losses_of, faces_of), (mistake, (losses, x)) in zip(axes, found.items(), strict=True):
        losses_of.semilogy(torch.tensor(losses).unfold(0, 20, 20).mean(dim=1), color="C0")
        losses_of.set(ylabel="loss", title=mistake)
        faces_of.imshow(to_uint8(x).transpose(1, 0, 2, 3).reshape(16, -1, 3))
        faces_of.axis("off")
    axes[-1][0].set_xlabel("steps / 20")
    figure.savefig(IMAGES / "break-training.png", dpi=110)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("sampling", "training"))
    {"sampling": draw_mistakes, "training": train_mistakes}[p.parse_args().what]()
