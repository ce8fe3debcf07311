r"""The denoising network: a UNet over latents that reads the time and the caption.

Letters: B batch, C channels, h and w the latent's sides, M context tokens (77), D width of the time embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddpm.attention import Context, CrossAttentionBlock, TransformerBlock
from ddpm.layers import Downsample, ResBlock, TimeEmbedding, Upsample, check_type, group_norm


class Level(nn.Module):
    r"""ResBlocks of one width, each followed by attention to the caption where the level has it.

    `gradient_checkpointing` keeps only the inputs of each pair for the backward pass and computes the rest again.
    """

    def __init__(self, inputs: list[int], channels: int, time_width: int, attention: dict | None):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(i, channels, time_width) for i in inputs])
        pairs = len(inputs) if attention else 0
        self.attentions = nn.ModuleList([CrossAttentionBlock(channels, **attention) for _ in range(pairs)])
        self.gradient_checkpointing = False

    def pair(self, i: int, h: Tensor, time: Tensor, context: Context) -> Tensor:
        r"""ResBlock i and the attention after it."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(self._pair, i, h, time, context, use_reentrant=False)
        return self._pair(i, h, time, context)

    def _pair(self, i: int, h: Tensor, time: Tensor, context: Context) -> Tensor:
        h = self.resnets[i](h, time)
        return self.attentions[i](h, context) if self.attentions else h


class DownLevel(Level):
    r"""One level on the way down; its outputs are kept as skips for the way up."""

    def __init__(self, inputs, channels, time_width, attention, last: bool):
        super().__init__(inputs, channels, time_width, attention)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels)])

    def forward(self, h: Tensor, time: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            h = self.pair(i, h, time, context)
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            skips.append(h)
        return h, skips


class MidLevel(Level):
    r"""The smallest size: ResBlock, attention, ResBlock."""

    def __init__(self, channels: int, time_width: int, attention: dict):
        super().__init__([channels, channels], channels, time_width, None)
        self.attentions = nn.ModuleList([CrossAttentionBlock(channels, **attention)])

    def forward(self, h: Tensor, time: Tensor, context: Context) -> Tensor:
        h = self.pair(0, h, time, context)
        return self.resnets[1](h, time)


class UpLevel(Level):
    r"""One level on the way up; every ResBlock takes a skip from the way down beside its input."""

    def __init__(self, inputs, channels, time_width, attention, last: bool):
        super().__init__(inputs, channels, time_width, attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels)])

    def forward(self, h: Tensor, skips: list[Tensor], time: Tensor, context: Context) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.pair(i, torch.cat([h, skips.pop()], dim=1), time, context)
        for upsample in self.upsamplers:
            h = upsample(h)
        return h


class UNet(nn.Module):
    r"""eps_theta(z_t, t, c): the noise (or v, or x_0) in a latent, given time and caption (Latent Diffusion, figure 3).

    The defaults are the spec's: 18,773,444 parameters, laid out like diffusers' UNet2DConditionModel.

    Args:
        channels: one width a level, multiples of 32; each step from one to the next halves the side.
        attention_levels: which levels, counted from the largest, attend to the caption; the middle always does.
        res_blocks: ResBlocks a level on the way down; one more on the way up.
        context_width: width of one caption token.
        head_width: width of one attention head.
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
        if not set(attention_levels) <= set(range(len(channels))) or res_blocks < 1:
            raise ValueError(
                f"expected attention_levels out of 0..{len(channels) - 1} and at least 1 res_blocks, "
                f"got {attention_levels} and {res_blocks}"
            )
        self.in_channels, self.context_width = in_channels, context_width
        self.factor = 2 ** (len(channels) - 1)
        time_width = 4 * channels[0]
        attention = {"context_width": context_width, "head_width": head_width}
        levels = [
            (width, attention if k in attention_levels else None, k) for k, width in enumerate(channels)
        ]

        self.time_embedding = TimeEmbedding(channels[0], time_width)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks, skip_widths = nn.ModuleList(), [channels[0]]
        for width, attend, k in levels:
            last = k == len(channels) - 1
            inputs = [skip_widths[-1]] + [width] * (res_blocks - 1)
            self.down_blocks.append(DownLevel(inputs, width, time_width, attend, last))
            skip_widths += [width] * (res_blocks + (not last))
        self.mid_block = MidLevel(channels[-1], time_width, attention)
        self.up_blocks, below = nn.ModuleList(), channels[-1]
        for width, attend, k in reversed(levels):
            inputs = [h + skip_widths.pop() for h in [below] + [width] * res_blocks]
            self.up_blocks.append(UpLevel(inputs, width, time_width, attend, last=k == 0))
            below = width
        self.conv_norm_out = group_norm(channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, z_t: Tensor, t: Tensor, context: Context) -> Tensor:
        r"""Args: z_t (B, C, h, w); t (B,) integers 0..T-1; context (B, M, context_width), or the `keys_values` of it.

        Returns: (B, C, h, w); twice the channels for a network that was made to say a variance too.
        """
        self._check(z_t, t, context)
        time = self.time_embedding(t)
        h = self.conv_in(z_t)
        skips = [h]
        for level in self.down_blocks:
            h, more = level(h, time, context)
            skips += more
        h = self.mid_block(h, time, context)
        for level in self.up_blocks:
            h = level(h, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def keys_values(self, context: Tensor) -> Context:
        r"""K and V of the caption in every cross-attention, which know neither z_t nor t: for a sampler, once.

        Args: context (B, M, context_width). Good as long as the weights and the autocast stay what they are.
        """
        self._check_context(context)
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        return {block.attn2: block.attn2.keys_values(context) for block in blocks}

    def set_gradient_checkpointing(self, on: bool):
        r"""Trade time for memory: the larger levels keep less for the backward pass and compute it again.

        The lowest level and the middle have the smallest maps, cheap to keep, and most weights, dear to compute.
        """
        larger = max(1, len(self.down_blocks) - 1)
        for level in (*self.down_blocks[:larger], *self.up_blocks[-larger:]):
            level.gradient_checkpointing = on

    def _check(self, z_t: Tensor, t: Tensor, context: Context):
        if (
            z_t.ndim != 4
            or z_t.shape[1] != self.in_channels
            or z_t.shape[2] % self.factor
            or z_t.shape[3] % self.factor
        ):
            raise ValueError(
                f"expected z_t of shape (B, {self.in_channels}, h, w) with h and w multiples of {self.factor}, "
                f"got {tuple(z_t.shape)}"
            )
        if (
            not isinstance(t, Tensor)
            or t.shape != z_t.shape[:1]
            or t.is_floating_point()
            or t.dtype == torch.bool
        ):
            came = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"expected t as ({len(z_t)},) integers, got {came}")
        if t.device.type == "cpu" and len(t) and t.min() < 0:  # elsewhere the look would make the device wait
            raise ValueError(f"expected t from 0, got {t.min()}")
        check_type(self.conv_in.weight, z_t=z_t)
        if not isinstance(context, dict):
            self._check_context(context, len(z_t))
        elif len(k := next(iter(context.values()))[0]) != len(z_t):
            raise ValueError(f"expected keys_values of {len(z_t)} captions, got those of {len(k)}")

    def _check_context(self, context: Tensor, B: int | str = "B"):
        if context.ndim != 3 or B not in ("B", len(context)) or context.shape[2] != self.context_width:
            raise ValueError(
                f"expected context of shape ({B}, M, {self.context_width}), got {tuple(context.shape)}"
            )
        check_type(self.conv_in.weight, context=context)
