r"""Attention against the plain softmax formula and torch's fused kernel; blocks that start as their shortcut."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import without_zeros

from ddpm.attention import (
    Attention,
    CrossAttentionBlock,
    FeedForward,
    PixelAttention,
    TransformerBlock,
    attend,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(q, k, v):
    r"""Equation 1, one query at a time."""
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for i in range(q.shape[2]):
                score = torch.exp(k[b, n] @ q[b, n, i] / math.sqrt(q.shape[3]))
                result[b, n, i] = (score[:, None] * v[b, n]).sum(0) / score.sum()
    return result


@pytest.mark.equation("attention")
@pytest.mark.parametrize("learn", [True, False])
def test_attend_is_equation_1_by_hand(learn):
    q, k, v = normal(2, 3, 5, 4, seed=1), normal(2, 3, 7, 4, seed=2), normal(2, 3, 7, 4, seed=3)
    assert (attend(q.requires_grad_(learn), k, v) - plain(q, k, v)).abs().max().item() < 1e-12


@pytest.mark.equation("attention")
@pytest.mark.parametrize("tokens", [256, 512])
def test_both_branches_of_attend_have_the_values_and_gradients_of_torchs_kernel(tokens, monkeypatch):
    r"""256 x 256 weights are held, 512 x 512 are more than 2^17 and are not."""
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(1) or kernel(*a))
    q, k, v, dy = (normal(1, 2, tokens, 4, seed=seed) for seed in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    ours = attend(*inputs)
    assert len(calls) == (0 if tokens == 256 else 1)
    theirs = kernel(*inputs)
    assert (ours - theirs).abs().max().item() < 1e-12
    for one, other in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        assert (one - other).abs().max().item() < 1e-12


def test_where_nothing_is_learned_the_fused_kernel_is_taken(monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(1) or kernel(*a))
    q = normal(1, 1, 4, 4)
    attend(q, q, q)
    assert calls == [1]


@pytest.mark.equation("attention")
def test_equal_scores_give_the_mean_of_the_values():
    v = normal(1, 2, 6, 4)
    h = attend(torch.zeros(1, 2, 3, 4, dtype=torch.float64), normal(1, 2, 6, 4, seed=1), v)
    assert (h - v.mean(dim=2, keepdim=True)).abs().max().item() < 1e-12


@pytest.mark.equation("attention")
def test_one_overwhelming_score_picks_its_value_without_overflow():
    q, v = torch.full((1, 1, 1, 4), 1e3), normal(1, 1, 3, 4).float()
    k = torch.tensor([-1e3, 1e3, 0.0])[:, None].expand(3, 4)[None, None]
    for learn in (True, False):
        assert torch.equal(attend(q.detach().requires_grad_(learn), k, v)[0, 0, 0], v[0, 0, 1])


@pytest.mark.equation("attention")
def test_the_order_of_the_words_does_not_matter_to_cross_attention():
    torch.manual_seed(0)
    attention = Attention(64, context_width=16).double()
    x, context = normal(2, 5, 64), normal(2, 7, 16, seed=1)
    assert (attention(x, context) - attention(x, context.flip(1))).abs().max().item() < 1e-12


@pytest.mark.equation("attention")
@pytest.mark.parametrize("context_width", [None, 16])
def test_multi_head_attention_is_torchs_with_the_same_weights(context_width):
    torch.manual_seed(0)
    width, heads = 64, 4
    ours = Attention(width, context_width, head_width=16).double()
    torchs = torch.nn.MultiheadAttention(
        width, heads, bias=True, kdim=context_width, vdim=context_width, batch_first=True
    ).double()
    projections = [ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]
    with torch.no_grad():
        if context_width is None:
            torchs.in_proj_weight.copy_(torch.cat(projections))
        else:
            for theirs, weight in zip(
                (torchs.q_proj_weight, torchs.k_proj_weight, torchs.v_proj_weight), projections, strict=True
            ):
                theirs.copy_(weight)
        torchs.in_proj_bias.zero_()
        torchs.out_proj.load_state_dict(ours.to_out.state_dict())
    x = normal(2, 5, width)
    context = x if context_width is None else normal(2, 7, context_width, seed=1)
    theirs, _ = torchs(x, context, context)
    assert (ours(x, None if context_width is None else context) - theirs).abs().max().item() < 1e-12


def test_the_number_of_heads_is_width_over_head_width_and_must_be_whole():
    assert Attention(128, head_width=32).heads == 4
    with pytest.raises(ValueError, match="divides the layer's width 64, got 48"):
        Attention(64, head_width=48)


def test_only_the_vae_has_biases_on_queries_keys_and_values():
    assert Attention(64).to_q.bias is None
    assert all(
        layer.bias is not None
        for layer in (PixelAttention(64).to_q, PixelAttention(64).to_k, PixelAttention(64).to_v)
    )
    assert PixelAttention(64).heads == 1


def test_pixel_attention_is_a_shortcut_plus_attention_over_rows_and_columns():
    r"""A picture that is not square, so that a swap of height and width would show."""
    torch.manual_seed(0)
    layer = PixelAttention(32).double()
    x = normal(2, 32, 3, 5)
    h = F.group_norm(x, 32, layer.group_norm.weight, layer.group_norm.bias, 1e-6).flatten(2).transpose(1, 2)
    q, k, v = (projection(h)[:, None] for projection in (layer.to_q, layer.to_k, layer.to_v))
    by_hand = x + layer.to_out(plain(q, k, v)[:, 0]).transpose(1, 2).reshape(x.shape)
    assert (layer(x) - by_hand).abs().max().item() < 1e-10


@pytest.mark.equation("feed-forward")
def test_feed_forward_gates_its_first_half_with_the_gelu_of_its_second():
    torch.manual_seed(0)
    layer = FeedForward(8).double()
    x = normal(2, 3, 8)
    inner = x @ layer.proj.weight.T + layer.proj.bias
    value, gate = inner[..., :32], inner[..., 32:]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    by_hand = (value * gelu) @ layer.out.weight.T + layer.out.bias
    assert inner.shape[-1] == 64
    assert (layer(x) - by_hand).abs().max().item() < 1e-12


@pytest.mark.equation("noise-network")
def test_a_transformer_block_adds_self_attention_cross_attention_and_feed_forward():
    torch.manual_seed(0)
    block = TransformerBlock(64, 16, head_width=32).double()
    x, context = normal(2, 5, 64), normal(2, 7, 16, seed=1)

    def norm(h):
        return F.layer_norm(h, (64,), eps=1e-5)  # its gamma is 1 and its beta 0 at first

    h = x + block.attn1(norm(x))
    h = h + block.attn2(norm(h), context)
    h = h + block.ff(norm(h))
    assert (block(x, context) - h).abs().max().item() < 1e-12


def test_a_cross_attention_block_starts_as_its_shortcut():
    torch.manual_seed(0)
    block = CrossAttentionBlock(64, 16, head_width=32)
    x = normal(2, 64, 3, 5).float()
    assert torch.equal(block(x, normal(2, 7, 16).float()), x)


@pytest.mark.equation("noise-network")
def test_a_cross_attention_block_with_weights_listens_to_its_caption_alone():
    torch.manual_seed(0)
    block = without_zeros(CrossAttentionBlock(64, 16, head_width=32).double())
    x, context = normal(2, 64, 3, 5), normal(2, 7, 16, seed=1)
    changed = context.clone()
    changed[1, 3] += 1
    before, after = block(x, context), block(x, changed)
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().min().item() > 0


def test_a_cross_attention_block_treats_a_transposed_picture_as_the_picture_transposed():
    r"""Neither attention nor 1 x 1 convolutions know where a pixel is, so rows and columns may be swapped."""
    torch.manual_seed(0)
    block = without_zeros(CrossAttentionBlock(32, 16, head_width=32).double())
    x, context = normal(2, 32, 3, 5), normal(2, 7, 16, seed=1)
    assert (block(x.transpose(2, 3), context) - block(x, context).transpose(2, 3)).abs().max().item() < 1e-12
