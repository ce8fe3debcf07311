r"""Attention against the plain softmax formula and torch's multi-head layer; blocks that start as their shortcut."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import far, normal, without_zeros

from ddpm.attention import Attention, CrossAttentionBlock, FeedForward, PixelAttention, TransformerBlock


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
@pytest.mark.parametrize("context_width", [None, 16])
def test_multi_head_attention_is_equation_1_by_hand_and_torchs_layer_with_the_same_weights(context_width):
    torch.manual_seed(0)
    ours = Attention(64, context_width, head_width=16).double()
    assert ours.heads == 4
    x = normal(2, 5, 64)
    context = x if context_width is None else normal(2, 7, context_width, seed=1)
    h = ours(x, None if context_width is None else context)

    def by_head(tokens):
        return torch.stack(tokens.split(16, dim=2), dim=1)

    q, k, v = (
        by_head(tokens @ layer.weight.T)
        for tokens, layer in ((x, ours.to_q), (context, ours.to_k), (context, ours.to_v))
    )
    by_hand = torch.cat(plain(q, k, v).unbind(1), dim=2) @ ours.to_out.weight.T + ours.to_out.bias
    assert far(h, by_hand) < 1e-12

    widths = {"kdim": context_width, "vdim": context_width}
    torchs = torch.nn.MultiheadAttention(64, 4, batch_first=True, **widths).double()
    weights = [ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if context_width else ["in_proj_weight"]
    state = dict(zip(names, weights if context_width else [torch.cat(weights)], strict=True))
    state |= {"in_proj_bias": torch.zeros(192), "out_proj.weight": ours.to_out.weight}
    torchs.load_state_dict(state | {"out_proj.bias": ours.to_out.bias})
    assert far(h, torchs(x, context, context)[0]) < 1e-12


@pytest.mark.equation("attention")
def test_the_order_of_the_words_does_not_matter_to_cross_attention():
    torch.manual_seed(0)
    attention = Attention(64, context_width=16).double()
    x = normal(2, 5, 64)
    context = normal(2, 7, 16, seed=1)
    assert far(attention(x, context), attention(x, context.flip(1))) < 1e-12


def test_only_the_vae_has_biases_on_queries_keys_and_values():
    for layer, bias in ((Attention(64), False), (PixelAttention(64), True)):
        assert {(part.bias is not None) for part in (layer.to_q, layer.to_k, layer.to_v)} == {bias}
    assert PixelAttention(64).heads == 1


def test_pixel_attention_is_a_shortcut_plus_attention_over_rows_and_columns():
    r"""A picture that is not square, so that a swap of height and width would show."""
    torch.manual_seed(0)
    layer = PixelAttention(32).double()
    x = normal(2, 32, 3, 5)
    h = F.group_norm(x, 32, layer.group_norm.weight, layer.group_norm.bias, 1e-6).flatten(2).transpose(1, 2)
    q, k, v = (projection(h)[:, None] for projection in (layer.to_q, layer.to_k, layer.to_v))
    by_hand = x + layer.to_out(plain(q, k, v)[:, 0]).transpose(1, 2).reshape(x.shape)
    assert far(layer(x), by_hand) < 1e-10


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
    assert far(layer(x), by_hand) < 1e-12


@pytest.mark.equation("noise-network")
def test_a_transformer_block_adds_self_attention_cross_attention_and_feed_forward():
    torch.manual_seed(0)
    block = TransformerBlock(64, 16, head_width=32).double()
    x = normal(2, 5, 64)
    context = normal(2, 7, 16, seed=1)
    for k, norm in enumerate((block.norm1, block.norm2, block.norm3)):  # each a layer norm of its own
        torch.nn.init.uniform_(norm.weight, k + 1, k + 2)

    def normed(h, norm):
        return F.layer_norm(h, (64,), norm.weight, norm.bias, eps=1e-5)

    h = x + block.attn1(normed(x, block.norm1))
    h = h + block.attn2(normed(h, block.norm2), context)
    h = h + block.ff(normed(h, block.norm3))
    assert far(block(x, context), h) < 1e-12


@pytest.mark.equation("noise-network")
def test_a_cross_attention_block_is_one_over_the_pixels_around_a_shortcut_that_it_starts_as():
    r"""Each picture by its own caption. Neither attention nor 1 x 1 convolutions see where a pixel is, so rows and
    columns may be swapped."""
    torch.manual_seed(0)
    block = CrossAttentionBlock(64, 16, head_width=32).double()
    x = normal(2, 64, 3, 5)
    context = normal(2, 7, 16, seed=1)
    assert torch.equal(block(x, context), x)
    without_zeros(block)
    y = block(x, context)
    tokens = block.proj_in(F.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6))
    tokens = block.transformer_blocks[0](tokens.flatten(2).transpose(1, 2), context)
    assert far(y, x + block.proj_out(tokens.transpose(1, 2).reshape(x.shape))) < 1e-12
    assert far(block(x.transpose(2, 3), context), y.transpose(2, 3)) < 1e-12
    changed = context.clone()
    changed[1, 3] += 1
    after = block(x, changed)
    assert far(y[0], after[0]) < 1e-12
    assert (y[1] - after[1]).abs().min().item() > 0
