r"""What the network is trained to predict, and the losses."""

import math

import torch
from torch import Tensor

from ddpm.diffusion import PREDICTIONS, _same_shape, q_sample, reverse_variance, v_from, x_0_and_eps
from ddpm.schedule import Schedule


def training_target(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor, prediction: str) -> Tensor:
    r"""What the network should have said about x_t = q_sample(x_0, t, eps): eps, v or x_0."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"expected a prediction out of {', '.join(PREDICTIONS)}, got {prediction!r}")
    return {"eps": lambda: eps, "x_0": lambda: x_0, "v": lambda: v_from(schedule, x_0, t, eps)}[prediction]()


def split_output(output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""A network's output as what it says of the mean and, from a network with twice the channels, of the variance.

    Args:
        output: (B, C, ...), or (B, 2 C, ...) where the variance is learned.
        like: (B, C, ...) what the network was asked about.

    Returns: the prediction, (B, C, ...), and nu for `reverse_variance`, or None. Raw numbers from -1 to 1 become nu
    from 0 to 1, without a bound (Improved DDPM, section 3.1).
    """
    if output.shape == like.shape:
        return output, None
    if like.ndim < 2 or output.shape != (len(like), 2 * like.shape[1], *like.shape[2:]):
        raise ValueError(
            f"expected the network to answer in shape {tuple(like.shape)}, or with twice the channels "
            f"where it learned the variance, got {tuple(output.shape)}"
        )
    prediction, raw = output.chunk(2, dim=1)
    return prediction, (raw.float() + 1) / 2


def variational_term(
    schedule: Schedule,
    z_0: Tensor,
    z_t: Tensor,
    t: Tensor,
    output: Tensor,
    prediction: str = "eps",
    variance: str = "posterior",
    nu: Tensor | None = None,
) -> Tensor:
    r"""What step t adds to the variational bound, in bits a dimension; (B,) (DDPM, equation 5).

    $$L_{t-1} = D_{\mathrm{KL}}\left(q(z_{t-1} \mid z_t, z_0)\ \|\ p_\theta(z_{t-1} \mid z_t, c)\right)
    = \frac12 \left[\frac{\tilde\beta_t}{\Sigma_\theta} - 1 + \log\frac{\Sigma_\theta}{\tilde\beta_t}
    + \frac{\bar\alpha_{t-1}\, \beta_t^2}{(1 - \bar\alpha_t)^2} \cdot
    \frac{(z_0 - \hat z_0)^2}{\Sigma_\theta}\right]$$

    since both means have the same part of z_t; and for the last step, t = 0 in code, the density of z_0 itself,

    $$L_0 = -\log p_\theta(z_0 \mid z_1, c)
    = \frac12 \left[\log 2 \pi \Sigma_\theta + \frac{(z_0 - \hat z_0)^2}{\Sigma_\theta}\right]$$

    in nats; the value is divided by log 2. L_0 is below 0 where the density is above 1: latents are continuous, so the
    bound is of their density.
    """
    z_0_hat, _ = x_0_and_eps(schedule, z_t, t, output, prediction)
    sigma_2 = reverse_variance(schedule, z_t, t, None, variance, nu)
    beta_tilde = reverse_variance(schedule, z_t, t)
    alpha_bar_t = schedule.alpha_bar_at(t, z_t)
    alpha_bar_before = schedule.alpha_bar_at(t - 1, z_t)
    of_picture = alpha_bar_before.sqrt() * schedule.beta_at(t, z_t) / (1 - alpha_bar_t)  # 1 at t = 0
    squares = (of_picture * (z_0.to(of_picture) - z_0_hat)) ** 2 / sigma_2
    between = beta_tilde / sigma_2 - 1 + (sigma_2 / beta_tilde).log()
    is_last = alpha_bar_before == 1
    nats = 0.5 * (squares + torch.where(is_last, (2 * math.pi * sigma_2).log(), between))
    return nats.flatten(1).mean(dim=1) / math.log(2)


def prior_term(schedule: Schedule, z_0: Tensor) -> Tensor:
    r"""What the start of the way back adds to the bound, in bits a dimension; (B,) (DDPM, equation 5).

    $$L_T = D_{\mathrm{KL}}\left(q(z_T \mid z_0)\ \|\ \mathcal N(0, \mathbf I)\right)
    = \frac12 \left[\bar\alpha_T z_0^2 - \bar\alpha_T - \log(1 - \bar\alpha_T)\right]$$

    in nats; the value is divided by log 2.
    """
    alpha_bar_T = schedule.alpha_bar[-1].item()
    nats = 0.5 * (alpha_bar_T * z_0.cpu().double() ** 2 - alpha_bar_T - math.log1p(-alpha_bar_T))
    return nats.flatten(1).mean(dim=1) / math.log(2)


def diffusion_loss(
    schedule: Schedule,
    denoise,
    z_0: Tensor,
    t: Tensor,
    eps: Tensor,
    prediction: str = "eps",
    vlb_weight: float = 0.001,
) -> Tensor:
    r"""The simplified objective, one number for each batch element (DDPM, equation 14; the spec's objective).

    $$\mathcal L = \mathbb E_{z_0,\, \epsilon \sim \mathcal N(0, \mathbf I),\, t}
    \left[\lVert \epsilon - \epsilon_\theta(z_t, t, c) \rVert^2\right], \qquad
    z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$

    The square is averaged over the elements of z, so that it does not grow with the picture; v and x_0 take the
    place of eps when `prediction` says so. A network with twice the channels learns its variance too, by the bound,
    through which no gradient reaches the mean (Improved DDPM, equation 16):

    $$\mathcal L_{\mathrm{hybrid}} = \mathcal L + \lambda\, T\, L_{t-1}$$

    where T L_{t-1} is the bound's estimate from one time.

    Args:
        denoise: callable (z_t, t) -> (B, ...), the network with its condition filled in.
        vlb_weight: lambda, for a network with twice the channels.

    Returns: (B,) float32.
    """
    z_t = q_sample(schedule, z_0, t, eps)
    target = training_target(schedule, z_0, t, eps, prediction)
    output, nu = split_output(denoise(z_t, t), z_t)
    _same_shape(target, output)
    loss = ((target.float() - output.float()) ** 2).flatten(1).mean(dim=1)
    if nu is not None and vlb_weight:
        bits = variational_term(schedule, z_0, z_t, t, output.detach().float(), prediction, "learned", nu)
        loss = loss + vlb_weight * schedule.timesteps * bits.float()
    return loss
