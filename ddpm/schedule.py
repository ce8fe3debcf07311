r"""The noise schedule: how much noise each of the T steps of the chain adds.

Time in this project, said once: code counts `t` from 0 to T-1, papers count from 1 to T, so `t` here is
`t + 1` there. `alpha_bar[t]` belongs to x_t *after* step t; the clean picture before step 0 has alpha_bar 1,
and wherever a time may also be "clean" it is written -1.

In the DDIM paper the symbol alpha means what is `alpha_bar` here (and in DDPM).
"""

import math

import torch
from torch import Tensor


def linear_beta(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    r"""beta rises in equal steps from `start` to `end` (DDPM, section 4).

    The ends are DDPM's for T = 1000; other lengths scale them by 1000 / T so that the whole chain adds about
    the same noise. Returns (T,) float64.
    """
    scale = 1000 / timesteps
    return torch.linspace(start * scale, end * scale, timesteps, dtype=torch.float64)


def scaled_linear_beta(timesteps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    r"""sqrt(beta) rises in equal steps (Latent Diffusion, where it is called "linear"). Returns (T,) float64."""
    scale = math.sqrt(1000 / timesteps)
    roots = torch.linspace(math.sqrt(start) * scale, math.sqrt(end) * scale, timesteps, dtype=torch.float64)
    return roots**2


def cosine_beta(timesteps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    r"""alpha_bar falls along a squared cosine (Improved DDPM, equation 17). Returns (T,) float64.

    With t from 1 to T, as in the paper:

    $$\bar\alpha_t = \frac{f(t)}{f(0)}, \quad f(t) = \cos^2\left(\frac{t/T + s}{1 + s} \cdot \frac{\pi}{2}\right),
    \quad \beta_t = \min\left(1 - \frac{\bar\alpha_t}{\bar\alpha_{t-1}},\ 0.999\right)$$
    """
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


SCHEDULES = {"linear": linear_beta, "scaled_linear": scaled_linear_beta, "cosine": cosine_beta}


class Schedule:
    r"""beta, alpha = 1 - beta and alpha_bar = alpha_0 alpha_1 ... alpha_t of a chain of T steps (DDPM, equation 4).

    $$\alpha_t = 1 - \beta_t, \qquad \bar\alpha_t = \prod_{s=0}^{t} \alpha_s$$

    Attributes: `beta`, `alpha`, `alpha_bar`, each (T,) float64 in (0, 1). Double precision costs nothing at
    this size, and keeps 1 - alpha_bar exact where alpha_bar is close to 1.

    >>> schedule = Schedule.named("linear")
    >>> schedule.timesteps, round(schedule.alpha_bar[-1].item(), 7)
    (1000, 4.04e-05)
    """

    def __init__(self, beta: Tensor):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) < 2:
            raise ValueError(f"expected beta of shape (T,) with T >= 2, got shape {tuple(beta.shape)}")
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(
                f"expected every beta in (0, 1), got values from {beta.min():g} to {beta.max():g}; "
                "check the schedule's ends and its number of timesteps"
            )
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)

    @classmethod
    def named(cls, name: str, timesteps: int = 1000) -> "Schedule":
        r"""The schedule called `name`: linear, scaled_linear or cosine."""
        if name not in SCHEDULES:
            raise ValueError(f"expected a schedule out of {', '.join(SCHEDULES)}, got {name!r}")
        if type(timesteps) is not int or timesteps < 2:
            raise ValueError(f"expected a whole number, at least 2 timesteps, got {timesteps!r}")
        return cls(SCHEDULES[name](timesteps))

    @property
    def timesteps(self) -> int:
        r"""T, the length of the chain."""
        return len(self.beta)

    def beta_at(self, t: Tensor, like: Tensor) -> Tensor:
        r"""beta_t for each element of the batch, shaped to multiply `like`; see `alpha_bar_at`."""
        return _lookup(self.beta, self.checked(t, like), like)

    def alpha_bar_at(self, t: Tensor, like: Tensor) -> Tensor:
        r"""alpha_bar_t for each element of the batch, shaped to multiply `like`.

        Args:
            t: (B,) integers in -1..T-1; -1 is the clean picture, where alpha_bar is 1.
            like: (B, ...), only its shape and device are used.

        Returns: (B, 1, ..., 1) float64 (float32 on devices without it), so that an equation written with it is
        computed in double precision; the functions of `diffusion` round once, at their end.
        """
        with_clean = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar])
        return _lookup(with_clean, self.checked(t, like, first=-1) + 1, like)

    def checked(self, t: Tensor, like: Tensor, first: int = 0) -> Tensor:
        r"""`t` as (B,) int64 on the CPU; ValueError unless it is one integer in first..T-1 for each of `like`."""
        last = self.timesteps - 1
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            came = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"expected t as a tensor of integers in {first}..{last}, got {came}")
        if like.ndim < 1 or t.shape != like.shape[:1]:
            expected = (
                f"t of shape {tuple(like.shape[:1])}, one time a batch element" if like.ndim else "a batch"
            )
            raise ValueError(f"expected {expected}, got {tuple(t.shape)}")
        t = t.detach().cpu().long()
        if len(t) and not (first <= int(t.min()) and int(t.max()) <= last):
            raise ValueError(f"expected t in {first}..{last}, got {int(t.min())}..{int(t.max())}")
        return t


def _lookup(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    values = table[index].reshape(-1, *[1] * (like.ndim - 1))
    return values.to(like.device, torch.float32 if like.device.type == "mps" else torch.float64)
