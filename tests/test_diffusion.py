r"""The forward process, its posterior, the three predictions and the reverse variance, by algebra and Bayes' rule."""

import math

import pytest
import torch
from conftest import far, normal

from ddpm.diffusion import (
    PREDICTIONS,
    forward_step,
    q_posterior,
    q_sample,
    reverse_variance,
    score_from,
    v_from,
    x_0_and_eps,
)
from ddpm.losses import training_target
from ddpm.schedule import SCHEDULES, Schedule

NAMES = sorted(SCHEDULES)
LINEAR = Schedule.named("linear")
ONE_ZERO = torch.tensor([1.0, 0.0]).double()
ZERO_ONE = torch.tensor([0.0, 1.0]).double()


def at(*times):
    return torch.tensor(times)


# ------------------------------------------------------------------------------------------- forward


@pytest.mark.equation("forward-step")
@pytest.mark.parametrize("t, beta", [(0, 1e-4), (999, 0.02)])
def test_one_step_of_noise_is_equation_2_by_hand(t, beta):
    x_t = forward_step(LINEAR, torch.tensor([3.0]).double(), at(t), torch.tensor([2.0]).double())
    assert x_t.item() == pytest.approx(math.sqrt(1 - beta) * 3 + math.sqrt(beta) * 2, abs=1e-14)


@pytest.mark.equation("forward-step", "closed-form")
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_single_steps_have_the_mean_and_variance_of_q_sample(name):
    r"""A step is a x + b eps: x = 1, eps = 0 shows a, x = 0, eps = 1 shows b, and then
    mean <- a mean, variance <- a^2 variance + b^2. q_sample shows its own two numbers in the same way."""
    schedule = Schedule.named(name)
    mean = 1.0
    variance = 0.0
    for t in range(schedule.timesteps):
        a, b = forward_step(schedule, ONE_ZERO, at(t, t), ZERO_ONE).tolist()
        mean = a * mean
        variance = a * a * variance + b * b
        signal, noise = q_sample(schedule, ONE_ZERO, at(t, t), ZERO_ONE).tolist()
        # 1e-12: a thousand roundings of 1e-16 each
        assert abs(mean - signal) < 1e-12
        assert abs(variance - noise**2) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_function_computes_in_double_precision_and_rounds_once_whatever_the_memory_layout(dtype):
    t = at(0, 10, 500, 900)
    a, b = (normal(3, 4, seed=k).T.to(dtype) for k in range(2))
    assert not a.is_contiguous()
    for f in (
        lambda a, b: forward_step(LINEAR, a, t, b),
        lambda a, b: q_sample(LINEAR, a, t, b),
        lambda a, b: q_posterior(LINEAR, a, b, t)[0],
        lambda a, b: v_from(LINEAR, a, t, b),
        lambda a, b: score_from(LINEAR, t, b),
        lambda a, b: x_0_and_eps(LINEAR, a, t, b, "v")[0],
        lambda a, b: x_0_and_eps(LINEAR, a, t, b, "v")[1],
        lambda a, b: x_0_and_eps(LINEAR, a, t, b, "eps")[0],
        lambda a, b: x_0_and_eps(LINEAR, a, t, b, "x_0")[1],
    ):
        rounded = f(a, b)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, f(a.double().contiguous(), b.double().contiguous()).to(dtype))


# ------------------------------------------------------------------------------------------- posterior


@pytest.mark.parametrize("prediction", ["epsilon", "V", "sample"])
def test_another_name_of_a_prediction_is_refused(prediction):
    x = normal(2, 4)
    with pytest.raises(ValueError, match="prediction out of eps, v, x_0"):
        x_0_and_eps(LINEAR, x, at(1, 2), x, prediction)
    with pytest.raises(ValueError, match="prediction out of eps, v, x_0"):
        training_target(LINEAR, x, at(1, 2), x, prediction)


@pytest.mark.equation("posterior")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [1, 50])
def test_the_posterior_is_bayes_rule_for_gaussians(name, stride):
    r"""q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0). As functions of x_s both are Gaussians:
    precisions add, means are weighed by them. q(x_t | x_s) is walked with `forward_step`, one step after another."""
    schedule = Schedule.named(name)
    times = list(range(1, 1000, 5)) if stride == 1 else list(range(stride, 1000, 37))
    t = torch.tensor(times)
    x_0 = normal(len(times), seed=1)
    x_t = normal(len(times), seed=2)
    mean, variance = q_posterior(schedule, x_0, x_t, t, None if stride == 1 else t - stride)
    for i, time in enumerate(times):
        a = 1.0
        spread = 0.0  # x_t given x_s: mean a x_s, variance spread
        for step in range(time - stride + 1, time + 1):
            a_1, b_1 = forward_step(schedule, ONE_ZERO, at(step, step), ZERO_ONE).tolist()
            a = a * a_1
            spread = a_1**2 * spread + b_1**2
        alpha_bar_s = schedule.alpha_bar[time - stride].item()
        precision = a**2 / spread + 1 / (1 - alpha_bar_s)
        prior = math.sqrt(alpha_bar_s) * x_0[i].item() / (1 - alpha_bar_s)
        # 1 - alpha_bar loses up to four digits where alpha_bar is close to 1, of sixteen
        assert abs(mean[i].item() - (a * x_t[i].item() / spread + prior) / precision) < 1e-9
        assert abs(variance[i].item() - 1 / precision) < 1e-10


@pytest.mark.equation("posterior")
@pytest.mark.parametrize("t, s", [(at(0, 0), None), (at(0, 0), at(-1, -1)), (at(700, 999), at(-1, -1))])
def test_the_posterior_of_the_clean_picture_is_the_clean_picture_itself(t, s):
    x_0 = normal(2, 4, 3, 3, seed=1)
    for name in NAMES:
        mean, variance = q_posterior(Schedule.named(name), x_0, normal(2, 4, 3, 3, seed=2), t, s)
        assert torch.equal(mean, x_0)
        assert torch.equal(variance, torch.zeros(2, 1, 1, 1).double())


@pytest.mark.equation("posterior", "reverse-variance")
def test_the_posterior_variance_is_equation_7_and_that_of_diffusers_own_tests():
    t = torch.arange(1, 1000)
    zeros = torch.zeros(999, dtype=torch.float64)
    _, variance = q_posterior(LINEAR, zeros, zeros, t)
    by_hand = (1 - LINEAR.alpha_bar[:-1]) / (1 - LINEAR.alpha_bar[1:]) * LINEAR.beta[1:]
    # beta from a quotient of two alpha_bars instead of the table: 1e-16 in a number about 1
    assert far(variance, by_hand) < 1e-14
    golden = reverse_variance(LINEAR, torch.zeros(2), at(487, 999))
    assert golden.tolist() == pytest.approx([0.00979, 0.02], abs=1e-5)


@pytest.mark.parametrize("s", [at(3, 5), at(3, 9)])
def test_a_time_that_is_not_before_t_is_refused(s):
    x = torch.zeros(2, 3)
    told = rf"s before t, got s = \[3, {s[1]}\] and t = \[5, 5\]"
    with pytest.raises(ValueError, match=told):
        q_posterior(LINEAR, x, x, at(5, 5), s)
    with pytest.raises(ValueError, match=told):
        reverse_variance(LINEAR, x, at(5, 5), s, "beta")


# ------------------------------------------------------------------------------------------- predictions


@pytest.mark.equation("predictions", "score", "v")
@pytest.mark.parametrize("name", NAMES)
def test_eps_v_x_0_and_score_convert_into_one_another_and_back(name):
    r"""At both ends of time and between; the hardest case is the cosine schedule's end, where eps is multiplied by
    2e4. In double precision, relative to the size of the result."""
    schedule = Schedule.named(name)
    t = at(0, 1, 10, 500, 998, 999)
    x_0 = normal(6, 4)
    eps = normal(6, 4, seed=1)
    x_t = q_sample(schedule, x_0, t, eps)
    v = v_from(schedule, x_0, t, eps)
    score = score_from(schedule, t, eps)
    for prediction, output in {"eps": eps, "x_0": x_0, "v": v, "score": score}.items():
        x_0_again, eps_again = x_0_and_eps(schedule, x_t, t, output, prediction)
        assert far(x_0_again, x_0) < 1e-6
        assert far(eps_again, eps) < 1e-6
        assert (score_from(schedule, t, eps_again) / score - 1).abs().max() < 1e-6
        assert far(v_from(schedule, x_0_again, t, eps_again), v) < 1e-6


@pytest.mark.equation("predictions")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whatever_a_network_predicts_picture_and_noise_add_up_to_x_t(prediction):
    r"""Also for a network that is wrong; the sum must hold or DDIM would walk away from its own sample."""
    t = at(0, 300, 999)
    x_t = normal(3, 4, 4, 4, seed=1)
    x_0, eps = x_0_and_eps(LINEAR, x_t, t, normal(3, 4, 4, 4, seed=2), prediction)
    assert far(q_sample(LINEAR, x_0, t, eps), x_t) < 1e-12


@pytest.mark.equation("score")
@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_gradient_of_the_log_density_of_x_t(name):
    r"""For a single picture x_0, by autograd through torch.distributions' normal density."""
    schedule = Schedule.named(name)
    t = at(0, 300, 999)
    x_0 = normal(3, 2)
    eps = normal(3, 2, seed=1)
    x_t = q_sample(schedule, x_0, t, eps).requires_grad_()
    ab = schedule.alpha_bar[t][:, None]
    torch.distributions.Normal(ab.sqrt() * x_0, (1 - ab).sqrt()).log_prob(x_t).sum().backward()
    assert (score_from(schedule, t, eps) / x_t.grad - 1).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------- reverse variance


@pytest.mark.equation("reverse-variance")
@pytest.mark.parametrize("name", NAMES)
def test_the_three_forms_of_the_reverse_variance(name):
    r"""beta_t, the posterior's, and between them geometrically; at t = 0 the posterior's is that of t = 1."""
    schedule = Schedule.named(name)
    t = torch.arange(1000)
    like = torch.zeros(1000, 2)
    posterior, beta = (reverse_variance(schedule, like, t, variance=form) for form in ("posterior", "beta"))
    assert (beta[:, 0] / schedule.beta - 1).abs().max() < 1e-9
    _, tilde = q_posterior(schedule, like, like, t)
    assert torch.equal(posterior[1:], tilde[1:])
    assert posterior[0] == posterior[1] > 0
    assert (posterior[1:] < beta[1:]).all()
    nu = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learned = reverse_variance(schedule, like, t, variance="learned", nu=nu)
    assert far(learned.log(), nu * beta.log() + (1 - nu) * posterior.log()) < 1e-9


@pytest.mark.equation("reverse-variance")
def test_the_reverse_variance_over_skipped_steps_is_the_posteriors_and_its_bound():
    t = at(999, 500, 20)
    s = at(499, 3, -1)
    like = torch.zeros(3, 1)
    _, tilde = q_posterior(LINEAR, like, like, t, s)
    posterior = reverse_variance(LINEAR, like, t, s)
    assert torch.equal(posterior[:2], tilde[:2])
    assert posterior[2] == reverse_variance(LINEAR, torch.zeros(1, 1), at(1))
    beta = reverse_variance(LINEAR, like, t, s, "beta")[:, 0]
    ab = LINEAR.alpha_bar
    assert far(beta, torch.stack([1 - ab[999] / ab[499], 1 - ab[500] / ab[3], 1 - ab[20]])) < 1e-12
