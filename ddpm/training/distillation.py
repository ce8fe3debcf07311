r"""Few steps: a network learns to go in one step of DDIM where guidance and twenty steps have led its teacher.

The teacher is the trained model. From noise x_T and a prompt it draws with its defaults, DPM-Solver++ 2M, 20 steps,
guidance 3, which runs the network 40 times. The student is a copy of its UNet, and of the 20 times it sees only k, the
few ones. From the teacher's latent at each it learns to reach the teacher's latent at the next, without guidance. This
is Progressive Distillation (Salimans and Ho 2022) in one stage in place of five halvings, on a teacher with guidance
(Meng et al. 2023).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN, VALID
from ddpm.config import GUIDED, Config, ModelConfig
from ddpm.diffusion import x_0_and_eps
from ddpm.losses import loss_weight, training_target
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


def distillation_loss(schedule: Schedule, denoise, z_t, t, z_s, s, prediction: str) -> Tensor:
    r"""How far one step from the teacher's z_t misses its z_s, as the squared error of v; one number a picture.

    $$\mathcal L = \lVert v(\hat x_0) - v_\theta(z_t, t, c) \rVert^2 = (\mathrm{SNR} + 1)
    \lVert \hat x_0 - x_{0, \theta} \rVert^2$$

    where $\hat x_0$ is `x_0_between` (Progressive Distillation, section 4, "SNR+1"). A network that predicts eps or
    x_0 has the same loss, weighted by `losses.loss_weight`.

    Args: denoise: callable (z_t, t) -> (B, ...) with its condition filled in; z_t, z_s (B, ...); t, s (B,) integers.
    """
    x_0 = x_0_between(schedule, z_t, t, z_s, s)
    _, eps = x_0_and_eps(schedule, z_t, t, x_0, "x_0")
    target = training_target(schedule, x_0, t, eps, prediction)
    weight = loss_weight(schedule, x_0, t, prediction, "v").float()
    return (weight * (target.float() - denoise(z_t, t).float()) ** 2).flatten(1).mean(dim=1)


class Trajectories:
    r"""trajectories(numbers) -> (B, k + 1, c, h, w) float16: where the teacher was at the k few times and at the end.

    Each begins with noise from a stream of its own, has the caption of a picture of the training data, and is kept in a
    file of `folder`.

    Attributes: times: (k + 1,) the few times, falling from T - 1, and -1.
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
        settings = (model.schedule, model.timesteps, model.prediction, model.few_steps)
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
        r"""The teacher's whole way for some numbers."""
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
            way = sample_loop(self.schedule, denoise, x_T, lambda: x_T, sampler, steps, self.model.prediction)
            shown = bar(way, total=steps, desc=f"the teacher draws, {self.drawn:,} so far", leave=False)
            for state in shown:
                if state.s in self.times:
                    states.append(state.x)
        self.drawn += len(set(numbers))
        return torch.stack(states, dim=1).float().cpu().numpy()


def captions_of(pictures: Pictures, config: Config) -> list[str]:
    r"""A caption for each trajectory, of training pictures, the usual share empty; then `HELD_OUT` of others."""
    settings = config.training
    rows = pictures.rows(TRAIN)
    g = generator(settings.seed, "trajectories")
    drawn = rows[torch.randint(len(rows), (settings.trajectories,), generator=g).numpy()]
    dropped = torch.rand(len(drawn), generator=g) < config.model.caption_drop
    captions = [
        "" if drop else pictures.caption(i, settings.seed, k % settings.caption_variants)
        for k, (i, drop) in enumerate(zip(drawn, dropped.tolist(), strict=True))
    ]
    return captions + [pictures.full_caption(i) for i in np.resize(pictures.rows(VALID), HELD_OUT)]


def train_distilled(
    model: TextToImage,
    trajectories: Trajectories,
    texts: Texts,
    config: Config,
    opt: Optimization,
    precision: str,
) -> Iterator[Report]:
    r"""Second stage of a model of few steps: the UNet learns the teacher's trajectories, a part of each at a time."""
    settings = config.training
    shard = opt.group.shard
    k = config.model.few_steps
    all_numbers = np.arange(settings.trajectories)

    def denoise(z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with autocast(model.device, precision):
            return opt.parallel(z_t.contiguous(memory_format=torch.channels_last), t, context)

    while opt.progress() < 1:
        opt.begin_step()
        batch, _ = batch_rows(all_numbers, settings.batch_size, opt.step, settings.seed, "distillation")
        part = shard((np.arange(len(batch)) + opt.step) % k)  # which of its steps
        numbers = shard(batch)
        z = trajectories(numbers)
        context = texts([trajectories.captions[i] for i in numbers])
        z_t, z_s = z[np.arange(len(z)), part], z[np.arange(len(z)), part + 1]
        t, s = trajectories.times[part], trajectories.times[part + 1]
        for *place, context_k in opt.micro_batches(z_t, t, z_s, s, context):
            denoise_k = partial(denoise, context=context_k)
            loss = distillation_loss(model.schedule, denoise_k, *place, model.config.prediction)
            opt.backward(loss.mean())
        yield opt.end_step(batch, t)


@torch.no_grad()
def loss_by_step(model: TextToImage, trajectories: Trajectories, texts: Texts, precision: str) -> list[float]:
    r"""The loss of each of the few steps on the held-out trajectories."""
    numbers = np.arange(len(trajectories.captions))[-HELD_OUT:]
    z = trajectories(numbers).to(model.device)
    context = texts([trajectories.captions[i] for i in numbers]).to(model.device)
    times = trajectories.times.to(model.device)
    losses = []
    for k in range(model.config.few_steps):
        t, s = times[k].expand(HELD_OUT), times[k + 1].expand(HELD_OUT)
        with autocast(model.device, precision):
            denoise = partial(model.unet, context=context)
            loss = distillation_loss(
                model.schedule, denoise, z[:, k], t, z[:, k + 1], s, model.config.prediction
            )
        losses.append(loss.mean().item())
    return losses
