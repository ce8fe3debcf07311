r"""The VAE gives the numbers of diffusers' AutoencoderKL: moments, draws and pictures.

Single precision on both sides, some 25 layers, values of size 1: differences of about 1e-6, hence 1e-5.
"""

import inspect

import pytest
import torch
from conftest import far
from safetensors.torch import load_file

from compat.conftest import normalisations, one_of_each, randomised
from ddpm.config import ModelConfig
from ddpm.export.diffusers_folder import RENAMES, VAE_ALWAYS, vae_config, write_weights
from ddpm.vae import KLVAE, DiagonalGaussian

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
ODD = ModelConfig(vae_channels=(32, 96, 64), vae_layers=3, latent_channels=5)
CONFIGS = one_of_each(vae_config, ODD)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    r"""Our VAE, and theirs with the weights that we wrote for it."""
    c = CONFIGS[request.param]
    torch.manual_seed(0)
    ours = randomised(KLVAE(c.vae_channels, c.vae_layers, c.latent_channels))
    path = tmp_path_factory.mktemp("vae") / "weights.safetensors"
    write_weights(path, ours, RENAMES)
    theirs = diffusers.AutoencoderKL.from_config(vae_config(c)).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.equation("vae-shapes", "latent-gaussian", "kl")
@torch.no_grad()
def test_moments_draws_with_one_generator_and_the_kl_term_are_equal(pair, pictures):
    r"""KL is a sum over some hundred to thousand latents; compared as a mean over them."""
    ours, theirs = pair
    assert normalisations(ours) == normalisations(theirs)
    q = ours.encode(pictures)
    expected = theirs.encode(pictures).latent_dist
    assert q.mu.std() > 0.05
    assert far(expected.mean, q.mu) < TOLERANCE
    assert far(expected.logvar, q.logvar) < TOLERANCE
    assert far(expected.mode(), q.mode()) < TOLERANCE
    draws = (d.sample(generator=torch.Generator().manual_seed(7)) for d in (expected, q))
    assert far(*draws) < TOLERANCE
    n = q.mu[0].numel()
    assert far(expected.kl() / n, q.kl() / n) < TOLERANCE


@pytest.mark.equation("vae-shapes")
@torch.no_grad()
def test_decoded_pictures_are_equal(pair):
    ours, theirs = pair
    side = 32 // ours.factor
    z = torch.randn(2, ours.latent_channels, side, side, generator=torch.Generator().manual_seed(2))
    x, expected = ours.decode(z), theirs.decode(z).sample
    assert x.shape == (2, 3, 32, 32)
    assert x.std() > 0.05
    assert far(expected, x) < TOLERANCE


@pytest.mark.equation("latent-gaussian")
def test_extreme_variances_are_clamped_alike():
    mu = torch.zeros(4, 2, 1, 1)
    logvar = torch.tensor([-1e3, -29.0, 19.0, 1e3]).reshape(4, 1, 1, 1).expand(4, 2, 1, 1)
    expected = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(torch.cat([mu, logvar], dim=1))
    ours = DiagonalGaussian(mu, logvar)
    assert torch.equal(ours.logvar, expected.logvar)
    assert torch.equal(ours.kl(), expected.kl())


def test_the_specs_vae_has_the_published_size_and_what_ours_always_is_is_diffusers_default():
    r"""A folder that leaves one of these settings out means the same by it."""
    theirs = diffusers.AutoencoderKL.from_config(vae_config(ModelConfig()))
    assert len(theirs.state_dict()) == 156
    assert sum(p.numel() for p in theirs.parameters()) == 3_346_471
    defaults = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    assert {key: defaults[key].default for key in VAE_ALWAYS} == VAE_ALWAYS
    read_elsewhere = {"sample_size", "scaling_factor"}
    assert defaults.keys() - vae_config(ModelConfig()) == {"self", "force_upcast"} | read_elsewhere
