r"""Attention: over the pixels of a picture, and from the pixels to the words of its caption.

Letters: B batch, L query tokens (pixels), M context tokens (words, or the pixels again), D width, N heads, d = D / N.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddpm.layers import group_norm, zero_init


class Attention(nn.Module):
    r"""Multi-head attention (Attention Is All You Need, equation 1).

    $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d}}\right) V, \qquad
    Q = W_q x, \quad K = W_k c, \quad V = W_v c$$

    where x gives the queries and c is `context`, or x itself without one: cross-attention or self-attention. Q, K and
    V are D = `width` wide and are cut into D / d heads, d = `head_width`. The equation holds for each head. The heads'
    results are concatenated and pass through one more linear layer, `to_out`.

    Shapes: x (B, L, D), context (B, M, context_width) -> (B, L, D).
    """

    attend = staticmethod(F.scaled_dot_product_attention)  # softmax(Q K^T / sqrt(d)) V

    def __init__(self, width: int, context_width: int | None = None, head_width: int = 32, bias=False):
        super().__init__()
        self.heads = width // head_width
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.by_head(self.to_q(x))  # (B, N, L, d)
        k = self.by_head(self.to_k(context))  # (B, N, M, d)
        v = self.by_head(self.to_v(context))  # (B, N, M, d)
        h = self.attend(q, k, v)  # (B, N, L, d)
        return self.to_out(rearrange(h, "b n l d -> b l (n d)"))  # (B, L, D)

    def by_head(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b l (n d) -> b n l d", n=self.heads)


class PixelAttention(Attention):
    r"""Self-attention of every pixel with every other, one head, around a shortcut: the middle of the VAE.

    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, head_width=channels, bias=True)
        self.group_norm = group_norm(channels, eps)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = super().forward(tokens)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class FeedForward(nn.Module):
    r"""Two linear layers with a gate between them (GLU Variants Improve Transformer, GEGLU).

    $$y = W_2 \left(a \odot \mathrm{GELU}(g)\right), \qquad [a, g] = W_1 x$$

    where a and g are 4 D wide. Shapes: (B, L, D) -> (B, L, D).
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=2)  # (B, L, 4 D) each
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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))
