r"""The UNet gives the numbers of diffusers' UNet2DConditionModel: same weights, outputs and gradients.

Both compute in single precision with the same convolutions, but attention and sums in another order: each of some 40
layers rounds at 6e-8 of values of size 1 to 10, which adds up to about 1e-6. Hence 1e-5 for outputs of size 1, and 1e-4
for gradients, which are sums over pixels of size 10.
"""

import inspect

import pytest
import torch
from conftest import far
from safetensors.torch import load_file

from compat.conftest import normalisations, one_of_each, randomised
from ddpm.config import ModelConfig
from ddpm.export.diffusers_folder import RENAMES, UNET_ALWAYS, split, unet_config, write_weights
from ddpm.layers import timestep_embedding
from ddpm.model import networks
from ddpm.text import WIDTH
from ddpm.unet import UNet

diffusers = pytest.importorskip("diffusers")

OUTPUT, GRADIENT = 1e-5, 1e-4
ODD = ModelConfig(
    channels=(32, 64, 96, 96), attention_levels=(0, 3), res_blocks=3, head_width=16, latent_channels=5
)
CONFIGS = one_of_each(unet_config, ODD)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    r"""Our UNet, and theirs with the weights that we wrote for it."""
    c = CONFIGS[request.param]
    torch.manual_seed(0)
    _, unet = networks(c)
    ours = randomised(unet)
    path = tmp_path_factory.mktemp("unet") / "weights.safetensors"
    write_weights(path, ours, RENAMES)
    theirs = diffusers.UNet2DConditionModel.from_config(unet_config(c)).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    return ours, theirs


def inputs(unet: UNet, times: list[int], side: int = 8):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(len(times), unet.in_channels, side, side, generator=g)
    context = torch.randn(len(times), 77, WIDTH, generator=g)
    return z, torch.tensor(times), context


@pytest.mark.equation("noise-network", "time-embedding", "group-norm")
@torch.no_grad()
def test_outputs_are_equal_at_the_ends_of_time_and_between(pair):
    r"""And change with time and caption: else equal outputs would say nothing of the branches that carry them."""
    ours, theirs = pair
    assert normalisations(ours) == normalisations(theirs)
    z, t, context = inputs(ours, [0, 999, 17, 480])
    y = ours(z, t, context)
    assert y.std() > 0.1  # there is something to compare
    assert far(theirs(z, t, context).sample, y) < OUTPUT
    assert far(y, ours(z, t.flip(0), context)) > 1e-2
    assert far(y, ours(z, t, context.flip(0))) > 1e-2


@pytest.mark.equation("time-embedding")
@torch.no_grad()
def test_the_embedding_of_every_time_is_equal(pair):
    ours, theirs = pair
    t = torch.arange(1000)
    embedding = timestep_embedding(t, ours.time_embedding.channels)
    assert far(theirs.time_proj(t), embedding) == 0
    assert far(theirs.time_embedding(theirs.time_proj(t)), ours.time_embedding(t)) < OUTPUT


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels-last"]
)
def test_gradients_are_equal_for_every_weight_and_input(pair, layout):
    r"""Channels-last maps of 256 pixels and more take the hand-written backward pass of the group norm."""
    ours, theirs = pair
    z, t, context = inputs(ours, [3, 700], side=16)
    z = z.contiguous(memory_format=layout)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5)) / 16
    gradients = []
    for unet in (ours, theirs):
        unet.train().zero_grad()
        x, c = z.clone().requires_grad_(), context.clone().requires_grad_()
        out = unet(x, t, c)
        ((out if unet is ours else out.sample) * weight).sum().backward()
        own = {name: p.grad for name, p in unet.named_parameters()}
        gradients.append({"z": x.grad, "context": c.grad} | own)
        unet.eval()
    mine, expected = gradients
    renamed = split(mine, RENAMES)
    assert renamed.keys() == expected.keys()
    assert max(g.abs().max().item() for g in expected.values()) > 0.1
    worst = max(expected, key=lambda name: far(expected[name], renamed[name]))
    assert far(expected[worst], renamed[worst]) < GRADIENT, worst


@pytest.mark.equation("network-configuration")
def test_the_specs_unet_has_the_published_size_and_what_ours_always_is_is_diffusers_default():
    r"""A folder that leaves one of these settings out means the same by it."""
    theirs = diffusers.UNet2DConditionModel.from_config(unet_config(ModelConfig()))
    assert len(theirs.state_dict()) == 496
    assert sum(p.numel() for p in theirs.parameters()) == 18_773_444
    defaults = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    assert {key: defaults[key].default for key in UNET_ALWAYS} == UNET_ALWAYS
    changes_nothing = {"dropout", "upcast_attention"}
    only_with_another = {
        "addition_embed_type_num_heads",
        "addition_time_embed_dim",
        "class_embeddings_concat",
    }
    only_with_another |= {"projection_class_embeddings_input_dim"}
    assert defaults.keys() - unet_config(ModelConfig()) == {"self"} | changes_nothing | only_with_another
