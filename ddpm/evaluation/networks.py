r"""The parts `vae`, `latents`, `loss` and `bits`: the two networks on held-out pictures, without drawing."""

import numpy as np
import torch

from ddpm.evaluation import metrics, plots
from ddpm.evaluation.bits import bits_per_dimension
from ddpm.evaluation.shared import Evaluation
from ddpm.tools.command import progress_bar
from ddpm.training.validation import loss_by_timestep, psnr, ssim


def vae(e: Evaluation) -> dict:
    r"""PSNR in dB and SSIM of the held-out pictures through the VAE."""
    both = list(zip(e.x.split(64), e.reconstructed.split(64), strict=True))  # ssim needs much memory for each
    figures = {f.__name__: torch.cat([f(x, x_hat) for x, x_hat in both]) for f in (psnr, ssim)}
    return {"n": e.n} | {name: values.mean().item() for name, values in figures.items()}


def latents(e: Evaluation) -> dict:
    r"""Mean, variance, KL and correlation of the channels of the scaled latents."""
    q = e.encoded.gaussian(np.arange(e.n), torch.zeros(e.n, dtype=torch.bool))
    health = metrics.latent_health(q, e.model.latent_scale)
    e.files["latents.png"] = plots.plot_latents(health)
    return {"n": e.n, "scale": e.model.latent_scale, **health}


def loss(e: Evaluation) -> dict:
    r"""The loss in each tenth of the time axis, on fixed noise."""
    e.check_all_times()
    n = min(e.n, 256)
    prediction = e.model.config.prediction
    inputs = (e.model, e.encoded, e.texts, e.held_out, np.arange(n))
    tenths = loss_by_timestep(*inputs, e.options.precision, seed=e.options.seed, progress=progress_bar)
    e.files["loss.png"] = plots.plot_loss(tenths, prediction)
    return {"n": n, "prediction": prediction, "tenths": tenths, "mean": sum(tenths) / len(tenths)}


def bits(e: Evaluation) -> dict:
    r"""Bits/dim, by the variational bound; the decoder's width is its mean error on train pictures."""
    e.check_all_times()
    n = min(e.n, 64)
    every = -(-len(e.train_pictures) // n)
    train = e.train_pictures[::every]  # not the first, because folders may be sorted
    width = (train - e.decoded(train)).abs().mean().item()
    inputs = (e.model, e.encoded, e.texts, e.held_out, np.arange(n))
    found = bits_per_dimension(*inputs, width, e.options.precision, e.options.seed, progress_bar)
    return {"n": n, "variance": e.model.config.variance, "width": width, **found}
