r"""Faster ways to compute the very same layers: for the CPU, and for a sampler that conditions on one caption.

The core holds the equations; `use_fast_kernels` gives its modules the code below in place of torch's where a
measurement showed torch's to be slow (docs/benchmarks.md).
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.attention import Attention, FeedForward, TransformerBlock


def use_fast_kernels(network: nn.Module) -> nn.Module:
    r"""Let the layers of `network` compute by the functions of this file; parameters and names stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
        elif type(module) is FeedForward:
            module.__class__ = GateInTwoProducts
        elif isinstance(module, Attention):
            module.attend = attend
    return network


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""softmax(Q K^T / sqrt(d)) V of every head; (B, N, L, d), (B, N, M, d) twice -> (B, N, L, d).

    Torch's fused kernel never holds the L x M weights, but its backward pass is slow on the CPU. So the weights are
    held there where a gradient is wanted and they are few.
    """
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] * k.shape[2] <= 2**17:
        weights = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return weights.softmax(dim=3) @ v
    return F.scaled_dot_product_attention(q, k, v)


@contextlib.contextmanager
def context_read_once(network: nn.Module) -> Iterator[None]:
    r"""Within this context K and V of one caption are computed once, since they depend on neither z_t nor t.

    Each cross-attention keeps the K and V of the last context tensor. Weights and autocast must not change within.
    """
    blocks = [module for module in network.modules() if isinstance(module, TransformerBlock)]
    projections = [linear for block in blocks for linear in (block.attn2.to_k, block.attn2.to_v)]
    for linear in projections:
        linear.forward = _remember_last(linear.forward)
    try:
        yield
    finally:
        for linear in projections:
            linear.__dict__.pop("forward", None)


def _remember_last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    seen, result = None, None

    def remembering(x: Tensor) -> Tensor:
        nonlocal seen, result
        if x is not seen:
            result = function(x)
            seen = x
        return result

    return remembering


class GateInTwoProducts(FeedForward):
    r"""The same numbers; W_1 in two products, because the halves of one are strided views, which are slow."""

    def forward(self, x: Tensor) -> Tensor:
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        value, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        return self.out(value * F.gelu(gate))


class GroupNorm(nn.GroupNorm):
    r"""The same numbers as torch's, for channels-last maps on the CPU, where torch is slow.

    In half precision it always is. In single precision it is where the map is large and has at most 64 channels, and
    a gradient is wanted; with more channels torch is the faster one.
    """

    def forward(self, x: Tensor) -> Tensor:
        channels_last = (
            not x.is_contiguous() and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        )
        if x.device.type == "cpu" and channels_last and (is_half(x) or self.is_slow_in_single(x)):
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)

    def is_slow_in_single(self, x: Tensor) -> bool:
        r"""Whether torch's backward pass is the slower one in single precision."""
        return x.requires_grad and self.num_channels <= 64 and x.shape[2] * x.shape[3] >= 256


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
        small = H * W < 1024  # torch's kernel for single precision is four to six times as fast there
        inputs = [v.float() for v in (x, gamma, beta)] if small and is_half(x) else [x, gamma, beta]
        y, mu, inverse_sigma = torch.native_group_norm(*inputs, B, C, H * W, groups, eps)
        ctx.save_for_backward(x, gamma, mu, inverse_sigma)
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, gamma, mu, inverse_sigma = ctx.saved_tensors
        B, C, H, W = x.shape
        groups = mu.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)  # sums are taken in single precision at least
        mu = mu.to(wide).repeat_interleave(C // groups, dim=1)
        inverse_sigma = inverse_sigma.to(wide).repeat_interleave(C // groups, dim=1)

        def group_mean(sums: Tensor) -> Tensor:
            r"""(B, C) sums over the map -> the mean over the group of each channel."""
            total = sums.view(B, groups, -1).sum(dim=2) / (C // groups * H * W)
            return total.repeat_interleave(C // groups, dim=1)

        sum_dy = dy.sum(dim=(2, 3), dtype=wide)
        sum_dy_x_hat = ((dy * x).sum(dim=(2, 3), dtype=wide) - mu * sum_dy) * inverse_sigma
        dy_factor = inverse_sigma * gamma
        x_factor = -(inverse_sigma**2) * group_mean(gamma * sum_dy_x_hat)
        constant = -inverse_sigma * group_mean(gamma * sum_dy) - mu * x_factor
        dy_factor, x_factor, constant = (
            v.to(x.dtype)[:, :, None, None] for v in (dy_factor, x_factor, constant)
        )
        dx = torch.addcmul(constant, x, x_factor).addcmul_(dy, dy_factor)
        return dx, sum_dy_x_hat.sum(dim=0), sum_dy.sum(dim=0), None, None
