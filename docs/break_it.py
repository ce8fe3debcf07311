r"""Makes the pictures of break-it.md: what the weights that ship draw when one line of the program is wrong.

    python docs/break_it.py      # docs/images/break-*.webp, a picture for each mistake, seed 0; a minute

Nothing is downloaded.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from PIL import Image
from torch import Tensor

from ddpm import TextToImage, diffusion, sampling
from ddpm import model as model_file
from ddpm.schedule import Schedule
from ddpm.tools.grids import to_uint8

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
    row(IMAGES / "break-right.webp", draw(model, DPM))
    row(IMAGES / "break-right-ddpm.webp", draw(model, DDPM))
    for name, (*_, how) in SAMPLING.items():
        with broken(name):
            row(IMAGES / f"break-{name}.webp", draw(model, how))
    model.schedule = Schedule.named("linear")
    row(IMAGES / "break-schedule.webp", draw(model, DPM))


if __name__ == "__main__":
    draw_mistakes()
