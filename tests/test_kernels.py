r"""The fast ways to compute the layers give the layers' own numbers and gradients, and are put where they pay."""

import pytest
import torch
import torch.nn.functional as F
from conftest import far, normal, without_zeros

from ddpm.attention import Attention, FeedForward
from ddpm.tools.kernels import (
    ChannelsLastGroupNorm,
    GateInTwoProducts,
    GroupNorm,
    attend,
    context_read_once,
    use_fast_kernels,
)
from ddpm.unet import UNet
from ddpm.vae import KLVAE


def small_unet():
    torch.manual_seed(0)
    return without_zeros(UNet(channels=(32, 64), attention_levels=(0, 1), res_blocks=1, context_width=16))


# ------------------------------------------------------------------------------------------- putting in place


@pytest.mark.parametrize("build", [small_unet, lambda: without_zeros(KLVAE((32, 64), layers=1))])
def test_a_plain_network_has_torchs_layers_and_a_fast_one_ours_with_the_same_weights_and_numbers(build):
    plain = build()
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    x = (
        normal(2, 4 if isinstance(plain, UNet) else 3, 16, 16)
        .float()
        .contiguous(memory_format=torch.channels_last)
    )

    def compute(network):
        more = (torch.tensor([3, 700]), normal(2, 5, 16).float())
        y = network(x, *more) if isinstance(network, UNet) else network.encode(x).mu
        gradients = torch.autograd.grad(y.square().mean(), list(network.parameters()), allow_unused=True)
        return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]

    norms = [module for module in plain.modules() if isinstance(module, torch.nn.GroupNorm)]
    gates = [module for module in plain.modules() if isinstance(module, FeedForward)]
    attentions = [module for module in plain.modules() if isinstance(module, Attention)]
    assert {type(norm) for norm in norms} == {torch.nn.GroupNorm}
    assert {module.attend for module in attentions} == {F.scaled_dot_product_attention}
    by_torch = compute(plain)
    assert use_fast_kernels(plain) is plain
    assert {type(norm) for norm in norms} == {GroupNorm}
    assert {type(gate) for gate in gates} == ({GateInTwoProducts} if isinstance(plain, UNet) else set())
    assert {module.attend for module in attentions} == {attend}
    for one, other in zip(compute(plain), by_torch, strict=True):
        assert far(one, other) < 1e-4 * (1 + other.abs().max().item())  # float32 sums in another order
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


# ------------------------------------------------------------------------------------------- attention


@pytest.mark.equation("attention")
@pytest.mark.parametrize("tokens, learn, fused", [(256, True, 0), (512, True, 1), (256, False, 1)])
def test_each_branch_of_attend_has_the_values_and_gradients_of_torchs_kernel(
    tokens, learn, fused, monkeypatch
):
    r"""256 x 256 weights are held, 512 x 512 are more than 2^17 and are not."""
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(1) or kernel(*a))
    inputs = [normal(1, 2, tokens, 4, seed=seed).requires_grad_(learn) for seed in range(3)]
    ours = attend(*inputs)
    assert len(calls) == fused
    torchs = kernel(*inputs)
    assert far(ours, torchs) < 1e-12
    if learn:
        dy = normal(1, 2, tokens, 4, seed=3)
        gradients = (torch.autograd.grad(y, inputs, dy) for y in (ours, torchs))
        for one, other in zip(*gradients, strict=True):
            assert far(one, other) < 1e-12


@pytest.mark.equation("attention")
@pytest.mark.parametrize("learn", [True, False])
def test_one_overwhelming_score_picks_its_value_without_overflow(learn):
    q = torch.full((1, 1, 1, 4), 1e3).requires_grad_(learn)
    k = torch.tensor([-1e3, 1e3, 0.0])[:, None].expand(3, 4)[None, None]
    v = normal(1, 1, 3, 4).float()
    assert torch.equal(attend(q, k, v)[0, 0, 0], v[0, 0, 1])


# ------------------------------------------------------------------------------------------- one caption


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@torch.no_grad()
def test_within_the_context_keys_and_values_of_a_caption_are_computed_once_and_the_bits_stay(
    precision, monkeypatch
):
    unet = small_unet().eval()
    blocks = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    projections = [linear for block in blocks for linear in (block.to_k, block.to_v)]
    assert len(projections) == 2 * 7
    context = normal(2, 5, 16).float()
    calls = []
    own = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: calls.append(self) or own(self, x))

    def three_steps(context):
        calls.clear()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            steps = [
                unet(normal(2, 4, 8, 8, seed=k).float(), torch.tensor([k, 99 * k]), context) for k in range(3)
            ]
        return torch.stack(steps), {sum(linear is called for called in calls) for linear in projections}

    every_time, reads = three_steps(context)
    assert reads == {3}
    with context_read_once(unet):
        once, reads = three_steps(context)
        assert reads == {1}
        other, reads = three_steps(context + 1)
        assert reads == {1}
    assert torch.equal(once, every_time)
    assert torch.equal(three_steps(context + 1)[0], other)
    with pytest.raises(RuntimeError, match="stop"), context_read_once(unet), context_read_once(unet):
        raise RuntimeError("stop")
    assert three_steps(context)[1] == {3}


# ------------------------------------------------------------------------------------------- group normalisation


def norm_and_gradients(function, x, gamma, beta, dy):
    x, gamma, beta = (tensor.detach().requires_grad_() for tensor in (x, gamma, beta))
    y = function(x, gamma, beta)
    return y.detach(), *torch.autograd.grad(y, (x, gamma, beta), dy)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.equation("group-norm", "group-norm-gradient")
@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_channels_last_group_norm_is_torchs_forward_and_backward(groups, layout):
    x = channels_last(normal(3, 8, 5, 7, seed=1) * 2 + 3)
    inputs = (x, normal(8, seed=2), normal(8, seed=3), layout(normal(3, 8, 5, 7, seed=4)))
    ours = norm_and_gradients(lambda *a: ChannelsLastGroupNorm.apply(*a, groups, 1e-5), *inputs)
    torchs = norm_and_gradients(lambda x, gamma, beta: F.group_norm(x, groups, gamma, beta, 1e-5), *inputs)
    for one, other in zip(ours, torchs, strict=True):
        assert far(one, other) < 1e-10  # sums of some hundred numbers about 10, in float64


@pytest.mark.equation("group-norm-gradient")
def test_channels_last_group_norm_has_the_derivative_of_its_forward_pass():
    inputs = [channels_last(normal(2, 4, 3, 3)), normal(4, seed=1), normal(4, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *a: ChannelsLastGroupNorm.apply(*a, 2, 1e-5), inputs)


@pytest.mark.equation("group-norm-gradient")
def test_channels_last_group_norm_in_bf16_stays_near_the_exact_gradients():
    r"""bf16 has 8 bits: a rounding is 0.4 %, and the products under the sums are rounded too. Gradients of the input
    are about 1; 0.05 is some ten roundings. Those of gamma and beta are sums over 512 products, about 20 each."""
    x = channels_last(normal(2, 8, 16, 16, seed=1))
    inputs = (x, 1 + 0.1 * normal(8, seed=2), normal(8, seed=3), normal(2, 8, 16, 16, seed=4))
    low = [tensor.bfloat16() for tensor in inputs]
    ours = norm_and_gradients(lambda *a: ChannelsLastGroupNorm.apply(*a, 4, 1e-5), *low)
    exact = norm_and_gradients(
        lambda x, gamma, beta: F.group_norm(x, 4, gamma, beta, 1e-5), *(tensor.double() for tensor in low)
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours)
    for one, other, tolerance in zip(ours, exact, (0.05, 0.05, 0.5, 0.5), strict=True):
        assert far(one, other) < tolerance


@pytest.mark.parametrize(
    "kind, side, layout, learn, ours",
    [
        (torch.float32, 16, channels_last, True, True),
        (torch.float32, 8, channels_last, True, False),
        (torch.float32, 16, torch.Tensor.contiguous, True, False),
        (torch.float32, 16, channels_last, False, False),
        (torch.bfloat16, 8, channels_last, True, True),
        (torch.bfloat16, 8, torch.Tensor.contiguous, True, False),
    ],
)
def test_our_group_norm_is_taken_for_channels_last_maps_where_torchs_is_slow(kind, side, layout, learn, ours):
    x = layout(normal(1, 32, side, side).to(kind)).requires_grad_(learn)
    y = GroupNorm(32, 32, eps=1e-5).to(kind).requires_grad_(False)(x)
    assert type(y.grad_fn).__name__.startswith("ChannelsLastGroupNorm") == ours
    # numbers about 1 in float32, numbers up to 4 in bf16
    assert far(y, F.group_norm(x.float(), 32)) < (1e-5 if kind == torch.float32 else 0.02)


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_group_norm_of_half_precision_is_rounded_once(kind, side):
    r"""Sums in single precision, then one rounding: at most half a unit in the last place of numbers up to 8, and
    for the kernel that takes the largest maps, which rounds the factors too, four of them."""
    x = channels_last((normal(2, 64, side, side, seed=1) + 0.5).to(kind))
    norm = GroupNorm(32, 64, eps=1e-5).to(kind).requires_grad_(False)
    norm.weight.copy_(1 + 0.1 * normal(64, seed=2))
    norm.bias.copy_(0.1 * normal(64, seed=3))
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5)
    y = norm(x)
    unit = torch.finfo(kind).eps * 2.0 ** exact.abs().clamp(min=2**-6).log2().floor()
    assert y.dtype == kind and y.is_contiguous(memory_format=torch.channels_last)
    assert ((y.double() - exact).abs() / unit).max().item() < (0.51 if side < 32 else 4)


def test_both_paths_of_group_norm_give_the_same_type_under_autocast():
    norm = GroupNorm(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        x = normal(1, 32, 16, 16).bfloat16()
        types = {
            norm(layout(x).requires_grad_()).dtype for layout in (channels_last, torch.Tensor.contiguous)
        }
    assert len(types) == 1
