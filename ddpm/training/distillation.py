r"""Few steps: a network learns to draw in a few steps of DDIM what its guided teacher draws in twenty steps.

The teacher is the trained model. It draws with DPM-Solver++ 2M in 20 steps at guidance 3, so its UNet runs 40 times.
The student starts as a copy of that UNet and learns k steps of DDIM without guidance. Each step must end at the
teacher's latent 20 / k steps later. The target is that of Progressive Distillation (Salimans and Ho 2022). Three
things differ. One training replaces their repeated halvings. The latents z_t come from the teacher's own
trajectories, and not from noised data. The teacher is guided at one fixed scale, whereas Meng et al. 2023 train a
student for many scales. At k = 1 the student learns the teacher's pictures from their noise, as in Luhman and Luhman
2021.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.config import GUIDED, Config, ModelConfig
from ddpm.diffusion import x_0_and_eps
from ddpm.losses import loss_weight, split_output, training_target
from ddpm.model import TextToImage
from ddpm.sampling import guided, sample_loop, timesteps
from ddpm.schedule import Schedule
from ddpm.tools import text_weights
from ddpm.tools.arrays import Records, key_of
from ddpm.tools.command import bar
from ddpm.tools.devices import autocast
from ddpm.tools.files import digest_of
from ddpm.tools.kernels import context_read_once
from ddpm.tools.seeding import generator
from ddpm.training.batches import batch_rows
from ddpm.training.caches import Texts
from ddpm.training.optimization import Optimization, Report
from ddpm.unet import UNet

HELD_OUT = 64  # trajectories to validate on


def x_0_between(schedule: Schedule, z_t: Tensor, t: Tensor, z_s: Tensor, s: Tensor) -> Tensor:
    r"""The x_0 by which one step of DDIM goes from z_t to z_s; (B, ...) (Progressive Distillation, appendix G).

    $$\hat x_0 = \frac{z_s - \frac{\sigma_s}{\sigma_t} z_t}{a_s - \frac{\sigma_s}{\sigma_t} a_t}, \qquad
    a_t = \sqrt{\bar\alpha_t}, \ \sigma_t = \sqrt{1 - \bar\alpha_t}$$

    because with $\hat\epsilon = (z_t - a_t \hat x_0) / \sigma_t$ that step is $z_s = a_s \hat x_0 + \sigma_s
    \hat\epsilon$. For s = -1, the clean picture, it is z_s itself.
    """
    alpha_bar_t = schedule.alpha_bar_at(t, z_t)
    alpha_bar_s = schedule.alpha_bar_at(s, z_t)
    ratio = ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt()
    x_0 = (z_s - ratio * z_t) / (alpha_bar_s.sqrt() - ratio * alpha_bar_t.sqrt())
    return x_0.to(z_t.dtype)


def distillation_loss(schedule: Schedule, denoise: Callable, z_t, t, z_s, s, prediction: str) -> Tensor:
    r"""The squared error of v between the network's picture and the target; (B,) float32.

    $$\mathcal L = \lVert v(\hat x_0) - v(x_{0, \theta}) \rVert^2 = (\mathrm{SNR} + 1)
    \lVert \hat x_0 - x_{0, \theta} \rVert^2, \qquad v(x) = a_t\, \epsilon - \sigma_t\, x$$

    where $\hat x_0$ is `x_0_between`, $\epsilon$ is what $z_t$ and x imply, and the square is averaged over elements
    (Progressive Distillation, section 4, "SNR+1"). Near pure noise a network that predicts eps learns badly, because
    its picture is divided by almost 0.

    Args: denoise: callable (z_t, t) -> (B, ...) with its condition filled in, which predicts `prediction`; z_t, z_s
        (B, ...); t, s (B,) integers.
    """
    x_0 = x_0_between(schedule, z_t, t, z_s, s)
    _, eps = x_0_and_eps(schedule, z_t, t, x_0, "x_0")
    target = training_target(schedule, x_0, t, eps, prediction)
    weight = loss_weight(schedule, x_0, t, prediction, "v").float()
    output, _ = split_output(denoise(z_t, t), z_t)
    return (weight * (target.float() - output.float()) ** 2).flatten(1).mean(dim=1)


class Trajectories:
    r"""trajectories(numbers): the teacher's latents at the k times and at the end; (B, k + 1, c, h, w) float32.

    Each begins with noise from a stream of its own, and is kept as float16 in a file of `folder`.

    Attributes: times: (k + 1,) the k times, falling from T - 1, and -1. captions: of each trajectory.
    """

    def __init__(
        self,
        folder: Path,
        teacher: UNet,
        schedule: Schedule,
        texts: Texts,
        captions: Sequence[str],
        model: ModelConfig,
        seed: int,
        precision: str,
    ):
        self.teacher = teacher
        self.schedule = schedule
        self.texts = texts
        self.captions = captions
        self.model = model
        self.seed = seed
        self.precision = precision
        self.drawn = 0  # by this process
        self.times = torch.tensor([*timesteps(schedule, model.few_steps), -1])
        settings = (model.schedule, model.timesteps, model.prediction, model.few_steps, GUIDED)
        if model.noise_scale != 1:
            settings += (model.noise_scale,)
        tower = text_weights.fingerprint(texts.tower)
        key = key_of(
            "trajectories", digest_of(teacher.state_dict()), tower, captions, settings, seed, precision
        )
        latent = (model.latent_channels, model.latent_size, model.latent_size)
        path = folder / f"trajectories-{key}.bin"
        self.records = Records(path, (len(self.times), *latent), np.float16, lambda i: [i], self.draw)

    def __call__(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(self.records(numbers.tolist())).float()

    @torch.no_grad()
    def draw(self, numbers: Sequence[int]) -> np.ndarray:
        r"""Draw these trajectories with the teacher; (B, k + 1, c, h, w)."""
        device = self.teacher.conv_in.weight.device
        shape = self.records.shape[1:]
        noise = [torch.randn(shape, generator=generator(self.seed, "trajectory", i)) for i in numbers]
        x_T = torch.stack(noise).to(device)
        context = self.texts([self.captions[i] for i in numbers]).to(device)
        uncond = self.texts([""]).to(device).expand_as(context)
        states = [x_T]
        sampler, steps, scale = GUIDED
        with autocast(device, self.precision), context_read_once(self.teacher):
            denoise = guided(self.teacher, context, uncond, scale)
            how = {"prediction": self.model.prediction, "noise_scale": self.model.noise_scale}
            loop = sample_loop(self.schedule, denoise, x_T, lambda: x_T, sampler, steps, **how)
            for state in bar(
                loop, total=steps, desc=f"the teacher draws, {self.drawn:,} so far", leave=False
            ):
                if state.s in self.times:
                    states.append(state.x)
        self.drawn += len(set(numbers))
        return torch.stack(states, dim=1).float().cpu().numpy()


def captions_of(pictures: Pictures, rows: np.ndarray, config: Config) -> list[str]:
    r"""A training caption of each row, of which the fraction `caption_drop` is empty; then `HELD_OUT` of validation."""
    settings = config.training
    dropped = torch.rand(len(rows), generator=generator(settings.seed, "trajectories", "dropped"))
    captions = [
        "" if drop else pictures.caption(i, settings.seed, k % settings.caption_variants)
        for k, (i, drop) in enumerate(zip(rows, dropped < config.model.caption_drop, strict=True))
    ]
    return captions + [pictures.full_caption(i) for i in np.resize(pictures.held_out(HELD_OUT), HELD_OUT)]


def rows_of(pictures: Pictures, config: Config) -> np.ndarray:
    r"""The training picture whose caption each trajectory has."""
    rows = pictures.rows(TRAIN)
    g = generator(config.training.seed, "trajectories", "rows")
    return rows[torch.randint(len(rows), (config.training.trajectories,), generator=g).numpy()]


def train_distilled(
    model: TextToImage,
    trajectories: Trajectories,
    rows: np.ndarray,
    texts: Texts,
    config: Config,
    opt: Optimization,
) -> Iterator[Report]:
    r"""Second stage of a model of few steps: a batch takes one step of each of its trajectories, all k equally often.

    Args: rows: the picture whose caption each trajectory has, for the reports.
    """
    settings = config.training
    shard = opt.group.shard
    while opt.progress() < 1:
        opt.begin_step()
        numbers, _ = batch_rows(
            np.arange(len(rows)), settings.batch_size, opt.step, settings.seed, "distillation"
        )
        k = (np.arange(len(numbers)) + opt.step) % config.model.few_steps
        t, s = trajectories.times[k], trajectories.times[k + 1]
        z = trajectories(shard(numbers))
        context = texts([trajectories.captions[i] for i in shard(numbers)])
        i, k = np.arange(len(z)), shard(k)
        for *place, context_k in opt.micro_batches(z[i, k], shard(t), z[i, k + 1], shard(s), context):
            denoise_k = partial(opt.forward, context=context_k)
            loss = distillation_loss(model.schedule, denoise_k, *place, model.config.prediction)
            opt.backward(loss.mean())
        yield opt.end_step(rows[numbers], t)


@torch.no_grad()
def loss_by_step(
    model: TextToImage, trajectories: Trajectories, texts: Texts, precision: str, batch: int
) -> list[float]:
    r"""The loss of each of the k steps on the held-out trajectories, `batch` at a time."""
    totals = [0.0] * model.config.few_steps
    held_out = np.arange(len(trajectories.captions))[-HELD_OUT:]
    for begin in range(0, HELD_OUT, batch):
        numbers = held_out[begin : begin + batch]
        z = trajectories(numbers).to(model.device)
        denoise = partial(
            model.unet, context=texts([trajectories.captions[i] for i in numbers]).to(model.device)
        )
        for k in range(len(totals)):
            t, s = trajectories.times[k : k + 2, None].expand(2, len(z)).to(model.device)
            with autocast(model.device, precision):
                place = (z[:, k], t, z[:, k + 1], s)
                loss = distillation_loss(model.schedule, denoise, *place, model.config.prediction)
            totals[k] += loss.sum().item()
    return [total / HELD_OUT for total in totals]
