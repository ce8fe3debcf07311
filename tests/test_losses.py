r"""What the network learns: targets, the simplified loss by hand, and the variational terms by torch.distributions."""

import math

import pytest
import torch
from conftest import far, normal
from torch.distributions import Normal, kl_divergence

from ddpm.diffusion import (
    PREDICTIONS,
    VARIANCES,
    q_posterior,
    q_sample,
    reverse_variance,
    v_from,
    x_0_and_eps,
)
from ddpm.losses import (
    WEIGHTINGS,
    diffusion_loss,
    prior_term,
    split_output,
    training_target,
    variational_term,
)
from ddpm.schedule import SCHEDULES, Schedule

NAMES = sorted(SCHEDULES)
LINEAR = Schedule.named("linear")


def at(*times):
    return torch.tensor(times)


# ------------------------------------------------------------------------------------------- simplified


@pytest.mark.equation("objective")
def test_training_targets_are_the_noise_the_picture_and_the_velocity():
    x_0 = normal(2, 3, seed=1)
    eps = normal(2, 3, seed=2)
    t = at(5, 500)
    assert torch.equal(training_target(LINEAR, x_0, t, eps, "eps"), eps)
    assert torch.equal(training_target(LINEAR, x_0, t, eps, "x_0"), x_0)
    assert torch.equal(training_target(LINEAR, x_0, t, eps, "v"), v_from(LINEAR, x_0, t, eps))


@pytest.mark.equation("objective")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_loss_zero(prediction):
    z_0 = normal(3, 4, 8, 8, seed=1).float()
    eps = normal(3, 4, 8, 8, seed=2).float()
    t = at(0, 500, 999)
    target = training_target(LINEAR, z_0, t, eps, prediction)
    loss = diffusion_loss(LINEAR, lambda z_t, t: target, z_0, t, eps, prediction)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.equation("objective")
def test_the_loss_is_the_mean_square_of_each_element_by_hand():
    z_0 = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, 1.0]])
    eps = torch.tensor([[0.3, 0.1, -0.7], [-1.0, 2.0, 0.0]])
    loss = diffusion_loss(LINEAR, lambda z_t, t: torch.zeros_like(z_t), z_0, at(5, 500), eps)
    by_hand = [(0.3**2 + 0.1**2 + 0.7**2) / 3, (1.0 + 4.0 + 0.0) / 3]
    assert loss.tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.equation("objective")
def test_the_network_sees_z_t_at_its_own_time_and_the_gradient_of_the_loss_reaches_it():
    z_0 = normal(2, 3, seed=1).float()
    eps = normal(2, 3, seed=2).float()
    t = at(100, 900)
    z_t = q_sample(LINEAR, z_0, t, eps)
    scale = torch.tensor(0.5, requires_grad=True)

    def denoise(z, time):
        assert torch.equal(z, z_t)
        assert torch.equal(time, t)
        return scale * z

    diffusion_loss(LINEAR, denoise, z_0, t, eps).sum().backward()
    by_hand = (2 * (0.5 * z_t - eps) * z_t).mean(dim=1).sum().item()
    assert scale.grad.item() == pytest.approx(by_hand, abs=1e-5)  # float32 sums of a few numbers about 1


@pytest.mark.equation("loss-weight")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weighting_makes_the_loss_that_of_the_same_network_with_another_prediction(prediction):
    z_0, eps, output = (normal(5, 3, seed=k) for k in range(3))
    t = at(0, 20, 300, 700, 999)
    z_t = q_sample(LINEAR, z_0, t, eps)
    z_0_hat, eps_hat = x_0_and_eps(LINEAR, z_t, t, output, prediction)
    same = {"eps": eps_hat, "v": v_from(LINEAR, z_0_hat, t, eps_hat), "x_0": z_0_hat}
    own = {p: diffusion_loss(LINEAR, lambda *_, p=p: same[p], z_0, t, eps, p) for p in PREDICTIONS}
    snr = LINEAR.alpha_bar[t] / (1 - LINEAR.alpha_bar[t])
    own |= {"prediction": own[prediction], "min_snr": own["x_0"] * snr.clamp(max=5)}
    assert set(own) == set(WEIGHTINGS)
    for weighting, expected in own.items():
        loss = diffusion_loss(LINEAR, lambda *_: output, z_0, t, eps, prediction, weighting=weighting)
        assert (loss / expected - 1).abs().max() < 1e-4  # float32, and an SNR of 10^4 at t = 0


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"prediction": "epsilon"}, "eps, v, x_0, got 'epsilon'"),
        ({"weighting": "snr"}, "prediction, eps, v, x_0, min_snr, got 'snr'"),
        ({"eps": torch.zeros(2, 1)}, r"eps like z_0, \(2, 3\), .* got \(2, 1\)"),  # it would broadcast
        ({"t": at(1, 2, 3)}, r"\(2,\) integers t, got .* \(3,\) torch.int64"),
        ({"t": torch.tensor([0.5, 1.0])}, r"\(2,\) integers t, got .* torch.float32"),
        (
            {"denoise": lambda z_t, t: z_t[:, :1]},
            r"like its input, or with twice the channels.* got \(2, 1\) for \(2, 3\)",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused_with_what_was_expected(changes, told):
    z = torch.zeros(2, 3)
    settings = {"denoise": lambda z_t, t: z_t, "z_0": z, "t": at(0, 1), "eps": z} | changes
    with pytest.raises(ValueError, match=told):
        diffusion_loss(LINEAR, **settings)


# ------------------------------------------------------------------------------------------- variational


@pytest.mark.equation("reverse-variance")
def test_a_network_with_twice_the_channels_predicts_mean_and_variance():
    z = normal(2, 3, 4, 4)
    output, nu = split_output(z, z)
    assert output is z and nu is None
    for raw, between in ((-1.0, 0.0), (0.5, 0.75)):
        output, nu = split_output(torch.cat([z, torch.full_like(z, raw)], dim=1), z)
        assert torch.equal(output, z)
        assert torch.equal(nu, torch.full((2, 3, 4, 4), between))
    with pytest.raises(ValueError, match=r"twice the channels, got \(2, 5, 4, 4\)"):
        split_output(torch.zeros(2, 5, 4, 4), z)


@pytest.mark.equation("variational-bound")
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_term_of_the_bound_is_the_divergence_of_two_normal_distributions(variance):
    r"""Against torch.distributions, with both means from q_posterior; and at t = 0 the log-density of z_0."""
    t = at(1, 2, 40, 500, 999, 0)
    z_0, eps, output, nu = (normal(6, 5, seed=k) for k in range(4))
    z_t = q_sample(LINEAR, z_0, t, eps)
    term = variational_term(LINEAR, z_0, z_t, t, output, "eps", variance, nu)
    z_0_hat, _ = x_0_and_eps(LINEAR, z_t, t, output, "eps")
    mu, beta_tilde = q_posterior(LINEAR, z_0, z_t, t)
    mu_hat, _ = q_posterior(LINEAR, z_0_hat, z_t, t)
    sigma = reverse_variance(LINEAR, z_t, t, None, variance, nu).sqrt().expand_as(mu)
    q = Normal(mu[:5], beta_tilde[:5].sqrt().expand_as(mu[:5]))
    divergence = kl_divergence(q, Normal(mu_hat[:5], sigma[:5])).mean(1)
    last = -Normal(mu_hat, sigma).log_prob(z_0)[5:].mean(1)
    by_hand = torch.cat([divergence, last]) / math.log(2)
    assert (term / by_hand - 1).abs().max() < 1e-5


@pytest.mark.equation("prior-term")
def test_the_prior_term_is_the_mean_over_the_elements_of_a_divergence_from_the_standard_normal():
    z_0 = normal(3, 5)
    alpha_bar_T = LINEAR.alpha_bar[-1]
    q = Normal(alpha_bar_T.sqrt() * z_0, (1 - alpha_bar_T).sqrt())
    by_hand = kl_divergence(q, Normal(torch.zeros(3, 5).double(), 1.0)).mean(1) / math.log(2)
    assert (prior_term(LINEAR, z_0) - by_hand).abs().max() < 1e-9


@pytest.mark.equation("variational-bound", "prior-term")
@pytest.mark.parametrize("name", NAMES)
def test_with_the_exact_mean_and_variance_the_bound_is_the_datas_entropy(name):
    r"""For data N(m, s^2) every reverse step is normal, so the bound has no gap but the one of its start: it is the
    entropy plus the divergence of x_T from the standard normal. All terms are quadratic in (z_0, eps), so four points,
    one deviation to either side, give their expectation exactly. The whole chain, all times, to 1e-6 of a bit."""
    schedule = Schedule.named(name)
    m = 0.6
    s = 0.5
    T = schedule.timesteps
    ab = schedule.alpha_bar
    before = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    spread = ab * s**2 + 1 - ab
    spread_before = before * s**2 + 1 - before
    exact = spread_before * schedule.beta / spread  # variance of x_{t-1} given x_t, by Bayes' rule
    like = torch.zeros(T, 1)
    t = torch.arange(T)
    ends = [reverse_variance(schedule, like, t, variance=form)[:, 0] for form in ("posterior", "beta")]
    nu = ((exact / ends[0]).log() / (ends[1] / ends[0]).log())[:, None]

    def expected(variance):
        total = 0.0
        for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            z_0 = torch.full((T, 1), m + a * s, dtype=torch.float64)
            z_t = q_sample(schedule, z_0, t, torch.full((T, 1), b, dtype=torch.float64))
            best = m + (ab.sqrt() * s**2 / spread)[:, None] * (z_t - m * ab.sqrt()[:, None])
            total += variational_term(schedule, z_0, z_t, t, best, "x_0", variance, nu).sum().item() / 4
        return total

    ends_of_data = torch.tensor([[m - s], [m + s]], dtype=torch.float64)
    prior = prior_term(schedule, ends_of_data).mean().item()
    gap = kl_divergence(Normal(ab[-1].sqrt() * m, spread[-1].sqrt()), Normal(0.0, 1.0)).item()
    entropy = Normal(m, s).entropy().item()
    assert abs(prior + expected("learned") - (entropy + gap) / math.log(2)) < 1e-6
    for other in ("posterior", "beta"):  # any other variance costs bits
        assert expected(other) > expected("learned") + 1e-4


@pytest.mark.equation("hybrid-loss")
def test_the_learned_variance_learns_by_the_bound_and_the_mean_by_the_square_alone():
    r"""Improved DDPM, equation 16: the loss adds lambda T L_{t-1}, and no gradient of it reaches the mean."""
    z_0, eps, mean, raw = (normal(4, 3, 2, 2, seed=k) for k in range(4))
    t = at(0, 5, 300, 999)
    mean.requires_grad_()
    raw = raw.clamp(-1, 1).requires_grad_()

    def both(z_t, t):
        return torch.cat([mean, raw], dim=1)

    loss = diffusion_loss(LINEAR, both, z_0, t, eps, vlb_weight=0.01)
    simple = diffusion_loss(LINEAR, lambda z_t, t: mean, z_0, t, eps)
    z_t = q_sample(LINEAR, z_0, t, eps)
    bits = variational_term(LINEAR, z_0, z_t, t, mean, "eps", "learned", (raw + 1) / 2)
    assert (loss - simple - 0.01 * 1000 * bits).abs().max() < 1e-4 * bits.abs().max()
    from_loss, from_raw = torch.autograd.grad(loss.sum(), (mean, raw))
    assert far(from_loss, torch.autograd.grad(simple.sum(), mean)[0]) < 1e-6
    expected = torch.autograd.grad(10 * bits.sum(), raw)[0]
    assert far(from_raw, expected) < 1e-4 * expected.abs().max()
    assert torch.equal(diffusion_loss(LINEAR, both, z_0, t, eps, vlb_weight=0.0), simple)


@pytest.mark.equation("reverse-variance", "hybrid-loss")
def test_following_the_loss_the_variance_becomes_the_exact_one():
    r"""One number for nu at one time, data N(0, 1/4), the exact mean: the minimum is the variance of Bayes' rule."""
    time = 400
    s = 0.5
    n = 4096
    ab = LINEAR.alpha_bar[time]
    before = LINEAR.alpha_bar[time - 1]
    exact = (before * s**2 + 1 - before) * LINEAR.beta[time] / (ab * s**2 + 1 - ab)
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True)
    z_0 = s * normal(n, 1)
    t = torch.full((n,), time)

    def network(z_t, t):
        best = (1 - ab).sqrt() * z_t / (ab * s**2 + 1 - ab)
        return torch.cat([best, raw.expand_as(z_t)], dim=1)

    optimizer = torch.optim.LBFGS([raw], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = diffusion_loss(LINEAR, network, z_0, t, normal(n, 1, seed=1), vlb_weight=1.0).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    nu = ((raw.detach() + 1) / 2).expand(n, 1)
    learned = reverse_variance(LINEAR, z_0, t, None, "learned", nu)[0]
    assert abs(learned.item() / exact.item() - 1) < 1e-3
