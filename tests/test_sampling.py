r"""The samplers against data whose score is known exactly, and guidance, the times and the loop by hand.

For data N(m, s^2) the best network is known. With a^2 = alpha_bar and sigma^2 = 1 - a^2,
x_t ~ N(a m, a^2 s^2 + sigma^2) and

    E[x_0 | x_t] = m + a s^2 (x_t - a m) / (a^2 s^2 + sigma^2),

and the probability-flow ODE keeps the standardised sample: (x_t - a m) / sqrt(a^2 s^2 + sigma^2) is constant. With it
every sampler is an affine map of its noises. A batch in which element k has noise at step k alone shows the map's
coefficients, and the mean and variance of the result follow without drawing a single number.
"""

import math
from fractions import Fraction

import pytest
import torch
from conftest import far, normal

from ddpm.diffusion import PREDICTIONS, q_posterior, q_sample, x_0_and_eps
from ddpm.losses import training_target
from ddpm.sampling import (
    SAMPLERS,
    Start,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    guided,
    keep_known,
    sample_loop,
    scale_noise,
    timesteps,
)
from ddpm.schedule import Schedule

LINEAR = Schedule.named("linear")
EACH_SCHEDULE = pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
ONE_FAST = pytest.mark.parametrize(
    "name", ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scaled_linear", "cosine"))]
)
ALL_SAMPLERS = [
    ("ddpm", {}),
    ("ddpm", {"variance": "beta"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("dpm++", {}),
    ("dpm++", {"eta": 0.5}),
    ("dpm++", {"eta": 1.0}),
]
EACH_SAMPLER = pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)


def at(*times):
    return torch.tensor(times)


def double(*values):
    r"""Each value as a tensor of one number."""
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def alpha_bar(schedule, t):
    return 1.0 if t < 0 else schedule.alpha_bar[t].item()


def best_network(schedule, m=0.6, s=0.5, prediction="eps"):
    r"""What a network predicts that has learned data N(m, s^2) perfectly."""

    def denoise(x_t, t):
        ab = schedule.alpha_bar_at(t, x_t)
        x_0 = m + ab.sqrt() * s**2 * (x_t - ab.sqrt() * m) / (ab * s**2 + 1 - ab)
        eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()
        return training_target(schedule, x_0, t, eps, prediction)

    return denoise


def moments(schedule, network, first, sampler, steps, **settings):
    r"""(time, mean, variance) of the sample after every step, from an x_T of given mean and standard deviation.

    Element 0 of the batch has no noise, element 1 one standard deviation of x_T, element 2 + k one of step k's."""
    noises = iter(torch.eye(steps + 2, dtype=torch.float64)[2:, :, None])
    x = torch.full((steps + 2, 1), first[0], dtype=torch.float64)
    x[1] += first[1]
    for state in sample_loop(schedule, network, x, lambda: next(noises), sampler, steps, **settings):
        yield state.s, state.x[0].item(), ((state.x[1:] - state.x[0]) ** 2).sum().item()


def marginal(schedule, m, s, t):
    r"""Mean and standard deviation of x_t."""
    ab = alpha_bar(schedule, t)
    return math.sqrt(ab) * m, math.sqrt(ab * s**2 + 1 - ab)


# ------------------------------------------------------------------------------------------- exact score


@pytest.mark.equation("reverse-process", "ddim-step", "dpm-solver-step")
@ONE_FAST
@EACH_SAMPLER
def test_with_the_exact_score_every_sampler_ends_at_the_datas_mean_and_variance(sampler, settings, name):
    r"""From x_T as the data has it the mean is exact; from a standard normal it would be off by a_T m s.
    First-order steps leave an error in the variance that falls as 1 / steps: 3 % of s^2 at five hundred."""
    schedule = Schedule.named(name)
    steps = 200 if sampler == "dpm++" else 500
    start = marginal(schedule, 0.6, 0.5, 999)
    *_, (time, mean, variance) = moments(schedule, best_network(schedule), start, sampler, steps, **settings)
    assert time == -1
    assert abs(mean - 0.6) < 1e-9
    assert abs(variance - 0.25) < 0.01


@pytest.mark.equation("reverse-process", "ddim-step")
@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("sampler, settings", [(s, k) for s, k in ALL_SAMPLERS if k != {"variance": "beta"}])
def test_for_a_single_picture_every_sampler_is_exact_in_any_number_of_steps(sampler, settings, steps):
    r"""Data without spread: the network predicts x_0 exactly, and x_s must have mean a_s m and variance
    1 - alpha_bar_s for every eta. Here the posterior's variance is the right one (DDPM, section 3.2)."""
    network = best_network(LINEAR, 2.0, 0.0)
    start = marginal(LINEAR, 2.0, 0.0, 999)
    for time, mean, variance in moments(LINEAR, network, start, sampler, steps, **settings):
        expected = marginal(LINEAR, 2.0, 0.0, time)
        assert (mean, math.sqrt(variance)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.equation("reverse-process")
@pytest.mark.parametrize("steps", [7, 50])
def test_for_standard_normal_data_the_variance_beta_is_exact_in_any_number_of_steps(steps):
    r"""There x_t is standard normal at every time (DDPM, section 3.2); the last step adds no noise by choice."""
    network = best_network(LINEAR, 0.0, 1.0)
    *before, (_, _, last) = moments(LINEAR, network, (0.0, 1.0), "ddpm", steps, variance="beta")
    assert len(before) == steps - 1
    assert all(abs(mean) < 1e-12 and abs(variance - 1) < 1e-9 for _, mean, variance in before)
    assert last < 1


@pytest.mark.equation("reverse-variance", "reverse-process")
def test_with_the_exact_mean_and_variance_every_step_of_ddpm_has_the_datas_marginal():
    r"""For data N(m, s^2) the reverse step is normal, and its variance lies between the posterior's and beta: with
    both exact the sample has at every time, in any number of steps, the mean and variance of x_s."""
    times = [*timesteps(LINEAR, 7), -1]
    earlier = dict(zip(times, times[1:], strict=False))
    mean_of = best_network(LINEAR)

    def network(x_t, t):
        ab_t = alpha_bar(LINEAR, t[0].item())
        ab_s = alpha_bar(LINEAR, earlier[t[0].item()])
        raw = 0.0
        if ab_s < 1:
            beta = 1 - ab_t / ab_s
            tilde = (1 - ab_s) / (1 - ab_t) * beta
            exact = (ab_s * 0.25 + 1 - ab_s) * beta / (ab_t * 0.25 + 1 - ab_t)  # Bayes' rule
            nu = math.log(exact / tilde) / math.log(beta / tilde)
            assert 0 < nu < 1
            raw = 2 * nu - 1
        return torch.cat([mean_of(x_t, t), torch.full_like(x_t, raw)], dim=1)

    start = marginal(LINEAR, 0.6, 0.5, 999)
    for time, mean, variance in moments(LINEAR, network, start, "ddpm", 7, variance="learned"):
        expected = marginal(LINEAR, 0.6, 0.5, time)
        assert abs(mean - expected[0]) < 1e-9
        if time >= 0:  # the last step adds no noise and gives the mean
            assert abs(variance - expected[1] ** 2) < 1e-6


@pytest.mark.equation("ddim-step", "dpm-solver-step")
@EACH_SCHEDULE
@pytest.mark.parametrize("sampler, order", [("ddim", 0.9), ("dpm++", 1.8)])
def test_the_error_falls_with_the_samplers_order(sampler, order, name):
    r"""Against the exact flow from t = 999 down to 199 in 16, 32, 40, 80 and 160 steps of equal length. All the way
    down it would not hold: the last step, to the clean picture, is first order, and infinitely long in lambda."""
    schedule = Schedule.named(name)
    (mean, spread), (mean_s, spread_s) = (marginal(schedule, 0.6, 0.5, t) for t in (999, 199))
    exact = mean_s + spread_s * (1.3 - mean) / spread
    points = []
    for steps in (20, 40, 50, 100, 200):
        loop = sample_loop(schedule, best_network(schedule), *double(1.3), None, sampler, steps)
        [x] = [state.x.item() for state in loop if state.s == 199]
        points.append((math.log(steps), -math.log(abs(x - exact))))
    log_steps, accuracy = torch.tensor(points).T
    centred = log_steps - log_steps.mean()
    assert (centred * accuracy).sum() / (centred**2).sum() >= order  # the slope


@pytest.mark.equation("predictions")
@EACH_SAMPLER
def test_the_sample_does_not_depend_on_what_a_perfect_network_predicts(sampler, settings):
    results = []
    for prediction in PREDICTIONS:
        drawn = iter(normal(30, 3, 2, seed=2))
        network = best_network(LINEAR, prediction=prediction)
        x_T = normal(3, 2, seed=1)
        *_, last = sample_loop(
            LINEAR, network, x_T, lambda d=drawn: next(d), sampler, 30, prediction, **settings
        )
        results.append(last.x)
    assert far(results[1], results[0]) < 1e-9  # eps is divided by a_T = 6e-3 at the first step
    assert far(results[2], results[0]) < 1e-9


# ------------------------------------------------------------------------------------------- one step

TIMES = [(999, 949), (999, 998), (500, 100), (1, 0), (0, -1), (49, -1)]


@pytest.mark.equation("ddim-step")
@pytest.mark.parametrize("t, s, variance", [(420, 400, 0.14771), (980, 960, 0.32460)])
def test_the_variance_of_ddim_is_that_of_diffusers_own_tests(t, s, variance):
    x = double(0.0, 0.0, 0.0, 1.0)
    sigma = ddim_step(LINEAR, x[0], at(t), at(s), *x[1:], eta=1.0).item()
    assert sigma**2 == pytest.approx(variance, abs=1e-5)


@pytest.mark.equation("reverse-process", "ddim-step")
@pytest.mark.parametrize("t, s", TIMES)
def test_a_ddpm_step_has_the_variance_that_was_asked_for_and_ddim_with_eta_one_is_the_same_step(t, s):
    x_t, x_0, one, zero = double(0.7, -1.3, 1.0, 0.0)
    ab_t, ab_s = alpha_bar(LINEAR, t), alpha_bar(LINEAR, s)
    beta_ts = 1 - ab_t / ab_s
    mean, _ = q_posterior(LINEAR, x_0, x_t, at(t), at(s))
    by_hand = {"beta": beta_ts if s >= 0 else 0.0, "posterior": (1 - ab_s) / (1 - ab_t) * beta_ts}
    for variance, expected in by_hand.items():
        assert far(ddpm_step(LINEAR, x_t, at(t), at(s), x_0, zero, variance), mean) < 1e-14
        shift = ddpm_step(LINEAR, x_t, at(t), at(s), x_0, one, variance) - mean
        assert shift.item() ** 2 == pytest.approx(expected, abs=1e-12)
    eps = (x_t - math.sqrt(ab_t) * x_0) / math.sqrt(1 - ab_t)
    by_ddim = ddim_step(LINEAR, x_t, at(t), at(s), x_0, eps, one, eta=1.0)
    assert far(by_ddim, ddpm_step(LINEAR, x_t, at(t), at(s), x_0, one)) < 1e-10


@pytest.mark.equation("reverse-process", "reverse-variance")
def test_a_learned_variance_lies_between_its_ends_and_the_other_samplers_ignore_it():
    r"""nu of 0 and 1 are the two ends; 1/2 is the geometric mean of the two variances."""
    x, x_0, noise = (normal(3, 2, seed=k) for k in range(3))
    t = at(600, 300, 20)
    s = at(400, 299, 3)
    mean, _ = q_posterior(LINEAR, x_0, x, t, s)
    sigma = {}
    for form in ("posterior", "beta"):
        sigma[form] = (ddpm_step(LINEAR, x, t, s, x_0, noise, form) - mean) / noise
    for nu, expected in (
        (0.0, sigma["posterior"]),
        (1.0, sigma["beta"]),
        (0.5, (sigma["posterior"] * sigma["beta"]).sqrt()),
    ):
        learned = ddpm_step(LINEAR, x, t, s, x_0, noise, "learned", torch.full((3, 2), nu))
        assert far((learned - mean) / noise, expected) < 1e-10

    def run(network, sampler, **settings):
        noises = iter(normal(9, 3, 2, seed=4))
        *_, last = sample_loop(LINEAR, network, normal(3, 2), lambda: next(noises), sampler, 9, **settings)
        return last.x

    plain = best_network(LINEAR)

    def with_variance(x_t, t):
        return torch.cat([plain(x_t, t), torch.full_like(x_t, 0.3)], dim=1)

    for sampler in SAMPLERS:
        assert torch.equal(run(with_variance, sampler), run(plain, sampler))
    assert not torch.equal(run(with_variance, "ddpm", variance="learned"), run(plain, "ddpm"))


@pytest.mark.equation("dpm-solver-step")
@pytest.mark.parametrize("t, s", TIMES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_first_step_of_dpm_solver_is_a_ddim_step(t, s, eta):
    x_t, x_0, noise = (normal(2, 4, 3, 3, seed=seed) for seed in (1, 2, 3))
    ab = alpha_bar(LINEAR, t)
    eps = (x_t - math.sqrt(ab) * x_0) / math.sqrt(1 - ab)
    first = dpmpp_2m_step(LINEAR, x_t, at(t, t), at(s, s), x_0, None, noise, eta)
    assert far(first, ddim_step(LINEAR, x_t, at(t, t), at(s, s), x_0, eps, noise, eta)) < 1e-10


@pytest.mark.equation("dpm-solver-step")
@pytest.mark.parametrize("before, t, s", [(999, 949, 899), (999, 600, 500), (2, 1, 0)])
def test_a_dpm_solver_step_is_algorithm_2_by_hand_and_with_noise_that_of_the_stochastic_equation(
    before, t, s
):
    r"""Lu et al. 2022, algorithm 2, and SDE-DPM-Solver++ 2M for eta = 1."""
    x_t, x_0, x_0_before, noise = 0.7, -1.3, 0.4, 0.9

    def lam(time):
        return math.log(math.sqrt(alpha_bar(LINEAR, time)) / math.sqrt(1 - alpha_bar(LINEAR, time)))

    h = lam(s) - lam(t)
    r = (lam(t) - lam(before)) / h
    D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
    sigma_s, sigma_t = (math.sqrt(1 - alpha_bar(LINEAR, time)) for time in (s, t))
    a_s = math.sqrt(alpha_bar(LINEAR, s))
    kept = math.exp(-h)
    stochastic = sigma_s / sigma_t * kept * x_t + a_s * (1 - kept**2) * D
    by_hand = {
        0.0: sigma_s / sigma_t * x_t - a_s * (kept - 1) * D,
        1.0: stochastic + sigma_s * math.sqrt(1 - kept**2) * noise,
    }
    x = double(x_t, x_0, x_0_before, noise)
    for eta, expected in by_hand.items():
        step = dpmpp_2m_step(LINEAR, x[0], at(t), at(s), x[1], (at(before), x[2]), x[3], eta)
        assert step.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.equation("dpm-solver-step", "predictions")
@pytest.mark.parametrize("prediction, mean", [("eps", 0.3301), ("v", 0.2251)])
def test_ten_steps_of_dpm_solver_end_where_diffusers_own_test_does(prediction, mean):
    r"""Its sample and network without weights, at times that are equally spaced from 999 to 100, then 0."""
    x = (torch.arange(3 * 8 * 8 * 4) / (3 * 8 * 8 * 4)).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    times = [round(999 - k * 99.9) for k in range(10)]
    previous = None
    for now, then in zip(times, [*times[1:], 0], strict=True):
        t = torch.full((4,), now)
        s = torch.full((4,), then)
        x_0, _ = x_0_and_eps(LINEAR, x, t, x * now / (now + 1), prediction)
        x = dpmpp_2m_step(LINEAR, x, t, s, x_0, previous, torch.zeros_like(x))
        previous = (t, x_0)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-4)


@pytest.mark.equation("reverse-process", "ddim-step", "dpm-solver-step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_step_arrives_at_the_networks_picture_and_is_finite(dtype):
    r"""lambda is infinite at the clean picture."""
    x_t, x_0, other, noise = (normal(2, 4, 3, 3, seed=seed, dtype=dtype) for seed in range(4))
    t = at(49, 49)
    s = at(-1, -1)
    for x in (
        dpmpp_2m_step(LINEAR, x_t, t, s, x_0, (at(99, 99), other), noise),
        dpmpp_2m_step(LINEAR, x_t, t, s, x_0, (at(99, 99), other), noise, eta=1.0),
        dpmpp_2m_step(LINEAR, x_t, t, s, x_0, None, noise),
        ddim_step(LINEAR, x_t, t, s, x_0, other, noise, eta=0.7),
        ddpm_step(LINEAR, x_t, t, s, x_0, noise),
        ddpm_step(LINEAR, x_t, t, s, x_0, noise, "beta"),
    ):
        assert torch.equal(x, x_0)


# ------------------------------------------------------------------------------------------- times


@pytest.mark.equation("sampling-times")
@pytest.mark.parametrize("T, counts", [(30, range(1, 31)), (1000, [*range(1, 101), 333, 600, 999, 1000])])
def test_any_number_of_steps_gives_that_many_trailing_times(T, counts):
    r"""round(T - k T / n) - 1 in exact fractions: 999 first, all different, all of the chain where n = T."""
    schedule = Schedule.named("cosine", T)
    for steps in counts:
        times = timesteps(schedule, steps)
        assert all(type(time) is int for time in times)
        assert times == [round(T - k * Fraction(T, steps)) - 1 for k in range(steps)]
        assert times[0] == T - 1 and times[-1] >= 0
        assert len(set(times)) == steps


@pytest.mark.parametrize("steps", [0, -1, 1001, 20.0, "20", None, True])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match="expected 1 to 1000 sampling steps, got") as refusal:
        timesteps(LINEAR, steps)
    assert repr(steps) in str(refusal.value)


# ------------------------------------------------------------------------------------------- a given picture


@pytest.mark.equation("start")
@pytest.mark.parametrize(
    "steps, strength, count", [(20, 0.5, 10), (1000, 0.5, 500), (7, 1 / 7, 1), (50, 1.0, 50)]
)
def test_a_strength_leaves_the_last_of_the_steps(steps, strength, count):
    r"""With a thousand steps and a half, t = 499 is the first: the papers' 500, which t < S T does not pass over."""
    times = timesteps(LINEAR, steps, strength)
    assert times == [round(1000 - k * Fraction(1000, steps)) - 1 for k in range(steps - count, steps)]


@pytest.mark.parametrize("strength", [0.0, 0.04, 1.1, -1.0, math.nan])
def test_a_strength_that_leaves_no_step_or_is_none_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength from 1 / steps, 0.05, to 1, got {strength}"):
        timesteps(LINEAR, 20, strength)


@pytest.mark.equation("start", "inpainting")
@EACH_SAMPLER
def test_sampling_starts_from_the_noised_picture_and_stays_at_the_noise_of_every_time(sampler, settings):
    r"""Data of a single number: whatever the strength, x_s has mean a_s m and variance 1 - alpha_bar_s, drawn or kept.
    Where the first network call is, x_t has them too."""
    if settings == {"variance": "beta"}:
        settings = {}  # the posterior's is the right one here
    seen = []
    exact = best_network(LINEAR, 2.0, 0.0)

    def network(x_t, t):
        seen.append((t[0].item(), x_t))
        return exact(x_t, t)

    x_0 = torch.full((1, 1), 2.0, dtype=torch.float64)
    for mask in (None, torch.tensor([[False]])):
        seen.clear()
        for time, mean, variance in moments(
            LINEAR, network, (0.0, 1.0), sampler, 10, start=Start(x_0, 0.7, mask), **settings
        ):
            assert (mean, math.sqrt(variance)) == pytest.approx(marginal(LINEAR, 2.0, 0.0, time), abs=1e-9)
        assert len(seen) == 7
        time, x_t = seen[0]
        assert time == 699
        first = (x_t[0].item(), (x_t[1] - x_t[0]).item())
        assert first == pytest.approx(marginal(LINEAR, 2.0, 0.0, 699), abs=1e-9)


@pytest.mark.equation("start")
@EACH_SAMPLER
def test_with_strength_one_it_is_plain_sampling_but_for_the_pictures_part_of_the_first_sample(
    sampler, settings
):
    r"""a_T x_0 is added there: a start whose picture is 0 has noise of sigma_T alone."""

    def run(x_T, start=None):
        noises = iter(normal(9, 3, 2, seed=4))
        loop = sample_loop(
            LINEAR, best_network(LINEAR), x_T, lambda: next(noises), sampler, 9, start=start, **settings
        )
        return [state.x for state in loop]

    x_0, eps = normal(3, 2, seed=5), normal(3, 2)
    ab = alpha_bar(LINEAR, 999)
    expected = run(math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * eps)
    found = run(eps, Start(x_0, 1.0))
    assert len(found) == 9
    assert all(far(x, y) < 1e-12 for x, y in zip(found, expected, strict=True))


@pytest.mark.equation("inpainting")
@EACH_SAMPLER
def test_a_mask_keeps_its_part_at_every_time_and_leaves_the_rest_to_the_sampler(sampler, settings):
    x_0, eps = normal(3, 4, seed=5), normal(3, 4)
    mask = torch.tensor([[True, True, False, False]])

    def run(mask):
        noises = iter(normal(9, 3, 4, seed=4))
        start = Start(x_0, 0.8, mask)
        loop = sample_loop(
            LINEAR, best_network(LINEAR), eps, lambda: next(noises), sampler, 9, start=start, **settings
        )
        return list(loop)

    for state, free in zip(run(mask), run(None), strict=True):
        ab = alpha_bar(LINEAR, state.s)
        kept = math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * eps
        assert far(state.x[:, 2:], kept[:, 2:]) < 1e-12
        assert far(state.x[:, :2], free.x[:, :2]) < 1e-12  # this network looks at one number at a time
    assert torch.equal(state.x[:, 2:], x_0[:, 2:])
    assert torch.equal(run(torch.ones_like(mask))[-1].x, free.x)
    s = at(600, 300, -1)
    assert torch.equal(keep_known(LINEAR, eps, s, Start(x_0, 1.0, ~mask), x_0)[:, 2:], eps[:, 2:])
    assert torch.equal(
        keep_known(LINEAR, x_0, s, Start(x_0, 1.0, mask), eps)[:, 2:], q_sample(LINEAR, x_0, s, eps)[:, 2:]
    )


# ------------------------------------------------------------------------------------------- less noise


@pytest.mark.equation("noise-scale", "reverse-process")
@pytest.mark.parametrize("steps", [7, 50])
@EACH_SAMPLER
def test_the_noise_of_every_time_is_scaled_by_the_share_of_the_chain_that_is_over(sampler, settings, steps):
    r"""Data of the single number 2: the mean stays a_s m, and where no step adds noise the deviation is
    gamma^((T - 1 - s) / T) sigma_s, whatever the number of steps. Fresh noise has been scaled less often."""
    path = moments(
        LINEAR,
        best_network(LINEAR, 2.0, 0.0),
        marginal(LINEAR, 2.0, 0.0, 999),
        sampler,
        steps,
        noise_scale=0.7,
        **settings,
    )
    for time, mean, variance in path:
        expected, sigma = marginal(LINEAR, 2.0, 0.0, time)
        assert mean == pytest.approx(expected, abs=1e-9)
        scaled = 0.7 ** ((999 - time) / 1000) * sigma
        if sampler != "ddpm" and not settings.get("eta"):
            assert math.sqrt(variance) == pytest.approx(scaled, abs=1e-9)
        elif time >= 0 and settings != {"variance": "beta"}:
            assert scaled - 1e-9 < math.sqrt(variance) < sigma


def test_a_noise_scale_of_one_and_the_clean_picture_change_nothing():
    x_s, x_0 = normal(2, 3), normal(2, 3, seed=1)
    assert far(scale_noise(LINEAR, x_s, at(600, 600), at(500, -1), x_0, 1.0), x_s) < 1e-12
    assert torch.equal(scale_noise(LINEAR, x_0, at(600, 600), at(-1, -1), x_0, 0.5), x_0)


# ------------------------------------------------------------------------------------------- guidance


class Recorder:
    r"""A network that keeps its inputs; its output differs for every context and depends on z_t and t."""

    def __init__(self):
        self.inputs = []

    def __call__(self, z_t, t, context):
        self.inputs.append((z_t, t, context))
        return context.mean(dim=(1, 2))[:, None] * (1 + z_t**2) + t[:, None] / 1000


Z = normal(2, 3, seed=1)
T = at(100, 900)
PROMPTS = normal(2, 5, 4, seed=2)
EMPTY = normal(2, 5, 4, seed=3)


@pytest.mark.equation("guidance")
@pytest.mark.parametrize("scale", [3.0, 0.5, -1.0, 2])
def test_guidance_leads_from_the_unconditional_past_the_conditional_in_one_call(scale):
    network = Recorder()
    output = guided(network, PROMPTS, EMPTY, scale)(Z, T)
    [(z, t, context)] = network.inputs
    assert torch.equal(z, torch.cat([Z, Z]))
    assert torch.equal(t, torch.cat([T, T]))
    assert torch.equal(context, torch.cat([EMPTY, PROMPTS]))  # [uncond, cond], as diffusers has it
    uncond = Recorder()(Z, T, EMPTY)
    cond = Recorder()(Z, T, PROMPTS)
    w = scale - 1
    assert far(output, (1 + w) * cond - w * uncond) < 1e-12  # equation 6


@pytest.mark.equation("guidance")
@pytest.mark.parametrize(
    "scale, prompts, context",
    [
        (1, PROMPTS, PROMPTS),
        (1.0, PROMPTS, PROMPTS),
        (0, PROMPTS, EMPTY),
        (0.0, PROMPTS, EMPTY),
        (3.0, EMPTY, EMPTY),
    ],
)
def test_guidance_one_is_conditional_and_zero_unconditional_with_half_the_work(scale, prompts, context):
    r"""So is any guidance of the empty prompt, which is led away from itself."""
    network = Recorder()
    output = guided(network, prompts, EMPTY, scale)(Z, T)
    [(z, _, seen)] = network.inputs
    assert z is Z and seen is context
    assert torch.equal(output, Recorder()(Z, T, context))


@pytest.mark.equation("guidance")
def test_guidance_leaves_the_learned_variance_to_the_conditional_model():
    def network(z_t, t, context):
        of_context = context.mean(dim=(1, 2))[:, None]
        return torch.cat([z_t * of_context, of_context + z_t], dim=1)

    both, cond, uncond = (guided(network, PROMPTS, EMPTY, scale)(Z, T) for scale in (3.0, 1.0, 0.0))
    assert far(both[:, :3], uncond[:, :3] + 3 * (cond[:, :3] - uncond[:, :3])) < 1e-12
    assert torch.equal(both[:, 3:], cond[:, 3:])


@pytest.mark.equation("guidance")
def test_guidance_is_computed_in_the_samples_precision_not_in_the_networks():
    r"""A difference of two bf16 numbers, times 7, would be rounded once more, by up to 0.4 %."""
    cond = normal(2, 3, seed=6).bfloat16()
    uncond = normal(2, 3, seed=7).bfloat16()
    output = guided(lambda z_t, t, context: torch.cat([uncond, cond]), PROMPTS, EMPTY, 7.0)(Z.float(), T)
    exact = uncond.double() + 7.0 * (cond.double() - uncond.double())
    assert far(output, exact) < 1e-5  # float32 numbers about 10


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_guidance_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="finite guidance scale, got"):
        guided(Recorder(), PROMPTS, EMPTY, scale)


# ------------------------------------------------------------------------------------------- loop


@pytest.mark.equation("sampling-times", "reverse-process")
@EACH_SAMPLER
def test_the_loop_calls_the_network_once_a_step_and_draws_noise_where_the_sampler_adds_it(sampler, settings):
    calls = []
    draws = []
    x = normal(2, 3)

    def denoise(x_t, t):
        calls.append(t.tolist())
        return torch.zeros_like(x_t)

    def draw():
        draws.append(1)
        return torch.zeros_like(x)

    states = list(sample_loop(LINEAR, denoise, x, draw, sampler, 6, **settings))
    times = [999, 832, 666, 499, 332, 166]
    assert calls == [[time, time] for time in times]
    assert [(state.i, state.t, state.s) for state in states] == [
        *zip(range(6), times, [*times[1:], -1], strict=True)
    ]
    assert all(state.x.shape == state.x_0.shape == x.shape for state in states)
    assert len(draws) == (6 if sampler == "ddpm" or settings.get("eta") else 0)


@EACH_SAMPLER
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_latents_are_never_clipped_and_keep_the_type_of_the_noise(sampler, settings, prediction):
    r"""A network that predicts x_0 = 1000 gets 1000, not 1, in single precision, whatever it computes in. 0.1:
    float32, divided by a_T = 6e-3."""
    x_0 = torch.full((2, 4, 2, 2), 1000.0)

    def denoise(x_t, t):
        ab = LINEAR.alpha_bar_at(t, x_t)
        eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()
        return training_target(LINEAR, x_0, t, eps, prediction).double()

    noise = normal(2, 4, 2, 2, dtype=torch.float32)
    for state in sample_loop(LINEAR, denoise, noise, lambda: noise, sampler, 10, prediction, **settings):
        assert far(state.x_0, x_0) < 0.1
        assert state.x.dtype == state.x_0.dtype == torch.float32
    assert torch.equal(state.x, state.x_0)


@EACH_SCHEDULE
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_device_without_float64_gives_the_same_sample(sampler, name):
    r"""MPS has none: the tables are float32 there. 1e-4: 20 steps of float32 numbers about 1, 6e-8 each."""

    def run(schedule):
        drawn = iter(normal(20, 8, seed=2).float())
        network = best_network(schedule)
        *_, last = sample_loop(schedule, network, normal(8, seed=1).float(), lambda: next(drawn), sampler, 20)
        return last.x

    single = Schedule.named(name)
    vars(single).update({name: table.float() for name, table in vars(single).items()})
    assert far(run(single), run(Schedule.named(name))) < 1e-4


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"sampler": "euler"}, r"ddpm, ddim, dpm\+\+, got 'euler'"),
        ({"eta": 1.5}, r"eta in \[0, 1\], got 1.5"),
        ({"eta": math.nan}, r"eta in \[0, 1\], got nan"),
        ({"noise_scale": 0.0}, "noise_scale above 0 and at most 1, got 0.0"),
        ({"noise_scale": 1.01}, "noise_scale above 0 and at most 1, got 1.01"),
        ({"noise_scale": math.nan}, "noise_scale above 0 and at most 1, got nan"),
        ({"steps": 0}, "1 to 1000 sampling steps, got 0"),
        ({"prediction": "noise"}, "eps, v, x_0, got 'noise'"),
        ({"sampler": "ddpm", "variance": "fixed_small"}, "posterior, beta, learned, got 'fixed_small'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=told):
        next(sample_loop(LINEAR, lambda x, t: x, x, lambda: x, **settings))
