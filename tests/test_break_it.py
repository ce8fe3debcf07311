r"""The mistakes that docs/break-it.md shows: numbers find each, also where no eye does."""

import contextlib
import re
from pathlib import Path

import break_it
import pytest
import torch

from ddpm import model as model_file
from ddpm import sampling
from ddpm.schedule import Schedule

PAGE = (Path(__file__).parents[1] / "docs" / "break-it.md").read_text(encoding="utf-8")
MEAN, SPREAD = 1.5, 0.05  # of the data under the caption; without one the mean is 0
COUNT = 20_000


def exact_v(schedule: Schedule, x_t, t, mean):
    r"""What a perfect network that predicts v says of normal data."""
    alpha_bar = schedule.alpha_bar_at(t, x_t)
    total = alpha_bar * SPREAD**2 + 1 - alpha_bar
    x_0 = mean + SPREAD**2 * alpha_bar.sqrt() * (x_t - alpha_bar.sqrt() * mean) / total
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    return (alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0).float()


def error(name: str | None, schedule: Schedule | None = None) -> float:
    r"""How far mean and standard deviation of DDPM's samples are from the data's, while the package makes a mistake."""
    g = torch.Generator().manual_seed(0)
    trained = Schedule.named("cosine")
    x_T = torch.randn(COUNT, 1, 1, 1, generator=g)
    with break_it.broken(name) if name else contextlib.nullcontext():
        caption, nothing = torch.full((COUNT, 1, 1, 1), MEAN), torch.zeros(COUNT, 1, 1, 1)

        def network(x_t, t, mean):
            return exact_v(trained, x_t, t, mean)

        denoise = model_file.guided(network, caption, nothing, 1.0)
        draw = lambda: torch.randn(x_T.shape, generator=g)  # noqa: E731
        *_, last = sampling.sample_loop(
            schedule or trained, denoise, x_T, draw, prediction="v", **break_it.DDPM
        )
    return max(abs(last.x.mean().item() - MEAN), abs(last.x.std().item() - SPREAD))


OF_THE_SAMPLER = [name for name, (_, attribute, *_) in break_it.SAMPLING.items() if attribute != "decode"]


@pytest.mark.parametrize("name", [*OF_THE_SAMPLER, "schedule"])
def test_where_the_result_is_known_every_mistake_shows(name):
    right = error(None)
    wrong = error(None, Schedule.named("linear")) if name == "schedule" else error(name)
    assert right < 0.001 and wrong > 0.01, (right, wrong)


def test_the_page_shows_each_mistake_and_hides_its_answer():
    shown = re.findall(r"images/break-([\w-]+)\.webp", PAGE)
    assert sorted(shown) == sorted([*break_it.SAMPLING, "schedule", "right", "right-ddpm"])
    of_training = len(break_it.TRAINING) - 1  # one of which is right
    assert PAGE.count("<details>") == PAGE.count("</details>") == len(break_it.SAMPLING) + 1 + of_training
