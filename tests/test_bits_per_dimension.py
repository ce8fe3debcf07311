r"""The variational bound as the evaluation reports it, against distributions whose bits are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, without_zeros

from ddpm.celeba.dataset import drawn_pictures
from ddpm.celeba.lists import TRAIN, VALID
from ddpm.diffusion import q_sample
from ddpm.evaluation.bits import bits_per_dimension, laplace_bits
from ddpm.losses import prior_term, variational_term
from ddpm.model import TextToImage
from ddpm.schedule import Schedule
from ddpm.training.caches import Latents


def texts(sentences):
    return torch.zeros(len(sentences), 77, 512)


def eight_bits(*values):
    return torch.tensor(values, dtype=torch.float64) / 127.5 - 1


@pytest.mark.equation("laplace-bits")
def test_the_probabilities_of_all_256_values_add_up_to_one():
    x = eight_bits(*range(256))
    for x_hat, width in ((0.0, 0.05), (-1.0, 0.01), (0.97, 0.3), (1.4, 0.2), (0.3, 0.002)):
        p = torch.exp2(-laplace_bits(x, torch.full_like(x, x_hat), width))
        assert abs(p.sum().item() - 1) < 1e-9


@pytest.mark.equation("laplace-bits")
def test_bits_are_those_of_torchs_laplace_distribution_and_stay_finite_far_away():
    x = eight_bits(0, 3, 100, 128, 255)
    x_hat = torch.tensor([-0.9, 0.1, -0.25, 0.5, 0.8]).double()
    F = torch.distributions.Laplace(x_hat, 0.1).cdf
    low = torch.where(x > -1, F(x - 1 / 255), torch.zeros_like(x))
    high = torch.where(x < 1, F(x + 1 / 255), torch.ones_like(x))
    assert (laplace_bits(x, x_hat, 0.1) + (high - low).log2()).abs().max() < 1e-9
    far = laplace_bits(eight_bits(0.0, 255.0), torch.tensor([1.0, -1.0]), 0.01).double()
    expected = (200 + math.log(2)) / math.log(2)  # exp(-2 / width) / 2, but for half a bin
    assert (far - expected).abs().max() < 0.7


class Perfect(torch.nn.Module):
    r"""The best network for latents drawn from N(m, s^2), as a UNet: it predicts x_0."""

    def __init__(self, schedule: Schedule, m: float, s: float):
        super().__init__()
        self.schedule = schedule
        self.m = m
        self.s = s
        self.conv_in = torch.nn.Conv2d(1, 1, 1)  # its device is the model's

    def forward(self, z_t, t, context):
        ab = self.schedule.alpha_bar_at(t, z_t)
        gain = ab.sqrt() * self.s**2 / (ab * self.s**2 + 1 - ab)
        return (self.m + gain * (z_t - ab.sqrt() * self.m)).float()


@pytest.fixture
def known(tmp_path):
    r"""A model whose latents, scaled by 1.25, are N(0.6, 0.5^2), with the network that knows it."""
    config = replace(TINY, prediction="x_0", schedule="cosine", timesteps=200)
    model = TextToImage(config, torch.nn.Identity()).eval()
    model.latent_scale = 1.25
    model.unet = Perfect(model.schedule, 0.6, 0.5)
    pictures = drawn_pictures(tmp_path, 320, seed=0, size=16)
    g = np.random.default_rng(0)
    logvar = np.full((320, 2, 4, 8, 8), math.log((0.3 / 1.25) ** 2), np.float32)
    std = math.sqrt(0.5**2 - 0.3**2)  # of mu; the posterior's own is 0.3
    mu = (0.6 + std * g.standard_normal((320, 2, 4, 8, 8))) / 1.25
    return model, Latents(np.stack([mu, logvar], axis=2).astype(np.float16)), pictures


def expected_bound(model, m, s, form):
    r"""The bound's expectation, exactly: its terms are quadratic in z_0 and the noise, so four points give it."""
    t = torch.arange(model.schedule.timesteps)
    total = 0.0
    for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        z_0 = torch.full((len(t), 1), m + a * s, dtype=torch.float64)
        z_t = q_sample(model.schedule, z_0, t, torch.full_like(z_0, b))
        x_0 = model.unet(z_t, t, None).double()
        terms = variational_term(model.schedule, z_0, z_t, t, x_0, "x_0", form)
        total += (terms.sum() + prior_term(model.schedule, z_0[:1]).sum()).item() / 4
    return total


@pytest.mark.equation("bits-per-dimension")
def test_the_bound_of_the_latents_is_the_one_computed_without_drawing_a_number(known):
    r"""Within four standard errors, as the function itself states them, and above the entropy."""
    model, latents, pictures = known
    rows = np.concatenate([pictures.rows(TRAIN), pictures.rows(VALID)])[:256]
    found = bits_per_dimension(model, latents, texts, pictures, rows, 0.1, seed=1)
    entropy = torch.distributions.Normal(0.6, 0.5).entropy().item() / math.log(2)
    for form in ("posterior", "beta"):
        bound = found["latent"][form]
        parts = bound["prior"] + bound["steps"] + bound["last"]  # the prior is 1e-8 bits here
        assert bound["total"] == pytest.approx(parts, rel=0, abs=1e-12)
        assert 0 < bound["standard_error"] < 0.02
        exact = expected_bound(model, 0.6, 0.5, form)
        assert entropy < exact
        assert (
            abs(bound["total"] - exact) < 4 * bound["standard_error"] + 0.002
        )  # latents are in half precision
    first, last, _ = zip(*found["by_time"], strict=True)
    own_bound = found["latent"]["posterior"]
    by_time = sum((b - a + 1) * mean for a, b, mean in found["by_time"])
    assert by_time == pytest.approx(own_bound["steps"] + own_bound["last"])
    assert (first[0], last[0], last[-1]) == (0, 0, 199)
    assert all(b == a + 1 for a, b in zip(last, first[1:], strict=False))
    picture = found["picture"]
    assert picture["total"] == pytest.approx(picture["latent"] + picture["error"])
    assert 1 < picture["error"] < 40  # of one element, which is off by 2 / width = 20 nats at most
    own = torch.distributions.Normal(0.0, 0.3).entropy().item() / math.log(2)  # of q(z | x), scaled
    ratio = 4 * 8 * 8 / (16 * 16 * 3)
    assert picture["latent"] == pytest.approx((found["latent"]["posterior"]["total"] - own) * ratio, abs=1e-3)


@pytest.mark.equation("bits-per-dimension")
def test_the_same_seed_gives_the_same_bits_and_a_learned_variance_is_between_the_fixed_ones(tmp_path):
    pictures = drawn_pictures(tmp_path, 80, seed=0, size=16)
    latents = Latents(np.random.default_rng(0).standard_normal((80, 2, 2, 4, 8, 8)).astype(np.float16))

    def found(variance, seed):
        torch.manual_seed(0)
        model = TextToImage(replace(TINY, variance=variance), torch.nn.Identity()).eval()
        without_zeros(model.unet)
        return bits_per_dimension(model, latents, texts, pictures, pictures.rows(VALID), 0.1, seed=seed)

    fixed = found("posterior", seed=3)
    assert fixed == found("posterior", seed=3) != found("posterior", seed=4)
    assert set(fixed["latent"]) == {"posterior", "beta"}
    learned = found("learned", seed=3)["latent"]
    assert learned["beta"]["total"] < learned["learned"]["total"] < learned["posterior"]["total"]


@pytest.mark.equation("bits-per-dimension")
def test_the_standard_error_is_of_pictures_that_are_hard_at_all_times(known):
    r"""Half of the latents are six times as wide as the network expects: it is the pictures that differ."""
    model, latents, pictures = known
    moments = np.array(latents.moments)
    moments[::2, :, 0] = (moments[::2, :, 0] - 0.6 / 1.25) * 6 + 0.6 / 1.25
    all_rows = pictures.rows(TRAIN)[:64]

    def found(rows):
        return bits_per_dimension(model, Latents(moments), texts, pictures, rows, 0.1, seed=1)

    wide, usual = (found(all_rows[k::2])["latent"]["posterior"]["total"] for k in (0, 1))
    apart = (wide - usual) / 2  # a standard deviation, if the halves themselves had none
    assert apart > 1
    whole = found(all_rows)
    assert whole["latent"]["posterior"]["standard_error"] == pytest.approx(apart / 64**0.5, rel=0.15)
    assert whole["picture"]["standard_error"] > 0
