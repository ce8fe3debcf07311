r"""The lines of docs/derivation.md that no other test holds, each against a calculation of another kind.

The data are normal, or two points, so that densities, scores and conditional means are known in closed form.
"""

import math
from pathlib import Path

import derivation
import pytest
import torch
from conftest import far, normal
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ddpm.diffusion import (
    forward_step,
    q_posterior,
    q_sample,
    reverse_variance,
    score_from,
    v_from,
    x_0_and_eps,
)
from ddpm.losses import loss_weight, prior_term, variational_term
from ddpm.sampling import ddim_step, dpmpp_2m_step, guided, sample_loop
from ddpm.schedule import Schedule
from ddpm.vae import DiagonalGaussian, vae_loss

LINEAR = Schedule.named("linear")
SHORT = Schedule(torch.tensor([0.05, 0.1, 0.3, 0.5]))
LINE = torch.linspace(-8, 8, 4001, dtype=torch.float64)  # for integrals: the trapezoidal rule is exact here


def at(*times):
    return torch.tensor(times)


def normal_density(mean: float, spread: float) -> Normal:
    return Normal(*torch.tensor([mean, spread], dtype=torch.float64))


def two_points(alpha_bar) -> MixtureSameFamily:
    r"""The density of x_t for data that are -1 or 1, each with probability 1/2."""
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.sqrt(alpha_bar)
    spread = torch.full((2,), math.sqrt(1 - alpha_bar), dtype=torch.float64)
    return MixtureSameFamily(Categorical(torch.ones(2, dtype=torch.float64)), Normal(means, spread))


def gradient(log_density, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(x).sum(), x)[0]


# ------------------------------------------------------------------------------------------- the bound


def wrong_network(z_t, t):
    r"""A prediction of x_0 that fits no data: 0.3 + 0.2 (t + 1) x_t."""
    return 0.3 + 0.2 * (t + 1).reshape(-1, 1) * z_t


def bits_of(z_0, eps):
    r"""L_T and all terms of a single z_0 in nats, with the noises eps (T,) of its four z_t."""
    t = torch.arange(4)
    z_0 = torch.full((4, 1), z_0, dtype=torch.float64)
    z_t = q_sample(SHORT, z_0, t, eps[:, None])
    terms = variational_term(SHORT, z_0, z_t, t, wrong_network(z_t, t), "x_0", "beta")
    return math.log(2) * (terms.sum() + prior_term(SHORT, z_0[:1]).sum()).item()


def test_the_terms_of_the_bound_add_up_to_its_definition_over_whole_chains():
    r"""E_q[log q(x_1..x_T | x_0) - log p(x_0..x_T)], by 200,000 chains of forward steps; the terms are quadratic in
    the noise, so that noises of -1 and 1 give their mean exactly."""
    x_0 = 0.7
    exact = (bits_of(x_0, torch.ones(4).double()) + bits_of(x_0, -torch.ones(4).double())) / 2
    n = 200_000
    before = torch.full((n, 1), x_0, dtype=torch.float64)
    log_ratio = torch.zeros(n, 1, dtype=torch.float64)
    for t in range(4):
        time = torch.full((n,), t)
        x_t = forward_step(SHORT, before, time, normal(n, 1, seed=t))
        log_ratio += Normal(SHORT.alpha[t].sqrt() * before, SHORT.beta[t].sqrt()).log_prob(x_t)
        mean, _ = q_posterior(SHORT, wrong_network(x_t, time), x_t, time)
        spread = reverse_variance(SHORT, x_t, time, variance="beta").sqrt()
        log_ratio -= Normal(mean, spread).log_prob(before)
        before = x_t
    log_ratio -= Normal(0.0, 1.0).log_prob(before)
    assert abs(log_ratio.mean().item() - exact) < 4 * log_ratio.std().item() / math.sqrt(n)


@pytest.mark.parametrize("x_0", [-1.5, 0.0, 0.7])
def test_the_bound_is_never_below_minus_the_log_likelihood(x_0):
    r"""The wrong network is linear, so that its p(x_0) is normal: the reverse steps, composed, give it exactly."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(4)):
        ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        times = at(t, t)
        shift, slope = q_posterior(SHORT, wrong_network(ends, times), ends, times)[0].flatten().tolist()
        slope -= shift
        mean = shift + slope * mean
        variance = slope**2 * variance + reverse_variance(SHORT, ends, times, variance="beta")[0].item()
    exact = -Normal(mean, math.sqrt(variance)).log_prob(torch.tensor(x_0)).item()
    bound = (bits_of(x_0, torch.ones(4).double()) + bits_of(x_0, -torch.ones(4).double())) / 2
    assert bound > exact + 0.01


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_bound_weighs_the_error_of_eps_by_beta_squared_over_2_sigma_squared_alpha_1_minus_alpha_bar(
    variance,
):
    t = at(0, 1, 30, 500, 999)
    x_0, eps, eps_hat = (normal(5, 1, seed=k) for k in range(3))
    x_t = q_sample(LINEAR, x_0, t, eps)
    wrong, right = (variational_term(LINEAR, x_0, x_t, t, e, "eps", variance) for e in (eps_hat, eps))
    beta, alpha, alpha_bar = (table[t] for table in (LINEAR.beta, LINEAR.alpha, LINEAR.alpha_bar))
    sigma_2 = reverse_variance(LINEAR, x_t, t, variance=variance).flatten()
    weight = beta**2 / (2 * sigma_2 * alpha * (1 - alpha_bar))
    expected = weight * (eps - eps_hat).flatten() ** 2
    assert ((wrong - right) * math.log(2) / expected - 1).abs().max() < 1e-9


def test_the_mean_of_the_reverse_step_subtracts_the_noise_and_divides_by_the_root_of_alpha():
    t = at(0, 1, 500, 999)
    x_0, eps = normal(4, 3), normal(4, 3, seed=1)
    x_t = q_sample(LINEAR, x_0, t, eps)
    beta, alpha, alpha_bar = (table[t, None] for table in (LINEAR.beta, LINEAR.alpha, LINEAR.alpha_bar))
    by_eps = (x_t - beta / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt()
    assert far(q_posterior(LINEAR, x_0, x_t, t)[0], by_eps) < 1e-9


# ------------------------------------------------------------------------------------------- the score


@pytest.mark.parametrize("t", [10, 300, 700])
def test_the_mean_of_the_noise_is_the_score_of_the_mixture_of_all_pictures(t):
    r"""E[eps | x_t] by Bayes' rule over the two points, the score by autograd through the density of both."""
    alpha_bar = LINEAR.alpha_bar[t].item()
    density = two_points(alpha_bar)
    x = LINE[::100]
    of_each = density.component_distribution.log_prob(x[:, None]).softmax(dim=1)  # p(x_0 | x_t)
    x_0 = of_each[:, 1] - of_each[:, 0]
    eps = (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
    score = score_from(LINEAR, torch.full((len(x),), t), eps)
    assert far(score, gradient(density.log_prob, x)) < 1e-8


def test_matching_the_noise_differs_from_matching_the_score_by_a_number_that_no_network_changes():
    density = two_points(LINEAR.alpha_bar[300].item())
    components = density.component_distribution
    score = gradient(density.log_prob, LINE)
    differences = []
    for guess in (torch.zeros_like(LINE), -LINE, LINE.sin()):
        explicit = torch.trapezoid(density.log_prob(LINE).exp() * (guess - score) ** 2, LINE)
        denoising = 0.0
        for k in range(2):
            of_noise = (components.mean[k] - LINE) / components.variance[k]
            weight = components.log_prob(LINE[:, None])[:, k].exp() / 2
            denoising += torch.trapezoid(weight * (guess - of_noise) ** 2, LINE)
        differences.append((denoising - explicit).item())
    assert differences[0] > 0.1
    assert differences == pytest.approx(differences[:1] * 3, abs=1e-9)


@pytest.mark.parametrize("s, low, high", [(249, 0.0, 1e-8), (200, 1e-3, 0.01), (100, 0.3, 0.4)])
def test_the_reverse_step_is_normal_only_where_it_is_short(s, low, high):
    r"""Data -1 and 1, from x_t = 0 at t = 250: the divergence of q(x_s | x_t) from the normal of its moments."""
    x_0 = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    mean, variance = q_posterior(LINEAR, x_0, torch.zeros(2).double(), at(250, 250), at(s, s))
    both = MixtureSameFamily(Categorical(torch.ones(2).double()), Normal(mean, variance.sqrt()))
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64) * (8 * both.stddev)
    p = both.log_prob(x)
    divergence = torch.trapezoid(p.exp() * (p - Normal(0.0, both.stddev).log_prob(x)), x).item()
    assert low < divergence < high


# ------------------------------------------------------------------------------------------- guidance

MEAN, SPREAD = 1.0, 0.5  # of the data under the caption; without one they are standard normal


def noise_of(mean, spread):
    r"""The best prediction of eps for data N(mean, spread^2)."""

    def network(x_t, t):
        alpha_bar = LINEAR.alpha_bar_at(t, x_t)
        deviation = x_t - alpha_bar.sqrt() * mean
        return (1 - alpha_bar).sqrt() * deviation / (alpha_bar * spread**2 + 1 - alpha_bar)

    return network


def both_networks(z_t, t, context):
    r"""The best network with a caption, where context is 1, and without, where it is 0."""
    with_caption, without = noise_of(MEAN, SPREAD)(z_t, t), noise_of(0.0, 1.0)(z_t, t)
    return torch.where(context[:, 0] == 1, with_caption, without)


def denoiser(scale):
    def denoise(z_t, t):
        context = torch.ones(len(t), 1, 1)
        return guided(both_networks, context, 0 * context, scale)(z_t, t)

    return denoise


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_the_score_of_p_of_z_times_p_of_c_given_z_to_the_power_s(scale):
    r"""With p(c | z_t) from Bayes' rule, p(z_t | c) / p(z_t), at one time; by autograd through both densities."""
    t = 300
    alpha_bar = LINEAR.alpha_bar[t].item()
    plain = normal_density(0.0, 1.0)
    under = normal_density(math.sqrt(alpha_bar) * MEAN, math.sqrt(alpha_bar * SPREAD**2 + 1 - alpha_bar))

    def log_tilted(z):
        return plain.log_prob(z) + scale * (under.log_prob(z) - plain.log_prob(z))

    z = LINE[::200, None]
    times = torch.full((len(z),), t)
    score = score_from(LINEAR, times, denoiser(scale)(z, times))
    assert far(score, gradient(log_tilted, z)) < 1e-9


def test_a_guided_sampler_ends_further_out_than_the_density_that_guidance_names():
    r"""p(z) p(c|z)^3 is normal here, precision 1 - 3 + 3 / SPREAD^2. Adding noise to it does not give the densities
    whose scores are followed, so that the curve ends elsewhere: beyond its mean, and narrower."""
    scale = 3.0
    precision = 1 - scale + scale / SPREAD**2
    named = scale * MEAN / SPREAD**2 / precision
    start = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    *_, last = sample_loop(LINEAR, denoiser(scale), start, lambda: None, "ddim", 250)
    low, high = last.x.flatten().tolist()
    assert (low + high) / 2 > named + 0.1
    assert (high - low) / 2 < precision**-0.5 - 0.02


# ------------------------------------------------------------------------------------------- DDIM, ODE, integrator

STEPS = [(999, 949), (500, 499), (300, 100)]


@pytest.mark.parametrize("t, s", STEPS)
def test_a_step_of_ddim_is_eulers_in_x_over_root_alpha_bar_against_the_noise_to_signal_ratio(t, s):
    x_t, eps = normal(1, 3), normal(1, 3, seed=1)
    x_0, _ = x_0_and_eps(LINEAR, x_t, at(t), eps, "eps")
    x_s = ddim_step(LINEAR, x_t, at(t), at(s), x_0, eps, torch.zeros_like(eps))
    ab_t, ab_s = LINEAR.alpha_bar[t], LINEAR.alpha_bar[s]
    ratio_t, ratio_s = ((1 - ab_t) / ab_t).sqrt(), ((1 - ab_s) / ab_s).sqrt()
    assert far(x_s / ab_s.sqrt(), x_t / ab_t.sqrt() + (ratio_s - ratio_t) * eps) < 1e-9


def test_a_short_step_of_ddim_is_one_of_the_probability_flow_equation():
    r"""x_{t-1} - x_t = beta_t / 2 (x_t + score), up to beta_t^2 (Song et al. 2021, equation 13)."""
    chain = Schedule(torch.full((4000,), 1e-3, dtype=torch.float64))
    t = at(700)
    x_t, eps = normal(1, 3), normal(1, 3, seed=1)
    x_0, _ = x_0_and_eps(chain, x_t, t, eps, "eps")
    step = ddim_step(chain, x_t, t, t - 1, x_0, eps, torch.zeros_like(eps)) - x_t
    assert far(step, 5e-4 * (x_t + score_from(chain, t, eps))) < 2e-6


@pytest.mark.parametrize("t, s", STEPS)
def test_between_two_times_the_curve_is_the_exponential_integral_of_the_predicted_picture(t, s):
    r"""For data N(0.6, 0.5^2) the curve keeps the standardised sample; the integral is by quadrature over lambda.
    With the prediction held at t the same integral is the first step of DPM-Solver++."""
    m, width = 0.6, 0.5
    x_t = torch.tensor([1.3], dtype=torch.float64)
    lambdas = [0.5 * (LINEAR.alpha_bar[k] / (1 - LINEAR.alpha_bar[k])).log().item() for k in (t, s)]
    lam = torch.linspace(*lambdas, 100_001, dtype=torch.float64)
    alpha_bar = torch.sigmoid(2 * lam)
    a, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    spread = (alpha_bar * width**2 + 1 - alpha_bar).sqrt()
    curve = a * m + spread / spread[0] * (x_t - a[0] * m)
    x_0 = m + a * width**2 * (curve - a * m) / spread**2
    x_s = sigma[-1] / sigma[0] * x_t + sigma[-1] * torch.trapezoid(lam.exp() * x_0, lam)
    assert far(x_s, curve[-1:]) < 1e-8
    held = sigma[-1] / sigma[0] * x_t + sigma[-1] * torch.trapezoid(lam.exp() * x_0[0], lam)
    first = dpmpp_2m_step(LINEAR, x_t, at(t), at(s), x_0[:1], None, torch.zeros_like(x_t))
    assert far(held, first) < 1e-8


# ------------------------------------------------------------------------------------------- v, flow, VAE


def test_v_is_the_pair_of_picture_and_noise_turned_by_an_angle_and_the_derivative_by_that_angle():
    t = at(0, 300, 999)
    x_0, eps = normal(3, 4), normal(3, 4, seed=1)
    angle = LINEAR.alpha_bar[t, None].sqrt().acos().expand(3, 4)
    x_t = angle.cos() * x_0 + angle.sin() * eps
    derivative = gradient(lambda phi: phi.cos() * x_0 + phi.sin() * eps, angle)
    v = v_from(LINEAR, x_0, t, eps)
    assert far(v, derivative) < 1e-12
    assert far(x_t**2 + v**2, x_0**2 + eps**2) < 1e-12


FLOW = [0.05, 0.3, 0.5, 0.8, 0.95]


def test_a_step_of_euler_along_rectified_flow_is_a_step_of_ddim_between_the_same_noise_to_signal_ratios():
    r"""x_t = (1 - t) x_0 + t eps, divided by its norm for data of variance 1, is a chain of this project: alpha_bar is
    (1 - t)^2 / ((1 - t)^2 + t^2). An Euler step follows the predicted velocity eps - x_0."""
    time = torch.tensor(FLOW, dtype=torch.float64)
    size = ((1 - time) ** 2 + time**2).sqrt()
    alpha_bar = ((1 - time) / size) ** 2
    chain = Schedule(1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]))
    assert far(chain.alpha_bar, alpha_bar) < 1e-12
    x_0, eps = normal(1, 3), normal(1, 3, seed=1)
    for t in range(1, 5):
        for s in range(t):
            x_t = (1 - time[t]) * x_0 + time[t] * eps
            by_euler = x_t + (time[s] - time[t]) * (eps - x_0)
            by_ddim = ddim_step(chain, x_t / size[t], at(t), at(s), x_0, eps, torch.zeros_like(eps))
            assert far(by_euler / size[s], by_ddim) < 1e-12


def test_the_error_of_rectified_flows_velocity_weighs_between_once_and_twice_that_of_v():
    r"""Given x_t, x_0 - x_0_hat = -t (u - u_hat), so the square of u is that of x_0 by 1 / t^2 = (1 + sqrt(SNR))^2."""
    t = torch.arange(1000)
    ones = torch.ones(1000, 1)
    snr = LINEAR.alpha_bar / (1 - LINEAR.alpha_bar)
    of_v = loss_weight(LINEAR, ones, t, "x_0", "v").flatten()
    flow_time = 1 / (1 + snr.sqrt())
    x_0, x_0_hat, eps = (normal(1000, seed=k) for k in range(3))
    x_t = (1 - flow_time) * x_0 + flow_time * eps
    u, u_hat = eps - x_0, (x_t - x_0_hat) / flow_time
    ratio = (u - u_hat) ** 2 / (x_0 - x_0_hat) ** 2 / of_v
    assert far(ratio, 1 + 2 * snr.sqrt() / (1 + snr)) < 1e-6
    assert ratio.min() > 1 and ratio.max() < 2 + 1e-9


def test_the_vaes_bound_is_exact_for_the_true_posterior_and_below_the_log_likelihood_for_any_other():
    r"""z standard normal and x = 2 z + 0.5 noise: x is N(0, 4.25), and z given x is N(2 x / 4.25, 0.25 / 4.25)."""
    x = 1.3
    exact = normal_density(0.0, math.sqrt(4.25)).log_prob(torch.tensor(x, dtype=torch.float64)).item()

    def bound(mu, variance):
        q = DiagonalGaussian(*torch.tensor([[[mu]], [[math.log(variance)]]], dtype=torch.float64))
        squares = (x - 2 * mu) ** 2 + 4 * variance
        return -0.5 * (math.log(2 * math.pi * 0.25) + squares / 0.25) - q.kl().item()

    assert bound(2 * x / 4.25, 0.25 / 4.25) == pytest.approx(exact, abs=1e-9)
    for mu, variance in ((0.0, 1.0), (0.5, 0.25 / 4.25), (2 * x / 4.25, 0.5)):
        assert bound(mu, variance) < exact - 0.1


@pytest.mark.parametrize("kl_weight, error", [(1e-3, 5e-4), (0.2, 0.1), (1.0, 0.5), (3.0, 1.0)])
def test_the_kl_weight_of_a_linear_vae_leaves_half_of_it_as_squared_error_until_it_leaves_nothing_else(
    kl_weight, error
):
    r"""x standard normal, z = a x + sigma eps, x_hat = w z. The optimum has the error kl_weight / 2, and from a weight
    of 2 on a = w = 0: the encoder is silent and the error is the variance of the data."""
    x, eps = (torch.tensor(values).double() for values in ([-1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]))
    a, w, logvar = (torch.tensor(start).double().requires_grad_() for start in (0.9, 0.9, -1.0))
    optimizer = torch.optim.LBFGS(
        [a, w, logvar], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def loss():
        optimizer.zero_grad()
        q = DiagonalGaussian((a * x)[:, None], logvar.expand(4, 1))
        _, whole = vae_loss(x[:, None], w * q.sample(eps=eps[:, None]), q, kl_weight, "l2")
        whole.backward()
        return whole

    optimizer.step(loss)
    squares = (1 - w * a) ** 2 + w**2 * logvar.exp()
    assert squares.item() == pytest.approx(error, rel=1e-2)


# ------------------------------------------------------------------------------------------- the figures


@pytest.mark.slow
def test_the_command_draws_the_figures_of_the_page_and_prints_the_numbers_that_it_quotes(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(derivation, "IMAGES", tmp_path)
    derivation.figures()
    page = (Path(derivation.__file__).parent / "derivation.md").read_text(encoding="utf-8")
    assert all(f"(images/{path.name})" in page for path in tmp_path.iterdir())
    printed = capsys.readouterr().out
    for quoted in (
        "10: '0.079'",
        "1.5e-09 nats",
        "0.38 nats",
        "named N(1.20, 0.32^2), drawn N(1.50, 0.12^2)",
        "linear, t uniform: 0.35",
        "uniform: 0.46; logit-normal: 0.68",
    ):
        assert quoted in printed
