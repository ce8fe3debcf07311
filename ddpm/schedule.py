r"""The noise schedule: how much noise each of the T steps of the chain adds.

Time in this project, said once: code counts `t` from 0 to T-1 and papers count from 1 to T, so `t` here is
`t + 1` there. `alpha_bar[t]` belongs to x_t *after* step t. The clean picture is at t = -1, where alpha_bar is 1.

The DDIM paper writes alpha for what is `alpha_bar` here and in DDPM.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor


def linear_beta(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    r"""beta rises in equal steps from `start` to `end` (DDPM, section 4).

    The ends are DDPM's for T = 1000. Another length scales them by 1000 / T, because the whole chain should add
    about the same noise. Returns (T,) float64.
    """
    scale = 1000 / timesteps
    return torch.linspace(start * scale, end * scale, timesteps, dtype=torch.float64)


def scaled_linear_beta(timesteps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    r"""sqrt(beta) rises in equal steps (Latent Diffusion, where it is called "linear"). Returns (T,) float64."""
    scale = math.sqrt(1000 / timesteps)
    roots = torch.linspace(math.sqrt(start), math.sqrt(end), timesteps, dtype=torch.float64)
    return (scale * roots) ** 2


def cosine_beta(timesteps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    r"""alpha_bar falls along a squared cosine (Improved DDPM, equation 17). Returns (T,) float64.

    $$\bar\alpha_t = \frac{f(t)}{f(0)}, \quad f(t) = \cos^2\left(\frac{t/T + s}{1 + s} \cdot \frac{\pi}{2}\right),
    \quad \beta_t = \min\left(1 - \frac{\bar\alpha_t}{\bar\alpha_{t-1}},\ 0.999\right)$$

    where t counts from 1 to T, as in the paper, s is `offset` and 0.999 is `largest`.
    """
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


SCHEDULES = {"linear": linear_beta, "scaled_linear": scaled_linear_beta, "cosine": cosine_beta}


def one_of(known: Iterable[str], value: str, name: str):
    r"""Raise ValueError unless a setting has one of its known values."""
    if value not in known:
        raise ValueError(f"expected a {name} out of {', '.join(known)}, got {value!r}")


class Schedule:
    r"""beta, alpha = 1 - beta and alpha_bar = alpha_0 alpha_1 ... alpha_t of a chain of T steps (DDPM, equation 4).

    $$\alpha_t = 1 - \beta_t, \qquad \bar\alpha_t = \prod_{s=0}^{t} \alpha_s$$

    Attributes: `beta`, `alpha`, `alpha_bar`, each (T,) float64 in (0, 1). Double precision keeps 1 - alpha_bar
    accurate where alpha_bar is close to 1.

    >>> schedule = Schedule.named("linear")
    >>> schedule.timesteps, round(schedule.alpha_bar[-1].item(), 7)
    (1000, 4.04e-05)
    """

    def __init__(self, beta: Tensor):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) < 2 or not bool(((beta > 0) & (beta < 1)).all()):
            got = f"shape {tuple(beta.shape)} and values {beta.flatten()[:3].tolist()}, ..."
            advice = "check the schedule's ends and T"
            raise ValueError(f"expected beta (T,) with T >= 2 and every beta in (0, 1), got {got}; {advice}")
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)
        self._from_clean = torch.cat([torch.ones(1), self.alpha_bar])  # the clean picture is at t = -1

    @classmethod
    def named(cls, name: str, timesteps: int = 1000) -> "Schedule":
        r"""The schedule called `name`: linear, scaled_linear or cosine."""
        one_of(SCHEDULES, name, "schedule")
        return cls(SCHEDULES[name](timesteps))

    @property
    def timesteps(self) -> int:
        r"""T, the length of the chain."""
        return len(self.beta)

    def to(self, device: torch.device | str) -> "Schedule":
        r"""The same schedule with its tables on `device`; in float32 on mps, which has no float64."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        moved = copy.copy(self)
        for name, table in vars(self).items():
            setattr(moved, name, table.to(device, dtype))
        return moved

    def beta_at(self, t: Tensor, x: Tensor) -> Tensor:
        r"""beta_t for each picture of x; see `alpha_bar_at`."""
        return self.beta[t].reshape(-1, *[1] * (x.ndim - 1))

    def alpha_bar_at(self, t: Tensor, x: Tensor) -> Tensor:
        r"""alpha_bar_t for each picture of x, whose shape alone is used; t is (B,) integers in -1..T-1.

        Returns: (B, 1, ..., 1) float64, so an equation with it is computed in double precision. The functions of
        `diffusion` round once, at their end.
        """
        return self._from_clean[t + 1].reshape(-1, *[1] * (x.ndim - 1))
