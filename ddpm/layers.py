r"""The layers that the VAE and the UNet share: time embedding, residual block, and the levels built of them.

Letters: B batch, C channels, H and W height and width, D width of the time embedding. Most attribute names
are diffusers' own, and `ddpm.export` has the few others, so weights go to and from other implementations by name.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    r"""Cosines and sines of t at `width / 2` frequencies (Attention Is All You Need, section 3.5; DDPM, appendix B).

    $$\gamma(t) = \left[\cos(\omega_i t),\ \sin(\omega_i t)\right]_{i=0}^{w/2-1}, \qquad
    \omega_i = 10000^{-2i/w}$$

    where t is (B,) times in 0..T-1 and w is `width`, even. Returns (B, w) float32 in [-1, 1], all cosines first.
    """
    half = width // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    r"""The time as a vector that every ResBlock reads: embedding, Linear, SiLU, Linear; (B,) -> (B, D)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.channels).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    r"""Group normalisation (Wu and He 2018, equation 1): each of 32 groups of channels to mean 0 and variance 1.

    $$y = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \varepsilon}}\, \gamma + \beta$$

    where $\mu_g$ and $\sigma_g^2$ are a group's mean and variance, and $\gamma$ and $\beta$ are learned.
    """
    return nn.GroupNorm(32, channels, eps=eps)


def zero_init(module: nn.Module) -> nn.Module:
    r"""Set every parameter of `module` to zero, so that its branch starts by adding nothing to the shortcut."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    r"""Two convolutions around a shortcut (DDPM, appendix B); the time is added between them.

    $$h = \mathrm{conv}_1(\mathrm{SiLU}(\mathrm{norm}_1(x))) + W\,\mathrm{SiLU}(e_t), \qquad
    y = \mathrm{skip}(x) + \mathrm{conv}_2(\mathrm{SiLU}(\mathrm{norm}_2(h)))$$

    where e_t is the vector of `TimeEmbedding`, W a linear layer, and skip a convolution if the widths differ.

    Args: time_width: D, or None for a block without time (the VAE's). eps: of the group normalisations.
    Shapes: (B, in, H, W), (B, D) -> (B, out, H, W). conv_2 starts at zero, so the block starts as its shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, time_width: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.norm1 = group_norm(in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = group_norm(out_channels, eps)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    r"""Halves height and width with a strided convolution; (B, C, H, W) -> (B, C, H/2, W/2).

    `asymmetric` pads on the right and at the bottom only, as the VAE does; the UNet pads all around.
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    r"""Doubles height and width: every pixel four times, then a convolution; (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    r"""ResBlocks of one width, each followed by attention where the level has it.

    Args:
        inputs: the channels of each ResBlock's input. channels: of all their outputs.
        attention: callable () -> nn.Module, which makes one attention block; None for a level without.

    `gradient_checkpointing` keeps only the inputs of each pair for the backward pass and computes the rest again.
    """

    def __init__(self, inputs: list[int], channels: int, time_width=None, attention=None, eps: float = 1e-5):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, channels, time_width, eps) for width in inputs])
        self.attentions = nn.ModuleList([attention() for _ in inputs] if attention else [])
        self.gradient_checkpointing = False

    def pair(self, i: int, h: Tensor, time: Tensor | None, context: Tensor | None) -> Tensor:
        r"""ResBlock i and the attention after it."""

        def compute(h, time, context):
            h = self.resnets[i](h, time)
            return self.attentions[i](h, context) if self.attentions else h

        if self.gradient_checkpointing and self.training:
            return checkpoint(compute, h, time, context, use_reentrant=False)
        return compute(h, time, context)


class DownLevel(Level):
    r"""One level on the way down: pairs, then half the size, except at the lowest level.

    Returns every output. The last of them is the level's result; the UNet keeps all of them as skips.
    """

    def __init__(self, inputs: list[int], channels: int, last: bool, asymmetric: bool = False, **options):
        super().__init__(inputs, channels, **options)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels, asymmetric)])

    def forward(self, h: Tensor, time=None, context=None) -> list[Tensor]:
        outputs = []
        for i in range(len(self.resnets)):
            h = self.pair(i, h, time, context)
            outputs.append(h)
        for downsample in self.downsamplers:
            outputs.append(downsample(h))
        return outputs


class MidLevel(nn.Module):
    r"""The smallest size: ResBlock, attention, ResBlock."""

    def __init__(self, channels: int, attention: Callable[[], nn.Module], **options):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, **options) for _ in range(2)])
        self.attentions = nn.ModuleList([attention()])

    def forward(self, h: Tensor, time=None, context=None) -> Tensor:
        h = self.resnets[0](h, time)
        h = self.attentions[0](h, context)
        return self.resnets[1](h, time)


class UpLevel(Level):
    r"""One level on the way up: pairs, then twice the size, except at the largest level.

    In the UNet every ResBlock takes its input and one skip from the way down, the last skip first.
    """

    def __init__(self, inputs: list[int], channels: int, last: bool, **options):
        super().__init__(inputs, channels, **options)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels)])

    def forward(self, h: Tensor, time=None, context=None, skips: list[Tensor] | None = None) -> Tensor:
        for i in range(len(self.resnets)):
            h = h if skips is None else torch.cat([h, skips.pop()], dim=1)
            h = self.pair(i, h, time, context)
        for upsample in self.upsamplers:
            h = upsample(h)
        return h
