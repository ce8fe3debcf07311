r"""Time embedding, group normalisation, residual block, down- and upsampling, against torch and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import far, normal, without_zeros

from ddpm.layers import (
    Downsample,
    ResBlock,
    TimeEmbedding,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)

# ------------------------------------------------------------------------------------------- time


@pytest.mark.equation("time-embedding")
def test_the_embedding_of_a_time_is_cosines_then_sines_by_hand():
    embedding = timestep_embedding(torch.tensor([0, 1, 7, 999]), 6)
    assert embedding.shape == (4, 6)
    assert embedding.dtype == torch.float32
    for row, t in zip(embedding.tolist(), (0, 1, 7, 999), strict=True):
        omega = [10_000 ** (-2 * i / 6) for i in range(3)]
        by_hand = [math.cos(w * t) for w in omega] + [math.sin(w * t) for w in omega]
        # angles up to 999 carry a float32 error of 999 * 6e-8 = 6e-5
        assert row == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.equation("time-embedding")
def test_no_two_of_a_thousand_times_look_alike():
    embedding = timestep_embedding(torch.arange(1000), 64)
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distances.min().item() > 0.1


@pytest.mark.equation("time-embedding")
def test_the_time_vector_is_linear_silu_linear():
    torch.manual_seed(0)
    time = TimeEmbedding(64, 256)
    t = torch.tensor([3, 500])
    h = timestep_embedding(t, 64) @ time.linear_1.weight.T + time.linear_1.bias
    h = h * torch.sigmoid(h)
    by_hand = h @ time.linear_2.weight.T + time.linear_2.bias
    assert far(time(t), by_hand) < 1e-5  # float32 sums of 256 numbers below 1


# ------------------------------------------------------------------------------------------- normalisation


@pytest.mark.equation("group-norm")
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_group_norm_makes_each_of_32_groups_mean_0_and_variance_1_with_epsilon_inside_the_root(eps):
    x = normal(2, 64, 5, 5) * 3 + 7
    norm = group_norm(64, eps).double().requires_grad_(False)
    groups = x.reshape(2, 32, -1)
    centred = groups - groups.mean(dim=2, keepdim=True)
    by_hand = (centred / (centred**2).mean(dim=2, keepdim=True).add(eps).sqrt()).reshape(x.shape)
    assert far(norm(x), by_hand) < 1e-12
    norm.weight.copy_(normal(64, seed=1))
    norm.bias.copy_(normal(64, seed=2))
    gamma, beta = (numbers[:, None, None] for numbers in (norm.weight, norm.bias))
    assert far(norm(x), by_hand * gamma + beta) < 1e-12


def test_widths_that_32_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="divisible by num_groups"):
        group_norm(48, eps=1e-5)


# ------------------------------------------------------------------------------------------- residual block


@pytest.mark.equation("res-block")
@pytest.mark.parametrize("in_channels, out_channels", [(32, 32), (32, 64)])
def test_a_resblock_starts_as_its_shortcut(in_channels, out_channels):
    torch.manual_seed(0)
    block = ResBlock(in_channels, out_channels, time_width=16).double()
    x = normal(2, in_channels, 6, 6, seed=1)
    shortcut = x if in_channels == out_channels else block.conv_shortcut(x)
    assert torch.equal(block(x, normal(2, 16, seed=2)), shortcut)
    assert (block.conv_shortcut is None) == (in_channels == out_channels)


@pytest.mark.equation("res-block")
@pytest.mark.parametrize("time_width", [16, None])
def test_a_resblock_is_its_equation_with_and_without_time(time_width):
    torch.manual_seed(0)
    block = without_zeros(ResBlock(32, 64, time_width).double())
    x = normal(2, 32, 6, 6, seed=1)
    time = normal(2, 16, seed=2)

    def norm_silu_conv(h, norm, conv):
        h = F.group_norm(h, 32, norm.weight, norm.bias, 1e-5)
        return F.conv2d(h * torch.sigmoid(h), conv.weight, conv.bias, padding=1)

    h = norm_silu_conv(x, block.norm1, block.conv1)
    if time_width:
        e_t = time * torch.sigmoid(time)
        h = h + (e_t @ block.time_emb_proj.weight.T + block.time_emb_proj.bias)[:, :, None, None]
    skip = torch.einsum("oi,bihw->bohw", block.conv_shortcut.weight[:, :, 0, 0], x)
    skip = skip + block.conv_shortcut.bias[:, None, None]
    by_hand = skip + norm_silu_conv(h, block.norm2, block.conv2)
    assert far(block(x, time if time_width else None), by_hand) < 1e-12
    assert any("time" in name for name in block.state_dict()) == bool(time_width)


def test_zero_init_zeroes_weight_and_bias_and_returns_the_module():
    layer = torch.nn.Conv2d(3, 5, 3)
    assert zero_init(layer) is layer
    assert all(not parameter.any() for parameter in layer.parameters())


# ------------------------------------------------------------------------------------------- down, up


def picking(layer, row, column):
    r"""`layer` with a convolution that hands on the pixel at (row, column) of each 3 x 3 window, channel by channel."""
    zero_init(layer.conv)
    with torch.no_grad():
        layer.conv.weight[range(3), range(3), row, column] = 1.0
    return layer.double()


X = normal(2, 3, 6, 8)


def test_downsample_pads_all_around():
    assert torch.equal(picking(Downsample(3), 1, 1)(X), X[:, :, ::2, ::2])
    first = picking(Downsample(3), 0, 0)(X)
    assert not first[:, :, 0].any() and not first[:, :, :, 0].any()
    assert torch.equal(first[:, :, 1:, 1:], X[:, :, 1:-1:2, 1:-1:2])


def test_asymmetric_downsample_pads_right_and_bottom_only():
    assert torch.equal(picking(Downsample(3, asymmetric=True), 0, 0)(X), X[:, :, ::2, ::2])
    last = picking(Downsample(3, asymmetric=True), 2, 2)(X)
    assert not last[:, :, -1].any() and not last[:, :, :, -1].any()
    assert torch.equal(last[:, :, :-1, :-1], X[:, :, 2::2, 2::2])


def test_upsample_shows_every_pixel_four_times():
    four = X.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(picking(Upsample(3), 1, 1)(X), four)
