r"""How good a stage is on held-out pictures."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.losses import diffusion_loss
from ddpm.model import TextToImage
from ddpm.tools.arrays import Progress, silent
from ddpm.tools.devices import autocast
from ddpm.tools.seeding import generator
from ddpm.training.caches import Latents


def psnr(x: Tensor, y: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of each pair in decibels, for pictures in [-1, 1], clipped to it; (B,).

    $$\mathrm{PSNR} = 10 \log_{10} \frac{2^2}{\mathrm{mean}\,(x - y)^2}$$
    """
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    r"""Structural similarity of each pair of pictures in [-1, 1], clipped to it; (B,) (Wang et al. 2004, equation 13).

    $$\mathrm{SSIM} = \frac{(2 \mu_x \mu_y + C_1)(2 \sigma_{xy} + C_2)}
    {(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)}$$

    where mu and sigma are moments in Gaussian windows of 11 x 11, sigma 1.5, without padding. For pictures in [0, 1]
    C_1 = 0.01^2 and C_2 = 0.03^2. The result is averaged over windows and the three colours.
    """
    x = (x.double().clamp(-1, 1) + 1) / 2  # in double, because variances are small differences
    y = (y.double().clamp(-1, 1) + 1) / 2
    channels = x.shape[1]
    line = torch.exp(-((torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, 11, 11)

    def mean(picture: Tensor) -> Tensor:
        return F.conv2d(picture, window, groups=channels)

    mu_x = mean(x)
    mu_y = mean(y)
    var_x = mean(x * x) - mu_x**2
    var_y = mean(y * y) - mu_y**2
    cov = mean(x * y) - mu_x * mu_y
    C_1 = 0.01**2
    C_2 = 0.03**2
    value = (2 * mu_x * mu_y + C_1) * (2 * cov + C_2) / ((mu_x**2 + mu_y**2 + C_1) * (var_x + var_y + C_2))
    return value.flatten(1).mean(dim=1)


@torch.no_grad()
def reconstruction_quality(
    model: TextToImage, pictures: Pictures, rows: np.ndarray, precision="fp32", batch=64, progress=silent
) -> tuple[float, float]:
    r"""Mean PSNR (dB) and SSIM of decode(encode(x).mode()) over the given pictures."""
    scores = []
    starts = range(0, len(rows), batch)
    for begin in progress(starts, len(starts), f"reconstructing pictures, {batch} at a time"):
        x = pictures.batch(rows[begin : begin + batch]).to(model.device)
        with autocast(model.device, precision):
            x_hat = model.vae.decode(model.vae.encode(x.contiguous(memory_format=torch.channels_last)).mode())
        x = x.cpu()  # ssim takes float64, which not every device has
        x_hat = x_hat.float().cpu()
        scores.append(torch.stack([psnr(x, x_hat), ssim(x, x_hat)]))
    mean_psnr, mean_ssim = torch.cat(scores, dim=1).mean(dim=1).tolist()
    return mean_psnr, mean_ssim


def measure_latent_scale(
    latents: Latents, rows: np.ndarray, progress: Progress = silent, batch: int = 64, batches: int = 32
) -> float:
    r"""1 / root mean square of the latents of 2,048 pictures (Latent Diffusion, appendix G, there around the mean).

    $$s = \left(\mathbb E\left[\mu^2 + \sigma^2\right]\right)^{-1/2}$$

    so that s z has mean square 1, like the noise.
    """
    second_moments = []
    batches = min(batches, -(-len(rows) // batch))
    starts = np.linspace(0, max(0, len(rows) - batch), batches).astype(int)
    for begin in progress(starts, batches, f"measuring latents, {batch} at a time"):
        chosen = rows[begin : begin + batch]
        q = latents.gaussian(chosen, torch.zeros(len(chosen), dtype=torch.bool))
        second_moments.append((q.mu.double() ** 2 + q.logvar.double().exp()).mean().item())
    return 1 / math.sqrt(float(np.mean(second_moments)))


@torch.no_grad()
def loss_by_timestep(
    model: TextToImage,
    latents,
    texts,
    pictures,
    rows,
    precision="fp32",
    buckets=10,
    seed=0,
    batch=64,
    weighting="prediction",
    progress: Progress = silent,
) -> list[float]:
    r"""Validation loss in each tenth of the time axis, on fixed pictures, noise and captions.

    Args:
        latents, texts, pictures, rows: as in `train_unet`; rows of held-out pictures.
        weighting: of the loss; the default is the error of the prediction itself, whatever the training's weighting.
    """
    T = model.schedule.timesteps
    g = generator(seed, "validation")
    q = latents.gaussian(rows, torch.zeros(len(rows), dtype=torch.bool))
    z_0 = q.mode() * model.latent_scale
    context = texts([pictures.full_caption(i) for i in rows])

    def denoise(z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with autocast(model.device, precision):
            return model.unet(z_t, t, context)

    losses = []
    for bucket in progress(range(buckets), buckets, "losses by time"):
        t = (bucket + torch.rand(len(rows), generator=g)) / buckets * T
        t = t.clamp(max=T - 1).long()  # it may be rounded up to T
        eps = torch.randn(z_0.shape, generator=g)
        total = 0.0
        for part in zip(*(tensor.split(batch) for tensor in (z_0, t, eps, context)), strict=True):
            z_k, t_k, eps_k, context_k = (tensor.to(model.device) for tensor in part)
            denoise_k = partial(denoise, context=context_k)
            prediction = model.config.prediction
            how = (prediction, 0.0, weighting)  # no bound of a learned variance
            loss = diffusion_loss(model.schedule, denoise_k, z_k, t_k, eps_k, *how)
            total += loss.sum().item()
        losses.append(total / len(rows))
    return losses
