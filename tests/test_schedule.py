r"""The three schedules: their ends, their products, the lookups, and what is refused."""

import math
from unittest.mock import Mock

import pytest
import torch

from ddpm.schedule import SCHEDULES, Schedule

NAMES = sorted(SCHEDULES)


@pytest.mark.equation("alpha-bar")
@pytest.mark.parametrize("name", NAMES)
def test_alpha_bar_is_the_falling_product_of_all_alphas_up_to_t_in_double_precision(name):
    schedule = Schedule.named(name)
    product = 1.0
    for t in range(schedule.timesteps):
        assert schedule.alpha[t].item() == 1.0 - schedule.beta[t].item()
        product *= schedule.alpha[t].item()
        # 1e-12: a thousand roundings of 1e-16 each
        assert schedule.alpha_bar[t].item() == pytest.approx(product, rel=1e-12)
    for table in (schedule.beta, schedule.alpha, schedule.alpha_bar):
        assert table.shape == (1000,)
        assert table.dtype == torch.float64
        assert bool(((table > 0) & (table < 1)).all())
    assert bool((schedule.alpha_bar.diff() < 0).all())
    assert bool((schedule.beta.diff() >= 0).all())


@pytest.mark.equation("cosine-schedule")
def test_cosine_alpha_bar_follows_the_squared_cosine_until_beta_is_cut():
    schedule = Schedule.named("cosine")

    def f(time):
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    cut = (schedule.beta == 0.999).nonzero().flatten().tolist()
    assert cut == [999]  # only the very last step would have beta 1
    for t in range(999):
        # alpha_bar[t] belongs to the papers' time t + 1; 1e-12: a thousand roundings of 1e-16 each
        assert schedule.alpha_bar[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), abs=1e-12)


@pytest.mark.equation("linear-schedule", "scaled-linear-schedule", "cosine-schedule")
@pytest.mark.parametrize(
    "name, terminal, tolerance",
    [("linear", 4.04e-5, 1e-7), ("scaled_linear", 4.66e-3, 1e-5), ("cosine", 2.43e-9, 1e-11)],
)
def test_the_signal_left_at_the_end_is_what_the_papers_say(name, terminal, tolerance):
    r"""Tolerances: the last of the printed digits. Cosine: sin^2(pi / 2000 / 1.008) / cos^2(0.008 ...) times 0.001."""
    assert Schedule.named(name).alpha_bar[-1].item() == pytest.approx(terminal, abs=tolerance)


@pytest.mark.equation("linear-schedule", "scaled-linear-schedule", "cosine-schedule")
@pytest.mark.parametrize("timesteps", [100, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_a_chain_of_another_length_adds_about_the_same_noise(name, timesteps):
    r"""Compared half way, in lambda = log(signal / noise) / 2, which runs over about 10; 0.2 is 2 % of it."""

    def half_way(schedule):
        return 0.5 * torch.logit(schedule.alpha_bar[schedule.timesteps // 2 - 1]).item()

    schedule = Schedule.named(name, timesteps)
    assert schedule.timesteps == timesteps
    assert half_way(schedule) == pytest.approx(half_way(Schedule.named(name)), abs=0.2)


@pytest.mark.equation("alpha-bar")
def test_lookups_have_the_shape_of_the_batch_and_minus_one_is_clean():
    schedule = Schedule.named("linear")
    alpha_bar = schedule.alpha_bar_at(torch.tensor([-1, 0, 999]), torch.zeros(3, 4, 8, 8))
    assert alpha_bar.shape == (3, 1, 1, 1)
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.flatten().tolist() == [1.0, schedule.alpha_bar[0].item(), schedule.alpha_bar[999].item()]
    beta = schedule.beta_at(torch.tensor([0, 999]), torch.zeros(2, 5))
    assert beta.shape == (2, 1)
    assert beta.flatten().tolist() == [schedule.beta[0].item(), schedule.beta[999].item()]
    with pytest.raises(IndexError):
        schedule.alpha_bar_at(torch.tensor([1000]), torch.zeros(1, 4))  # the times end at T - 1


def test_the_tables_move_to_a_device_in_double_precision_and_to_mps_in_single():
    schedule = Schedule.named("linear")
    moved = schedule.to("meta")
    for name, table in vars(moved).items():
        assert table.is_meta and table.dtype == torch.float64
        assert not vars(schedule)[name].is_meta
    table = Mock()
    vars(schedule).update(dict.fromkeys(vars(schedule), table))
    schedule.to("mps")
    assert {call.args for call in table.to.call_args_list} == {("mps", torch.float32)}


@pytest.mark.parametrize(
    "beta, told",
    [
        ([0.1, 1.0], r"every beta in \(0, 1\), got shape \(2,\) and values \[0.1, 1.0\]"),
        ([0.0, 0.1], r"every beta in \(0, 1\)"),
        ([0.1, float("nan")], r"every beta in \(0, 1\)"),
        ([0.1], r"T >= 2 .*got shape \(1,\)"),
        ([[0.1, 0.2]], r"got shape \(1, 2\)"),
    ],
)
def test_a_beta_that_cannot_be_is_refused(beta, told):
    with pytest.raises(ValueError, match=told):
        Schedule(torch.tensor(beta, dtype=torch.float64))


def test_an_unknown_schedule_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="linear, scaled_linear, cosine, got 'quadratic'"):
        Schedule.named("quadratic")


@pytest.mark.parametrize("timesteps", [1, 10])
def test_a_chain_too_short_for_its_noise_is_refused(timesteps):
    with pytest.raises(ValueError, match="check the schedule's ends and T"):
        Schedule.named("linear", timesteps)  # 0.02 * 1000 / 10 would be beta = 2
