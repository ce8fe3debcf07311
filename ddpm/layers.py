r"""The layers that the VAE and the UNet share: time embedding, residual block, down- and upsampling.

Letters: B batch, C channels, H and W height and width, D width of the time embedding. Attribute names are those that
Stable Diffusion checkpoints use, so that weights go to and from other implementations by name.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    r"""Cosines and sines of t at `width / 2` frequencies (Attention Is All You Need, section 3.5; DDPM, appendix B).

    $$\gamma(t) = \left[\cos(\omega_i t),\ \sin(\omega_i t)\right]_{i=0}^{w/2-1}, \qquad
    \omega_i = 10000^{-2i/w}$$

    Args:
        t: (B,) times, 0..T-1.
        width: w, even.

    Returns: (B, width) float32 in [-1, 1], all cosines first.
    """
    if width % 2:
        raise ValueError(f"expected an even width of the time embedding, got {width}")
    half = width // 2
    frequency = torch.exp(-math.log(longest) * torch.arange(half, device=t.device) / half)
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


class ResBlock(nn.Module):
    r"""Two convolutions around a shortcut (DDPM, appendix B); the time is added between them.

    $$h = \mathrm{conv}_1(\mathrm{SiLU}(\mathrm{norm}_1(x))) + W\,\mathrm{SiLU}(e_t), \qquad
    y = \mathrm{skip}(x) + \mathrm{conv}_2(\mathrm{SiLU}(\mathrm{norm}_2(h)))$$

    Args:
        time_width: D of the time embedding; None for a block that knows no time (the VAE's).
        eps: of the group normalisation; 1e-5 in the UNet, 1e-6 in the VAE.

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


class GroupNorm(nn.GroupNorm):
    r"""Group normalisation (Wu and He 2018, equation 1): each group of channels to mean 0 and variance 1.

    $$y = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \varepsilon}}\, \gamma + \beta$$

    The same numbers as torch's. On the CPU torch is slow for channels-last maps: its backward pass where they are large
    (it took half of a VAE step), in half precision its forward pass where they are small. That case is written below.
    """

    def forward(self, x: Tensor) -> Tensor:
        channels_last = (
            not x.is_contiguous() and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        )
        large = channels_last and x.shape[2] * x.shape[3] >= 256
        if x.device.type == "cpu" and ((channels_last and is_half(x)) or (large and x.requires_grad)):
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def is_half(x: Tensor) -> bool:
    r"""Whether the numbers of x have 16 bits."""
    return x.dtype in (torch.bfloat16, torch.float16)


class ChannelsLastGroupNorm(torch.autograd.Function):
    r"""GroupNorm whose backward pass is three sums and one multiply-add over the map.

    With x-hat the normalised x, n elements a group and sums over a group,

    $$\frac{\partial L}{\partial x} = \frac{1}{\sigma} \left(\gamma\, \partial y
    - \frac1n \sum \gamma\, \partial y - \hat x\, \frac1n \sum \gamma\, \partial y\, \hat x\right)$$
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
        B, C, H, W = x.shape
        small = (
            H * W < 1024
        )  # where torch's kernel for single precision is four to six times as fast as that for half
        wide = (v.float() for v in (x, gamma, beta)) if small and is_half(x) else (x, gamma, beta)
        y, mu, inverse_sigma = torch.native_group_norm(*wide, B, C, H * W, groups, eps)
        ctx.save_for_backward(x, gamma, mu, inverse_sigma)
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, gamma, mu, inverse_sigma = ctx.saved_tensors
        B, C, H, W = x.shape
        groups = mu.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)  # sums are taken in single precision at least
        mu, inverse_sigma = (v.to(wide).repeat_interleave(C // groups, dim=1) for v in (mu, inverse_sigma))

        def group_mean(
            v: Tensor,
        ) -> Tensor:  # (B, C) sums over the map -> mean over the group, for each channel
            total = v.view(B, groups, -1).sum(dim=2) / (C // groups * H * W)
            return total.repeat_interleave(C // groups, dim=1)

        sum_dy = dy.sum(dim=(2, 3), dtype=wide)
        sum_dy_x_hat = ((dy * x).sum(dim=(2, 3), dtype=wide) - mu * sum_dy) * inverse_sigma
        mean_1, mean_x_hat = group_mean(gamma * sum_dy), group_mean(gamma * sum_dy_x_hat)
        of_dy, of_x = inverse_sigma * gamma, -(inverse_sigma**2) * mean_x_hat
        constant = -inverse_sigma * mean_1 - mu * of_x
        of_dy, of_x, constant = (v.to(x.dtype)[:, :, None, None] for v in (of_dy, of_x, constant))
        dx = torch.addcmul(constant, x, of_x).addcmul_(dy, of_dy)
        return dx, sum_dy_x_hat.sum(dim=0), sum_dy.sum(dim=0), None, None


def group_norm(channels: int, eps: float) -> GroupNorm:
    r"""Group normalisation with 32 groups; `channels` must be a multiple of 32."""
    if channels % 32:
        raise ValueError(
            f"expected a number of channels that 32 divides (32 groups of normalisation), got {channels}"
        )
    return GroupNorm(32, channels, eps=eps)


def zero_init(module: nn.Module) -> nn.Module:
    r"""Set every parameter of `module` to zero: it then starts by adding nothing to its residual branch."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def check_type(weight: Tensor, **inputs: Tensor):
    r"""Raise ValueError unless the inputs have the type of a network's weights, or autocast will see to it."""
    for name, x in inputs.items():
        half = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if x.dtype != weight.dtype and not (half and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(
                f"expected {name} in the network's own {weight.dtype}, got {x.dtype}; convert it, or call "
                "the network under torch.autocast for half precision"
            )
