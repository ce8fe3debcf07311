r"""What several test files share: one random text tower, a tiny model, and weights that are nowhere zero."""

import pytest
import torch
from torch import Tensor, nn

from ddpm.config import ModelConfig
from ddpm.model import TextToImage
from ddpm.text import TextTower
from ddpm.tools import command, text_weights
from ddpm.tools.errors import UserError

collect_ignore = ["benchmarks"]  # they are run by hand
SLOW_LEFT_OUT = []
TINY = ModelConfig(
    image_size=16,
    vae_channels=(32, 32),
    vae_layers=1,
    channels=(32, 64),
    attention_levels=(1,),
    res_blocks=1,
    text_weights="random",
)


def pytest_deselected(items):
    SLOW_LEFT_OUT.extend(item for item in items if item.get_closest_marker("slow"))


def pytest_terminal_summary(terminalreporter):
    if SLOW_LEFT_OUT and terminalreporter.config.option.markexpr:
        terminalreporter.write_line(
            f"{len(SLOW_LEFT_OUT):,} slow tests were left out; python -m pytest -m '' runs all tests"
        )


@pytest.fixture(autouse=True, scope="session")
def memory_is_given_back():
    r"""The commands keep freed memory, which suits one training; hundreds of them in one process would add up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "keep_freed_memory", lambda: None)
        yield


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    r"""Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def far(x: Tensor, y: Tensor) -> float:
    r"""The largest absolute difference of two tensors of one shape."""
    assert x.shape == y.shape
    return (x.double() - y.double()).abs().max().item()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name in ("browser", "compat", "notebooks"):  # these need extras
            item.add_marker(pytest.mark.slow)


def without_zeros(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    r"""`module` with every layer that starts at zero drawn at random, so that its output depends on its inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(drawn * std)
    return module


def refusal_of(action, *arguments) -> str:
    r"""The text of the UserError that `action` raises, which must be one line."""
    with pytest.raises(UserError) as refusal:
        action(*arguments)
    message = str(refusal.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def tower() -> TextTower:
    r"""The random text tower; drawing its 63 million weights takes a second. Tests only read it."""
    return text_weights.random_tower()


class Remembering(nn.Module):
    r"""The text tower, run once for each prompt of the whole session, because it is most of a tiny model's time."""

    def __init__(self, tower: TextTower):
        super().__init__()
        self.tower, self.states = tower, {}
        self.tokenize = tower.tokenize

    def forward(self, prompts: list[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in self.states:
                self.states[prompt] = self.tower([prompt])[0]
        device = next(self.tower.parameters()).device
        return torch.stack([self.states[prompt] for prompt in prompts]).to(device)


@pytest.fixture(scope="session")
def remembering(tower) -> Remembering:
    return Remembering(tower)


@pytest.fixture
def tiny(remembering) -> TextToImage:
    r"""An untrained model of 16 x 16 pictures whose UNet's output depends on the time and on the caption."""
    torch.manual_seed(0)
    model = TextToImage(TINY, remembering).eval()
    without_zeros(model.vae, seed=1)
    without_zeros(model.unet, seed=2)
    model.latent_scale = 1.25
    return model
