r"""Attention: over the pixels of a picture, and from the pixels to the words of its caption.

Letters: B batch, L query tokens (pixels), M context tokens (words, or the pixels again), D width, N heads.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddpm.layers import group_norm, zero_init

Context = Tensor | dict[nn.Module, tuple[Tensor, Tensor]]  # states of captions, or K and V of them by layer


class Attention(nn.Module):
    r"""Multi-head attention (Attention Is All You Need, equation 1).

    $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d}}\right) V, \qquad
    Q = W_q x, \quad K = W_k c, \quad V = W_v c$$

    Self-attention when no context is given (c = x), cross-attention otherwise.

    Args:
        width: D of the queries and of the result.
        context_width: width of the context; None for self-attention.
        head_width: d, the width of one head; the number of heads is D / d.

    Shapes: x (B, L, D), context (B, M, context_width) -> (B, L, D). In the context's place may stand what
    `keys_values` made of it, by layer, which many calls then share.
    """

    def __init__(
        self, width: int, context_width: int | None = None, head_width: int = 32, qkv_bias: bool = False
    ):
        super().__init__()
        if width % head_width:
            raise ValueError(
                f"expected a head width that divides the layer's width {width}, got {head_width}"
            )
        self.heads = width // head_width
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width or width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width or width, width, bias=qkv_bias)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        k, v = (
            context[self]
            if isinstance(context, dict)
            else self.keys_values(x if context is None else context)
        )
        h = attend(self.by_head(self.to_q(x)), k, v)
        return self.to_out(rearrange(h, "b n l d -> b l (n d)"))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        r"""K and V of every head; (B, M, context_width) -> (B, N, M, d) twice."""
        return self.by_head(self.to_k(context)), self.by_head(self.to_v(context))

    def by_head(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b l (n d) -> b n l d", n=self.heads)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""softmax(Q K^T / sqrt(d)) V of every head; (B, N, L, d), (B, N, M, d) twice -> (B, N, L, d).

    Torch's fused kernel never holds the L x M weights. On the CPU its backward pass is slow, so that where
    something is to be learned and the weights are few, they are held.
    """
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] * k.shape[2] <= 2**17:
        weights = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return weights.softmax(dim=3) @ v
    return F.scaled_dot_product_attention(q, k, v)


class PixelAttention(Attention):
    r"""Self-attention of every pixel with every other, one head, around a shortcut: the middle of the VAE.

    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, head_width=channels, qkv_bias=True)
        self.group_norm = group_norm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = super().forward(tokens)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class FeedForward(nn.Module):
    r"""Two linear layers with a gate between them (GLU Variants Improve Transformer, GEGLU).

    $$y = W_2 \left(a \odot \mathrm{GELU}(g)\right), \qquad [a, g] = W_1 x$$

    The inner width is four times the outer. W_1's two halves are multiplied one by one, since halves of one product
    would be strided views, slow to go on with and to go back through. Shapes: (B, L, D) -> (B, L, D).
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        value, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    r"""Self-attention, cross-attention to the caption, feed-forward; each normalised first and added to its input."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, head_width=head_width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, head_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class CrossAttentionBlock(nn.Module):
    r"""A transformer block over the pixels of a feature map, around a shortcut (Latent Diffusion, section 3.3).

    Shapes: (B, C, H, W), (B, M, context_width) -> (B, C, H, W). `proj_out` starts at zero, so the block starts as
    its shortcut.
    """

    def __init__(self, channels: int, context_width: int, head_width: int):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_width, head_width)])
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))
