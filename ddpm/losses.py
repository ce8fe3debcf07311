r"""What the network is trained to predict: the simplified loss, and the terms of the variational bound."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion import PREDICTIONS, q_sample, reverse_variance, v_from, x_0_and_eps
from ddpm.schedule import Schedule, one_of

WEIGHTINGS = ("prediction", "eps", "v", "x_0", "min_snr")
MIN_SNR_GAMMA = 5


def training_target(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor, prediction: str) -> Tensor:
    r"""What the network should predict from x_t = q_sample(x_0, t, eps): eps, v or x_0."""
    one_of(PREDICTIONS, prediction, "prediction")
    if prediction == "eps":
        return eps
    if prediction == "x_0":
        return x_0
    return v_from(schedule, x_0, t, eps)


def loss_weight(schedule: Schedule, x_0: Tensor, t: Tensor, prediction: str, weighting: str) -> Tensor:
    r"""The factor that makes the squared error of one prediction that of another; (B, 1, ..., 1).

    Given x_t, the three predictions determine each other, so their squared errors are equal up to a factor that
    depends on t alone:

    $$\lVert \epsilon - \hat\epsilon \rVert^2 = \mathrm{SNR}\, \lVert x_0 - \hat x_0 \rVert^2, \qquad
    \lVert v - \hat v \rVert^2 = (\mathrm{SNR} + 1)\, \lVert x_0 - \hat x_0 \rVert^2, \qquad
    \mathrm{SNR} = \frac{\bar\alpha_t}{1 - \bar\alpha_t}$$

    For example, a network that predicts v minimises the spec's error of eps when its square is weighted by
    SNR / (SNR + 1), which is alpha_bar_t. `prediction` gives every prediction the weight 1, and `min_snr` bounds the
    weight of the error of x_0, so that times of little noise do not prevail (Min-SNR, section 3.4):

    $$\min(\mathrm{SNR}, \gamma)\, \lVert x_0 - \hat x_0 \rVert^2, \qquad \gamma = 5$$
    """
    alpha_bar_t = schedule.alpha_bar_at(t, x_0)
    snr = alpha_bar_t / (1 - alpha_bar_t)
    weights = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1, "min_snr": snr.clamp(max=MIN_SNR_GAMMA)}
    weights["prediction"] = weights[prediction]  # all of the error of x_0
    return weights[weighting] / weights[prediction]


def diffusion_loss(
    schedule: Schedule,
    denoise: Callable,
    z_0,
    t,
    eps,
    prediction="eps",
    vlb_weight=0.001,
    weighting="prediction",
) -> Tensor:
    r"""The simplified objective, one number for each picture (DDPM, equation 14; the spec's objective).

    $$\mathcal L = \mathbb E_{z_0,\, \epsilon \sim \mathcal N(0, \mathbf I),\, t}
    \left[\lVert \epsilon - \epsilon_\theta(z_t, t, c) \rVert^2\right], \qquad
    z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$

    where the square is averaged over the elements of z, so it does not grow with the picture. `prediction` puts v or
    x_0 in place of eps, and `weighting` weighs their errors, see `loss_weight`. A network with twice the channels also
    learns its variance by the bound, through which no gradient reaches the mean (Improved DDPM, equation 16):

    $$\mathcal L_{\mathrm{hybrid}} = \mathcal L + \lambda\, T\, L_{t-1}$$

    where $\lambda$ is `vlb_weight`, and T L_{t-1}, in bits/dim, estimates the whole bound from one time.

    Args: denoise: callable (z_t, t) -> (B, ...), the network with its condition filled in; z_0, eps (B, ...);
        t (B,) integers.

    Returns: (B,) float32.
    """
    one_of(WEIGHTINGS, weighting, "weighting")
    if eps.shape != z_0.shape or t.shape != z_0.shape[:1] or t.is_floating_point():
        got = f"{tuple(eps.shape)} and {tuple(t.shape)} {t.dtype}"
        raise ValueError(
            f"expected eps like z_0, {tuple(z_0.shape)}, and ({len(z_0)},) integers t, got {got}"
        )
    z_t = q_sample(schedule, z_0, t, eps)
    target = training_target(schedule, z_0, t, eps, prediction)
    output, nu = split_output(denoise(z_t, t), z_t)
    weight = loss_weight(schedule, z_0, t, prediction, weighting).float()
    loss = (weight * (target.float() - output.float()) ** 2).flatten(1).mean(dim=1)
    if nu is not None and vlb_weight:
        bits = variational_term(schedule, z_0, z_t, t, output.detach().float(), prediction, "learned", nu)
        loss = loss + vlb_weight * schedule.timesteps * bits.float()
    return loss


def split_output(output: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""A network's output, (B, C, ...) or (B, 2 C, ...), as its prediction and, from the latter, its variance.

    Returns: the prediction, like z_t (B, C, ...), and nu for `reverse_variance`, or None. Raw numbers from -1 to 1
    become nu from 0 to 1, without a bound (Improved DDPM, section 3.1).
    """
    if output.shape == z_t.shape:
        return output, None
    if z_t.ndim < 2 or output.shape != (len(z_t), 2 * z_t.shape[1], *z_t.shape[2:]):
        got = f"{tuple(output.shape)} for {tuple(z_t.shape)}"
        raise ValueError(f"expected a network's output like its input, or with twice the channels, got {got}")
    prediction, raw = output.chunk(2, dim=1)
    return prediction, (raw.float() + 1) / 2


def variational_term(
    schedule: Schedule, z_0, z_t, t, output, prediction="eps", variance="posterior", nu=None
) -> Tensor:
    r"""What step t adds to the variational bound, in bits/dim; (B,) (DDPM, equation 5).

    $$L_{t-1} = D_{\mathrm{KL}}\left(q(z_{t-1} \mid z_t, z_0)\ \|\ p_\theta(z_{t-1} \mid z_t, c)\right)
    = \frac12 \left[\frac{\tilde\beta_t}{\Sigma_\theta} - 1 + \log\frac{\Sigma_\theta}{\tilde\beta_t}
    + \frac{\bar\alpha_{t-1}\, \beta_t^2}{(1 - \bar\alpha_t)^2} \cdot
    \frac{(z_0 - \hat z_0)^2}{\Sigma_\theta}\right]$$

    because both means contain z_t with the same factor. For the last step, t = 0 in code, it is minus the logarithm of
    the density of z_0:

    $$L_0 = -\log p_\theta(z_0 \mid z_1, c)
    = \frac12 \left[\log 2 \pi \Sigma_\theta + \frac{(z_0 - \hat z_0)^2}{\Sigma_\theta}\right]$$

    Both are in nats, and the value is divided by log 2. Latents are continuous, so L_0 is below 0 where that density
    is above 1.

    Args: z_0, z_t (B, ...); t (B,) integers; output: the network's prediction; variance, nu as for `reverse_variance`.
    """
    z_0_hat, _ = x_0_and_eps(schedule, z_t, t, output, prediction)
    sigma_2 = reverse_variance(schedule, z_t, t, None, variance, nu)
    beta_tilde = reverse_variance(schedule, z_t, t)
    alpha_bar_t = schedule.alpha_bar_at(t, z_t)
    alpha_bar_before = schedule.alpha_bar_at(t - 1, z_t)
    weight = alpha_bar_before.sqrt() * schedule.beta_at(t, z_t) / (1 - alpha_bar_t)  # 1 at t = 0
    squares = (weight * (z_0.to(weight) - z_0_hat)) ** 2 / sigma_2
    between = beta_tilde / sigma_2 - 1 + (sigma_2 / beta_tilde).log()
    is_last = alpha_bar_before == 1
    nats = 0.5 * (squares + torch.where(is_last, (2 * math.pi * sigma_2).log(), between))
    return nats.flatten(1).mean(dim=1) / math.log(2)


def prior_term(schedule: Schedule, z_0: Tensor) -> Tensor:
    r"""What the start of the reverse process adds to the bound, in bits/dim; (B,) (DDPM, equation 5).

    $$L_T = D_{\mathrm{KL}}\left(q(z_T \mid z_0)\ \|\ \mathcal N(0, \mathbf I)\right)
    = \frac12 \left[\bar\alpha_T z_0^2 - \bar\alpha_T - \log(1 - \bar\alpha_T)\right]$$

    in nats. The value is divided by log 2.
    """
    alpha_bar_T = schedule.alpha_bar[-1].item()
    nats = 0.5 * (
        alpha_bar_T * z_0.to(schedule.alpha_bar.dtype) ** 2 - alpha_bar_T - math.log1p(-alpha_bar_T)
    )
    return nats.flatten(1).mean(dim=1) / math.log(2)
