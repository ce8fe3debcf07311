r"""The denoising network: a UNet over latents that is conditioned on the time and the caption.

Letters: B batch, C latent channels, h and w the latent's sides, M context tokens (77), D width of the time embedding,
c_k width of level k.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.attention import CrossAttentionBlock
from ddpm.layers import DownLevel, MidLevel, TimeEmbedding, UpLevel, group_norm, zero_init


class UNet(nn.Module):
    r"""eps_theta(z_t, t, c): the noise (or v, or x_0) in a latent, given time and caption (Latent Diffusion, figure 3).

    The defaults are the spec's: 18,773,444 parameters, laid out like diffusers' UNet2DConditionModel.

    Args:
        channels: one width a level, multiples of 32. Each level after the first halves the side.
        attention_levels: which levels, counted from the largest, attend to the caption; the middle always does.
        res_blocks: ResBlocks a level on the way down; one more on the way up.
        context_width: of one caption token. head_width: of one attention head.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        channels: tuple[int, ...] = (64, 128, 256),
        attention_levels: tuple[int, ...] = (0, 1),
        res_blocks: int = 2,
        context_width: int = 512,
        head_width: int = 32,
    ):
        super().__init__()
        self.in_channels = in_channels
        time_width = 4 * channels[0]
        smallest = len(channels) - 1

        def options(width: int, level: int) -> dict:
            attention = partial(CrossAttentionBlock, width, context_width, head_width)
            return {"time_width": time_width, "attention": attention if level in attention_levels else None}

        self.time_embedding = TimeEmbedding(channels[0], time_width)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # the widths of what the way up will take
        for k, width in enumerate(channels):
            inputs = [skips[-1]] + [width] * (res_blocks - 1)
            self.down_blocks.append(DownLevel(inputs, width, last=k == smallest, **options(width, k)))
            skips += [width] * (res_blocks + (k != smallest))

        middle = partial(CrossAttentionBlock, channels[-1], context_width, head_width)
        self.mid_block = MidLevel(channels[-1], middle, time_width=time_width)

        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for k, width in reversed(list(enumerate(channels))):
            inputs = [h + skips.pop() for h in [below] + [width] * res_blocks]
            self.up_blocks.append(UpLevel(inputs, width, last=k == 0, **options(width, k)))
            below = width

        self.conv_norm_out = group_norm(channels[0], eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(channels[0], out_channels, 3, padding=1))

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        r"""The prediction, and a variance too where the network was made with twice the output channels.

        Args: z_t (B, C, h, w), h and w multiples of 2^(number of levels - 1); t (B,) integers 0..T-1;
            context (B, M, context_width).

        Returns: (B, out_channels, h, w).
        """
        time = self.time_embedding(t)  # (B, D)
        h = self.conv_in(z_t)  # (B, c_0, h, w)
        skips = [h]
        for level in self.down_blocks:
            outputs = level(h, time, context)  # (B, c_k, h / 2^k, w / 2^k), then half the size
            skips += outputs
            h = outputs[-1]
        h = self.mid_block(h, time, context)  # the smallest size
        for level in self.up_blocks:
            h = level(h, time, context, skips)  # twice the size, but for the last level
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (B, out_channels, h, w)

    def set_gradient_checkpointing(self, on: bool):
        r"""Trade time for memory: the larger levels keep less for the backward pass and compute it again.

        The lowest level and the middle stay as they are, because their maps are small.
        """
        larger = max(1, len(self.down_blocks) - 1)
        for level in (*self.down_blocks[:larger], *self.up_blocks[-larger:]):
            level.gradient_checkpointing = on
