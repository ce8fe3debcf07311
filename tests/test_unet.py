r"""The denoising network: its size, what its output depends on, and gradient checkpointing."""

import copy

import pytest
import torch
from conftest import without_zeros

from ddpm.unet import UNet


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**changes):
    torch.manual_seed(0)
    settings = {
        "channels": (32, 64),
        "attention_levels": (1,),
        "res_blocks": 1,
        "context_width": 16,
    } | changes
    return without_zeros(UNet(**settings))


@pytest.fixture(scope="module")
def unet():
    return small().eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- size


@pytest.mark.equation("network-configuration")
def test_the_default_unet_has_the_specs_size_and_shapes():
    torch.manual_seed(0)
    unet = UNet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 18_773_444
    assert len(unet.state_dict()) == 496
    with torch.no_grad():
        assert unet(normal(1, 4, 32, 32), torch.tensor([500]), normal(1, 77, 512)).shape == (1, 4, 32, 32)
    assert unet.conv_in.weight.shape[:2] == (64, 4)
    assert unet.conv_out.weight.shape[:2] == (4, 64)
    assert {len(level.resnets) for level in unet.down_blocks} == {2}
    assert {len(level.resnets) for level in unet.up_blocks} == {3}
    assert [len(level.attentions) for level in unet.down_blocks] == [2, 2, 0]
    assert [len(level.attentions) for level in unet.up_blocks] == [0, 3, 3]
    assert len(unet.mid_block.attentions) == 1
    assert unet.time_embedding.linear_1.weight.shape == (256, 64)
    heads = [unet.down_blocks[i].attentions[0].transformer_blocks[0].attn1.heads for i in (0, 1)]
    assert heads == [2, 4]  # 32 wide each


@pytest.mark.parametrize("widths", [(32,), (32, 64), (32, 64, 96), (32, 32, 64, 64)])
@pytest.mark.parametrize("res_blocks", [1, 2])
def test_any_number_of_levels_and_blocks_keeps_the_latents_shape(widths, res_blocks):
    unet = small(channels=widths, res_blocks=res_blocks, attention_levels=(len(widths) - 1,))
    assert unet.factor == 2 ** (len(widths) - 1)
    with torch.no_grad():
        z = normal(2, 4, 8, 16)  # not square, so that swapped sides would show
        assert unet(z, torch.tensor([0, 999]), normal(2, 5, 16)).shape == z.shape


def test_input_and_output_may_have_different_channels():
    unet = small(in_channels=3, out_channels=6)
    with torch.no_grad():
        assert unet(normal(1, 3, 8, 8), torch.tensor([3]), normal(1, 5, 16)).shape == (1, 6, 8, 8)


def test_an_untrained_unet_says_the_same_everywhere():
    r"""The last convolution's weights start at zero; only its bias is left."""
    torch.manual_seed(0)
    unet = UNet(channels=(32, 64), attention_levels=(1,), res_blocks=1, context_width=16)
    with torch.no_grad():
        output = unet(normal(2, 4, 8, 8), torch.tensor([5, 500]), normal(2, 5, 16))
    assert torch.equal(output, unet.conv_out.bias.detach()[None, :, None, None].expand(2, 4, 8, 8))


# ------------------------------------------------------------------------------------------- dependence

Z, T, C = normal(2, 4, 8, 8, seed=1), torch.tensor([10, 700]), normal(2, 5, 16, seed=2)


@pytest.mark.equation("noise-network")
def test_the_output_depends_on_latent_time_and_caption(unet):
    before = unet(Z, T, C)
    changed = C.clone()
    changed[:, -1] += 1
    for after in (unet(Z + 0.1, T, C), unet(Z, T + 1, C), unet(Z, T, changed)):
        # a thousand times what float32 rounds
        assert (before - after).abs().amax(dim=(1, 2, 3)).min().item() > 1e-4


def test_a_level_without_attention_leaves_the_middle_to_listen():
    unet = small(attention_levels=())
    with torch.no_grad():
        assert (unet(Z, T, C) - unet(Z, T, C + 1)).abs().max().item() > 1e-4


def test_each_element_of_a_batch_is_computed_by_itself(unet):
    together = unet(Z, T, C)
    for i in range(2):
        alone = unet(Z[i : i + 1], T[i : i + 1], C[i : i + 1])
        # float32 sums in another order: 1e-4 of numbers about 1
        assert (together[i : i + 1] - alone).abs().max().item() < 1e-4


def test_memory_layout_does_not_change_the_output(unet):
    straight = unet(Z, T, C)
    crooked = Z.transpose(2, 3).contiguous().transpose(2, 3)
    words = C.transpose(1, 2).contiguous().transpose(1, 2)
    assert not crooked.is_contiguous() and not words.is_contiguous()
    for z, c in [(crooked, words), (Z.contiguous(memory_format=torch.channels_last), C)]:
        assert (unet(z, T, c) - straight).abs().max().item() < 1e-4


def test_the_order_of_the_words_alone_does_not_matter(unet):
    r"""Where a word stands is in the text tower's state, not in the cross-attention."""
    assert (unet(Z, T, C) - unet(Z, T, C.flip(1))).abs().max().item() < 1e-4


@pytest.mark.equation("noise-network")
def test_every_skip_reaches_the_output():
    r"""conv_in, and for each level its blocks and its downsampling: the gradient arrives at each one's bias even with
    everything below taken out of the way up."""
    unet = small(channels=(32, 32, 64), res_blocks=2)
    outputs = []
    keep = [unet.conv_in, *(m for level in unet.down_blocks for m in (*level.resnets, *level.downsamplers))]
    hooks = [m.register_forward_hook(lambda m, i, o: outputs.append(o) or o.retain_grad()) for m in keep]
    unet(normal(1, 4, 8, 8), torch.tensor([5]), normal(1, 5, 16)).sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 1 + 3 * 2 + 2
    assert all(output.grad.abs().max().item() > 0 for output in outputs)
    assert sum(block.conv1.weight.shape[1] for level in unet.up_blocks for block in level.resnets) == (
        # what comes from below: once the middle's width, then each level's own; and all nine skips
        (64 + 64 + 64) + (64 + 32 + 32) + (32 + 32 + 32) + sum(output.shape[1] for output in outputs)
    )


@pytest.mark.equation("noise-network")
def test_a_skip_stands_behind_what_comes_from_below_and_the_last_one_down_is_the_first_one_up(unet):
    r"""Checkpoints of Stable Diffusion count on this order of channels."""
    seen = {}
    parts = {"middle": unet.mid_block, "last": unet.down_blocks[-1].attentions[-1], "first": unet.conv_in}
    hooks = [
        m.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
        for name, m in parts.items()
    ]
    ends = {"up": unet.up_blocks[0].resnets[0], "top": unet.up_blocks[-1].resnets[-1]}
    hooks += [
        m.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0]}))
        for name, m in ends.items()
    ]
    unet(Z, T, C)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["up"], torch.cat([seen["middle"], seen["last"]], dim=1))
    assert torch.equal(seen["top"][:, -32:], seen["first"])


def test_every_parameter_is_learned_from():
    unet = small()
    (unet(Z, T, C) ** 2).sum().backward()
    assert [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


# ------------------------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_keys_and_values_computed_before_give_the_same_bits_as_the_caption_itself(precision):
    unet = small(attention_levels=(0, 1)).eval()
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision is not None):
        told = unet.keys_values(C)
        for z, t in ((Z, T), (Z + 1, T + 5)):
            assert torch.equal(unet(z, t, told), unet(z, t, C))
    assert len(told) == 7 and all(k.shape == v.shape == (2, k.shape[1], 5, 32) for k, v in told.values())


def test_keys_and_values_of_another_number_of_captions_are_refused(unet):
    with pytest.raises(ValueError, match="keys_values of 2 captions, got those of 1"):
        unet(Z, T, unet.keys_values(C[:1]))
    with pytest.raises(ValueError, match=r"context of shape \(B, M, 16\), got \(2, 5, 512\)"):
        unet.keys_values(torch.zeros(2, 5, 512))


# ------------------------------------------------------------------------------------------- checkpointing


def gradients_and_bytes(unet, z=Z, context=C):
    r"""The gradients, and the bytes of the distinct storages beside the weights that the backward pass keeps."""
    unet.zero_grad()
    weights, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (unet(z, T, context) ** 2).mean()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}, sum(kept.values())


@pytest.mark.equation("small-machine")
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_fewer_bytes():
    unet = small(attention_levels=(0, 1)).train()
    plain, kept = gradients_and_bytes(unet)
    unet.set_gradient_checkpointing(True)
    checkpointed, kept_fewer = gradients_and_bytes(unet)
    unet.set_gradient_checkpointing(False)
    _, kept_again = gradients_and_bytes(unet)
    for name in plain:
        assert (plain[name] - checkpointed[name]).abs().max().item() < 1e-6, name  # the same sums once more
    assert kept_fewer < kept
    assert kept_again == kept


@pytest.mark.equation("small-machine")
def test_with_gradient_checkpointing_the_specs_unet_keeps_less_than_three_tenths():
    torch.manual_seed(0)
    unet = UNet().train()
    _, kept = gradients_and_bytes(unet, normal(2, 4, 32, 32), normal(2, 77, 512))
    unet.set_gradient_checkpointing(True)
    _, kept_fewer = gradients_and_bytes(unet, normal(2, 4, 32, 32), normal(2, 77, 512))
    assert 0 < kept_fewer < 0.3 * kept


def test_a_unet_of_one_level_is_checkpointed_too():
    unet = small(channels=(32,), attention_levels=(0,)).train()
    _, kept = gradients_and_bytes(unet)
    unet.set_gradient_checkpointing(True)
    _, kept_fewer = gradients_and_bytes(unet)
    assert kept_fewer < kept / 2


def test_gradient_checkpointing_changes_nothing_where_nothing_is_learned():
    unet = small().eval()
    with torch.no_grad():
        before = unet(Z, T, C)
        unet.set_gradient_checkpointing(True)
        assert torch.equal(unet(Z, T, C), before)
        assert torch.equal(unet.train()(Z, T, C), before)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "z, t, c, told",
    [
        (torch.zeros(2, 3, 8, 8), T, C, r"z_t of shape \(B, 4, h, w\) .* multiples of 2, got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 4, 7, 8), T, C, r"multiples of 2, got \(2, 4, 7, 8\)"),
        (torch.zeros(2, 4, 8, 7), T, C, r"multiples of 2, got \(2, 4, 8, 7\)"),
        (torch.zeros(4, 8, 8), T, C, r"got \(4, 8, 8\)"),
        (Z, torch.tensor([1.0, 2.0]), C, r"t as \(2,\) integers, got \(2,\) torch.float32"),
        (Z, torch.tensor([1, 2, 3]), C, r"t as \(2,\) integers, got \(3,\) torch.int64"),
        (Z, torch.tensor(1), C, r"t as \(2,\) integers, got \(\) torch.int64"),
        (Z, T, torch.zeros(2, 5, 512), r"context of shape \(2, M, 16\), got \(2, 5, 512\)"),
        (Z, T, torch.zeros(1, 5, 16), r"context of shape \(2, M, 16\), got \(1, 5, 16\)"),
        (Z, T, torch.zeros(2, 16), r"context of shape \(2, M, 16\), got \(2, 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_both_shapes(unet, z, t, c, told):
    with pytest.raises(ValueError, match=told):
        unet(z, t, c)


def test_widths_and_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="that 32 divides .*, got 40"):
        small(channels=(40, 64))
    with pytest.raises(ValueError, match="divides the layer's width 64, got 48"):
        small(head_width=48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_numbers_of_another_type_are_refused_with_both_types_or_cast_by_autocast(unet, dtype):
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 7, 16)
    for bad in ((z.to(dtype), t, c), (z, t, c.to(dtype))):
        with pytest.raises(ValueError, match=rf"in the network's own torch.float32, got {dtype}"):
            unet(*bad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if dtype in (torch.int64, torch.float64):
            with pytest.raises(ValueError, match=str(dtype)):
                unet(z.to(dtype), t, c)
        else:
            assert unet(z.to(dtype), t, c.to(dtype)).shape == z.shape
    with pytest.raises(ValueError, match="t from 0, got -2"):
        unet(z, -t, c)


def test_a_network_in_half_precision_answers_in_half_precision(unet):
    half = copy.deepcopy(unet).bfloat16()
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 7, 16)
    with torch.no_grad():
        output, exact = half(z.bfloat16(), t, c.bfloat16()), unet(z, t, c)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.05 * exact.norm()  # bf16 keeps eight bits


def test_inputs_that_do_not_lie_in_order_in_memory_give_the_same(unet):
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(7, 2, 16).transpose(0, 1)
    turned = z.transpose(2, 3)
    assert not (turned.is_contiguous() or c.is_contiguous())
    with torch.no_grad():
        assert (unet(turned, t, c) - unet(turned.contiguous(), t, c.contiguous())).abs().max() < 1e-5
