r"""The forward chain, its posterior and the three predictions, against algebra, Bayes' rule and the loss by hand."""

import math

import pytest
import torch

from ddpm.diffusion import (
    PREDICTIONS,
    VARIANCES,
    forward_step,
    q_posterior,
    q_sample,
    reverse_variance,
    score_from,
    v_from,
    x_0_and_eps,
)
from ddpm.losses import diffusion_loss, prior_term, split_output, training_target, variational_term
from ddpm.schedule import SCHEDULES, Schedule

NAMES = sorted(SCHEDULES)
LINEAR = Schedule.named("linear")


def at(*times):
    return torch.tensor(times)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------- forward


@pytest.mark.equation("forward-step")
def test_one_step_of_noise_is_equation_2_by_hand():
    x_1 = forward_step(LINEAR, torch.tensor([3.0]).double(), at(0), torch.tensor([2.0]).double())
    assert x_1.item() == pytest.approx(math.sqrt(1 - 1e-4) * 3 + math.sqrt(1e-4) * 2, abs=1e-14)
    x_T = forward_step(LINEAR, torch.tensor([3.0]).double(), at(999), torch.tensor([2.0]).double())
    assert x_T.item() == pytest.approx(math.sqrt(0.98) * 3 + math.sqrt(0.02) * 2, abs=1e-14)


@pytest.mark.equation("forward-step", "closed-form")
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_single_steps_have_the_mean_and_variance_of_q_sample(name):
    r"""A step is a x + b eps: x = 1, eps = 0 shows a, x = 0, eps = 1 shows b, and then
    mean <- a mean, variance <- a^2 variance + b^2. q_sample shows its own two numbers in the same way."""
    schedule = Schedule.named(name)
    shown = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    mean, variance = 1.0, 0.0
    for t in range(schedule.timesteps):
        a, b = forward_step(schedule, shown[0], at(t, t), shown[1]).tolist()
        mean, variance = a * mean, a * a * variance + b * b
        signal, noise = q_sample(schedule, shown[0], at(t, t), shown[1]).tolist()
        # 1e-12: a thousand roundings of 1e-16 each; the issue asks for 1e-6
        assert abs(mean - signal) < 1e-12
        assert abs(variance - noise**2) < 1e-12


@pytest.mark.equation("forward-step", "closed-form")
def test_a_hundred_random_steps_agree_with_q_sample():
    r"""100,000 walkers; a mean has standard error sqrt(v / n), a variance v sqrt(2 / n). Both may be off by four
    standard errors, which chance alone exceeds once in 8,000 drawings; the seed is fixed."""
    n, last = 100_000, 99
    generator = torch.Generator().manual_seed(0)
    x = torch.full((1, n), 0.7)
    for t in range(last + 1):
        x = forward_step(LINEAR, x, at(t), torch.randn(1, n, generator=generator))
    mean = LINEAR.alpha_bar[last].sqrt().item() * 0.7
    variance = 1 - LINEAR.alpha_bar[last].item()
    assert abs(x.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) < 4 * variance * math.sqrt(2 / n)


@pytest.mark.equation("closed-form")
def test_q_sample_is_equation_4_by_hand_with_a_time_for_each_element():
    x_0, eps = (
        torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double(),
        torch.tensor([[0.3, 0.1], [-1.0, 2.0]]).double(),
    )
    x_t = q_sample(LINEAR, x_0, at(0, 1), eps)
    alpha_bar = [1 - 1e-4, (1 - 1e-4) * (1 - (1e-4 + (0.02 - 1e-4) / 999))]
    for i in range(2):
        for j in range(2):
            by_hand = (
                math.sqrt(alpha_bar[i]) * x_0[i, j].item() + math.sqrt(1 - alpha_bar[i]) * eps[i, j].item()
            )
            assert x_t[i, j].item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.equation("closed-form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_input_keeps_its_type_and_is_rounded_once(dtype):
    x_0, eps = normal(4, 3, 8, 8, seed=1).to(dtype), normal(4, 3, 8, 8, seed=2).to(dtype)
    t = at(0, 10, 500, 999)
    x_t = q_sample(LINEAR, x_0, t, eps)
    assert x_t.dtype == dtype
    assert torch.equal(x_t, q_sample(LINEAR, x_0.double(), t, eps.double()).to(dtype))


# ------------------------------------------------------------------------------------------- posterior


@pytest.mark.equation("posterior")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [1, 50])
def test_the_posterior_is_bayes_rule_for_gaussians(name, stride):
    r"""q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0). As functions of x_s both are Gaussians:
    precisions add, means are weighed by them. q(x_t | x_s) is walked with `forward_step`, one step after another."""
    schedule = Schedule.named(name)
    times = list(range(1, 1000)) if stride == 1 else list(range(stride, 1000, 37))
    t = torch.tensor(times)
    x_0, x_t = normal(len(times), seed=1), normal(len(times), seed=2)
    shown = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    mean, variance = q_posterior(schedule, x_0, x_t, t, None if stride == 1 else t - stride)
    for i, time in enumerate(times):
        a, spread = 1.0, 0.0  # x_t given x_s: mean a x_s, variance spread
        for step in range(time - stride + 1, time + 1):
            a_1, b_1 = forward_step(schedule, shown[0], at(step, step), shown[1]).tolist()
            a, spread = a * a_1, a_1**2 * spread + b_1**2
        prior_mean, prior_variance = (
            schedule.alpha_bar[time - stride].sqrt().item() * x_0[i].item(),
            1 - schedule.alpha_bar[time - stride].item(),
        )
        precision = a**2 / spread + 1 / prior_variance
        by_bayes = (a * x_t[i].item() / spread + prior_mean / prior_variance) / precision
        # 1 - alpha_bar loses up to four digits where alpha_bar is close to 1, of sixteen
        assert abs(mean[i].item() - by_bayes) < 1e-9
        assert abs(variance[i].item() - 1 / precision) < 1e-10


@pytest.mark.equation("posterior")
@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_of_the_first_step_is_the_clean_picture_itself(name):
    x_0, x_t = normal(2, 4, 3, 3, seed=1), normal(2, 4, 3, 3, seed=2)
    for t, s in [(at(0, 0), None), (at(0, 0), at(-1, -1)), (at(700, 999), at(-1, -1))]:
        mean, variance = q_posterior(Schedule.named(name), x_0, x_t, t, s)
        assert torch.equal(mean, x_0)
        assert variance.shape == (2, 1, 1, 1)
        assert variance.tolist() == torch.zeros(2, 1, 1, 1).tolist()


@pytest.mark.equation("posterior")
def test_the_posterior_variance_is_equation_7_and_below_beta():
    t = torch.arange(1, 1000)
    zeros = torch.zeros(999, dtype=torch.float64)
    _, variance = q_posterior(LINEAR, zeros, zeros, t)
    by_hand = (1 - LINEAR.alpha_bar[:-1]) / (1 - LINEAR.alpha_bar[1:]) * LINEAR.beta[1:]
    # beta from a quotient of two alpha_bars instead of the table: 1e-16 in a number about 1
    assert (variance - by_hand).abs().max().item() < 1e-14
    assert bool((variance < LINEAR.beta[1:]).all())


@pytest.mark.equation("posterior")
def test_one_posterior_step_undoes_one_forward_step_in_distribution():
    r"""Drawing x_t from q(x_t | x_0), then x_{t-1} from the posterior, must give q(x_{t-1} | x_0): the variance is
    c^2 (1 - alpha_bar_t) + beta-tilde, with c the coefficient of x_t, shown by x_t = 1, x_0 = 0."""
    t = torch.arange(1, 1000)
    zeros, ones = torch.zeros(999, dtype=torch.float64), torch.ones(999, dtype=torch.float64)
    c, variance = q_posterior(LINEAR, zeros, ones, t)
    assert (
        c**2 * (1 - LINEAR.alpha_bar[1:]) + variance - (1 - LINEAR.alpha_bar[:-1])
    ).abs().max().item() < 1e-12


# ------------------------------------------------------------------------------------------- predictions


@pytest.mark.equation("predictions")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_a_perfect_prediction_gives_back_picture_and_noise(name, prediction, dtype, tolerance):
    r"""float32: eps or x_0 is divided by sqrt(alpha_bar) or its complement, which at these times is at least 1e-2,
    after one rounding of 6e-8 of numbers up to 5, so 5e-5; 1e-3 leaves room. In float64 the hardest case is the
    cosine schedule's end, where eps is multiplied by 2e4."""
    schedule = Schedule.named(name)
    times = [0, 1, 10, 500, 900, 990] + ([998, 999] if dtype == torch.float64 else [])
    t = torch.tensor(times)
    x_0, eps = (normal(len(times), 3, 4, 4, seed=seed).to(dtype) for seed in (1, 2))
    x_t = q_sample(schedule, x_0, t, eps)
    target = training_target(schedule, x_0, t, eps, prediction)
    x_0_hat, eps_hat = x_0_and_eps(schedule, x_t, t, target, prediction)
    assert x_0_hat.dtype == eps_hat.dtype == dtype
    assert (x_0_hat - x_0).abs().max().item() < tolerance
    assert (eps_hat - eps).abs().max().item() < tolerance


@pytest.mark.equation("predictions")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whatever_a_network_says_picture_and_noise_add_up_to_x_t(prediction):
    r"""Also for a network that is wrong; the sum must hold or DDIM would walk away from its own sample."""
    t = at(0, 300, 999)
    x_t, output = normal(3, 4, 4, 4, seed=1), normal(3, 4, 4, 4, seed=2)
    x_0, eps = x_0_and_eps(LINEAR, x_t, t, output, prediction)
    assert (q_sample(LINEAR, x_0, t, eps) - x_t).abs().max().item() < 1e-12


@pytest.mark.equation("v", "predictions")
def test_the_three_predictions_are_one_another():
    r"""Reading eps, then saying it as v, then reading v, arrives at the same pair; so does x_0."""
    t = at(3, 300, 999)
    x_t, eps = normal(3, 4, 4, 4, seed=1), normal(3, 4, 4, 4, seed=2)
    x_0, _ = x_0_and_eps(LINEAR, x_t, t, eps, "eps")
    for prediction, output in [("v", v_from(LINEAR, x_0, t, eps)), ("x_0", x_0)]:
        pair = x_0_and_eps(LINEAR, x_t, t, output, prediction)
        assert (pair[0] - x_0).abs().max().item() < 1e-6
        assert (pair[1] - eps).abs().max().item() < 1e-6


@pytest.mark.equation("v")
def test_v_is_noise_at_the_start_and_minus_the_picture_at_the_end():
    x_0, eps = torch.tensor([2.0, 2.0]).double(), torch.tensor([0.5, 0.5]).double()
    v = v_from(LINEAR, x_0, at(0, 999), eps)
    assert v[0].item() == pytest.approx(math.sqrt(1 - 1e-4) * 0.5 - math.sqrt(1e-4) * 2, abs=1e-12)
    assert v[1].item() == pytest.approx(-2.0, abs=4e-3)  # sqrt(alpha_bar) is 6.4e-3 there, times 0.5


@pytest.mark.equation("v")
def test_v_is_the_derivative_of_x_t_along_the_angle():
    r"""With sqrt(alpha_bar) = cos(phi) and sqrt(1 - alpha_bar) = sin(phi), v = d x_t / d phi (appendix D)."""
    phi = torch.acos(LINEAR.alpha_bar[400].sqrt()).item()
    x_0, eps, step = 2.0, 0.5, 1e-5

    def x(angle):
        return math.cos(angle) * x_0 + math.sin(angle) * eps

    v = v_from(LINEAR, torch.tensor([x_0]).double(), at(400), torch.tensor([eps]).double())
    # a central difference is off by step^2 / 6 and by 1e-16 / step
    assert v.item() == pytest.approx((x(phi + step) - x(phi - step)) / (2 * step), abs=1e-9)


@pytest.mark.equation("objective")
def test_training_targets_are_the_noise_the_picture_and_the_velocity():
    x_0, eps, t = normal(2, 3, seed=1), normal(2, 3, seed=2), at(5, 500)
    assert torch.equal(training_target(LINEAR, x_0, t, eps, "eps"), eps)
    assert torch.equal(training_target(LINEAR, x_0, t, eps, "x_0"), x_0)
    assert torch.equal(training_target(LINEAR, x_0, t, eps, "v"), v_from(LINEAR, x_0, t, eps))


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.equation("objective")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_loss_zero(prediction):
    z_0, eps, t = (normal(3, 4, 8, 8, seed=1).float(), normal(3, 4, 8, 8, seed=2).float(), at(0, 500, 999))
    target = training_target(LINEAR, z_0, t, eps, prediction)
    loss = diffusion_loss(LINEAR, lambda z_t, t: target, z_0, t, eps, prediction)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.equation("objective")
def test_the_loss_is_the_mean_square_of_each_element_by_hand():
    z_0 = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, 1.0]])
    eps = torch.tensor([[0.3, 0.1, -0.7], [-1.0, 2.0, 0.0]])
    loss = diffusion_loss(LINEAR, lambda z_t, t: torch.zeros_like(z_t), z_0, at(5, 500), eps)
    assert loss[0].item() == pytest.approx((0.3**2 + 0.1**2 + 0.7**2) / 3, abs=1e-6)
    assert loss[1].item() == pytest.approx((1.0 + 4.0 + 0.0) / 3, abs=1e-6)


@pytest.mark.equation("objective")
def test_the_network_is_asked_about_z_t_at_its_own_time():
    z_0, eps, t = normal(2, 4, 4, 4, seed=1), normal(2, 4, 4, 4, seed=2), at(5, 500)
    asked = []

    def denoise(z_t, time):
        asked.append((z_t, time))
        return z_t

    diffusion_loss(LINEAR, denoise, z_0, t, eps)
    [(z_t, time)] = asked
    assert torch.equal(z_t, q_sample(LINEAR, z_0, t, eps))
    assert torch.equal(time, t)


@pytest.mark.equation("objective")
def test_the_gradient_of_the_loss_reaches_the_network():
    z_0, eps = normal(2, 3, seed=1).float(), normal(2, 3, seed=2).float()
    scale = torch.tensor(0.5, requires_grad=True)
    z_t = q_sample(LINEAR, z_0, at(100, 900), eps)
    diffusion_loss(LINEAR, lambda z, t: scale * z, z_0, at(100, 900), eps).sum().backward()
    by_hand = (2 * (0.5 * z_t - eps) * z_t).mean(dim=1).sum()
    assert scale.grad.item() == pytest.approx(
        by_hand.item(), abs=1e-5
    )  # float32 sums of a few numbers about 1


# ------------------------------------------------------------------------------------------- refusals

DOORS = {
    "forward_step": lambda x, y, t: forward_step(LINEAR, x, t, y),
    "q_sample": lambda x, y, t: q_sample(LINEAR, x, t, y),
    "q_posterior": lambda x, y, t: q_posterior(LINEAR, x, y, t),
    "x_0_and_eps": lambda x, y, t: x_0_and_eps(LINEAR, x, t, y, "eps"),
    "diffusion_loss": lambda x, y, t: diffusion_loss(LINEAR, lambda z_t, t: z_t, x, t, y),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "t, told",
    [
        (torch.tensor([0.5, 1.0]), "integers in .*, got torch.float32"),
        (7, "integers in .*, got int"),
        (torch.tensor([0, 1000]), r"999, got 0\.\.1000"),
        (torch.tensor([-2, 0]), r"999, got -[23]\.\."),
        (torch.tensor([1, 2, 3]), r"shape \(2,\), .*, got \(3,\)"),
    ],
)
def test_a_bad_time_is_refused_at_every_door(door, t, told):
    with pytest.raises(ValueError, match=told):
        DOORS[door](torch.zeros(2, 3), torch.zeros(2, 3), t)


@pytest.mark.parametrize("door", DOORS)
def test_tensors_of_two_shapes_are_refused_at_every_door(door):
    r"""(2, 1) would broadcast against (2, 3) without a word."""
    with pytest.raises(ValueError, match="expected two tensors of one shape, got") as refusal:
        DOORS[door](torch.zeros(2, 3), torch.zeros(2, 1), at(0, 1))
    assert "(2, 3)" in str(refusal.value)
    assert "(2, 1)" in str(refusal.value)


@pytest.mark.parametrize("door", DOORS)
def test_pictures_of_whole_numbers_are_refused_at_every_door(door):
    r"""uint8 pictures would be rounded to 0 and 1 without a word."""
    with pytest.raises(ValueError, match="expected floating-point tensors, got torch.uint8"):
        DOORS[door](torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8), at(0, 1))


def test_an_unknown_prediction_is_refused_and_the_known_ones_are_named():
    x, t = torch.zeros(1, 3), at(0)
    for ask in (
        lambda: x_0_and_eps(LINEAR, x, t, x, "epsilon"),
        lambda: training_target(LINEAR, x, t, x, "epsilon"),
        lambda: diffusion_loss(LINEAR, lambda z_t, t: z_t, x, t, x, "epsilon"),
    ):
        with pytest.raises(ValueError, match="eps, v, x_0, (score, )?got 'epsilon'"):
            ask()


def test_the_clean_picture_is_no_time_to_denoise_from_and_a_step_back_goes_back():
    schedule, x = Schedule.named("linear"), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"in 0\.\.999, got -1"):
        x_0_and_eps(schedule, x, torch.tensor([-1]), x, "eps")
    with pytest.raises(ValueError, match="s before t"):
        q_posterior(schedule, x, x, torch.tensor([5]), torch.tensor([5]))


def test_small_integer_types_do_not_wrap_around():
    schedule, x = Schedule.named("linear"), torch.ones(1, 2)
    mean, variance = q_posterior(schedule, x, x, torch.tensor([0], dtype=torch.uint8))
    assert torch.equal(mean, x) and variance.item() == 0


def test_a_network_that_answers_in_another_shape_is_refused():
    schedule, z = Schedule.named("linear"), torch.zeros(2, 4, 4, 4)
    with pytest.raises(
        ValueError, match=r"in shape \(2, 4, 4, 4\), or with twice the channels.* got \(2, 1, 4, 4\)"
    ):
        diffusion_loss(schedule, lambda z_t, t: z_t[:, :1], z, torch.tensor([0, 1]), z)


# ------------------------------------------------------------------------------------------- score, variance, bound


@pytest.mark.equation("predictions", "score")
@pytest.mark.parametrize("name", NAMES)
def test_eps_v_x_0_and_score_convert_into_one_another_and_back(name):
    r"""At both ends of time and between, in double precision, relative to the size of what comes back."""
    schedule, t = Schedule.named(name), at(0, 1, 10, 500, 998, 999)
    x_0, eps = normal(6, 4), normal(6, 4, seed=1)
    x_t = q_sample(schedule, x_0, t, eps)
    said = {"eps": eps, "x_0": x_0, "v": v_from(schedule, x_0, t, eps), "score": score_from(schedule, t, eps)}
    for prediction, output in said.items():
        x_0_again, eps_again = x_0_and_eps(schedule, x_t, t, output, prediction)
        assert (x_0_again - x_0).abs().max() < 1e-6
        assert (eps_again - eps).abs().max() < 1e-6
        assert (score_from(schedule, t, eps_again) / said["score"] - 1).abs().max() < 1e-6
        assert (v_from(schedule, x_0_again, t, eps_again) - said["v"]).abs().max() < 1e-6


@pytest.mark.equation("score")
@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_gradient_of_the_log_density_of_x_t(name):
    r"""For a single picture x_0, by autograd through torch.distributions' normal density."""
    schedule, t = Schedule.named(name), at(0, 300, 999)
    x_0, eps = normal(3, 2), normal(3, 2, seed=1)
    x_t = q_sample(schedule, x_0, t, eps).requires_grad_()
    ab = schedule.alpha_bar_at(t, x_t)
    torch.distributions.Normal(ab.sqrt() * x_0, (1 - ab).sqrt()).log_prob(x_t).sum().backward()
    assert (score_from(schedule, t, eps) / x_t.grad - 1).abs().max() < 1e-6


@pytest.mark.equation("reverse-variance")
@pytest.mark.parametrize("name", NAMES)
def test_the_three_forms_of_the_reverse_variance(name):
    r"""beta_t, the posterior's, and between them geometrically; at t = 0 the posterior's is that of t = 1."""
    schedule, t = Schedule.named(name), torch.arange(1000)
    like = torch.zeros(1000, 2)
    posterior, beta = (reverse_variance(schedule, like, t, variance=form) for form in ("posterior", "beta"))
    assert (beta[:, 0] / schedule.beta - 1).abs().max() < 1e-9
    _, tilde = q_posterior(schedule, like, like, t)
    assert torch.equal(posterior[1:], tilde[1:])
    assert posterior[0] == posterior[1] > 0
    assert (posterior[1:] < beta[1:]).all()
    nu = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learned = reverse_variance(schedule, like, t, variance="learned", nu=nu)
    assert learned.shape == (1000, 2)
    assert (learned.log() - (nu * beta.log() + (1 - nu) * posterior.log())).abs().max() < 1e-9


@pytest.mark.equation("reverse-variance")
def test_the_reverse_variance_over_skipped_steps_is_the_posteriors_and_its_bound():
    t, s, like = at(999, 500, 20), at(499, 3, -1), torch.zeros(3, 1)
    _, tilde = q_posterior(LINEAR, like, like, t, s)
    posterior = reverse_variance(LINEAR, like, t, s)
    assert torch.equal(posterior[:2], tilde[:2])
    assert posterior[2] == reverse_variance(LINEAR, torch.zeros(1, 1), at(1))
    beta = reverse_variance(LINEAR, like, t, s, "beta")[:, 0]
    ab = LINEAR.alpha_bar
    assert (beta - torch.stack([1 - ab[999] / ab[499], 1 - ab[500] / ab[3], 1 - ab[20]])).abs().max() < 1e-12


@pytest.mark.equation("reverse-variance")
def test_a_network_with_twice_the_channels_says_mean_and_variance():
    z = normal(2, 3, 4, 4)
    output, nu = split_output(z, z)
    assert output is z and nu is None
    output, nu = split_output(torch.cat([z, torch.full_like(z, -1.0)], dim=1), z)
    assert torch.equal(output, z) and torch.equal(nu, torch.zeros(2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"in shape \(2, 3, 4, 4\), or with twice the channels.* got \(2, 5, 4, 4\)"
    ):
        split_output(torch.zeros(2, 5, 4, 4), z)


def test_a_variance_that_cannot_be_is_refused():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="posterior, beta, learned, got 'fixed'"):
        reverse_variance(LINEAR, z, at(1, 2), variance="fixed")
    with pytest.raises(ValueError, match=r"nu of shape \(2, 3\).* got none"):
        reverse_variance(LINEAR, z, at(1, 2), variance="learned")
    with pytest.raises(ValueError, match=r"nu of shape \(2, 3\).* got \(2, 1\)"):
        reverse_variance(LINEAR, z, at(1, 2), variance="learned", nu=torch.zeros(2, 1))


@pytest.mark.equation("variational-bound")
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_term_of_the_bound_is_the_divergence_of_two_normal_distributions(variance):
    r"""Against torch.distributions, with both means from q_posterior; and at t = 0 the log-density of z_0."""
    t = at(1, 2, 40, 500, 999, 0)
    z_0, eps, said, nu = (normal(6, 5, seed=k) for k in range(4))
    z_t = q_sample(LINEAR, z_0, t, eps)
    term = variational_term(LINEAR, z_0, z_t, t, said, "eps", variance, nu)
    z_0_hat, _ = x_0_and_eps(LINEAR, z_t, t, said, "eps")
    mu, beta_tilde = q_posterior(LINEAR, z_0, z_t, t)
    mu_hat, _ = q_posterior(LINEAR, z_0_hat, z_t, t)
    sigma = reverse_variance(LINEAR, z_t, t, None, variance, nu).sqrt().expand_as(mu)
    p = torch.distributions.Normal(mu_hat, sigma)
    q = torch.distributions.Normal(mu[:5], beta_tilde[:5].sqrt().expand_as(mu[:5]))
    by_hand = torch.distributions.kl_divergence(q, torch.distributions.Normal(mu_hat[:5], sigma[:5])).mean(1)
    by_hand = torch.cat([by_hand, -p.log_prob(z_0)[5:].mean(1)]) / math.log(2)
    assert (term / by_hand - 1).abs().max() < 1e-5


@pytest.mark.equation("prior-term")
def test_the_prior_term_is_the_divergence_of_q_at_the_end_from_the_standard_normal():
    z_0, ab = normal(3, 5), LINEAR.alpha_bar[-1]
    q = torch.distributions.Normal(ab.sqrt() * z_0, (1 - ab).sqrt())
    by_hand = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean(1) / math.log(2)
    assert (prior_term(LINEAR, z_0) - by_hand).abs().max() < 1e-12


@pytest.mark.equation("variational-bound", "prior-term")
@pytest.mark.parametrize("name", NAMES)
def test_with_the_exact_mean_and_variance_the_bound_is_the_datas_entropy(name):
    r"""For data N(m, s^2) every step back is normal, so the bound has no gap but the one of its start: it is the
    entropy plus the divergence of x_T from the standard normal. All terms are quadratic in (z_0, eps), so four points,
    one deviation to either side, give their expectation exactly. The whole chain, all times, to 1e-6 of a bit."""
    schedule, m, s = Schedule.named(name), 0.6, 0.5
    T, ab = schedule.timesteps, schedule.alpha_bar
    before = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    spread, spread_before = ab * s**2 + 1 - ab, before * s**2 + 1 - before
    exact = spread_before * schedule.beta / spread  # variance of x_{t-1} given x_t, by Bayes' rule
    like, t = torch.zeros(T, 1), torch.arange(T)
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

    prior = sum(
        prior_term(schedule, torch.tensor([[m + a * s]], dtype=torch.float64)).item() / 2 for a in (-1, 1)
    )
    x_T = torch.distributions.Normal(ab[-1].sqrt() * m, spread[-1].sqrt())
    gap = torch.distributions.kl_divergence(x_T, torch.distributions.Normal(0.0, 1.0)).item()
    entropy = torch.distributions.Normal(m, s).entropy().item()
    assert abs(prior + expected("learned") - (entropy + gap) / math.log(2)) < 1e-6
    for other in ("posterior", "beta"):  # any other variance costs bits
        assert expected(other) > expected("learned") + 1e-4


@pytest.mark.equation("hybrid-loss")
def test_the_learned_variance_is_taught_by_the_bound_and_the_mean_by_the_square_alone():
    r"""Improved DDPM, equation 16: the loss adds lambda T L_{t-1}, and no gradient of it reaches the mean."""
    z_0, eps, t = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1), at(0, 5, 300, 999)
    mean = normal(4, 3, 2, 2, seed=2).requires_grad_()
    raw = normal(4, 3, 2, 2, seed=3).clamp(-1, 1).requires_grad_()
    loss = diffusion_loss(LINEAR, lambda z_t, t: torch.cat([mean, raw], dim=1), z_0, t, eps, vlb_weight=0.01)
    simple = diffusion_loss(LINEAR, lambda z_t, t: mean, z_0, t, eps)
    z_t = q_sample(LINEAR, z_0, t, eps)
    bits = variational_term(LINEAR, z_0, z_t, t, mean, "eps", "learned", (raw + 1) / 2)
    assert (loss - simple - 0.01 * 1000 * bits).abs().max() < 1e-3 * bits.abs().max() * 10 * 0.01
    from_loss, from_raw = torch.autograd.grad(loss.sum(), (mean, raw))
    assert (from_loss - torch.autograd.grad(simple.sum(), mean)[0]).abs().max() < 1e-6
    expected = torch.autograd.grad(10 * bits.sum(), raw)[0]
    assert (from_raw - expected).abs().max() < 1e-4 * expected.abs().max()
    without = diffusion_loss(
        LINEAR, lambda z_t, t: torch.cat([mean, raw], dim=1), z_0, t, eps, vlb_weight=0.0
    )
    assert torch.equal(without, simple)


@pytest.mark.equation("reverse-variance", "hybrid-loss")
def test_following_the_loss_the_variance_becomes_the_exact_one():
    r"""One number for nu at one time, data N(0, 1/4), the exact mean: the minimum is the variance of Bayes' rule."""
    t_of, s, n = 400, 0.5, 4096
    ab, before = LINEAR.alpha_bar[t_of], LINEAR.alpha_bar[t_of - 1]
    exact = (before * s**2 + 1 - before) * LINEAR.beta[t_of] / (ab * s**2 + 1 - ab)
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True)
    z_0, eps, t = s * normal(n, 1), normal(n, 1, seed=1), torch.full((n,), t_of)

    def network(z_t, t):
        best = (1 - ab).sqrt() * z_t / (ab * s**2 + 1 - ab)
        return torch.cat([best, raw.expand_as(z_t)], dim=1)

    optimizer = torch.optim.LBFGS([raw], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = diffusion_loss(LINEAR, network, z_0, t, eps, vlb_weight=1.0).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    learned = reverse_variance(LINEAR, z_0, t, None, "learned", ((raw.detach() + 1) / 2).expand(n, 1))[0]
    assert abs(learned.item() / exact.item() - 1) < 1e-3


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.01), (torch.float16, 0.002), (torch.float32, 1e-6)]
)
def test_every_function_answers_in_its_inputs_type_to_that_types_precision_whatever_the_memory_layout(
    dtype, tolerance
):
    schedule, t = LINEAR, at(0, 10, 500, 900)
    a, b = (normal(3, 4, seed=k).T.to(dtype) for k in range(2))
    assert not a.is_contiguous()
    for f in (
        lambda a, b: forward_step(schedule, a, t, b),
        lambda a, b: q_sample(schedule, a, t, b),
        lambda a, b: q_posterior(schedule, a, b, t)[0],
        lambda a, b: v_from(schedule, a, t, b),
        lambda a, b: score_from(schedule, t, b),
        lambda a, b: x_0_and_eps(schedule, a, t, b, "v")[0],
        lambda a, b: x_0_and_eps(schedule, a, t, b, "eps")[1],
    ):
        said, exact = f(a, b), f(a.double().contiguous(), b.double().contiguous())
        assert said.dtype == dtype
        assert ((said.double() - exact).abs() <= tolerance * exact.abs().clamp(min=1)).all()
