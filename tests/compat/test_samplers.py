r"""Each step of our samplers gives what diffusers' schedulers give for the same x_t, model output and noise.

The network is known in closed form: data are normal with mean 0.5 and deviation 0.8 in every coordinate, so the best
eps is linear in x_t; some noise is added to it, as a network errs.

Ours computes in double precision. Theirs holds alpha_bar in single precision, off by up to 1e-6 of its value (cosine:
1.3e-5) and 1 - alpha_bar by up to 5e-4 of its own, at t = 0. So steps are compared twice. With our table in their
scheduler the equations are compared: to 1e-9, in double precision, or to 1e-5 where their code rounds to single
(DPMSolverMultistepScheduler). With their own table, x in single precision and of size 1, they agree to 1e-5 but for a
few steps in which its error is magnified: next to t = 0, and for eta = 1 from the last time of cosine, where
1 - alpha_bar - sigma^2 is a difference of nearly equal numbers. Hence 1e-4.

Where diffusers is wrong, a test says so, and an oracle shows which of the two is right:
- DDIMScheduler takes t - T // n for the next time, which is another than the one the network is asked at next when
  n does not divide T (`trailing`, `linspace`).
- `trailing` times come from a sum of rounded steps: some n give n + 1 times, the last of them -1.
- DDPMScheduler with `fixed_large` adds noise to the finished sample unless the last time is 0.
"""

import pytest
import torch

from compat.conftest import largest
from ddpm.config import ModelConfig
from ddpm.diffusion import q_sample, x_0_and_eps
from ddpm.export.diffusers_folder import SAMPLER, schedule_config
from ddpm.losses import split_output, training_target
from ddpm.sampling import ddim_step, ddpm_step, dpmpp_2m_step, sample_loop, timesteps
from ddpm.schedule import Schedule

diffusers = pytest.importorskip("diffusers")

EXACT, ROUNDED, THEIR_TABLE = 1e-9, 1e-5, 1e-4
MEAN, STD = 0.5, 0.8
T = 1000
CASES = [("linear", "eps"), ("linear", "v"), ("scaled_linear", "eps"), ("cosine", "v"), ("cosine", "x_0")]
cases = pytest.mark.parametrize(("name", "prediction"), CASES)
tables = pytest.mark.parametrize("table", ["ours", "theirs"])


def scheduler(kind: str, name: str, prediction: str, table: str = "theirs", **settings):
    r"""The scheduler `kind` as our export would configure it, but for `settings` and perhaps our table of alpha_bar."""
    settings = schedule_config(ModelConfig(schedule=name, prediction=prediction)) | SAMPLER | settings
    made = getattr(diffusers, kind).from_config(settings)
    if table == "ours":
        made.alphas_cumprod = Schedule.named(name).alpha_bar
    return made


def size_of(table: str) -> torch.dtype:
    return torch.float64 if table == "ours" else torch.float32


def times_of(steps: list[int], i: int, x) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The time of step i and the next one, -1 after the last, for every row of x."""
    t, s = [*steps, -1][i : i + 2]
    return torch.full((len(x),), t), torch.full((len(x),), s)


def exact_eps(schedule: Schedule, x, t):
    r"""E[eps | x_t] when the data are N(MEAN, STD^2)."""
    a2 = schedule.alpha_bar_at(t, x)
    return ((1 - a2).sqrt() * (x - a2.sqrt() * MEAN) / (a2 * STD**2 + 1 - a2)).to(x.dtype)


def output_of(schedule: Schedule, x, t, prediction: str, g) -> torch.Tensor:
    r"""What a network with a small error would say of x_t."""
    x_0, eps = x_0_and_eps(schedule, x, t, exact_eps(schedule, x, t), "eps")
    target = training_target(schedule, x_0, t, eps, prediction)
    return target + 0.02 * torch.randn(x.shape, generator=g, dtype=x.dtype)


def start(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return g, torch.randn(4, 4, 8, 8, generator=g, dtype=dtype)


@pytest.mark.equation("reverse-process")
@cases
@tables
@pytest.mark.parametrize(("spacing", "n"), [("trailing", 20), ("leading", 30), ("linspace", 7)])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_each_ddpm_step_is_equal(name, prediction, table, spacing, n, variance):
    r"""DDPMScheduler looks the next time up, so any n will do. `beta` but for the noise on a finished sample."""
    kind = {"posterior": "fixed_small", "beta": "fixed_large"}[variance]
    theirs = scheduler(
        "DDPMScheduler", name, prediction, table, timestep_spacing=spacing, steps_offset=0, variance_type=kind
    )
    theirs.set_timesteps(n)
    schedule, (g, x) = Schedule.named(name), start(size_of(table))
    steps = timesteps(schedule, n, spacing)
    assert theirs.timesteps.tolist() == steps
    for i in range(n if variance == "posterior" or steps[-1] == 0 else n - 1):
        t, s = times_of(steps, i, x)
        output = output_of(schedule, x, t, prediction, g)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        expected = theirs.step(output, steps[i], x, generator=torch.Generator().manual_seed(i)).prev_sample
        x_0, _ = x_0_and_eps(schedule, x, t, output, prediction)
        x = ddpm_step(schedule, x, t, s, x_0, noise, variance)
        assert largest(expected, x) < (EXACT if table == "ours" else THEIR_TABLE), i
    assert 0.1 < x.std() < 2


@pytest.mark.equation("ddim-step", "reverse-variance")
@cases
@tables
def test_each_ddpm_step_with_a_learned_variance_is_equal(name, prediction, table):
    r"""Theirs reads the second half of the channels as ours does, and interpolates from the clamped posterior."""
    n = 25
    theirs = scheduler(
        "DDPMScheduler",
        name,
        prediction,
        table,
        timestep_spacing="leading",
        steps_offset=0,
        variance_type="learned_range",
    )
    theirs.set_timesteps(n)
    schedule, (g, x) = Schedule.named(name), start(size_of(table))
    steps = timesteps(schedule, n, "leading")
    for i in range(n):
        t, s = times_of(steps, i, x)
        mean = output_of(schedule, x, t, prediction, g)
        raw = torch.rand(x.shape, generator=g, dtype=x.dtype) * 2 - 1
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        both = torch.cat([mean, raw], dim=1)
        expected = theirs.step(both, steps[i], x, generator=torch.Generator().manual_seed(i)).prev_sample
        output, nu = split_output(both, x)
        x_0, _ = x_0_and_eps(schedule, x, t, output, prediction)
        x = ddpm_step(schedule, x, t, s, x_0, noise, "learned", nu)
        assert largest(expected, x) < (ROUNDED if table == "ours" else THEIR_TABLE), i
    assert 0.1 < x.std() < 2


@cases
@tables
@pytest.mark.parametrize(("spacing", "n"), [("trailing", 20), ("leading", 30)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_each_ddim_step_is_equal(name, prediction, table, spacing, n, eta):
    theirs = scheduler("DDIMScheduler", name, prediction, table, timestep_spacing=spacing, steps_offset=0)
    theirs.set_timesteps(n)
    schedule, (g, x) = Schedule.named(name), start(size_of(table))
    steps = timesteps(schedule, n, spacing)
    assert theirs.timesteps.tolist() == steps
    for i in range(n):
        t, s = times_of(steps, i, x)
        output, noise = (
            output_of(schedule, x, t, prediction, g),
            torch.randn(x.shape, generator=g, dtype=x.dtype),
        )
        expected = theirs.step(output, steps[i], x, eta=eta, variance_noise=noise).prev_sample
        x_0, eps = x_0_and_eps(schedule, x, t, output, prediction)
        x = ddim_step(schedule, x, t, s, x_0, eps, noise, eta)
        assert largest(expected, x) < (EXACT if table == "ours" else THEIR_TABLE), i
    assert 0.1 < x.std() < 2


@pytest.mark.equation("dpm-solver-step")
@cases
@tables
@pytest.mark.parametrize(
    ("spacing", "n"), [("trailing", 20), ("trailing", 7), ("leading", 20), ("linspace", 12)]
)
@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_each_dpmpp_step_is_equal(name, prediction, table, spacing, n, eta, algorithm):
    r"""Their `leading` and `linspace` leave out one of n + 1 times, so those two are given as a list."""
    theirs = scheduler("DPMSolverMultistepScheduler", name, prediction, table, algorithm_type=algorithm)
    schedule, (g, x) = Schedule.named(name), start()
    steps, previous = timesteps(schedule, n, spacing), None
    theirs.set_timesteps(**({"num_inference_steps": n} if spacing == "trailing" else {"timesteps": steps}))
    assert theirs.timesteps.tolist() == steps
    for i in range(n):
        t, s = times_of(steps, i, x)
        output = output_of(schedule, x, t, prediction, g)
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        expected = theirs.step(output, steps[i], x, variance_noise=noise).prev_sample
        x_0, _ = x_0_and_eps(schedule, x, t, output, prediction)
        x, previous = dpmpp_2m_step(schedule, x, t, s, x_0, previous, noise, eta), (t, x_0)
        assert largest(expected, x) < (ROUNDED if table == "ours" else THEIR_TABLE * (1 + eta)), (
            i
        )  # e^-2h for e^-h
    assert 0.1 < x.std() < 2


@pytest.mark.equation("alpha-bar")
@pytest.mark.parametrize("length", [1000, 100])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_the_tables_are_equal(name, length):
    r"""As the export configures them, of either length; to the rounding of single precision over a product of T."""
    config = ModelConfig(schedule=name, timesteps=length)
    theirs = diffusers.DDIMScheduler.from_config(schedule_config(config) | SAMPLER)
    schedule = Schedule.named(name, length)
    assert ((theirs.betas.double() - schedule.beta).abs() / schedule.beta).max() < 1e-6
    off = (theirs.alphas_cumprod.double() - schedule.alpha_bar).abs()
    assert off.max() < 1e-6
    assert (off / schedule.alpha_bar).max() < 2e-5
    assert (off / (1 - schedule.alpha_bar)).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "theirs", "ends"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", (0.0, 0.0)),
    ],
)
def test_the_named_schedules_have_the_published_ends(name, theirs, ends):
    r"""DDPM's and Stable Diffusion's; the export would carry any others along."""
    made = diffusers.DDIMScheduler(beta_schedule=theirs, beta_start=ends[0], beta_end=ends[1])
    beta = Schedule.named(name).beta
    assert ((made.betas.double() - beta).abs() / beta).max() < 1e-6


LOOPS = {"dpm++": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}


@pytest.mark.parametrize("sampler", LOOPS)
@pytest.mark.parametrize("n", [8, 20])
def test_our_whole_loop_ends_where_theirs_ends(sampler, n):
    r"""All steps on the network in closed form, each side going on from its own: differences do not grow."""
    schedule, (_, x_T) = Schedule.named("scaled_linear"), start()
    theirs = scheduler(LOOPS[sampler], "scaled_linear", "eps")
    theirs.set_timesteps(n)
    expected, g, h = x_T, torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    for t in theirs.timesteps:
        eps = exact_eps(schedule, expected, t.expand(len(x_T)))
        expected = theirs.step(
            eps, t, expected, **({"generator": g} if sampler == "ddpm" else {})
        ).prev_sample

    def draw():
        return torch.randn(x_T.shape, generator=h)

    *_, last = sample_loop(schedule, lambda x, t: exact_eps(schedule, x, t), x_T, draw, sampler, n)
    assert largest(expected, last.x) < ROUNDED


# ------------------------------------------------------------------------------------------- where theirs is wrong


@pytest.mark.parametrize(("spacing", "n"), [("trailing", 30), ("trailing", 600), ("linspace", 20)])
def test_ddims_next_time_is_the_one_the_network_is_asked_at_next(spacing, n):
    r"""Oracle: for a network that knows x_0 and eps, every step must land on sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar)
    eps at the time that it is asked at next. Ours does; theirs lands on the noise of another time.
    """
    schedule = Schedule.named("linear")
    steps = timesteps(schedule, n, spacing)
    theirs = scheduler("DDIMScheduler", "linear", "eps", "ours", timestep_spacing=spacing, steps_offset=0)
    theirs.set_timesteps(n)
    assert theirs.timesteps.tolist() == steps
    g, eps = start(torch.float64)
    x_0 = torch.randn(eps.shape, generator=g, dtype=eps.dtype)
    theirs_is_off = []
    for i in range(n):
        t, s = times_of(steps, i, eps)
        x, landed = (q_sample(schedule, x_0, t, eps), (q_sample(schedule, x_0, s, eps) if s[0] >= 0 else x_0))
        assert largest(landed, ddim_step(schedule, x, t, s, x_0, eps, torch.zeros_like(x))) < EXACT
        theirs_is_off.append(largest(landed, theirs.step(eps, steps[i], x).prev_sample))
    assert max(theirs_is_off) > 1e-3


def test_stepping_to_another_time_costs_ddim_its_deviation():
    r"""Oracle: with the best network for data of deviation 0.8, 600 trailing steps must end at it. Steps are linear, so
    the deviation is how far two x_T one apart end from one another: ours 0.797, theirs 0.874.
    """
    schedule = Schedule.named("linear")
    steps = timesteps(schedule, 600)
    theirs = scheduler("DDIMScheduler", "linear", "eps")
    theirs.set_timesteps(600)
    mine = expected = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i in range(600):
        t, s = times_of(steps, i, mine)
        x_0, eps = x_0_and_eps(schedule, mine, t, exact_eps(schedule, mine, t), "eps")
        mine = ddim_step(schedule, mine, t, s, x_0, eps, torch.zeros_like(mine))
        expected = theirs.step(exact_eps(schedule, expected, t), steps[i], expected).prev_sample
    assert abs(mine.diff(dim=0).item() - STD) < 0.01
    assert abs(expected.diff(dim=0).item() - STD) > 0.05


@pytest.mark.equation("sampling-times")
def test_trailing_times_are_n_whole_numbers_of_the_chain():
    r"""Oracle: round(T - k T / n) - 1 in exact fractions."""
    from fractions import Fraction

    schedule = Schedule.named("linear")
    theirs = scheduler("DDPMScheduler", "linear", "eps")
    other, beyond = [], []
    for n in range(1, T + 1):
        exact = [round(T - k * Fraction(T, n)) - 1 for k in range(n)]
        assert timesteps(schedule, n) == exact
        theirs.set_timesteps(n)
        if theirs.timesteps.tolist() != exact:
            other.append(n)
        if theirs.timesteps[-1] < 0:
            beyond.append(n)
            assert len(theirs.timesteps) == n + 1
    assert 61 in beyond and len(other) < 150
    assert not set(other) & {1, 2, 4, 5, 8, 10, 15, 20, 25, 30, 40, 50, 100, 150, 200, 250, 500, 1000}


def test_fixed_large_noise_is_not_added_to_a_finished_sample():
    r"""Oracle: with the network's eps exact for one known x_0, the last step must end at that x_0."""
    schedule = Schedule.named("linear")
    theirs = scheduler("DDPMScheduler", "linear", "eps", variance_type="fixed_large")
    theirs.set_timesteps(20)
    g, eps = start()
    x_0 = torch.randn(eps.shape, generator=g)
    t, s = times_of(timesteps(schedule, 20), 19, eps)
    x = schedule.alpha_bar_at(t, eps).sqrt() * x_0 + (1 - schedule.alpha_bar_at(t, eps)).sqrt() * eps
    ours = ddpm_step(schedule, x, t, s, x_0_and_eps(schedule, x, t, eps.double(), "eps")[0], eps, "beta")
    noisy = theirs.step(eps, int(t[0]), x, generator=g).prev_sample
    assert largest(x_0, ours) < ROUNDED
    assert largest(x_0, noisy) > 0.1
