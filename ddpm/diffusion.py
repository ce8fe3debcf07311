r"""The forward process, its posterior, what a network may predict, the variance of the way back, and the losses.

Every function takes the `Schedule` first. Pictures or latents are (B, C, H, W) or any (B, ...); `t` is (B,) with
integers in 0..T-1. The algebra runs in double precision and is rounded to the input's type once, at the end."""

import torch
from torch import Tensor

from ddpm.schedule import Schedule

PREDICTIONS = ("eps", "v", "x_0")
VARIANCES = ("posterior", "beta", "learned")


def forward_step(schedule: Schedule, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    r"""One step of noise (DDPM, equation 2).

    $$q(x_t \mid x_{t-1}) = \mathcal N(x_t;\ \sqrt{1 - \beta_t}\, x_{t-1},\ \beta_t \mathbf I)$$

    Args:
        x_prev: (B, ...) x_{t-1}; at t = 0 the clean picture.
        t: (B,) the step that is taken, 0..T-1.
        eps: (B, ...) standard normal noise.
    """
    _same_shape(x_prev, eps)
    beta_t = schedule.beta_at(t, x_prev)
    x_t = (1 - beta_t).sqrt() * x_prev + beta_t.sqrt() * eps
    return x_t.to(x_prev.dtype)


def q_sample(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    r"""All steps up to t at once (DDPM, equation 4).

    $$q(x_t \mid x_0) = \mathcal N(x_t;\ \sqrt{\bar\alpha_t}\, x_0,\ (1 - \bar\alpha_t) \mathbf I), \qquad
    x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$
    """
    _same_shape(x_0, eps)
    alpha_bar_t = schedule.alpha_bar_at(schedule.checked(t, x_0), x_0)
    x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps
    return x_t.to(x_0.dtype)


def q_posterior(
    schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of the step back when x_0 is known (DDPM, equations 6 and 7).

    $$q(x_s \mid x_t, x_0) = \mathcal N\left(
    \frac{\sqrt{\bar\alpha_s}\, \beta_{t|s}}{1 - \bar\alpha_t} x_0
    + \frac{\sqrt{\alpha_{t|s}}\, (1 - \bar\alpha_s)}{1 - \bar\alpha_t} x_t,\ \
    \tilde\beta = \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \beta_{t|s}\right), \quad
    \alpha_{t|s} = \bar\alpha_t / \bar\alpha_s, \ \beta_{t|s} = 1 - \alpha_{t|s}$$

    Args:
        s: (B,) the earlier time, t - 1 when not given (then alpha_{t|s} is alpha_t, beta_{t|s} is beta_t).
            Samplers that skip steps pass a smaller one; -1 is the clean picture.

    Returns: the mean, like x_t, and the variance, (B, 1, ..., 1). At s = -1 they are x_0 and 0.
    """
    _same_shape(x_t, x_0)
    t = schedule.checked(t, x_t)
    s = t - 1 if s is None else schedule.checked(s, x_t, first=-1)
    if not bool((s < t).all()):
        raise ValueError(f"expected s before t, got s = {s.tolist()} and t = {t.tolist()}")
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t, x_t), schedule.alpha_bar_at(s, x_t)
    alpha_ts = alpha_bar_t / alpha_bar_s
    beta_ts = 1 - alpha_ts
    mean = (
        alpha_bar_s.sqrt() * beta_ts / (1 - alpha_bar_t) * x_0
        + alpha_ts.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t) * x_t
    )
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_ts
    return mean.to(x_t.dtype), variance


def v_from(schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    r"""The velocity of x_t along the chain (Progressive Distillation, appendix D).

    $$v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x_0$$
    """
    _same_shape(x_0, eps)
    alpha_bar_t = schedule.alpha_bar_at(schedule.checked(t, x_0), x_0)
    return (alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0).to(x_0.dtype)


def score_from(schedule: Schedule, t: Tensor, eps: Tensor) -> Tensor:
    r"""The gradient of log q(x_t) that a prediction of the noise stands for (Song et al. 2021, section 3).

    $$\nabla_{x_t} \log q(x_t) = -\frac{\mathbb E[\epsilon \mid x_t]}{\sqrt{1 - \bar\alpha_t}}$$
    """
    alpha_bar_t = schedule.alpha_bar_at(schedule.checked(t, eps), eps)
    return (-eps / (1 - alpha_bar_t).sqrt()).to(eps.dtype)


def x_0_and_eps(
    schedule: Schedule, x_t: Tensor, t: Tensor, output: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    r"""Read a network's output as the picture and the noise that make up x_t, whether it says eps, v or x_0.

    $$\hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \hat\epsilon}{\sqrt{\bar\alpha_t}}
    = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, \hat v, \qquad
    \hat\epsilon = \frac{x_t - \sqrt{\bar\alpha_t}\, \hat x_0}{\sqrt{1 - \bar\alpha_t}}
    = \sqrt{1 - \bar\alpha_t}\, x_t + \sqrt{\bar\alpha_t}\, \hat v$$

    `prediction` may also be "score", see `score_from`.
    """
    _same_shape(x_t, output)
    alpha_bar_t = schedule.alpha_bar_at(schedule.checked(t, x_t), x_t)
    signal, noise = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    if prediction == "eps":
        x_0, eps = (x_t - noise * output) / signal, output
    elif prediction == "v":
        x_0, eps = signal * x_t - noise * output, noise * x_t + signal * output
    elif prediction == "x_0":
        x_0, eps = output, (x_t - signal * output) / noise
    elif prediction == "score":
        eps = -noise * output
        x_0 = (x_t - noise * eps) / signal
    else:
        raise ValueError(f"expected a prediction out of {', '.join(PREDICTIONS)}, score, got {prediction!r}")
    return x_0.to(x_t.dtype), eps.to(x_t.dtype)


def reverse_variance(
    schedule: Schedule,
    like: Tensor,
    t: Tensor,
    s: Tensor | None = None,
    variance: str = "posterior",
    nu: Tensor | None = None,
) -> Tensor:
    r"""Sigma_theta(x_t, t, c), the variance of the step back, in its three forms.

    `posterior`: beta-tilde of `q_posterior`, right for a single picture; `beta`: beta_{t|s}, right for standard normal
    data (DDPM, section 3.2); `learned`: between the two (Improved DDPM, equation 15; its v is nu here)

    $$\Sigma_\theta = \exp\left(\nu \log \beta_{t|s} + (1 - \nu) \log \tilde\beta\right)$$

    Args:
        s: (B,) the earlier time, t - 1 when not given. At s = -1 beta-tilde is 0, which no density has: the
            beta-tilde of the step from 1 to 0 takes its place, as in DDPM. Samplers add no noise there at all.
        nu: (B, ...) like `like`, for `learned`.

    Returns: (B, 1, ..., 1), or (B, ...) where it is learned; float64 (float32 on devices without it).
    """
    if variance not in VARIANCES:
        raise ValueError(f"expected a variance out of {', '.join(VARIANCES)}, got {variance!r}")
    t = schedule.checked(t, like)
    s = t - 1 if s is None else schedule.checked(s, like, first=-1)
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t, like), schedule.alpha_bar_at(s, like)
    beta_ts = 1 - alpha_bar_t / alpha_bar_s
    if variance == "beta":
        return beta_ts
    alpha_bar_0, alpha_bar_1 = schedule.alpha_bar[:2].to(alpha_bar_t).unbind()
    least = (1 - alpha_bar_0) / (1 - alpha_bar_1) * (1 - alpha_bar_1 / alpha_bar_0)
    beta_tilde = torch.where(alpha_bar_s < 1, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_ts, least)
    if variance == "posterior":
        return beta_tilde
    if nu is None or nu.shape != like.shape:
        came = "none" if nu is None else tuple(nu.shape)
        raise ValueError(
            f"expected nu of shape {tuple(like.shape)} for a learned variance, got {came}; "
            "the network must have twice the channels"
        )
    return torch.exp(nu * beta_ts.log() + (1 - nu) * beta_tilde.log())


def _same_shape(x: Tensor, other: Tensor):
    if x.shape != other.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    if not (torch.is_floating_point(x) and torch.is_floating_point(other)):
        raise ValueError(f"expected floating-point tensors, got {x.dtype} and {other.dtype}")
