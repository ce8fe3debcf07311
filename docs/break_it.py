r"""Makes the pictures of break-it.md: what is drawn when one line of the program is wrong.

    python docs/break_it.py               # docs/images/break-*.webp, with the weights that ship; a minute
    python docs/break_it.py --training    # docs/images/break-training.png; six runs, some minutes

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

from ddpm import TextToImage, diffusion, losses, sampling
from ddpm import model as model_file
from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.dataset import Pictures, drawn_pictures
from ddpm.config import Config
from ddpm.schedule import Schedule
from ddpm.tools.grids import to_uint8
from ddpm.training import loops, optimization
from ddpm.training.caches import Latents
from ddpm.training.optimization import Bound, Optimization
from ddpm.training.validation import measure_latent_scale

IMAGES = Path(__file__).parent / "images"
PROMPTS = [
    "a smiling woman with blond hair and eyeglasses",
    "a bald man with a mustache",
    "an older woman with gray hair",
    "a young man with black hair, wearing a hat",
]
DPM = {"sampler": "dpm++", "steps": 20}
DDPM = {"sampler": "ddpm", "steps": 50, "variance": "beta"}


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


# DPM-Solver++ also reads its own x_0 by this function; the mistake is in what is read of the network
def x_0_clipped(schedule: Schedule, x_t, t, output, prediction):
    x_0, eps = diffusion.x_0_and_eps(schedule, x_t, t, output, prediction)
    return (x_0, eps) if prediction == "x_0" else (x_0.clamp(-1, 1), eps)


def x_0_without_the_root(schedule: Schedule, x_t, t, output, prediction):
    if prediction == "x_0":
        return diffusion.x_0_and_eps(schedule, x_t, t, output, prediction)
    alpha_bar = schedule.alpha_bar_at(t, x_t)
    x_0 = alpha_bar * x_t - (1 - alpha_bar).sqrt() * output
    return x_0, (1 - alpha_bar).sqrt() * x_t + alpha_bar * output


def x_0_as_if_eps(schedule: Schedule, x_t, t, output, prediction):
    return diffusion.x_0_and_eps(schedule, x_t, t, output, "x_0" if prediction == "x_0" else "eps")


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
    row(IMAGES / "break-right.webp", draw(model, DPM))
    row(IMAGES / "break-right-ddpm.webp", draw(model, DDPM))
    for name, (*_, how) in SAMPLING.items():
        with broken(name):
            row(IMAGES / f"break-{name}.webp", draw(model, how))
    model.schedule = Schedule.named("linear")
    row(IMAGES / "break-schedule.webp", draw(model, DPM))


# ------------------------------------------------------------------------------- training: small runs, one mistake each


def update_without_warmup(self: optimization.EMA, network: torch.nn.Module, n: int):
    with torch.no_grad():
        for mean, p in zip(self.shadow.values(), network.parameters(), strict=True):
            mean.lerp_(p, 1 - self.decay)


def noised_without_the_root(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    alpha_bar = schedule.alpha_bar_at(t, x_0)
    return (alpha_bar * x_0 + (1 - alpha_bar).sqrt() * eps).to(x_0.dtype)


def loss_a_time_late(schedule: Schedule, denoise: Callable, z_0: Tensor, t: Tensor, *rest) -> Tensor:
    late = lambda z_t, t: denoise(z_t, (t + 1).clamp(max=schedule.timesteps - 1))  # noqa: E731
    return losses.diffusion_loss(schedule, late, z_0, t, *rest)


def batch_in_0_1(self: Pictures, rows, flip=None) -> Tensor:
    return (right_batch(self, rows, flip) + 1) / 2


right_batch = Pictures.batch
TRAINING = {  # mistake: the owner of the wrong function, its name, the function
    "nothing is wrong": None,
    "captions are never dropped": None,  # a setting
    "the average is never warmed up": (optimization.EMA, "update", update_without_warmup),
    "pictures in 0..1": (Pictures, "batch", batch_in_0_1),
    "a root of alpha_bar is forgotten": (losses, "q_sample", noised_without_the_root),
    "the time is off by one": (loops, "diffusion_loss", loss_a_time_late),
}


STEPS, MEANS = 300, 20  # of each run; losses to a point of its curve


def small_faces(folder: Path) -> Pictures:
    r"""Drawn faces of 16 x 16 with captions of two words."""
    pictures = drawn_pictures(folder, 800, seed=0, size=16)
    male = pictures.attributes[:, ATTRIBUTES.index("Male")]
    captions = tuple(("a man",) if is_male else ("a woman",) for is_male in male)
    return Pictures(**{**vars(pictures), "attributes": None, "captions": captions})


def run(pictures: Pictures, mistake: str) -> tuple[list[float], Tensor]:
    r"""Losses of a small UNet on pixels, and what its averaged weights then draw: four men, four women."""
    drop = 0.0 if mistake == "captions are never dropped" else 0.1
    settings = {"image_size": 16, "vae_channels": (32,), "latent_channels": 3, "caption_drop": drop}
    settings |= {"unet_steps": STEPS, "lr": 3e-3, "warmup": 20, "ema_decay": 0.999, "batch_size": 16}
    config = Config.from_preset("tiny", **settings)
    torch.manual_seed(0)
    model = TextToImage(config.model)
    mu = pictures.batch(range(len(pictures.pixels)))
    mu = torch.stack([mu, mu.flip(3)], dim=1)
    latents = Latents(torch.stack([mu, torch.full_like(mu, -30.0)], dim=2).numpy())
    model.latent_scale = measure_latent_scale(latents, pictures.rows(0))
    states = {text: model.text([text])[0] for text in ("a man", "a woman", "")}

    def texts(captions: list[str]) -> Tensor:
        return torch.stack([states[caption] for caption in captions])

    opt = Optimization(model.unet, config, config.training.lr, Bound(STEPS), ema=True, precision="fp32")
    reports = loops.train_unet(model, latents, texts, pictures, config, opt)
    found = [report.loss for report in reports]
    words = ["a man"] * 4 + ["a woman"] * 4
    start = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with opt.ema.applied(model.unet), torch.no_grad():
        denoise = sampling.guided(model.unet.eval(), texts(words), texts([""] * 8), 3.0)
        *_, last = sampling.sample_loop(model.schedule, denoise, start, None, "dpm++", 20, "v")
    return found, last.x / model.latent_scale


def trained(mistake: str) -> tuple[list[float], Tensor]:
    r"""The right program with one mistake: the means of 20 losses each, and the eight faces."""
    torch.set_num_threads(1)  # rounding is then that of one thread everywhere
    patch = TRAINING[mistake]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(*patch) if patch else contextlib.nullcontext(),
    ):
        found, faces = run(small_faces(Path(folder)), mistake)
    curve = torch.tensor(found).unfold(0, MEANS, MEANS).mean(dim=1).tolist()
    print(f"{mistake}: loss, means of {MEANS} steps:", *(f"{x:.4f}" for x in curve), flush=True)
    return curve, faces


def draw_training(results: dict[str, tuple[list[float], Tensor]]):
    r"""A row for each mistake: its loss beside the right one, and its faces."""
    right, _ = results["nothing is wrong"]
    figure, axes = plt.subplots(len(results), 2, figsize=(8, 9), width_ratios=(1, 2), constrained_layout=True)
    for (curve, sheet), (mistake, (means, x)) in zip(axes, results.items(), strict=True):
        times = range(MEANS, STEPS + 1, MEANS)
        curve.semilogy(times, right, color="0.7")
        curve.semilogy(times, means)
        number = 10 + list(results).index(mistake)  # its heading on the page; the reader guesses
        curve.set(ylabel="loss", title=str(number) if number > 10 else "the right program")
        sheet.imshow(to_uint8(x).transpose(1, 0, 2, 3).reshape(16, -1, 3))
        sheet.axis("off")
    axes[-1][0].set_xlabel("step")
    figure.savefig(IMAGES / "break-training.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--training", action="store_true", help="small runs with mistakes in training")
    if parser.parse_args().training:
        draw_training({mistake: trained(mistake) for mistake in TRAINING})
    else:
        draw_mistakes()
