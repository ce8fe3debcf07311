r"""The Gaussian that the encoder predicts, the shapes and sizes of the autoencoder, its loss."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import far, normal, without_zeros
from torch.distributions import Normal, kl_divergence

from ddpm.vae import KLVAE, DiagonalGaussian, vae_loss

single = partial(normal, dtype=torch.float32)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return without_zeros(KLVAE((32, 64), layers=1)).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- Gaussian


@pytest.mark.equation("kl", "entropy")
def test_kl_and_entropy_are_those_of_torch_distributions_summed_over_each_latent():
    mu = normal(3, 4, 5, 6, seed=1)
    logvar = normal(3, 4, 5, 6, seed=2)
    oracle = Normal(mu, (logvar / 2).exp())
    q = DiagonalGaussian(mu, logvar)
    # float64 sums of 120 numbers about 1
    assert far(q.kl(), kl_divergence(oracle, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))) < 1e-10
    assert far(q.entropy(), oracle.entropy().sum(dim=(1, 2, 3))) < 1e-10


@pytest.mark.equation("latent-gaussian")
def test_logvar_is_kept_between_minus_30_and_20_and_the_mode_is_mu():
    q = DiagonalGaussian(single(3), torch.tensor([-100.0, 1.0, 100.0]))
    assert q.logvar.tolist() == [-30.0, 1.0, 20.0]
    assert torch.equal(q.mode(), single(3))


@pytest.mark.equation("latent-gaussian")
def test_a_sample_is_mu_plus_sigma_times_the_generators_noise_and_moves_no_global_one():
    mu = normal(2, 4, 3, 3, seed=1)
    logvar = normal(2, 4, 3, 3, seed=2)
    before = torch.get_rng_state()
    q = DiagonalGaussian(mu, logvar)
    z = q.sample(torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    eps = normal(2, 4, 3, 3, seed=7)
    assert far(z, mu + logvar.exp().sqrt() * eps) < 1e-12
    assert torch.equal(q.sample(eps=eps), z)


@pytest.mark.equation("latent-gaussian")
def test_the_gradient_of_a_sample_reaches_mu_and_logvar():
    mu = torch.zeros(3, requires_grad=True)
    logvar = torch.zeros(3, requires_grad=True)
    DiagonalGaussian(mu, logvar).sample(eps=single(3)).sum().backward()
    assert mu.grad.tolist() == [1.0, 1.0, 1.0]
    assert far(logvar.grad, single(3) / 2) < 1e-6


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.equation("vae-shapes")
def test_the_default_vae_has_the_specs_size_and_latent():
    vae = KLVAE()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 3_346_471
    assert len(vae.state_dict()) == 156
    with torch.no_grad():
        q = vae.encode(torch.zeros(1, 3, 64, 64))
        assert q.mu.shape == q.logvar.shape == (1, 4, 32, 32)
        assert vae.decode(q.mode()).shape == (1, 3, 64, 64)


@pytest.mark.equation("vae-shapes")
@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_each_width_after_the_first_halves_the_side(halvings):
    vae = KLVAE((32,) * (halvings + 1), layers=1, latent_channels=3)
    assert vae.factor == 2**halvings
    with torch.no_grad():
        q = vae.encode(torch.zeros(2, 3, 16, 24))  # not square, so that swapped sides would show
        assert q.mu.shape == q.logvar.shape == (2, 3, 16 // 2**halvings, 24 // 2**halvings)
        assert vae.decode(q.mode()).shape == (2, 3, 16, 24)


@pytest.mark.equation("latent-gaussian")
def test_mu_is_the_first_half_of_the_encoders_numbers_and_logvar_the_second():
    vae = KLVAE((32, 64), layers=1).requires_grad_(False)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.copy_(torch.arange(8.0))
    q = vae.encode(torch.zeros(1, 3, 8, 8))
    assert q.mu[0, :, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert q.logvar[0, :, 0, 0].tolist() == [4.0, 5.0, 6.0, 7.0]


# ------------------------------------------------------------------------------------------- behaviour


@pytest.mark.equation("vae-shapes")
def test_each_picture_is_encoded_and_decoded_by_itself_whatever_the_memory_layout(small):
    r"""1e-4 of numbers about 1: float32 sums in another order. Latents of size 100 show that nothing is clipped."""
    x = single(3, 3, 16, 16)
    z = small.encode(x).mu
    assert far(z[0], z[1]) > 1e-2
    decoded = small.decode(z)
    for other in (x[1:2], x[1:2].contiguous(memory_format=torch.channels_last), x[1:2].mT.contiguous().mT):
        alone = small.encode(other).mu
        assert far(alone, z[1:2]) < 1e-4
        assert far(small.decode(alone), decoded[1:2]) < 1e-4
    assert small.decode(100 * z).abs().max().item() > 1


@pytest.mark.equation("vae-shapes")
def test_training_decodes_a_draw_and_keeps_mu_and_logvar_in_float32_under_autocast(small):
    x = single(2, 3, 16, 16)
    eps = single(2, 4, 8, 8, seed=1)
    x_hat, q = small(x, eps)
    expected = small.encode(x)
    assert torch.equal(q.mu, expected.mu) and torch.equal(q.logvar, expected.logvar)
    assert torch.equal(x_hat, small.decode(expected.mu + (expected.logvar / 2).exp() * eps))
    with torch.autocast("cpu", torch.bfloat16):
        _, q = small(x, eps)
    assert q.mu.dtype == q.logvar.dtype == torch.float32


def test_every_parameter_is_learned_from():
    torch.manual_seed(0)
    vae = without_zeros(KLVAE((32, 32), layers=1))
    x = single(1, 3, 8, 8)
    x_hat, q = vae(x, single(1, 4, 4, 4))
    vae_loss(x, x_hat, q, kl_weight=1.0)[1].backward()
    still = {name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()}
    # softmax does not see a number added to all scores, so this bias alone has gradient 0, up to rounding
    assert {name for name in still if not name.endswith("to_k.bias")} == set()


@pytest.mark.parametrize(
    "shape", [(2, 1, 16, 16), (2, 4, 16, 16), (3, 16, 16), (2, 3, 15, 16), (2, 3, 16, 15)]
)
def test_pictures_that_cannot_be_encoded_are_refused(small, shape):
    with pytest.raises(
        ValueError, match=r"\(B, 3, H, W\) of floats in .*, H and W multiples of 2"
    ) as refusal:
        small.encode(torch.zeros(shape))
    assert str(shape) in str(refusal.value)


@pytest.mark.parametrize(
    "x, got",
    [
        (torch.full((1, 3, 8, 8), 255.0), "torch.float32 up to 255.0"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8 up to 0"),
        (np.zeros((1, 3, 8, 8), np.float32), "expected a tensor .* of floats"),
    ],
)
def test_pictures_of_another_range_or_kind_are_refused(small, x, got):
    with pytest.raises(ValueError, match=got):
        small.encode(x)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)])
def test_latents_that_cannot_be_decoded_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"latents \(B, 4, h, w\), got") as refusal:
        small.decode(torch.zeros(shape))
    assert str(shape) in str(refusal.value)


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.equation("vae-loss")
@pytest.mark.parametrize("norm, by_hand", [("l1", (1 + 0 + 3 + 0) / 8), ("l2", (1 + 0 + 9 + 0) / 8)])
def test_the_loss_by_hand_averages_over_the_batch_the_pixels_and_the_latent(norm, by_hand):
    r"""mu = 2 at one of the two latent numbers of one of two pictures, sigma = 1: KL is 2 nats, 1/2 a number."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    x_hat = torch.tensor([[2.0, 2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    q = DiagonalGaussian(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))
    reconstruction, loss = vae_loss(x, x_hat, q, kl_weight=0.1, norm=norm)
    assert reconstruction.item() == pytest.approx(by_hand, abs=1e-6)
    assert loss.item() == pytest.approx(by_hand + 0.1 * 0.5, abs=1e-6)


def test_an_unknown_norm_is_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="norm out of l1, l2, got 'huber'"):
        vae_loss(x, x, DiagonalGaussian(x, x), 1.0, "huber")
