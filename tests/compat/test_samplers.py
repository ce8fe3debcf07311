r"""Each step of our samplers gives what diffusers' schedulers give for the same x_t, model output and noise.

The network is known in closed form: data are normal with mean 0.5 and deviation 0.8 in every coordinate, so the best
eps is linear in x_t; some noise is added to it, as a network errs.

Ours computes in double precision. Theirs holds alpha_bar in single precision, off by up to 1e-6 of its value (cosine:
1.3e-5) and 1 - alpha_bar by up to 5e-4 of its own, at t = 0. So steps are compared twice. With our table in their
scheduler the equations are compared: to 1e-9, in double precision, or to 1e-5 where their code rounds to single
(DPMSolverMultistepScheduler). With their own table, x in single precision and of size 1, they agree to 1e-5 but for a
few steps in which its error is magnified: next to t = 0, and for eta = 1 from the last time of cosine, where
1 - alpha_bar - sigma^2 is a difference of nearly equal numbers. Hence 1e-4, and 5e-4 for eta = 1,
because CPUs round their table unlike each other.

Where DDIMScheduler is wrong, a test says so, and an oracle shows which of the two is right: it takes t - T // n for the
next time, which is another than the one the network is asked at next when n does not divide T.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import far

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
KINDS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}


def scheduler(sampler: str, name: str, prediction: str, table: str = "theirs", **settings):
    r"""Their scheduler as our export would configure it, but for `settings` and perhaps our table of alpha_bar."""
    settings = schedule_config(ModelConfig(schedule=name, prediction=prediction)) | SAMPLER | settings
    made = getattr(diffusers, KINDS[sampler]).from_config(settings)
    if table == "ours":
        made.alphas_cumprod = Schedule.named(name).alpha_bar
    return made


def times_of(steps: list[int], i: int, x) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The time of step i and the next one, -1 after the last, for every row of x."""
    t, s = [*steps, -1][i : i + 2]
    return torch.full((len(x),), t), torch.full((len(x),), s)


def exact_eps(schedule: Schedule, x, t):
    r"""E[eps | x_t] when the data are N(MEAN, STD^2)."""
    a2 = schedule.alpha_bar_at(t, x)
    return ((1 - a2).sqrt() * (x - a2.sqrt() * MEAN) / (a2 * STD**2 + 1 - a2)).to(x.dtype)


def output_of(schedule: Schedule, x, t, prediction: str, g) -> torch.Tensor:
    r"""What a network with a small error would predict from x_t."""
    x_0, eps = x_0_and_eps(schedule, x, t, exact_eps(schedule, x, t), "eps")
    target = training_target(schedule, x_0, t, eps, prediction)
    return target + 0.02 * torch.randn(x.shape, generator=g, dtype=x.dtype)


def start(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return g, torch.randn(4, 4, 8, 8, generator=g, dtype=dtype)


@pytest.mark.equation("reverse-process", "reverse-variance", "ddim-step", "dpm-solver-step")
@pytest.mark.parametrize(("name", "prediction"), CASES)
@pytest.mark.parametrize("table", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("sampler", "n", "ours", "theirs"),
    [
        ("ddpm", 20, "posterior", {"variance_type": "fixed_small"}),
        (
            "ddpm",
            7,
            "posterior",
            {"variance_type": "fixed_small"},
        ),  # it looks the next time up: any n will do
        ("ddpm", 20, "beta", {"variance_type": "fixed_large"}),
        ("ddpm", 20, "learned", {"variance_type": "learned_range"}),
        ("ddim", 20, 0.0, {}),
        ("ddim", 20, 0.5, {}),
        ("ddim", 25, 1.0, {}),
        ("dpm++", 20, 0.0, {"algorithm_type": "dpmsolver++"}),
        ("dpm++", 7, 0.0, {"algorithm_type": "dpmsolver++"}),
        ("dpm++", 20, 1.0, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_each_step_is_equal(name, prediction, table, sampler, n, ours, theirs):
    r"""`ours` is the variance of ddpm, and eta of the others. `beta` and `learned` but for the noise that
    theirs leaves on a finished sample."""
    theirs = scheduler(sampler, name, prediction, table, **theirs)
    theirs.set_timesteps(n)
    schedule = Schedule.named(name)
    steps = timesteps(schedule, n)
    assert theirs.timesteps.tolist() == steps
    g, x = start(torch.float64 if table == "ours" and sampler != "dpm++" else torch.float32)
    tolerance = ROUNDED if sampler == "dpm++" or ours == "learned" else EXACT
    if table == "theirs":
        tolerance = THEIR_TABLE * (5 if ours == 1.0 else 1)
    previous = None
    for i in range(n - 1 if ours in ("beta", "learned") else n):
        t, s = times_of(steps, i, x)
        output = output_of(schedule, x, t, prediction, g)
        if ours == "learned":
            raw = torch.rand(x.shape, generator=g, dtype=x.dtype) * 2 - 1
            output = torch.cat([output, raw], dim=1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        drawn = {"variance_noise": noise}
        if sampler == "ddpm":
            drawn = {"generator": torch.Generator().manual_seed(i)}
        elif sampler == "ddim":
            drawn |= {"eta": ours}
        expected = theirs.step(output, steps[i], x, **drawn).prev_sample
        output, nu = split_output(output, x)
        x_0, eps = x_0_and_eps(schedule, x, t, output, prediction)
        if sampler == "ddpm":
            x = ddpm_step(schedule, x, t, s, x_0, noise, ours, nu)
        elif sampler == "ddim":
            x = ddim_step(schedule, x, t, s, x_0, eps, noise, ours)
        else:
            x = dpmpp_2m_step(schedule, x, t, s, x_0, previous, noise, ours)
            previous = (t, x_0)
        assert far(expected, x) < tolerance, i
    assert 0.1 < x.std() < 2


@pytest.mark.equation("alpha-bar")
@pytest.mark.parametrize("length", [1000, 100])
@pytest.mark.parametrize(
    ("name", "theirs", "ends"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", (0.0, 0.0)),
    ],
)
def test_the_tables_are_equal_and_have_the_published_ends(name, theirs, ends, length):
    r"""As the export configures them, of either length; to the rounding of single precision over a product of T. DDPM's
    and Stable Diffusion's ends are typed here, since the export would carry any others along."""
    schedule = Schedule.named(name, length)
    config = schedule_config(ModelConfig(schedule=name, timesteps=length)) | SAMPLER
    made = diffusers.DDIMScheduler.from_config(config)
    if length == 1000:
        made = diffusers.DDIMScheduler(beta_schedule=theirs, beta_start=ends[0], beta_end=ends[1])
    assert ((made.betas.double() - schedule.beta).abs() / schedule.beta).max() < 1e-6
    off = (made.alphas_cumprod.double() - schedule.alpha_bar).abs()
    assert off.max() < 1e-6
    assert (off / schedule.alpha_bar).max() < 2e-5
    assert (off / (1 - schedule.alpha_bar)).max() < 1e-3


@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("n", [8, 20])
def test_our_whole_loop_ends_where_theirs_ends(sampler, n):
    r"""All steps on the network in closed form, each side going on from its own: differences do not grow."""
    schedule = Schedule.named("scaled_linear")
    _, x_T = start()
    theirs = scheduler(sampler, "scaled_linear", "eps")
    theirs.set_timesteps(n)
    expected = x_T
    g, h = (torch.Generator().manual_seed(9) for _ in range(2))
    drawn = {"generator": g} if sampler == "ddpm" else {}
    for t in theirs.timesteps:
        eps = exact_eps(schedule, expected, t.expand(len(x_T)))
        expected = theirs.step(eps, t, expected, **drawn).prev_sample

    def draw():
        return torch.randn(x_T.shape, generator=h)

    *_, last = sample_loop(schedule, lambda x, t: exact_eps(schedule, x, t), x_T, draw, sampler, n)
    assert far(expected, last.x) < ROUNDED


# ------------------------------------------------------------------------------------------- where theirs is wrong


def test_ddims_next_time_is_the_one_at_which_the_network_is_called_next():
    r"""Oracle: for a network that predicts x_0 and eps exactly, every step must land on q_sample at the next time. And
    with the best network for data of deviation 0.8, 600 trailing steps must end at it. Steps are linear, so the
    deviation is how far two x_T one apart end from one another: ours 0.797, theirs 0.874."""
    schedule = Schedule.named("linear")
    steps = timesteps(schedule, 600)
    theirs = scheduler("ddim", "linear", "eps", "ours")
    theirs.set_timesteps(600)
    assert theirs.timesteps.tolist() == steps
    g, eps = start(torch.float64)
    x_0 = torch.randn(eps.shape, generator=g, dtype=eps.dtype)
    off = []
    mine = expected = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i in range(600):
        t, s = times_of(steps, i, eps)
        x = q_sample(schedule, x_0, t, eps)
        landed = q_sample(schedule, x_0, s, eps)
        assert far(landed, ddim_step(schedule, x, t, s, x_0, eps, torch.zeros_like(x))) < EXACT
        off.append(far(landed, theirs.step(eps, steps[i], x).prev_sample))
        t, s = times_of(steps, i, mine)
        pair = x_0_and_eps(schedule, mine, t, exact_eps(schedule, mine, t), "eps")
        mine = ddim_step(schedule, mine, t, s, *pair, torch.zeros_like(mine))
        expected = theirs.step(exact_eps(schedule, expected, t), steps[i], expected).prev_sample
    assert max(off) > 1e-3
    assert abs(mine.diff(dim=0).item() - STD) < 0.01
    assert abs(expected.diff(dim=0).item() - STD) > 0.05


@pytest.mark.equation("start")
@pytest.mark.parametrize(("n", "strength"), [(20, 0.5), (20, 0.6), (50, 0.75), (50, 0.33), (10, 1.0)])
def test_a_strength_leaves_the_steps_that_their_image_to_image_takes(n, strength):
    r"""0.29 of 100 steps would not do: theirs rounds 28.999999999999996 down to 28."""
    theirs = scheduler("ddim", "linear", "eps")
    theirs.set_timesteps(n)
    get = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps
    expected, _ = get(SimpleNamespace(scheduler=theirs), n, strength, "cpu")
    assert timesteps(Schedule.named("linear"), n, strength) == expected.tolist()
