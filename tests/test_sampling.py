r"""The samplers against data whose score is known exactly, and guidance, time grids and the loop by hand.

For data N(m, s^2) the best network is known. With a^2 = alpha_bar and sigma^2 = 1 - a^2,
x_t ~ N(a m, a^2 s^2 + sigma^2) and

    E[x_0 | x_t] = m + a s^2 (x_t - a m) / (a^2 s^2 + sigma^2),

and the probability-flow ODE keeps the standardised sample: (x_t - a m) / sqrt(a^2 s^2 + sigma^2) is constant. With it
every sampler is an affine map of its noises. A batch in which element k has noise at step k alone shows the map's
coefficients, and the mean and variance of the result follow without drawing a single number.
"""

import math

import pytest
import torch

from ddpm import schedule as schedule_file
from ddpm.diffusion import PREDICTIONS, q_posterior, score_from, x_0_and_eps
from ddpm.losses import training_target
from ddpm.sampling import (
    SAMPLERS,
    SPACINGS,
    State,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    guided,
    sample_loop,
    timesteps,
)
from ddpm.schedule import SCHEDULES, Schedule

NAMES = sorted(SCHEDULES)
LINEAR = Schedule.named("linear")
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


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at(*times):
    return torch.tensor(times)


def alpha_bar(schedule, t):
    return 1.0 if t < 0 else schedule.alpha_bar[t].item()


def best_network(schedule, m, s, prediction="eps"):
    r"""What a network says that has learned data N(m, s^2) perfectly."""

    def denoise(x_t, t):
        ab = schedule.alpha_bar_at(t, x_t)
        x_0 = m + ab.sqrt() * s**2 * (x_t - ab.sqrt() * m) / (ab * s**2 + 1 - ab)
        eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()
        return training_target(schedule, x_0, t, eps, prediction)

    return denoise


def flow(schedule, m, s, x, t, to):
    r"""The exact solution of the probability-flow ODE from x at time t to time `to`."""
    ab_t, ab_s = alpha_bar(schedule, t), alpha_bar(schedule, to)
    spread = math.sqrt((ab_s * s**2 + 1 - ab_s) / (ab_t * s**2 + 1 - ab_t))
    return math.sqrt(ab_s) * m + spread * (x - math.sqrt(ab_t) * m)


def moments(schedule, m, s, sampler, steps, x_T=(0.0, 1.0), **settings):
    r"""(time, mean, variance) of the sample after every step; x_T gives the start's mean and standard deviation.

    Element 0 of the batch has no noise, element 1 one standard deviation of x_T, element 2 + k one of step k's."""
    steps_done = 0

    def draw():
        nonlocal steps_done
        steps_done += 1
        return torch.eye(steps + 2, dtype=torch.float64)[1 + steps_done]

    x = torch.full((steps + 2,), x_T[0], dtype=torch.float64)
    x[1] += x_T[1]
    for state in sample_loop(schedule, best_network(schedule, m, s), x, draw, sampler, steps, **settings):
        yield state.s, state.x[0].item(), ((state.x[1:] - state.x[0]) ** 2).sum().item()


# ------------------------------------------------------------------------------------------- exact score


@pytest.mark.equation("reverse-process", "ddim-step", "dpm-solver-step")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)
def test_with_the_exact_score_every_sampler_ends_at_the_datas_mean_and_variance(sampler, settings, name):
    r"""From x_T as the data has it the mean is exact; from a standard normal it would be off by a_T m s.
    First-order steps leave an error in the variance that falls as 1 / steps: 3 % of s^2 at five hundred."""
    schedule, m, s = Schedule.named(name), 0.6, 0.5
    ab = alpha_bar(schedule, 999)
    start = math.sqrt(ab) * m, math.sqrt(ab * s**2 + 1 - ab)
    *_, (time, mean, variance) = moments(
        schedule, m, s, sampler, 200 if sampler == "dpm++" else 500, start, **settings
    )
    assert time == -1
    assert abs(mean - m) < 1e-9
    assert abs(variance - s**2) < 0.01


@pytest.mark.equation("reverse-process", "ddim-step")
@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("sampler, settings", [(s, k) for s, k in ALL_SAMPLERS if k != {"variance": "beta"}])
def test_for_a_single_picture_every_sampler_is_exact_in_any_number_of_steps(sampler, settings, steps):
    r"""Data without spread: the network knows x_0, and x_s must have mean a_s m and variance 1 - alpha_bar_s for every
    eta. This is where the posterior's variance is the right one (DDPM, section 3.2)."""
    ab = alpha_bar(LINEAR, 999)
    start = math.sqrt(ab) * 2.0, math.sqrt(1 - ab)
    for time, mean, variance in moments(LINEAR, 2.0, 0.0, sampler, steps, start, **settings):
        assert mean == pytest.approx(math.sqrt(alpha_bar(LINEAR, time)) * 2.0, abs=1e-9)
        assert variance == pytest.approx(1 - alpha_bar(LINEAR, time), abs=1e-9)


@pytest.mark.equation("reverse-process")
@pytest.mark.parametrize("steps", [7, 50])
def test_for_standard_normal_data_the_variance_beta_is_exact_in_any_number_of_steps(steps):
    r"""There x_t is standard normal at every time (DDPM, section 3.2); the last step adds no noise by choice."""
    *before, (time, mean, last) = moments(LINEAR, 0.0, 1.0, "ddpm", steps, variance="beta")
    assert len(before) == steps - 1
    assert all(abs(mean) < 1e-12 and abs(variance - 1) < 1e-9 for _, mean, variance in before)
    assert time == -1 and last < 1


@pytest.mark.equation("reverse-process")
def test_the_two_variances_of_ddpm_bracket_the_datas():
    r"""The true reverse variance lies between the posterior's and beta (DDPM, section 3.2): so does what comes out."""
    (*_, (_, _, low)), (*_, (_, _, high)) = (
        moments(LINEAR, 0.6, 0.5, "ddpm", 50, variance=v) for v in ("posterior", "beta")
    )
    assert low < 0.25 - 0.01
    assert high > 0.25 + 0.005


@pytest.mark.equation("ddim-step", "dpm-solver-step")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler, order", [("ddim", 0.9), ("dpm++", 1.8)])
def test_the_error_falls_with_the_samplers_order(sampler, order, name):
    r"""Against the exact flow from t = 999 down to 199 in 16, 32, 40, 80 and 160 steps of equal length: the slope of
    log error over log steps. All the way down it would not hold: the last step, to the clean picture, is first order
    by construction, and its length in lambda is infinite."""
    schedule, m, s = Schedule.named(name), 0.6, 0.5
    x_T = torch.tensor([1.3], dtype=torch.float64)
    exact = flow(schedule, m, s, 1.3, 999, 199)
    points = []
    for steps in (20, 40, 50, 100, 200):
        loop = sample_loop(schedule, best_network(schedule, m, s), x_T, None, sampler, steps)
        [x] = [state.x.item() for state in loop if state.s == 199]
        points.append((math.log(steps), math.log(abs(x - exact))))
    log_steps, log_error = torch.tensor(points).T
    centred = log_steps - log_steps.mean()
    assert -(centred * log_error).sum() / (centred**2).sum() >= order


@pytest.mark.equation("dpm-solver-step")
def test_the_second_order_sampler_is_closer_than_the_first_at_the_usual_20_steps():
    x_T = torch.tensor([1.3], dtype=torch.float64)
    exact = flow(LINEAR, 0.6, 0.5, 1.3, 999, -1)
    errors = {}
    for sampler in ("ddim", "dpm++"):
        *_, last = sample_loop(LINEAR, best_network(LINEAR, 0.6, 0.5), x_T, None, sampler, 20)
        errors[sampler] = abs(last.x.item() - exact)
    assert errors["dpm++"] < errors["ddim"] / 2


@pytest.mark.equation("dpm-solver-step")
@pytest.mark.parametrize("name", NAMES)
def test_with_noise_too_the_second_order_sampler_keeps_the_datas_spread_in_20_steps(name):
    off = {}
    for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0), ("dpm++", 1.0)):
        *_, (_, _, variance) = moments(Schedule.named(name), 0.6, 0.5, sampler, 20, eta=eta)
        off[sampler] = abs(math.sqrt(variance) - 0.5)
    assert off["dpm++"] < off["ddpm"] / 2 and off["ddim"] == pytest.approx(off["ddpm"])


@pytest.mark.equation("predictions")
@pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)
def test_the_sample_does_not_depend_on_what_a_perfect_network_predicts(sampler, settings):
    x_T, noise, results = normal(3, 2, seed=1), normal(30, 3, 2, seed=2), []
    for prediction in PREDICTIONS:
        drawn = iter(noise)
        network = best_network(LINEAR, 0.6, 0.5, prediction)
        *_, last = sample_loop(
            LINEAR, network, x_T, lambda d=drawn: next(d), sampler, 30, prediction, **settings
        )
        results.append(last.x)
    for other in results[1:]:
        assert (
            results[0] - other
        ).abs().max().item() < 1e-9  # eps is divided by a_T = 6e-3 at the first step


# ------------------------------------------------------------------------------------------- one step

TIMES = [(999, 949), (999, 998), (500, 100), (1, 0), (0, -1), (49, -1)]


@pytest.mark.equation("reverse-process", "ddim-step")
@pytest.mark.parametrize("t, s", TIMES)
def test_ddim_with_eta_one_has_the_ddpm_posterior_variance(t, s):
    r"""And the same mean: given the same noise the two steps are the same step."""
    x_t, x_0, noise = (normal(2, 4, 3, 3, seed=seed) for seed in range(3))
    ab = alpha_bar(LINEAR, t)
    eps = (x_t - math.sqrt(ab) * x_0) / math.sqrt(1 - ab)
    t, s = at(t, t), at(s, s)
    by_ddim = ddim_step(LINEAR, x_t, t, s, x_0, eps, noise, eta=1.0)
    by_ddpm = ddpm_step(LINEAR, x_t, t, s, x_0, noise)
    assert (by_ddim - by_ddpm).abs().max().item() < 1e-10
    shift = by_ddim - ddim_step(LINEAR, x_t, t, s, x_0, eps, torch.zeros_like(noise), eta=1.0)
    _, variance = q_posterior(LINEAR, x_0, x_t, t, s)
    assert (shift - variance.sqrt() * noise).abs().max().item() < 1e-10


@pytest.mark.equation("ddim-step")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t, s", TIMES)
def test_a_ddim_step_is_its_equation_by_hand(t, s, eta):
    x_t, x_0, noise = 0.7, -1.3, 0.9
    ab_t, ab_s = alpha_bar(LINEAR, t), alpha_bar(LINEAR, s)
    eps = (x_t - math.sqrt(ab_t) * x_0) / math.sqrt(1 - ab_t)
    sigma = eta * math.sqrt((1 - ab_s) / (1 - ab_t)) * math.sqrt(1 - ab_t / ab_s)
    by_hand = math.sqrt(ab_s) * x_0 + math.sqrt(1 - ab_s - sigma**2) * eps + sigma * noise
    x = [torch.tensor([value], dtype=torch.float64) for value in (x_t, x_0, eps, noise)]
    assert ddim_step(LINEAR, x[0], at(t), at(s), *x[1:], eta=eta).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.equation("reverse-process")
@pytest.mark.parametrize("t, s", TIMES)
def test_a_ddpm_step_has_the_variance_that_was_asked_for(t, s):
    x_t, x_0 = torch.tensor([0.7]).double(), torch.tensor([-1.3]).double()
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    ab_t, ab_s = alpha_bar(LINEAR, t), alpha_bar(LINEAR, s)
    beta_ts = 1 - ab_t / ab_s
    by_hand = {"beta": beta_ts if s >= 0 else 0.0, "posterior": (1 - ab_s) / (1 - ab_t) * beta_ts}
    mean, _ = q_posterior(LINEAR, x_0, x_t, at(t), at(s))
    for variance, expected in by_hand.items():
        assert ddpm_step(LINEAR, x_t, at(t), at(s), x_0, zero, variance).item() == pytest.approx(
            mean.item(), abs=1e-14
        )
        shift = ddpm_step(LINEAR, x_t, at(t), at(s), x_0, one, variance) - mean
        assert shift.item() ** 2 == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("dpm-solver-step")
@pytest.mark.parametrize("t, s", TIMES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_first_step_of_dpm_solver_is_a_ddim_step(t, s, eta):
    x_t, x_0, noise = (normal(2, 4, 3, 3, seed=seed) for seed in (1, 2, 3))
    ab = alpha_bar(LINEAR, t)
    eps = (x_t - math.sqrt(ab) * x_0) / math.sqrt(1 - ab)
    first = dpmpp_2m_step(LINEAR, x_t, at(t, t), at(s, s), x_0, None, noise, eta)
    by_ddim = ddim_step(LINEAR, x_t, at(t, t), at(s, s), x_0, eps, noise, eta)
    assert (first - by_ddim).abs().max().item() < 1e-10


@pytest.mark.equation("dpm-solver-step")
@pytest.mark.parametrize("before, t, s", [(999, 949, 899), (999, 600, 500), (2, 1, 0)])
def test_a_dpm_solver_step_is_algorithm_2_by_hand_and_with_noise_that_of_the_stochastic_equation(
    before, t, s
):
    r"""Lu et al. 2022, algorithm 2, and SDE-DPM-Solver++ 2M for eta = 1."""
    x_t, x_0, x_0_before, noise = 0.7, -1.3, 0.4, 0.9

    def lam(time):
        return math.log(math.sqrt(alpha_bar(LINEAR, time)) / math.sqrt(1 - alpha_bar(LINEAR, time)))

    h, h_before = lam(s) - lam(t), lam(t) - lam(before)
    r = h_before / h
    D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
    sigma_s, sigma_t = (math.sqrt(1 - alpha_bar(LINEAR, time)) for time in (s, t))
    a_s, kept = math.sqrt(alpha_bar(LINEAR, s)), math.exp(-h)
    by_hand = {
        0.0: sigma_s / sigma_t * x_t - a_s * (kept - 1) * D,
        1.0: sigma_s / sigma_t * kept * x_t
        + a_s * (1 - kept**2) * D
        + sigma_s * math.sqrt(1 - kept**2) * noise,
    }
    x = [torch.tensor([value], dtype=torch.float64) for value in (x_t, x_0, x_0_before, noise)]
    for eta, expected in by_hand.items():
        step = dpmpp_2m_step(LINEAR, x[0], at(t), at(s), x[1], (at(before), x[2]), x[3], eta)
        assert step.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.equation("dpm-solver-step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_step_arrives_at_the_networks_picture_and_is_finite(dtype):
    r"""lambda is infinite at the clean picture."""
    x_t, x_0, other, noise = (normal(2, 4, 3, 3, seed=seed, dtype=dtype) for seed in range(4))
    t, s = at(49, 49), at(-1, -1)
    for x in (
        dpmpp_2m_step(LINEAR, x_t, t, s, x_0, (at(99, 99), other), noise),
        dpmpp_2m_step(LINEAR, x_t, t, s, x_0, (at(99, 99), other), noise, eta=1.0),
        dpmpp_2m_step(LINEAR, x_t, t, s, x_0, None, noise),
        ddim_step(LINEAR, x_t, t, s, x_0, other, noise, eta=0.7),
        ddpm_step(LINEAR, x_t, t, s, x_0, noise),
        ddpm_step(LINEAR, x_t, t, s, x_0, noise, "beta"),
    ):
        assert torch.equal(x, x_0)


def test_a_variance_that_cannot_be_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="posterior, beta, learned, got 'fixed_small'"):
        ddpm_step(LINEAR, x, at(5), at(4), x, x, "fixed_small")
    with pytest.raises(ValueError, match="twice the channels"):
        ddpm_step(LINEAR, x, at(5), at(4), x, x, "learned")


def test_a_network_with_twice_the_channels_takes_its_variance_along_and_the_other_samplers_ignore_it():
    r"""Raw numbers of -1 and 1 are the two ends; 0 is the geometric mean of the two variances."""
    x, t, s, x_0, noise = (
        normal(3, 2),
        at(600, 300, 20),
        at(400, 299, 3),
        normal(3, 2, seed=1),
        normal(3, 2, seed=2),
    )
    for nu, form in ((0.0, "posterior"), (1.0, "beta")):
        learned = ddpm_step(LINEAR, x, t, s, x_0, noise, "learned", torch.full((3, 2), nu))
        assert (learned - ddpm_step(LINEAR, x, t, s, x_0, noise, form)).abs().max() < 1e-12
    middle = ddpm_step(LINEAR, x, t, s, x_0, noise, "learned", torch.full((3, 2), 0.5))
    mean, _ = q_posterior(LINEAR, x_0, x, t, s)
    ends = [((ddpm_step(LINEAR, x, t, s, x_0, noise, form) - mean) / noise) for form in ("posterior", "beta")]
    assert ((middle - mean) / noise / (ends[0] * ends[1]).sqrt() - 1).abs().max() < 1e-10

    plain = best_network(LINEAR, 0.6, 0.5)

    def with_variance(x_t, t):
        return torch.cat([plain(x_t, t), torch.full_like(x_t, 0.3)], dim=1)

    def run(network, sampler, **settings):
        noises = iter(normal(9, 3, 2, seed=4))
        *_, last = sample_loop(LINEAR, network, normal(3, 2), lambda: next(noises), sampler, 9, **settings)
        return last.x

    for sampler in SAMPLERS:
        assert torch.equal(run(with_variance, sampler), run(plain, sampler))
    assert not torch.equal(run(with_variance, "ddpm", variance="learned"), run(plain, "ddpm"))


@pytest.mark.equation("reverse-variance", "reverse-process")
def test_with_the_exact_mean_and_variance_every_step_of_ddpm_has_the_datas_marginal():
    r"""For data N(m, s^2) the step back is normal, and its variance lies between the posterior's and beta: a network
    that knows both has at every time, in any number of steps, exactly the mean and variance of x_s."""
    m, s, steps = 0.6, 0.5, 7
    times = [*timesteps(LINEAR, steps), -1]
    earlier = dict(zip(times, times[1:], strict=False))
    mean_of = best_network(LINEAR, m, s)

    def network(x_t, t):
        ab_t, ab_s = alpha_bar(LINEAR, t[0].item()), alpha_bar(LINEAR, earlier[t[0].item()])
        spread_t, spread_s, a = ab_t * s**2 + 1 - ab_t, ab_s * s**2 + 1 - ab_s, ab_t / ab_s
        exact = (
            spread_s * (1 - a) / spread_t
        )  # Bayes' rule for x_s ~ N(., spread_s), x_t = sqrt(a) x_s + noise
        raw = 0.0
        if ab_s < 1:
            tilde, beta = (1 - ab_s) / (1 - ab_t) * (1 - a), 1 - a
            nu = (math.log(exact) - math.log(tilde)) / (math.log(beta) - math.log(tilde))
            assert 0 < nu < 1
            raw = 2 * nu - 1
        return torch.cat([mean_of(x_t, t), torch.full_like(x_t, raw)], dim=1)

    x = torch.zeros(steps + 2, 1, dtype=torch.float64)
    ab = alpha_bar(LINEAR, 999)
    x += math.sqrt(ab) * m
    x[1] += math.sqrt(ab * s**2 + 1 - ab)
    noises = iter(torch.eye(steps + 2, dtype=torch.float64)[2:, :, None])
    loop = sample_loop(LINEAR, network, x, lambda: next(noises), "ddpm", steps, variance="learned")
    for state in loop:
        ab = alpha_bar(LINEAR, state.s)
        variance = ((state.x[1:] - state.x[0]) ** 2).sum().item()
        assert abs(state.x[0].item() - math.sqrt(ab) * m) < 1e-9
        if state.s >= 0:  # the last step adds no noise and gives the mean
            assert abs(variance - (ab * s**2 + 1 - ab)) < 1e-6


# ------------------------------------------------------------------------------------------- a mixture

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.4, 0.25], dtype=torch.float64)[:, None]


def mixture_log_density(x_t, ab):
    r"""log q(x_t), but for a constant, of a mixture of three Gaussians in the plane, and the parts of it."""
    variance = ab * SPREADS**2 + 1 - ab
    away = x_t[:, None] - ab.sqrt() * MEANS
    parts = WEIGHTS.log() - ((away**2 / (2 * variance)).sum(2) + variance.log()[..., 0])
    return parts.logsumexp(1), parts


def mixture_eps(x_t, ab):
    r"""E[eps | x_t] of the mixture: its components' answers, each weighted by how probable it made x_t."""
    variance = ab * SPREADS**2 + 1 - ab
    each = MEANS + ab.sqrt() * SPREADS**2 / variance * (x_t[:, None] - ab.sqrt() * MEANS)
    share = mixture_log_density(x_t, ab)[1].softmax(dim=1)[..., None]
    ab = ab.reshape(-1, 1)
    return (x_t - ab.sqrt() * (share * each).sum(1)) / (1 - ab).sqrt()


def best_of_mixture(schedule):
    r"""A network that has learned the mixture perfectly."""
    return lambda x_t, t: mixture_eps(x_t, schedule.alpha_bar_at(t, x_t)[:, None])


def mixture_at(schedule, t, n, seed):
    r"""n draws of x_t."""
    g = torch.Generator().manual_seed(seed)
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    x_0 = MEANS[which] + SPREADS[which] * torch.randn(n, 2, generator=g, dtype=torch.float64)
    ab = alpha_bar(schedule, t)
    return math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * torch.randn(n, 2, generator=g, dtype=torch.float64)


def mixture_flow(schedule, x, t, to, steps=400):
    r"""The probability-flow ODE d(x / a) / d(sigma / a) = eps (DDIM, equation 14) by Runge and Kutta's fourth order."""
    ends = [math.log((1 - ab) / ab) / 2 for ab in (alpha_bar(schedule, t), alpha_bar(schedule, to))]
    noise = torch.linspace(*ends, steps + 1, dtype=torch.float64).exp()  # sigma / a

    def slope(y, n):
        ab = 1 / (1 + n**2)
        return mixture_eps(y * ab.sqrt(), ab.reshape(1, 1, 1))

    y = x / math.sqrt(alpha_bar(schedule, t))
    for n, after in zip(noise, noise[1:], strict=False):
        h = after - n
        k_1 = slope(y, n)
        k_2 = slope(y + h / 2 * k_1, n + h / 2)
        k_3 = slope(y + h / 2 * k_2, n + h / 2)
        y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + slope(y + h * k_3, after))
    return y * math.sqrt(alpha_bar(schedule, to))


def test_the_mixtures_network_knows_the_gradient_of_its_density():
    r"""Against finite differences of log q(x_t), and as a score read back into picture and noise."""
    x, t, h = normal(5, 2), at(30, 200, 500, 800, 999), 1e-5
    eps = best_of_mixture(LINEAR)(x, t)
    score = score_from(LINEAR, t, eps)
    ab = LINEAR.alpha_bar_at(t, x)[:, None]
    for k in range(2):
        step = torch.eye(2, dtype=torch.float64)[k] * h
        slope = (mixture_log_density(x + step, ab)[0] - mixture_log_density(x - step, ab)[0]) / (2 * h)
        assert (slope - score[:, k]).abs().max() < 1e-6
    x_0, again = x_0_and_eps(LINEAR, x, t, score, "score")
    assert (again - eps).abs().max() < 1e-12
    assert (x_0 - x_0_and_eps(LINEAR, x, t, eps, "eps")[0]).abs().max() < 1e-9


@pytest.mark.equation("reverse-process", "ddim-step", "dpm-solver-step")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)
def test_with_the_exact_score_every_sampler_ends_at_the_mixture(sampler, settings, name):
    r"""5,000 walks of 500 steps against the mixture itself: the components' shares and means within four standard
    errors, 0.03 and 0.04; their spreads within 10 %, of which a few per cent are the first-order steps' own."""
    schedule, n = Schedule.named(name), 5_000
    g = torch.Generator().manual_seed(7)
    start = mixture_at(schedule, 999, n, seed=8)

    def draw():
        return torch.randn(n, 2, generator=g, dtype=torch.float64)

    steps = 200 if sampler == "dpm++" else 500
    *_, last = sample_loop(schedule, best_of_mixture(schedule), start, draw, sampler, steps, **settings)
    own = mixture_log_density(last.x, torch.ones(1, 1, 1, dtype=torch.float64))[1].argmax(1)
    for k in range(3):
        mine = last.x[own == k]
        assert abs(len(mine) / n - WEIGHTS[k].item()) < 0.03
        assert (mine.mean(0) - MEANS[k]).abs().max() < 0.04
        assert (mine.std(0) / SPREADS[k] - 1).abs().max() < 0.1


@pytest.mark.equation("ddim-step", "dpm-solver-step")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler, order", [("ddim", 0.9), ("dpm++", 1.8)])
def test_on_the_mixture_too_the_error_falls_with_the_samplers_order(sampler, order, name):
    r"""Against the exact flow from t = 999 down to 199, as for one Gaussian; here the flow bends."""
    schedule = Schedule.named(name)
    starts = mixture_at(schedule, 999, 64, seed=9)
    exact = mixture_flow(schedule, starts, 999, 199)
    points = []
    for steps in (100, 200, 500, 1000):
        loop = sample_loop(schedule, best_of_mixture(schedule), starts, lambda: None, sampler, steps)
        [x] = [state.x for state in loop if state.s == 199]
        points.append((math.log(steps), math.log((x - exact).square().sum(1).sqrt().mean())))
    log_steps, log_error = torch.tensor(points).T
    centred = log_steps - log_steps.mean()
    assert -(centred * log_error).sum() / (centred**2).sum() >= order, points


# ------------------------------------------------------------------------------------------- times


@pytest.mark.equation("sampling-times")
def test_twenty_steps_stand_where_each_spacing_puts_them():
    assert timesteps(LINEAR, 20) == list(range(999, 0, -50))
    assert timesteps(LINEAR, 20, "trailing")[:2] == [999, 949]
    assert timesteps(LINEAR, 20, "leading") == list(range(950, -1, -50))
    linspace = timesteps(LINEAR, 20, "linspace")
    assert (linspace[0], linspace[-1]) == (999, 0)
    assert linspace == [round(999 - k * 999 / 19) for k in range(20)]


@pytest.mark.equation("sampling-times")
def test_trailing_times_are_rounded_where_the_steps_do_not_divide_the_chain():
    r"""1000 - k 1000 / 7 is 1000, 857.1, 714.3, 571.4, 428.6, 285.7, 142.9."""
    assert timesteps(LINEAR, 7) == [999, 856, 713, 570, 428, 285, 142]


@pytest.mark.equation("sampling-times")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [30, 1000])
def test_any_number_of_steps_gives_that_many_falling_times_within_the_chain(spacing, T):
    schedule = Schedule.named("cosine", T)
    for steps in range(1, T + 1):
        times = timesteps(schedule, steps, spacing)
        assert len(times) == steps
        assert all(type(time) is int for time in times)
        assert times[0] <= T - 1 and times[-1] >= 0
        assert all(later < earlier for earlier, later in zip(times, times[1:], strict=False))


@pytest.mark.equation("sampling-times")
@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_the_chain_has_take_every_one(spacing):
    assert timesteps(LINEAR, 1000, spacing) == list(range(999, -1, -1))


def test_one_step_starts_where_there_is_only_noise():
    assert timesteps(LINEAR, 1) == [999]
    assert timesteps(LINEAR, 1, "linspace") == [999]


@pytest.mark.parametrize("steps", [0, -1, 1001, 20.0, "20", None, True])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match="expected 1 to 1000 sampling steps, got") as refusal:
        timesteps(LINEAR, steps)
    assert repr(steps) in str(refusal.value)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="trailing, leading, linspace, got 'karras'"):
        timesteps(LINEAR, 20, "karras")


# ------------------------------------------------------------------------------------------- guidance


class Recorder:
    r"""A network that keeps what it was asked; its answer differs for every context and depends on z_t and t."""

    def __init__(self):
        self.asked = []

    def __call__(self, z_t, t, context):
        self.asked.append((z_t, t, context))
        return context.mean(dim=(1, 2))[:, None] * (1 + z_t**2) + t[:, None] / 1000


Z, T = normal(2, 3, seed=1), at(100, 900)
PROMPTS, EMPTY = normal(2, 5, 4, seed=2), normal(2, 5, 4, seed=3)


@pytest.mark.equation("guidance")
@pytest.mark.parametrize("scale", [3.0, 7.5, 0.5, -1.0, 2])
def test_guidance_leads_from_the_unconditional_past_the_conditional_in_one_call(scale):
    network = Recorder()
    output = guided(network, PROMPTS, EMPTY, scale)(Z, T)
    [(z, t, context)] = network.asked
    assert torch.equal(z, torch.cat([Z, Z]))
    assert torch.equal(t, torch.cat([T, T]))
    assert torch.equal(context, torch.cat([EMPTY, PROMPTS]))  # [uncond, cond], as diffusers has it
    uncond, cond = Recorder()(Z, T, EMPTY), Recorder()(Z, T, PROMPTS)
    assert (output - (uncond + scale * (cond - uncond))).abs().max().item() < 1e-12
    w = scale - 1
    assert (output - ((1 + w) * cond - w * uncond)).abs().max().item() < 1e-12  # equation 6


@pytest.mark.equation("guidance")
@pytest.mark.parametrize("scale, context", [(1, PROMPTS), (1.0, PROMPTS), (0, EMPTY), (0.0, EMPTY)])
def test_guidance_one_is_conditional_and_zero_unconditional_with_half_the_work(scale, context):
    network = Recorder()
    output = guided(network, PROMPTS, EMPTY, scale)(Z, T)
    [(z, _, asked)] = network.asked
    assert torch.equal(z, Z)
    assert torch.equal(asked, context)
    assert torch.equal(output, Recorder()(Z, T, context))


@pytest.mark.equation("guidance")
def test_guidance_leaves_the_learned_variance_to_the_conditional_model():
    def network(z_t, t, context):
        return torch.cat(
            [z_t * context.mean(dim=(1, 2))[:, None], context.mean(dim=(1, 2))[:, None] + z_t], dim=1
        )

    z, t, context, negative = (normal(2, 3), at(1, 2), normal(2, 4, 5, seed=1), normal(2, 4, 5, seed=2))
    both, cond, uncond = (guided(network, context, negative, scale)(z, t) for scale in (3.0, 1.0, 0.0))
    assert (both[:, :3] - (uncond[:, :3] + 3 * (cond[:, :3] - uncond[:, :3]))).abs().max() < 1e-12
    assert torch.equal(both[:, 3:], cond[:, 3:])


@pytest.mark.equation("guidance")
def test_guidance_is_the_same_whatever_the_network_predicts():
    r"""Combining v or x_0 and reading the result as eps is combining eps: all three are affine in one another."""
    said = {c: normal(2, 3, seed=seed) for c, seed in (("cond", 4), ("uncond", 5))}
    for prediction in PREDICTIONS:
        pairs = {c: x_0_and_eps(LINEAR, Z, T, output, prediction) for c, output in said.items()}
        combined = said["uncond"] + 3 * (said["cond"] - said["uncond"])
        _, eps = x_0_and_eps(LINEAR, Z, T, combined, prediction)
        by_eps = pairs["uncond"][1] + 3 * (pairs["cond"][1] - pairs["uncond"][1])
        assert (eps - by_eps).abs().max().item() < 1e-9


def test_guidance_is_computed_in_the_samples_precision_not_in_the_networks():
    r"""A difference of two bf16 numbers, times 7, would be rounded once more, by up to 0.4 %."""
    cond, uncond = normal(2, 3, seed=6).bfloat16(), normal(2, 3, seed=7).bfloat16()
    output = guided(lambda z_t, t, context: torch.cat([uncond, cond]), PROMPTS, EMPTY, 7.0)(Z.float(), T)
    exact = uncond.double() + 7.0 * (cond.double() - uncond.double())
    assert (output.double() - exact).abs().max().item() < 1e-5  # float32 numbers about 10


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.0])
def test_guidance_reads_its_contexts_once_for_all_times(scale):
    network, read = Recorder(), []
    denoise = guided(network, PROMPTS, EMPTY, scale, lambda context: read.append(context) or 2 * context)
    for time in (900, 500, 100):
        denoise(Z, at(time, time))
    [once] = read
    assert all(torch.equal(context, 2 * once) for _, _, context in network.asked) and len(network.asked) == 3


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_guidance_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="finite guidance scale, got"):
        guided(Recorder(), PROMPTS, EMPTY, scale)


# ------------------------------------------------------------------------------------------- loop


@pytest.mark.equation("sampling-times")
@pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_loop_asks_the_network_once_a_step_at_the_times_of_the_spacing(sampler, settings, spacing):
    asked = []

    def denoise(x_t, t):
        asked.append(t.tolist())
        return torch.zeros_like(x_t)

    x = normal(2, 3)
    states = list(
        sample_loop(LINEAR, denoise, x, lambda: torch.zeros_like(x), sampler, 6, spacing=spacing, **settings)
    )
    times = timesteps(LINEAR, 6, spacing)
    assert asked == [[time, time] for time in times]
    assert [state.i for state in states] == list(range(6))
    assert [state.t for state in states] == times
    assert [state.s for state in states] == [*times[1:], -1]
    assert all(isinstance(state, State) and state.x.shape == state.x_0.shape == x.shape for state in states)


@pytest.mark.parametrize(
    "sampler, settings, draws",
    [
        ("ddpm", {}, 5),
        ("ddim", {}, 0),
        ("ddim", {"eta": 0.5}, 5),
        ("dpm++", {}, 0),
        ("dpm++", {"eta": 0.5}, 5),
    ],
)
def test_noise_is_drawn_once_a_step_by_the_samplers_that_add_it(sampler, settings, draws):
    drawn = []

    def draw():
        drawn.append(1)
        return torch.zeros(2, 3)

    list(sample_loop(LINEAR, lambda x, t: x, torch.ones(2, 3), draw, sampler, 5, **settings))
    assert len(drawn) == draws


@pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_latents_are_never_clipped(sampler, settings, prediction):
    r"""A network that is sure of x_0 = 1000 gets 1000, not 1. 0.1: float32, divided by a_T = 6e-3."""
    x_0 = torch.full((2, 4, 2, 2), 1000.0)

    def denoise(x_t, t):
        ab = LINEAR.alpha_bar_at(t, x_t)
        eps = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()
        return training_target(LINEAR, x_0, t, eps, prediction).float()

    noise = normal(2, 4, 2, 2, dtype=torch.float32)
    for state in sample_loop(LINEAR, denoise, noise, lambda: noise, sampler, 10, prediction, **settings):
        assert (state.x_0 - 1000).abs().max().item() < 0.1
    assert (state.x - 1000).abs().max().item() < 0.1


@pytest.mark.parametrize("sampler, settings", ALL_SAMPLERS)
def test_a_single_step_is_the_networks_first_picture(sampler, settings):
    x_T = normal(2, 3)
    [state] = sample_loop(LINEAR, best_network(LINEAR, 0.6, 0.5), x_T, lambda: x_T, sampler, 1, **settings)
    assert torch.equal(state.x, state.x_0)
    assert (state.t, state.s) == (999, -1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sample_keeps_the_type_of_the_noise_whatever_the_network_computes_in(sampler):
    noise = normal(2, 3, dtype=torch.float32)
    for state in sample_loop(LINEAR, lambda x, t: x.bfloat16(), noise, lambda: noise, sampler, 3):
        assert state.x.dtype == state.x_0.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_device_without_float64_gives_the_same_sample(sampler, name, monkeypatch):
    r"""MPS has none: tables are looked up in float32 there. 1e-4: 20 steps of float32 numbers about 1, 6e-8 each."""
    schedule, x_T, noise = (Schedule.named(name), normal(8, seed=1).float(), normal(20, 8, seed=2).float())

    def run():
        drawn = iter(noise)
        *_, last = sample_loop(
            schedule, best_network(schedule, 0.6, 0.5), x_T, lambda: next(drawn), sampler, 20
        )
        return last.x

    exact, lookup = run(), schedule_file._lookup
    monkeypatch.setattr(schedule_file, "_lookup", lambda *a: lookup(*a).float())
    assert (run() - exact).abs().max().item() < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_element_of_a_batch_walks_by_itself(sampler):
    x_T, noise = normal(3, 2, seed=1), normal(10, 3, 2, seed=2)

    def run(part):
        drawn = iter(noise[:, part])
        *_, last = sample_loop(
            LINEAR, best_network(LINEAR, 0.6, 0.5), x_T[part], lambda: next(drawn), sampler, 10
        )
        return last.x

    assert torch.equal(run(slice(0, 3))[1:2], run(slice(1, 2)))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"sampler": "euler"}, r"ddpm, ddim, dpm\+\+, got 'euler'"),
        ({"eta": 1.5}, r"eta in \[0, 1\], got 1.5"),
        ({"eta": math.nan}, r"eta in \[0, 1\], got nan"),
        ({"steps": 0}, "1 to 1000 sampling steps, got 0"),
        ({"spacing": "karras"}, "got 'karras'"),
        ({"prediction": "noise"}, "eps, v, x_0, score, got 'noise'"),
        ({"sampler": "ddpm", "variance": "fixed_small"}, "posterior, beta, learned, got 'fixed_small'"),
        ({"sampler": "ddpm", "variance": "learned"}, "the network must have twice the channels"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=told):
        list(sample_loop(LINEAR, lambda x, t: x, x, lambda: x, **settings))
