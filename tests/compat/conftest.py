r"""What the comparisons share: weights that are nowhere zero, and one tiny model in a diffusers folder."""

import shutil

import pytest
import torch
from conftest import TINY
from torch import nn

from ddpm.config import PRESETS, Config, ModelConfig
from ddpm.export.diffusers_folder import export
from ddpm.model import TextToImage
from ddpm.tools.seeding import generator


def one_of_each(describe, odd: ModelConfig) -> dict[str, ModelConfig]:
    r"""The models of the presets and an odd one; of those that `describe` describes alike, but for a size, the last."""
    configs = {name: Config.from_preset(name).model for name in PRESETS} | {"odd": odd}
    kinds = {repr(describe(c) | {"sample_size": None}): name for name, c in configs.items()}
    return {name: configs[name] for name in kinds.values()}


def randomised(module: nn.Module, *keys) -> nn.Module:
    r"""`module` with noise on every parameter: no zero hides a branch, no gain of 1 or bias of 0 hides a wrong name."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = 0.1 if parameter.ndim == 1 else 0.5 / parameter[0].numel() ** 0.5
            parameter += std * torch.randn(parameter.shape, generator=generator("compat", name, *keys))
    return module.eval()


def normalisations(module: nn.Module) -> dict[str, tuple]:
    r"""Group count or width, and epsilon, of every normalisation: too small a number to show in outputs of size 1."""
    found = {name: m for name, m in module.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    return {name: (getattr(m, "num_groups", None), m.weight.shape, m.eps) for name, m in found.items()}


@pytest.fixture(scope="session")
def tiny_model(tower) -> TextToImage:
    r"""The tiny model with all weights of VAE and UNet at random; its text tower is the random one."""
    torch.manual_seed(0)
    model = TextToImage(TINY, tower).eval()
    randomised(model.vae, "vae")
    randomised(model.unet, "unet")
    model.latent_scale = 1.25
    return model


@pytest.fixture(scope="session")
def exported(tiny_model, tmp_path_factory):
    r"""The tiny model's diffusers folder."""
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export(tiny_model, folder)
    yield folder
    shutil.rmtree(folder)  # a quarter of a gigabyte
