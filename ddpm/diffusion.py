r"""The forward process, its posterior, what a network may predict, and the variance of the reverse process.

Every function takes the `Schedule` first. Pictures or latents are (B, C, H, W) or any (B, ...); `t` is (B,) with
integers in 0..T-1. The algebra runs in double precision and is rounded to the input's type once, at the end.
"""

import torch
from torch import Tensor

from ddpm.schedule import Schedule, one_of

PREDICTIONS = ("eps", "v", "x_0")
VARIANCES = ("posterior", "beta", "learned")


def forward_step(schedule: Schedule, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    r"""One step of noise (DDPM, equation 2).

    $$q(x_t \mid x_{t-1}) = \mathcal N(x_t;\ \sqrt{1 - \beta_t}\, x_{t-1},\ \beta_t \mathbf I)$$

    where x_{t-1} is `x_prev`, the clean picture at t = 0. `eps` is standard normal noise like x_prev.
    """
    beta_t = schedule.beta_at(t, x_prev)
    x_t = (1 - beta_t).sqrt() * x_prev + beta_t.sqrt() * eps
    return x_t.to(x_prev.dtype)


def q_sample(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    r"""All steps up to t at once (DDPM, equation 4); eps is standard normal noise like x_0.

    $$q(x_t \mid x_0) = \mathcal N(x_t;\ \sqrt{\bar\alpha_t}\, x_0,\ (1 - \bar\alpha_t) \mathbf I), \qquad
    x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$
    """
    alpha_bar_t = schedule.alpha_bar_at(t, x_0)
    x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps
    return x_t.to(x_0.dtype)


def q_posterior(schedule: Schedule, x_0, x_t, t, s=None) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of the reverse step when x_0 is known (DDPM, equations 6 and 7).

    $$q(x_s \mid x_t, x_0) = \mathcal N\left(
    \frac{\sqrt{\bar\alpha_s}\, \beta_{t|s}}{1 - \bar\alpha_t} x_0
    + \frac{\sqrt{\alpha_{t|s}}\, (1 - \bar\alpha_s)}{1 - \bar\alpha_t} x_t,\ \
    \tilde\beta = \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \beta_{t|s}\right), \quad
    \alpha_{t|s} = \bar\alpha_t / \bar\alpha_s, \ \beta_{t|s} = 1 - \alpha_{t|s}$$

    where s, (B,), is the earlier time: t - 1 when not given (then alpha_{t|s} is alpha_t and beta_{t|s} is beta_t),
    smaller where samplers skip steps, and -1 for the clean picture.

    Returns: the mean, like x_t, and the variance, (B, 1, ..., 1). At s = -1 they are x_0 and 0.
    """
    alpha_bar_t, alpha_bar_s = alpha_bars(schedule, x_t, t, s)
    alpha_ts = alpha_bar_t / alpha_bar_s
    beta_ts = 1 - alpha_ts
    mean = (
        alpha_bar_s.sqrt() * beta_ts / (1 - alpha_bar_t) * x_0
        + alpha_ts.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t) * x_t
    )
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_ts
    return mean.to(x_t.dtype), variance


def alpha_bars(schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""alpha_bar at t and at the earlier time s, t - 1 when None; on the CPU ValueError unless s is before t."""
    if s is None:
        s = t - 1
    elif s.device.type == "cpu" and not bool((s < t).all()):  # the look would make a GPU wait
        raise ValueError(f"expected s before t, got s = {s.tolist()} and t = {t.tolist()}")
    return schedule.alpha_bar_at(t, x_t), schedule.alpha_bar_at(s, x_t)


def v_from(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    r"""The velocity of x_t along the chain, from its picture and its noise (Progressive Distillation, appendix D).

    $$v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x_0$$
    """
    alpha_bar_t = schedule.alpha_bar_at(t, x_0)
    return (alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0).to(x_0.dtype)


def score_from(schedule: Schedule, t: Tensor, eps: Tensor) -> Tensor:
    r"""The gradient of log q(x_t), which a prediction of the noise gives (Song et al. 2021, section 3).

    $$\nabla_{x_t} \log q(x_t) = -\frac{\mathbb E[\epsilon \mid x_t]}{\sqrt{1 - \bar\alpha_t}}$$
    """
    alpha_bar_t = schedule.alpha_bar_at(t, eps)
    return (-eps / (1 - alpha_bar_t).sqrt()).to(eps.dtype)


def x_0_and_eps(schedule: Schedule, x_t, t, output, prediction: str) -> tuple[Tensor, Tensor]:
    r"""The picture and the noise in x_t, from the `output` of a network that predicts eps, v or x_0.

    $$\hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \hat\epsilon}{\sqrt{\bar\alpha_t}}
    = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, \hat v, \qquad
    \hat\epsilon = \frac{x_t - \sqrt{\bar\alpha_t}\, \hat x_0}{\sqrt{1 - \bar\alpha_t}}
    = \sqrt{1 - \bar\alpha_t}\, x_t + \sqrt{\bar\alpha_t}\, \hat v$$

    `prediction` may also be "score", see `score_from`.
    """
    one_of((*PREDICTIONS, "score"), prediction, "prediction")
    alpha_bar_t = schedule.alpha_bar_at(t, x_t)
    signal = alpha_bar_t.sqrt()
    noise = (1 - alpha_bar_t).sqrt()
    if prediction == "v":
        x_0 = signal * x_t - noise * output
        eps = noise * x_t + signal * output
    elif prediction == "x_0":
        x_0 = output
        eps = (x_t - signal * x_0) / noise
    else:
        eps = -noise * output if prediction == "score" else output
        x_0 = (x_t - noise * eps) / signal
    return x_0.to(x_t.dtype), eps.to(x_t.dtype)


def reverse_variance(schedule: Schedule, x_t, t, s=None, variance="posterior", nu=None) -> Tensor:
    r"""Sigma_theta(x_t, t, c), the variance of the reverse step, in its three forms.

    `posterior` is beta-tilde of `q_posterior`, exact for a single picture. `beta` is beta_{t|s}, exact for standard
    normal data (DDPM, section 3.2). `learned` lies between the two for nu in 0..1 (Improved DDPM, equation 15; its v is
    nu here):

    $$\Sigma_\theta = \exp\left(\nu \log \beta_{t|s} + (1 - \nu) \log \tilde\beta\right)$$

    Args:
        x_t: (B, ...), whose shape alone is used.
        s: (B,) the earlier time, t - 1 when not given. At s = -1 beta-tilde is 0, which no density has, so the
            beta-tilde of the step from 1 to 0 takes its place, as in DDPM. Samplers add no noise there.
        nu: (B, ...) like x_t, for `learned`.

    Returns: (B, 1, ..., 1), or (B, ...) where it is learned; float64 (float32 on devices without it).
    """
    alpha_bar_t, alpha_bar_s = alpha_bars(schedule, x_t, t, s)
    beta_ts = 1 - alpha_bar_t / alpha_bar_s
    if variance == "beta":
        return beta_ts
    alpha_bar_0, alpha_bar_1 = schedule.alpha_bar[:2]
    least = (1 - alpha_bar_0) / (1 - alpha_bar_1) * (1 - alpha_bar_1 / alpha_bar_0)
    beta_tilde = torch.where(alpha_bar_s < 1, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_ts, least)
    if variance == "posterior":
        return beta_tilde
    return torch.exp(nu * beta_ts.log() + (1 - nu) * beta_tilde.log())
