r"""The figure of docs/explore.md for readers without JavaScript: `python docs/explore.py` writes it.

Data, the noised cloud and the paths of two samplers in the plane, drawn by `ddpm` with the perfect network.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from ddpm.diffusion import q_sample  # noqa: E402
from ddpm.sampling import sample_loop  # noqa: E402
from ddpm.schedule import Schedule  # noqa: E402

FIGURE = HERE / "images/explore.svg"
SPREAD = 0.06  # standard deviation of the Gaussian around each point
SIDE = 300  # of a panel, for -3..3 in the plane
BLUE, GREEN, RED, GREY = "#1d63d1", "#0b7a63", "#c2255c", "#97a1ad"


def moons(count: int = 100) -> Tensor:
    r"""Two half circles, (count, 2)."""
    angle = torch.pi * (torch.arange(count // 2, dtype=torch.float64) + 0.5) / (count // 2)
    upper = torch.stack([1.3 * angle.cos() - 0.65, 1.3 * angle.sin() - 0.35], dim=1)
    return torch.cat([upper, -upper])


def perfect_network(schedule: Schedule, points: Tensor):
    r"""E[eps | x_t] where the data are a Gaussian around each of `points`."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar_at(t, x_t)
        variance = alpha_bar * SPREAD**2 + 1 - alpha_bar
        away = (x_t[:, None] - alpha_bar.sqrt()[:, None] * points).square().sum(dim=2)
        mean = (-away / (2 * variance)).softmax(dim=1) @ points
        return (1 - alpha_bar).sqrt() / variance * (x_t - alpha_bar.sqrt() * mean)

    return denoise


def dots(x: Tensor, colour: str, width: float) -> str:
    r"""One SVG path with a round dot at each of (n, 2)."""
    marks = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in pixels(x))
    return f'<path d="{marks}" stroke="{colour}" stroke-width="{width}" stroke-linecap="round"/>'


def pixels(x: Tensor) -> np.ndarray:
    return ((x * torch.tensor([1.0, -1.0])).numpy() / 6 + 0.5) * SIDE


def figure() -> str:
    r"""The whole SVG: the cloud at t = 150, then 40 steps of DDIM and of DDPM from the same noise."""
    schedule = Schedule.named("linear")
    points = moons()
    generator = torch.Generator().manual_seed(0)

    def draw(n: int = 300) -> Tensor:
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    x_0 = points.repeat(3, 1) + SPREAD * draw()
    x_t = q_sample(schedule, x_0, torch.full((300,), 150), draw())
    panels = {"data and their noised cloud, t = 150": dots(x_t, GREY, 3) + dots(points, BLUE, 5)}
    x_T = draw()
    for sampler, colour in (("ddim", GREEN), ("ddpm", RED)):
        states = [x_T]
        network = perfect_network(schedule, points)
        states += [s.x for s in sample_loop(schedule, network, x_T, draw, sampler, steps=40)]
        paths = "".join(
            "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in pixels(torch.stack([x[n] for x in states])))
            for n in range(4)
        )
        line = f'<path d="{paths}" stroke="{colour}" fill="none" stroke-linejoin="round"/>'
        panels[f"{sampler.upper()}, 40 steps"] = (
            dots(points, "#bcd2f5", 5) + dots(states[-1], colour, 3) + line + dots(x_T[:4], colour, 6)
        )
    drawn = "".join(
        f'<svg x="{i * (SIDE + 20)}" y="24" width="{SIDE}" height="{SIDE}">'
        f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#c3cad4"/>{panel}</svg>'
        f'<text x="{i * (SIDE + 20)}" y="16" font-family="sans-serif" font-size="14" fill="#37404d">{title}</text>\n'
        for i, (title, panel) in enumerate(panels.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {3 * SIDE + 56} {SIDE + 40}">\n'
        f'<rect x="-8" y="-8" width="{3 * SIDE + 56}" height="{SIDE + 40}" fill="white"/>\n{drawn}</svg>\n'
    )


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
