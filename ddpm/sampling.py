r"""From noise to latents: DDPM, DDIM and DPM-Solver++ 2M, one step each, guidance, and the loop over them.

All three steps go from x_t at time t to x_s at an earlier time s, given the network's prediction of x_0. x_t, x_0,
eps and noise are (B, ...), t and s (B,) integers; s = -1 is the clean picture. Nothing is clipped: latents have no
bounds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.diffusion import (
    PREDICTIONS,
    VARIANCES,
    alpha_bars,
    q_posterior,
    q_sample,
    reverse_variance,
    x_0_and_eps,
)
from ddpm.losses import split_output
from ddpm.schedule import Schedule, one_of

SAMPLERS = ("ddpm", "ddim", "dpm++")


@dataclass
class State:
    r"""Where the loop over the steps stands."""

    i: int  # number of the step, from 0
    t: int  # the time of this step
    s: int  # the time of the next one, -1 after the last
    x: Tensor  # (B, ...) the sample at time s
    x_0: Tensor  # (B, ...) the network's prediction of the clean sample, from time t


@dataclass
class Start:
    r"""A given picture, from which sampling starts late (SDEdit, Meng et al. 2022) and of which a mask keeps a part.

    $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad
    t = \max \lbrace t_k : t_k < S T \rbrace$$

    where t_k are the sampler's times. For example, S = 0.5 begins in the middle of the chain and takes half the steps.

    Attributes:
        x_0: (B, ...) the picture: latents in `sample_loop`, pixels in `TextToImage.sample`.
        strength: S from 1 / steps to 1. Even at 1 a little of the picture is left: its factor is sqrt(alpha_bar_T).
        mask: (B, 1, ...) booleans, True is drawn anew and False is kept, see `keep_known`; None: all is drawn anew.
    """

    x_0: Tensor
    strength: float
    mask: Tensor | None = None


def timesteps(schedule: Schedule, steps: int, strength: float = 1.0) -> list[int]:
    r"""The times of `steps` network calls, falling from T - 1 (Lin et al. 2024, table 2, "trailing").

    A strength below 1 leaves only those below strength x T, see `Start`.

    >>> timesteps(Schedule.named("linear"), 4)
    [999, 749, 499, 249]
    >>> timesteps(Schedule.named("linear"), 4, strength=0.5)
    [499, 249]
    """
    T = schedule.timesteps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= T:
        raise ValueError(f"expected 1 to {T} sampling steps, got {steps!r}")
    if not 1 / steps <= strength <= 1:
        raise ValueError(f"expected a strength from 1 / steps, {1 / steps:.3g}, to 1, got {strength}")
    times = [round(T - k * T / steps) - 1 for k in range(steps)]
    return [t for t in times if t < strength * T]


def ddpm_step(schedule: Schedule, x_t, t, s, x_0, noise, variance="posterior", nu=None) -> Tensor:
    r"""Ancestral sampling (DDPM, algorithm 2), also over skipped steps.

    $$p_\theta(x_s \mid x_t, c) = \mathcal N\left(x_s;\ \mu_\theta(x_t, t, c),\ \Sigma_\theta(x_t, t, c)\right), \qquad
    \mu_\theta = \tilde\mu(x_t, \hat x_0)$$

    where $\tilde\mu$ is the mean of `q_posterior`. Sigma is the posterior's variance, beta_{t|s}, or learned between
    the two by nu, see `reverse_variance`. The last step, to the clean picture, adds no noise.
    """
    mean, _ = q_posterior(schedule, x_0, x_t, t, s)
    sigma_2 = reverse_variance(schedule, x_t, t, s, variance, nu)
    sigma_2 = torch.where(schedule.alpha_bar_at(s, x_t) < 1, sigma_2, 0.0)
    return (mean + sigma_2.sqrt() * noise).to(x_t.dtype)


def ddim_step(schedule: Schedule, x_t, t, s, x_0, eps, noise, eta: float = 0.0) -> Tensor:
    r"""One step of DDIM (equations 12 and 16; its alpha is our alpha_bar).

    $$x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2}\, \hat\epsilon
    + \sigma\, \epsilon', \qquad
    \sigma^2 = \eta^2\, \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \left(1 - \frac{\bar\alpha_t}{\bar\alpha_s}\right)$$

    where $\epsilon'$ is `noise`. eta = 0 is deterministic, and eta = 1 is a step of DDPM with the posterior's variance.
    """
    alpha_bar_t, alpha_bar_s = alpha_bars(schedule, x_t, t, s)
    sigma_2 = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    direction = (1 - alpha_bar_s - sigma_2).clamp(min=0).sqrt()  # float32 may round it below 0
    x_s = alpha_bar_s.sqrt() * x_0 + direction * eps + sigma_2.sqrt() * noise
    return x_s.to(x_t.dtype)


def dpmpp_2m_step(schedule: Schedule, x_t, t, s, x_0, previous, noise, eta: float = 0.0) -> Tensor:
    r"""One step of DPM-Solver++ 2M: `ddim_step` with D, which extrapolates, for the network's x_0.

    $$x_s = a_s D + \sqrt{\sigma_s^2 - \sigma^2}\, \frac{x_t - a_t D}{\sigma_t} + \sigma\, \epsilon', \qquad
    D = \hat x_0 + \frac{1}{2r}\left(\hat x_0 - \hat x_0^{\,\mathrm{prev}}\right), \quad
    h = \lambda_s - \lambda_t, \ r = \frac{h_{\mathrm{prev}}}{h}$$

    where a_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t), lambda_t = log(a_t / sigma_t); sigma is DDIM's.
    eta = 0 is algorithm 2 of Lu et al. 2022, $x_s = \frac{\sigma_s}{\sigma_t} x_t - a_s (e^{-h} - 1) D$, and eta = 1
    their SDE-DPM-Solver++ 2M, $x_s = \frac{\sigma_s}{\sigma_t} e^{-h} x_t + a_s (1 - e^{-2h}) D
    + \sigma_s \sqrt{1 - e^{-2h}}\, \epsilon'$.

    Args: previous: (time, x_0) of the step before. None makes this step DDIM's, of first order. The last step, to the
    clean picture, always has first order, because lambda is infinite there and x_s = x_0.
    """
    D = x_0
    if previous is not None:
        t_prev, x_0_prev = previous
        alpha_bar_s = schedule.alpha_bar_at(s, x_t)
        lambda_t = _log_snr(schedule.alpha_bar_at(t, x_t))
        h = _log_snr(alpha_bar_s) - lambda_t
        h_prev = lambda_t - _log_snr(schedule.alpha_bar_at(t_prev, x_t))
        weight = torch.where(alpha_bar_s < 1, h / (2 * h_prev), 0.0)
        D = x_0 + weight * (x_0 - x_0_prev)
    D, eps = x_0_and_eps(schedule, x_t, t, D, "x_0")
    return ddim_step(schedule, x_t, t, s, D, eps, noise, eta)


def _log_snr(alpha_bar: Tensor) -> Tensor:
    r"""lambda = log(a / sigma), half the logarithm of the signal-to-noise ratio; infinite for the clean picture."""
    return 0.5 * (alpha_bar.log() - torch.log1p(-alpha_bar))


def guided(network: Callable, context: Tensor, negative: Tensor, scale: float) -> Callable:
    r"""Classifier-free guidance (Ho and Salimans 2022, equation 6, in the form with scale = 1 + w).

    $$\hat\epsilon = \epsilon_\theta(z_t, t, \varnothing)
    + s \left(\epsilon_\theta(z_t, t, c) - \epsilon_\theta(z_t, t, \varnothing)\right)$$

    where s is `scale`. s = 1 is the conditional model and s = 0 the unconditional one, and each runs the network once,
    not twice. Once is enough for every s where `negative` is `context`. A learned variance is the conditional model's,
    because guidance would take nu far out of 0..1.

    Args:
        network: callable (z_t, t, context) -> (B, ...), the UNet; the formula holds for eps, v and x_0 alike.
        context, negative: (B, M, D) states of the prompts and of the negative, or empty, ones.

    Returns: callable (z_t, t) -> (B, ...).
    """
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite guidance scale, got {scale}")
    if scale in (0.0, 1.0) or negative is context:
        alone = negative if scale == 0.0 else context
        return lambda z_t, t: network(z_t, t, alone)
    both = torch.cat([negative, context])

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        output = network(torch.cat([z_t, z_t]), torch.cat([t, t]), both)
        uncond, cond = output.to(z_t.dtype).chunk(2)
        mean = uncond + scale * (cond - uncond)
        C = z_t.shape[1]
        return mean if mean.shape[1] == C else torch.cat([mean[:, :C], cond[:, C:]], dim=1)

    return denoise


def keep_known(schedule: Schedule, x_s: Tensor, s: Tensor, start: Start, eps: Tensor) -> Tensor:
    r"""Inpainting: where the mask is False, x_s becomes the given picture at the noise of s (RePaint, equation 8).

    $$x_s \leftarrow m\, x_s + (1 - m) \left(\sqrt{\bar\alpha_s}\, x_0 + \sqrt{1 - \bar\alpha_s}\, \epsilon\right)$$

    where m is `start.mask`, 1 - m in the paper. At s = -1 the kept part is the picture itself. eps is the noise that
    sampling starts with, so a deterministic sampler stays deterministic. RePaint draws it anew at every step, and jumps
    back and forth between times, so that the two parts agree better.
    """
    return torch.where(start.mask, x_s, q_sample(schedule, start.x_0, s, eps))


def scale_noise(schedule: Schedule, x_s: Tensor, t: Tensor, s: Tensor, x_0: Tensor, scale: float) -> Tensor:
    r"""A step's result with a factor on its noise. An imperfect network may draw better with a little less.

    $$x_s \leftarrow a_s \hat x_0 + \gamma^{(t - s) / T} \left(x_s - a_s \hat x_0\right), \qquad
    a_s = \sqrt{\bar\alpha_s}$$

    where gamma is `scale`. What is scaled is all that the step adds to the prediction, also the noise that it drew. The
    exponents of a whole chain add up to 1, so gamma means the same for any number of steps. gamma = 1 changes nothing,
    nor does any gamma change the clean picture, s = -1, where x_s is x_0.

    Ning et al. 2024 (arXiv:2308.15321) scale the predicted eps instead, and so the x_0 that follows from it. That x_0
    is divided by a_t, so their form draws nothing under a schedule whose a_T is nearly 0.

    Args: x_s, x_0: (B, ...) the sample at time s, and the prediction at t by which it was made.
    """
    a_s = schedule.alpha_bar_at(s, x_s).sqrt()
    factor = scale ** ((t - s).view_as(a_s).to(a_s.dtype) / schedule.timesteps)
    return (a_s * x_0 + factor * (x_s - a_s * x_0)).to(x_s.dtype)


def sample_loop(
    schedule: Schedule,
    denoise: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    draw: Callable[[], Tensor],
    sampler: str = "dpm++",
    steps: int = 20,
    prediction: str = "eps",
    eta: float = 0.0,
    variance: str = "posterior",
    start: Start | None = None,
    noise_scale: float = 1.0,
) -> Iterator[State]:
    r"""The reverse process from x_T to the clean sample; yields the state after every step. The last x is the result.

    A generator, so wrong arguments are refused when the first state is asked for.

    Args:
        denoise: callable (x_t, t) -> (B, ...), the network with condition and guidance filled in; with twice the
            channels where its variance is learned.
        x_T: (B, ...) standard normal.
        draw: returns fresh standard normal noise like x_T; called once a step by the samplers that add noise.
        steps: 1..T. eta: noise of ddim and dpm++, 0 (none, the same way every time) to 1 (that of ddpm).
        start: a picture to start from, with x_T as its noise; of the steps its strength leaves the last ones.
        noise_scale: gamma of `scale_noise`, above 0 and at most 1.
    """
    one_of(SAMPLERS, sampler, "sampler")
    one_of(PREDICTIONS, prediction, "prediction")
    one_of(VARIANCES, variance, "variance")
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta in [0, 1], got {eta}")
    if not 0 < noise_scale <= 1:
        raise ValueError(f"expected a noise_scale above 0 and at most 1, got {noise_scale}")
    times = timesteps(schedule, steps, start.strength if start else 1.0)
    adds_noise = eta > 0 or sampler == "ddpm"
    x = x_T
    if start:
        x = q_sample(schedule, start.x_0, torch.full((len(x_T),), times[0], device=x_T.device), x_T)
    previous = None
    for i, (now, then) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        t = torch.full((len(x),), now, device=x.device)
        s = torch.full((len(x),), then, device=x.device)
        output, nu = split_output(denoise(x, t).to(x.dtype), x)
        x_0, eps = x_0_and_eps(schedule, x, t, output, prediction)
        noise = draw() if adds_noise else torch.zeros_like(x)
        if sampler == "ddpm":
            x = ddpm_step(schedule, x, t, s, x_0, noise, variance, nu)
        elif sampler == "ddim":
            x = ddim_step(schedule, x, t, s, x_0, eps, noise, eta)
        else:
            x = dpmpp_2m_step(schedule, x, t, s, x_0, previous, noise, eta)
            previous = (t, x_0)
        if noise_scale != 1.0:
            x = scale_noise(schedule, x, t, s, x_0, noise_scale)
        if start and start.mask is not None:
            x = keep_known(schedule, x, s, start, x_T)
        yield State(i, now, then, x, x_0)
