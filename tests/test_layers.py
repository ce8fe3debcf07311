r"""Time embedding, group normalisation, residual block, down- and upsampling, against torch and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from ddpm.layers import (
    ChannelsLastGroupNorm,
    Downsample,
    GroupNorm,
    ResBlock,
    TimeEmbedding,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
def test_time_zero_is_all_cosines_one_and_all_sines_zero():
    assert timestep_embedding(torch.tensor([0]), 64).tolist() == [[1.0] * 32 + [0.0] * 32]


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
    assert (time(t) - by_hand).abs().max().item() < 1e-5  # float32 sums of 256 numbers below 1


# ------------------------------------------------------------------------------------------- normalisation


@pytest.mark.equation("group-norm")
def test_group_norm_makes_each_group_of_each_picture_mean_0_and_variance_1():
    x = normal(2, 64, 5, 5, dtype=torch.float64) * 3 + 7
    y = group_norm(64, eps=1e-12).double()(x).reshape(2, 32, -1)
    assert y.mean(dim=2).abs().max().item() < 1e-12
    assert (y.var(dim=2, unbiased=False) - 1).abs().max().item() < 1e-10


@pytest.mark.equation("group-norm")
def test_the_epsilon_of_group_norm_is_inside_the_root():
    x = normal(1, 32, 4, 4, dtype=torch.float64)
    mean, variance = (x.mean(dim=(2, 3), keepdim=True), x.var(dim=(2, 3), keepdim=True, unbiased=False))
    by_hand = (x - mean) / (variance + 0.5).sqrt()
    assert (group_norm(32, eps=0.5).double()(x) - by_hand).abs().max().item() < 1e-12


@pytest.mark.parametrize("channels", [16, 33, 48])
def test_group_norm_refuses_channels_that_32_does_not_divide(channels):
    with pytest.raises(ValueError, match=f"that 32 divides .*, got {channels}"):
        group_norm(channels, eps=1e-5)


def norm_and_gradients(function, x, gamma, beta, dy):
    x, gamma, beta = (tensor.detach().requires_grad_() for tensor in (x, gamma, beta))
    y = function(x, gamma, beta)
    return y.detach(), *torch.autograd.grad(y, (x, gamma, beta), dy)


@pytest.mark.equation("group-norm", "group-norm-gradient")
@pytest.mark.parametrize("channels_last_dy", [True, False])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_channels_last_group_norm_is_torchs_forward_and_backward(groups, channels_last_dy):
    x = (normal(3, 8, 5, 7, seed=1, dtype=torch.float64) * 2 + 3).contiguous(
        memory_format=torch.channels_last
    )
    gamma, beta = normal(8, seed=2, dtype=torch.float64), normal(8, seed=3, dtype=torch.float64)
    dy = normal(3, 8, 5, 7, seed=4, dtype=torch.float64)
    if channels_last_dy:
        dy = dy.contiguous(memory_format=torch.channels_last)
    ours = norm_and_gradients(lambda *a: ChannelsLastGroupNorm.apply(*a, groups, 1e-5), x, gamma, beta, dy)
    torchs = norm_and_gradients(lambda x, g, b: F.group_norm(x, groups, g, b, 1e-5), x, gamma, beta, dy)
    for one, other in zip(ours, torchs, strict=True):
        assert (one - other).abs().max().item() < 1e-10  # sums of some hundred numbers about 10, in float64


@pytest.mark.equation("group-norm-gradient")
def test_channels_last_group_norm_has_the_derivative_of_its_forward_pass():
    torch.manual_seed(0)
    x = (
        torch.randn(2, 4, 3, 3, dtype=torch.float64)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    gamma, beta = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: ChannelsLastGroupNorm.apply(*a, 2, 1e-5), (x, gamma, beta))


@pytest.mark.equation("group-norm-gradient")
def test_channels_last_group_norm_in_bf16_stays_near_the_exact_gradients():
    r"""bf16 has 8 bits: a rounding is 0.4 %, and the products under the sums are rounded too. Gradients of the input
    are about 1; 0.05 is some ten roundings. Those of gamma and beta are sums over 512 products, about 20 each."""
    x = normal(2, 8, 16, 16, seed=1).contiguous(memory_format=torch.channels_last)
    gamma, beta, dy = 1 + 0.1 * normal(8, seed=2), normal(8, seed=3), normal(2, 8, 16, 16, seed=4)
    low = [tensor.bfloat16() for tensor in (x, gamma, beta, dy)]
    ours = norm_and_gradients(lambda *a: ChannelsLastGroupNorm.apply(*a, 4, 1e-5), *low)
    exact = norm_and_gradients(
        lambda x, g, b: F.group_norm(x, 4, g, b, 1e-5), *(tensor.double() for tensor in low)
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours)
    for one, other, tolerance in zip(ours, exact, (0.05, 0.05, 0.5, 0.5), strict=True):
        assert (one.double() - other).abs().max().item() < tolerance


@pytest.mark.parametrize(
    "kind, side, channels_last, learn, ours",
    [
        (torch.float32, 16, True, True, True),
        (torch.float32, 8, True, True, False),
        (torch.float32, 16, False, True, False),
        (torch.float32, 16, True, False, False),
        (torch.bfloat16, 8, True, True, True),
        (torch.bfloat16, 8, False, True, False),
    ],
)
def test_our_group_norm_is_taken_for_channels_last_maps_where_torchs_is_slow(
    kind, side, channels_last, learn, ours
):
    x = (
        normal(1, 32, side, side)
        .to(kind)
        .contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    )
    norm = group_norm(32, 1e-5).to(kind).requires_grad_(False)
    y = norm(x.requires_grad_(learn))
    assert type(y.grad_fn).__name__.startswith("ChannelsLastGroupNorm") == ours
    # numbers about 1 in float32, numbers up to 4 in bf16
    tolerance = 1e-5 if kind == torch.float32 else 0.02
    assert (y - F.group_norm(x.float(), 32)).abs().max().item() < tolerance


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision_is_rounded_once(kind, side):
    r"""Sums in single precision, then one rounding: at most half a unit in the last place of numbers up to 8, and
    for the kernel that takes the largest maps, which rounds the factors too, four of them."""
    x = (normal(2, 64, side, side, seed=1) + 0.5).to(kind).contiguous(memory_format=torch.channels_last)
    norm = group_norm(64, 1e-5).to(kind).requires_grad_(False)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * normal(64, seed=2))
        norm.bias.copy_(0.1 * normal(64, seed=3))
        exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5)
        y = norm(x)
    unit = torch.finfo(kind).eps * 2.0 ** exact.abs().clamp(min=2**-6).log2().floor()
    assert y.dtype == kind and y.is_contiguous(memory_format=torch.channels_last)
    assert ((y.double() - exact).abs() / unit).max().item() < (0.51 if side < 32 else 4)


def test_both_paths_of_group_norm_answer_in_the_same_type_under_autocast():
    norm = group_norm(32, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        types = set()
        for memory in (torch.channels_last, torch.contiguous_format):
            x = normal(1, 32, 16, 16).bfloat16().contiguous(memory_format=memory).requires_grad_()
            types.add(norm(x).dtype)
    assert len(types) == 1


def test_our_group_norm_has_torchs_parameters_and_takes_its_weights():
    torchs = torch.nn.GroupNorm(32, 64, eps=1e-6)
    ours = GroupNorm(32, 64, eps=1e-6)
    ours.load_state_dict(torchs.state_dict())
    assert ours.eps == torchs.eps


# ------------------------------------------------------------------------------------------- residual block


@pytest.mark.equation("res-block")
@pytest.mark.parametrize("in_channels, out_channels", [(32, 32), (32, 64)])
def test_a_resblock_starts_as_its_shortcut(in_channels, out_channels):
    torch.manual_seed(0)
    block = ResBlock(in_channels, out_channels, time_width=16)
    x = normal(2, in_channels, 6, 6, seed=1)
    shortcut = x if in_channels == out_channels else block.conv_shortcut(x)
    assert torch.equal(block(x, normal(2, 16, seed=2)), shortcut)
    assert (block.conv_shortcut is None) == (in_channels == out_channels)


@pytest.mark.equation("res-block")
def test_a_resblock_is_its_equation():
    torch.manual_seed(0)
    block = ResBlock(32, 64, time_width=16)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    torch.nn.init.normal_(block.conv2.bias)
    x, time = normal(2, 32, 6, 6, seed=1), normal(2, 16, seed=2)

    def norm_silu_conv(h, norm, conv):
        h = F.group_norm(h, 32, norm.weight, norm.bias, 1e-5)
        return F.conv2d(h * torch.sigmoid(h), conv.weight, conv.bias, padding=1)

    h = norm_silu_conv(x, block.norm1, block.conv1)
    h = (
        h
        + ((time * torch.sigmoid(time)) @ block.time_emb_proj.weight.T + block.time_emb_proj.bias)[
            :, :, None, None
        ]
    )
    skip = (
        torch.einsum("oi,bihw->bohw", block.conv_shortcut.weight[:, :, 0, 0], x)
        + block.conv_shortcut.bias[:, None, None]
    )
    by_hand = skip + norm_silu_conv(h, block.norm2, block.conv2)
    assert (block(x, time) - by_hand).abs().max().item() < 1e-4  # float32 sums of 576 numbers about 1


def test_a_resblock_without_time_has_no_parameters_for_it():
    block = ResBlock(32, 32)
    assert not any("time" in name for name, _ in block.named_parameters())
    assert block(normal(1, 32, 4, 4)).shape == (1, 32, 4, 4)


def test_zero_init_zeroes_weight_and_bias_and_returns_the_module():
    layer = torch.nn.Conv2d(3, 5, 3)
    assert zero_init(layer) is layer
    assert all(not parameter.any() for parameter in layer.parameters())


# ------------------------------------------------------------------------------------------- down, up


def picking(layer, row, column):
    r"""`layer` with a convolution that hands on the pixel at (row, column) of each 3 x 3 window, channel by channel."""
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.zero_()
        for c in range(layer.conv.weight.shape[0]):
            layer.conv.weight[c, c, row, column] = 1.0
    return layer


def test_downsample_pads_all_around():
    x = normal(2, 3, 6, 8)
    down = Downsample(3)
    assert torch.equal(picking(down, 1, 1)(x), x[:, :, ::2, ::2])
    first = picking(down, 0, 0)(x)
    assert not first[:, :, 0].any() and not first[:, :, :, 0].any()
    assert torch.equal(first[:, :, 1:, 1:], x[:, :, 1:-1:2, 1:-1:2])


def test_asymmetric_downsample_pads_right_and_bottom_only():
    x = normal(2, 3, 6, 8)
    down = Downsample(3, asymmetric=True)
    assert torch.equal(picking(down, 0, 0)(x), x[:, :, ::2, ::2])
    last = picking(down, 2, 2)(x)
    assert not last[:, :, -1].any() and not last[:, :, :, -1].any()
    assert torch.equal(last[:, :, :-1, :-1], x[:, :, 2::2, 2::2])


def test_upsample_shows_every_pixel_four_times():
    x = normal(2, 3, 3, 4)
    assert torch.equal(
        picking(Upsample(3), 1, 1)(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    )
