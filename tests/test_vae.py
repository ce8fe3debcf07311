r"""The Gaussian that the encoder speaks of, the shapes and sizes of the autoencoder, its loss."""

import math

import pytest
import torch
from conftest import without_zeros
from torch.distributions import Normal, kl_divergence

from ddpm.vae import KLVAE, DiagonalGaussian, vae_loss


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return without_zeros(KLVAE((32, 64), layers=1)).eval()


# ------------------------------------------------------------------------------------------- Gaussian


@pytest.mark.equation("kl")
def test_kl_is_that_of_torch_distributions_summed_over_each_latent():
    mu, logvar = (
        normal(3, 4, 5, 6, seed=1, dtype=torch.float64),
        normal(3, 4, 5, 6, seed=2, dtype=torch.float64),
    )
    oracle = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    kl = DiagonalGaussian(mu, logvar).kl()
    assert kl.shape == (3,)
    assert (kl - oracle.sum(dim=(1, 2, 3))).abs().max().item() < 1e-10  # float64 sums of 120 numbers about 1


@pytest.mark.equation("kl")
def test_the_standard_normal_is_at_distance_zero_from_itself():
    assert DiagonalGaussian(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)).kl().tolist() == [0.0, 0.0]


@pytest.mark.equation("entropy")
def test_entropy_is_that_of_torch_distributions_summed_over_each_latent():
    mu, logvar = (
        normal(3, 4, 5, 6, seed=1, dtype=torch.float64),
        normal(3, 4, 5, 6, seed=2, dtype=torch.float64),
    )
    oracle = Normal(mu, (logvar / 2).exp()).entropy().sum(dim=(1, 2, 3))
    assert (DiagonalGaussian(mu, logvar).entropy() - oracle).abs().max().item() < 1e-10


@pytest.mark.equation("latent-gaussian")
def test_logvar_is_kept_between_minus_30_and_20():
    q = DiagonalGaussian(torch.zeros(3), torch.tensor([-100.0, 1.0, 100.0]))
    assert q.logvar.tolist() == [-30.0, 1.0, 20.0]


@pytest.mark.equation("latent-gaussian")
def test_the_mode_is_mu():
    mu = normal(2, 4, 3, 3)
    assert torch.equal(DiagonalGaussian(mu, torch.ones_like(mu)).mode(), mu)


@pytest.mark.equation("latent-gaussian")
def test_a_sample_is_mu_plus_sigma_times_the_generators_noise():
    mu, logvar = normal(2, 4, 3, 3, seed=1), normal(2, 4, 3, 3, seed=2)
    z = DiagonalGaussian(mu, logvar).sample(torch.Generator().manual_seed(7))
    eps = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(7))
    assert (z - (mu + logvar.exp().sqrt() * eps)).abs().max().item() < 1e-5  # float32 numbers below 10


def test_sampling_with_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    DiagonalGaussian(torch.zeros(4), torch.zeros(4)).sample(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.equation("latent-gaussian")
def test_many_samples_have_the_mean_and_variance_that_were_said():
    r"""n draws of mean 3 and variance 4: standard errors 2 / sqrt(n) and 4 sqrt(2 / n), four of each allowed."""
    n = 100_000
    z = DiagonalGaussian(torch.full((n,), 3.0), torch.full((n,), math.log(4.0))).sample(
        torch.Generator().manual_seed(0)
    )
    assert abs(z.mean().item() - 3) < 4 * 2 / math.sqrt(n)
    assert abs(z.var().item() - 4) < 4 * 4 * math.sqrt(2 / n)


def test_the_gradient_of_a_sample_reaches_mu_and_logvar():
    mu, logvar = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    DiagonalGaussian(mu, logvar).sample(torch.Generator().manual_seed(0)).sum().backward()
    eps = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert mu.grad.tolist() == [1.0, 1.0, 1.0]
    assert (logvar.grad - eps / 2).abs().max().item() < 1e-6


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.equation("vae-shapes")
def test_the_default_vae_has_the_specs_size_and_latent():
    torch.manual_seed(0)
    vae = KLVAE()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 3_346_471
    assert len(vae.state_dict()) == 156
    with torch.no_grad():
        q = vae.encode(torch.zeros(1, 3, 64, 64))
        assert q.mu.shape == q.logvar.shape == (1, 4, 32, 32)
        assert vae.decode(q.mode()).shape == (1, 3, 64, 64)


@pytest.mark.equation("vae-shapes")
@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_each_width_after_the_first_halves_the_side(halvings):
    vae = KLVAE((32,) * (halvings + 1), layers=1, latent_channels=3)
    assert vae.factor == 2**halvings
    with torch.no_grad():
        q = vae.encode(torch.zeros(2, 3, 16, 24))  # not square, so that swapped sides would show
        assert q.mu.shape == q.logvar.shape == (2, 3, 16 // 2**halvings, 24 // 2**halvings)
        assert vae.decode(q.mode()).shape == (2, 3, 16, 24)


@pytest.mark.equation("latent-gaussian")
def test_mu_is_the_first_half_of_the_encoders_numbers_and_logvar_the_second(small):
    with torch.no_grad():
        small_copy = KLVAE((32, 64), layers=1)
        small_copy.load_state_dict(small.state_dict())
        small_copy.quant_conv.weight.zero_()
        small_copy.quant_conv.bias.copy_(torch.arange(8.0))
        q = small_copy.encode(torch.zeros(1, 3, 8, 8))
    assert q.mu[0, :, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert q.logvar[0, :, 0, 0].tolist() == [4.0, 5.0, 6.0, 7.0]


# ------------------------------------------------------------------------------------------- behaviour


def test_each_picture_is_coded_and_decoded_by_itself(small):
    x = normal(3, 3, 16, 16)
    with torch.no_grad():
        together, alone = small.encode(x).mu, small.encode(x[1:2]).mu
        decoded, decoded_alone = small.decode(together), small.decode(alone)
    # float32 sums in another order: 1e-4 of numbers about 1
    assert (together[1:2] - alone).abs().max().item() < 1e-4
    assert (decoded[1:2] - decoded_alone).abs().max().item() < 1e-4
    assert (together[0] - together[1]).abs().max().item() > 1e-2


def test_memory_layout_changes_neither_code_nor_picture(small):
    x = normal(2, 3, 16, 16).permute(0, 1, 3, 2)  # not contiguous
    assert not x.is_contiguous()
    with torch.no_grad():
        for other in (x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
            assert (small.encode(x).mu - small.encode(other).mu).abs().max().item() < 1e-4
            z = small.encode(other).mu
            assert (small.decode(z) - small.decode(z.contiguous())).abs().max().item() < 1e-4


def test_decoded_pictures_are_not_clipped(small):
    with torch.no_grad():
        assert small.decode(100 * normal(1, 4, 8, 8)).abs().max().item() > 1


def test_every_parameter_is_learned_from():
    torch.manual_seed(0)
    vae = without_zeros(KLVAE((32, 32), layers=1))
    x = normal(1, 3, 8, 8)
    q = vae.encode(x)
    _, loss = vae_loss(x, vae.decode(q.sample(torch.Generator().manual_seed(0))), q, kl_weight=1.0)
    loss.backward()
    still = [
        name
        for name, parameter in vae.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # softmax does not see a number added to all scores, so this bias alone has gradient 0, up to rounding
    assert [name for name in still if not name.endswith("to_k.bias")] == []


@pytest.mark.parametrize(
    "shape", [(2, 1, 16, 16), (2, 4, 16, 16), (3, 16, 16), (2, 3, 15, 16), (2, 3, 16, 15)]
)
def test_pictures_that_cannot_be_coded_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\) with H and W multiples of 2, got") as refusal:
        small.encode(torch.zeros(shape))
    assert str(shape) in str(refusal.value)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)])
def test_latents_that_cannot_be_decoded_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"shape \(B, 4, h, w\), got") as refusal:
        small.decode(torch.zeros(shape))
    assert str(shape) in str(refusal.value)


def test_widths_must_be_multiples_of_32():
    with pytest.raises(ValueError, match="that 32 divides .*, got 48"):
        KLVAE((48, 64))


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.equation("vae-loss")
@pytest.mark.parametrize("norm, by_hand", [("l1", (1 + 0 + 3 + 0) / 4), ("l2", (1 + 0 + 9 + 0) / 4)])
def test_the_loss_by_hand(norm, by_hand):
    r"""mu = 2 at one of two latent numbers, sigma = 1: KL is 2 nats, 1 a number."""
    x, x_hat = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[2.0, 2.0, 0.0, 4.0]])
    q = DiagonalGaussian(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    reconstruction, loss = vae_loss(x, x_hat, q, kl_weight=0.1, norm=norm)
    assert reconstruction.item() == pytest.approx(by_hand, abs=1e-6)
    assert loss.item() == pytest.approx(by_hand + 0.1 * 1.0, abs=1e-6)


@pytest.mark.equation("vae-loss")
def test_the_kl_term_is_a_mean_over_the_batch_and_the_latent():
    q = DiagonalGaussian(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))
    zeros = torch.zeros(2, 4)
    _, loss = vae_loss(zeros, zeros, q, kl_weight=1.0)
    assert loss.item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.equation("vae-loss")
def test_the_docstrings_balance_with_latent_diffusion_holds():
    r"""Summed losses with weight 1e-6 and mean losses with 3.3e-7 differ by one factor, n = 64 x 64 x 3."""
    x, x_hat = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.1)
    q = DiagonalGaussian(torch.full((1, 4, 32, 32), 2.0), torch.zeros(1, 4, 32, 32))
    summed = (x - x_hat).abs().sum() + 1e-6 * q.kl().sum()
    _, loss = vae_loss(x, x_hat, q, kl_weight=1e-6 * (4 * 32 * 32) / (3 * 64 * 64))
    assert pytest.approx(3.3e-7, rel=0.02) == 1e-6 * (4 * 32 * 32) / (3 * 64 * 64)
    assert (loss * x.numel()).item() == pytest.approx(summed.item(), rel=1e-5)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="l1 or l2, got 'huber'"):
        vae_loss(
            torch.zeros(1),
            torch.zeros(1),
            DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1, 1)),
            1.0,
            "huber",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_numbers_of_another_type_are_refused_with_both_types(small, dtype):
    with pytest.raises(ValueError, match=rf"expected x in the network's own torch.float32, got {dtype}"):
        small.encode(torch.zeros(1, 3, 16, 16, dtype=dtype))
    with pytest.raises(ValueError, match=rf"expected z in the network's own torch.float32, got {dtype}"):
        small.decode(torch.zeros(1, small.latent_channels, 8, 8, dtype=dtype))
