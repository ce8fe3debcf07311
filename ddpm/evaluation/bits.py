r"""Bits/dim: the variational bound on the likelihood of held-out latents and of the pictures themselves."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.diffusion import q_sample
from ddpm.losses import prior_term, split_output, variational_term
from ddpm.model import TextToImage
from ddpm.schedule import Schedule
from ddpm.tools.arrays import Progress, silent
from ddpm.tools.devices import autocast
from ddpm.tools.seeding import generator
from ddpm.training.caches import Latents, Texts

SLICES = 24  # at most, of the time axis, in each of which one timestep is drawn for each picture


@torch.no_grad()
def bits_per_dimension(
    model: TextToImage,
    latents: Latents,
    texts: Texts,
    pictures: Pictures,
    rows: np.ndarray,
    width: float,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress = silent,
) -> dict:
    r"""The full variational bound of some held-out pictures: of their latents, and of the 8-bit pictures themselves.

    Of the latents, scaled as the UNet sees them, it bounds a density and may be below 0 (DDPM, equation 5):

    $$-\log p(z_0) \le L_T + \sum_{t=2}^{T} L_{t-1} + L_0$$

    L_T and L_0 are computed for each picture. The sum is estimated from one random timestep for each picture in each
    of at most SLICES slices of 1..T-1, which are short where t is small and the terms are large. Of the pictures it is
    the bound of the VAE with the diffusion as its prior (Kingma and Welling 2014, equation 2):

    $$-\log P(x) \le \mathbb E_{q(z_0 \mid x)}\left[-\log P(x \mid z_0) + \log q(z_0 \mid x) - \log p(z_0)\right]$$

    where P(x | z_0) is a Laplace distribution around the decoded picture, see `laplace_bits`.

    Args:
        rows: of the pictures, which pass through the networks all at once.
        width: of that distribution; best is the mean absolute error, taken from other pictures than these.

    Returns: `latent`: for each form of Sigma that the model has, {prior, steps, last, total, standard_error} in
    bits/dim of z; `picture`: {latent, error, total, standard_error} in bits/dim of x, for the model's own Sigma;
    `by_time`: [first t, last t, mean L_{t-1}] of each slice, for the model's own Sigma. Standard errors are those of a
    mean over pictures.
    """
    own = model.config.variance
    forms = ("posterior", "beta", "learned") if own == "learned" else ("posterior", "beta")
    g = generator(seed, "bound")
    q = latents.gaussian(rows, torch.zeros(len(rows), dtype=torch.bool))
    z_0 = q.sample(g) * model.latent_scale
    context = texts([pictures.full_caption(i) for i in rows]).to(model.device)
    # on the CPU, where the algebra runs in double precision
    schedule = Schedule.named(model.config.schedule, model.config.timesteps)
    edges = sorted({0, *np.geomspace(1, schedule.timesteps, SLICES + 1).round().astype(int).tolist()})
    slices = list(itertools.pairwise(edges))  # the first is t = 0 alone

    terms = {form: torch.zeros(len(slices), len(rows), dtype=torch.float64) for form in forms}
    for k, (first, end) in enumerate(progress(slices, len(slices), "variational terms, by time")):
        t = torch.randint(first, end, (len(rows),), generator=g)
        z_t = q_sample(schedule, z_0, t, torch.randn(z_0.shape, generator=g))
        with autocast(model.device, precision):
            output = model.unet(z_t.to(model.device), t.to(model.device), context)
        output, nu = split_output(output.float().cpu(), z_t)
        prediction = model.config.prediction
        for form in forms:
            terms[form][k] = variational_term(schedule, z_0, z_t, t, output, prediction, form, nu)
    with autocast(model.device, precision):
        x_hat = model.vae.decode((z_0 / model.latent_scale).to(model.device))

    widths = torch.tensor([end - first for first, end in slices], dtype=torch.float64)
    prior = prior_term(schedule, z_0).double()
    latent = {}
    for form, term in terms.items():
        steps = widths[1:] @ term[1:]
        total = prior + widths @ term
        latent[form] = _means({"prior": prior, "steps": steps, "last": term[0], "total": total})
    size = z_0[0].numel()
    entropy = q.entropy().double() / (size * math.log(2)) + math.log2(model.latent_scale)
    rate = (prior + widths @ terms[own] - entropy) * size / pictures.pixels[0].size
    error = laplace_bits(pictures.batch(rows), x_hat.float().cpu().clamp(-1, 1), width).flatten(1).mean(dim=1)
    picture = _means({"latent": rate, "error": error, "total": rate + error})
    own_means = terms[own].mean(dim=1).tolist()
    by_time = [[first, end - 1, mean] for (first, end), mean in zip(slices, own_means, strict=True)]
    return {"latent": latent, "picture": picture, "by_time": by_time}


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    r"""The mean over pictures of each of (B,) `values`, and the standard error of that of their total."""
    total = values["total"]
    means = {name: value.mean().item() for name, value in values.items()}
    return {**means, "standard_error": total.std().item() / len(total) ** 0.5}


def laplace_bits(x: Tensor, x_hat: Tensor, width: float) -> Tensor:
    r"""-log2 of the probability of 8-bit values x in [-1, 1] under a Laplace distribution around x_hat, elementwise.

    $$P(x) = F\left(x + \tfrac{1}{255}\right) - F\left(x - \tfrac{1}{255}\right), \qquad
    F(y) = \frac12 \left[1 + \mathrm{sign}(y - \hat x) \left(1 - e^{-|y - \hat x| / b}\right)\right]$$

    where b is `width`. The outermost bins contain the tails, as in DDPM's equation 13 for a normal distribution.
    """
    x = x.double()
    x_hat = x_hat.double()
    low = torch.where(x <= -1, -math.inf, x - 1 / 255 - x_hat)
    high = torch.where(x >= 1, math.inf, x + 1 / 255 - x_hat)
    above = x > x_hat  # mirrored, so that F is small and its differences exact
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)

    def F(y: Tensor) -> Tensor:
        return torch.where(y < 0, 0.5 * torch.exp(y / width), 1 - 0.5 * torch.exp(-y / width))

    return -torch.log2((F(high) - F(low)).clamp(min=1e-300))
