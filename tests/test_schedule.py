r"""The three schedules: their ends, their products, and what is refused."""

import math

import pytest
import torch

from ddpm.schedule import SCHEDULES, Schedule

NAMES = sorted(SCHEDULES)


@pytest.mark.equation("alpha-bar")
@pytest.mark.parametrize("name", NAMES)
def test_beta_alpha_and_alpha_bar_are_double_precision_numbers_between_0_and_1(name):
    schedule = Schedule.named(name)
    for table in (schedule.beta, schedule.alpha, schedule.alpha_bar):
        assert table.shape == (1000,)
        assert table.dtype == torch.float64
        assert bool(((table > 0) & (table < 1)).all())


@pytest.mark.equation("alpha-bar")
@pytest.mark.parametrize("name", NAMES)
def test_alpha_bar_falls_and_beta_does_not(name):
    schedule = Schedule.named(name)
    assert bool((schedule.alpha_bar.diff() < 0).all())
    assert bool((schedule.beta.diff() >= 0).all())


@pytest.mark.equation("alpha-bar")
@pytest.mark.parametrize("name", NAMES)
def test_alpha_bar_is_the_product_of_all_alphas_up_to_t(name):
    schedule = Schedule.named(name)
    product = 1.0
    for t in range(schedule.timesteps):
        product *= 1.0 - schedule.beta[t].item()
        # 1e-12: a thousand roundings of 1e-16 each
        assert schedule.alpha_bar[t].item() == pytest.approx(product, rel=1e-12)


@pytest.mark.equation("linear-schedule")
def test_linear_beta_has_the_ends_of_ddpm():
    beta = Schedule.named("linear").beta
    assert beta[0].item() == pytest.approx(1e-4, abs=1e-15)
    assert beta[-1].item() == pytest.approx(0.02, abs=1e-15)
    assert beta[499].item() == pytest.approx(1e-4 + (0.02 - 1e-4) * 499 / 999, abs=1e-15)


@pytest.mark.equation("scaled-linear-schedule")
def test_scaled_linear_beta_has_the_ends_of_latent_diffusion_and_straight_roots():
    beta = Schedule.named("scaled_linear").beta
    assert beta[0].item() == pytest.approx(0.00085, abs=1e-15)
    assert beta[-1].item() == pytest.approx(0.012, abs=1e-15)
    root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * 499 / 999
    assert beta[499].item() == pytest.approx(root**2, abs=1e-15)


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
@pytest.mark.parametrize("timesteps", [100, 250, 4000])
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
    like = torch.zeros(3, 4, 8, 8)
    alpha_bar = schedule.alpha_bar_at(torch.tensor([-1, 0, 999]), like)
    assert alpha_bar.shape == (3, 1, 1, 1)
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.flatten().tolist() == [1.0, schedule.alpha_bar[0].item(), schedule.alpha_bar[999].item()]
    beta = schedule.beta_at(torch.tensor([0, 999]), torch.zeros(2, 5))
    assert beta.shape == (2, 1)
    assert beta.flatten().tolist() == [schedule.beta[0].item(), schedule.beta[999].item()]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_of_t_is_understood(dtype):
    schedule = Schedule.named("linear")
    t = torch.tensor([0, 100], dtype=dtype)
    assert schedule.alpha_bar_at(t, torch.zeros(2)).tolist() == schedule.alpha_bar[[0, 100]].tolist()


@pytest.mark.parametrize(
    "t, told",
    [
        (torch.tensor([0.0, 1.0]), "integers in -1..999, got torch.float32"),
        (torch.tensor([True, False]), "got torch.bool"),
        (5, "got int"),
        ([0, 1], "got list"),
        (torch.tensor([0, 1000]), r"t in -1..999, got 0..1000"),
        (torch.tensor([-2, 5]), r"t in -1..999, got -2..5"),
        (torch.tensor([0, 1, 2]), r"shape \(2,\), one time a batch element, got \(3,\)"),
        (torch.tensor(0), r"shape \(2,\), one time a batch element, got \(\)"),
        (torch.tensor([[0], [1]]), r"shape \(2,\), one time a batch element, got \(2, 1\)"),
    ],
)
def test_a_time_that_cannot_be_is_refused_with_what_was_expected_and_what_came(t, told):
    with pytest.raises(ValueError, match=told):
        Schedule.named("linear").alpha_bar_at(t, torch.zeros(2, 4))


def test_beta_has_no_clean_time():
    with pytest.raises(ValueError, match=r"t in 0..999, got -1..-1"):
        Schedule.named("linear").beta_at(torch.tensor([-1]), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "beta, told",
    [
        ([0.1, 1.0], r"every beta in \(0, 1\), got values from 0.1 to 1"),
        ([0.0, 0.1], r"every beta in \(0, 1\), got values from 0 to 0.1"),
        ([0.1, float("nan")], r"every beta in \(0, 1\)"),
        ([0.1], r"T >= 2, got shape \(1,\)"),
        ([[0.1, 0.2]], r"got shape \(1, 2\)"),
    ],
)
def test_a_beta_that_cannot_be_is_refused(beta, told):
    with pytest.raises(ValueError, match=told):
        Schedule(torch.tensor(beta))


def test_an_unknown_schedule_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="linear, scaled_linear, cosine, got 'quadratic'"):
        Schedule.named("quadratic")


@pytest.mark.parametrize("timesteps", [1, 0, -5])
def test_a_chain_needs_two_steps(timesteps):
    with pytest.raises(ValueError, match=f"at least 2 timesteps, got {timesteps}"):
        Schedule.named("linear", timesteps)


def test_a_chain_too_short_for_its_noise_says_so():
    with pytest.raises(ValueError, match="check the schedule's ends and its number of timesteps"):
        Schedule.named("linear", 10)  # 0.02 * 1000 / 10 would be beta = 2
