r"""The denoising network: its size, what its output depends on, and gradient checkpointing."""

import copy
from functools import partial

import pytest
import torch
from conftest import far, normal, without_zeros

from ddpm.unet import UNet

single = partial(normal, dtype=torch.float32)
SMALL = {"channels": (32, 64), "attention_levels": (1,), "res_blocks": 1, "context_width": 16}
Z = single(2, 4, 8, 8, seed=1)
T = torch.tensor([10, 700])
C = single(2, 5, 16, seed=2)


def small(**changes):
    torch.manual_seed(0)
    return without_zeros(UNet(**SMALL | changes))


@pytest.fixture(scope="module")
def unet():
    return small().eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- size


@pytest.mark.equation("network-configuration")
def test_the_default_unet_has_the_specs_size_and_shapes():
    unet = UNet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 18_773_444
    assert len(unet.state_dict()) == 496
    with torch.no_grad():
        assert unet(single(1, 4, 32, 32), torch.tensor([500]), single(1, 77, 512)).shape == (1, 4, 32, 32)
    assert unet.conv_in.weight.shape[:2] == (64, 4)
    assert unet.conv_out.weight.shape[:2] == (4, 64)
    assert [len(level.resnets) for level in unet.down_blocks] == [2, 2, 2]
    assert [len(level.resnets) for level in unet.up_blocks] == [3, 3, 3]
    assert [len(level.attentions) for level in unet.down_blocks] == [2, 2, 0]
    assert [len(level.attentions) for level in unet.up_blocks] == [0, 3, 3]
    assert len(unet.mid_block.attentions) == 1
    assert unet.time_embedding.linear_1.weight.shape == (256, 64)
    heads = [unet.down_blocks[i].attentions[0].transformer_blocks[0].attn1.heads for i in (0, 1)]
    assert heads == [2, 4]  # 32 wide each


@pytest.mark.parametrize("widths", [(32,), (32, 64, 96), (32, 32, 64, 64)])
@pytest.mark.parametrize("res_blocks", [1, 2])
@torch.no_grad()
def test_any_number_of_levels_blocks_and_channels_keeps_the_latents_size(widths, res_blocks):
    unet = small(channels=widths, res_blocks=res_blocks, attention_levels=(), in_channels=3, out_channels=6)
    z = single(2, 3, 8, 16)  # not square, so that swapped sides would show
    assert unet(z, torch.tensor([0, 999]), C).shape == (2, 6, 8, 16)
    assert far(unet(z, T, C), unet(z, T, C + 1)) > 1e-4  # the middle attends in any case


@torch.no_grad()
def test_an_untrained_unet_predicts_zero_everywhere():
    assert not UNet(**SMALL)(Z, T, C).any()


# ------------------------------------------------------------------------------------------- dependence


@pytest.mark.equation("noise-network")
def test_the_output_depends_on_latent_time_and_caption(unet):
    before = unet(Z, T, C)
    changed = C.clone()
    changed[:, -1] += 1
    for after in (unet(Z + 0.1, T, C), unet(Z, T + 1, C), unet(Z, T, changed)):
        # a thousand times what float32 rounds
        assert (before - after).abs().amax(dim=(1, 2, 3)).min().item() > 1e-4


@pytest.mark.equation("noise-network")
def test_neither_the_rest_of_the_batch_nor_memory_layout_nor_the_order_of_words_changes_the_output(unet):
    r"""Where a word stands is in the text tower's state, not in the cross-attention."""
    output = unet(Z, T, C)
    # float32 sums in another order: 1e-4 of numbers about 1
    assert far(unet(Z, T, C.flip(1)), output) < 1e-4
    assert far(unet(Z[1:], T[1:], C[1:]), output[1:]) < 1e-4
    crooked = Z.mT.contiguous().mT
    words = C.mT.contiguous().mT
    assert not crooked.is_contiguous() and not words.is_contiguous()
    assert far(unet(crooked, T, words), output) < 1e-4
    assert far(unet(Z.contiguous(memory_format=torch.channels_last), T, C), output) < 1e-4


@pytest.mark.equation("noise-network")
def test_every_skip_reaches_the_output():
    r"""conv_in, and for each level its blocks and its downsampling: the gradient arrives at each one's output."""
    unet = small(channels=(32, 32, 64), res_blocks=2)
    outputs = []
    keep = [unet.conv_in, *(m for level in unet.down_blocks for m in (*level.resnets, *level.downsamplers))]
    for module in keep:
        module.register_forward_hook(lambda m, i, output: outputs.append(output) or output.retain_grad())
    unet(single(1, 4, 8, 8), torch.tensor([5]), single(1, 5, 16)).sum().backward()
    assert len(outputs) == 1 + 3 * 2 + 2
    assert all(output.grad.abs().max().item() > 0 for output in outputs)
    assert sum(block.conv1.in_channels for level in unet.up_blocks for block in level.resnets) == (
        # what comes from below: once the middle's width, then each level's own; and all nine skips
        (64 + 64 + 64) + (64 + 32 + 32) + (32 + 32 + 32) + sum(output.shape[1] for output in outputs)
    )


@pytest.mark.equation("noise-network")
def test_a_skip_stands_behind_what_comes_from_below_and_the_last_one_down_is_the_first_one_up():
    r"""Checkpoints of Stable Diffusion count on this order of channels."""
    unet = small()
    seen = {}
    parts = {"middle": unet.mid_block, "last": unet.down_blocks[-1].attentions[-1], "first": unet.conv_in}
    for name, module in parts.items():
        module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    ends = {"up": unet.up_blocks[0].resnets[0], "top": unet.up_blocks[-1].resnets[-1]}
    for name, module in ends.items():
        module.register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name: inputs[0]}))
    unet(Z, T, C)
    assert torch.equal(seen["up"], torch.cat([seen["middle"], seen["last"]], dim=1))
    assert torch.equal(seen["top"][:, -32:], seen["first"])


@pytest.mark.equation("noise-network")
def test_every_parameter_is_learned_from():
    unet = small()
    (unet(Z, T, C) ** 2).sum().backward()
    assert [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_network_in_half_precision_computes_in_half_precision(unet):
    half = copy.deepcopy(unet).bfloat16()
    output = half(Z.bfloat16(), T, C.bfloat16())
    exact = unet(Z, T, C)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.05 * exact.norm()  # bf16 keeps eight bits


# ------------------------------------------------------------------------------------------- checkpointing


def gradients_and_bytes(unet, z=Z, context=C):
    r"""The gradients, and the bytes of the distinct storages beside the weights that the backward pass keeps."""
    unet.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept = {}

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
@pytest.mark.parametrize("channels", [(32, 64), (32,)])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_fewer_bytes(channels):
    unet = small(channels=channels, attention_levels=(0, 1)).train()
    plain, kept = gradients_and_bytes(unet)
    unet.set_gradient_checkpointing(True)
    checkpointed, kept_fewer = gradients_and_bytes(unet)
    unet.set_gradient_checkpointing(False)
    _, kept_again = gradients_and_bytes(unet)
    for name in plain:
        assert far(plain[name], checkpointed[name]) < 1e-6, name  # the same sums once more
    assert kept_fewer < (kept if len(channels) > 1 else kept / 2)
    assert kept_again == kept


@pytest.mark.slow
@pytest.mark.equation("small-machine")
def test_with_gradient_checkpointing_the_specs_unet_keeps_less_than_three_tenths():
    unet = UNet().train()
    inputs = (single(2, 4, 32, 32), single(2, 77, 512))
    _, kept = gradients_and_bytes(unet, *inputs)
    unet.set_gradient_checkpointing(True)
    _, kept_fewer = gradients_and_bytes(unet, *inputs)
    assert 0 < kept_fewer < 0.3 * kept


@torch.no_grad()
def test_gradient_checkpointing_changes_nothing_where_nothing_is_learned():
    unet = small().eval()
    before = unet(Z, T, C)
    unet.set_gradient_checkpointing(True)
    assert torch.equal(unet(Z, T, C), before)
    assert torch.equal(unet.train()(Z, T, C), before)


@pytest.mark.equation("noise-network")
def test_the_last_convolution_reads_the_silu_of_the_last_norm():
    unet, passed = small().eval(), []
    unet.conv_norm_out.register_forward_hook(lambda module, inputs, output: passed.append(output))
    unet.conv_out.register_forward_hook(lambda module, inputs, output: passed.append(inputs[0]))
    with torch.no_grad():
        unet(Z, T, C)
    assert torch.equal(passed[1], torch.nn.functional.silu(passed[0]))
