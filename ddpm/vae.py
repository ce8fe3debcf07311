r"""The variational autoencoder that makes a picture small: 64 x 64 x 3 -> 32 x 32 x 4 by default, and back.

Letters: B batch, H and W the picture's height and width, h = H / f and w = W / f the latent's, c latent channels, and
f = 2^(number of channel widths - 1) the factor by which the encoder shrinks a side.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.attention import PixelAttention
from ddpm.layers import DownLevel, MidLevel, UpLevel, group_norm
from ddpm.schedule import one_of

EPS = 1e-6


class DiagonalGaussian:
    r"""q(z | x), the encoder's output: each latent number is normal with its own mean and variance.

    $$q(z \mid x) = \mathcal N\left(z;\ \mu(x),\ \mathrm{diag}\, \sigma^2(x)\right), \qquad \log\sigma^2 \in [-30, 20]$$

    Attributes: `mu` and `logvar`, each (B, c, h, w).
    """

    def __init__(self, mu: Tensor, logvar: Tensor):
        self.mu = mu
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        r"""The most likely z, which is mu."""
        return self.mu

    def sample(self, generator: torch.Generator | None = None, eps: Tensor | None = None) -> Tensor:
        r"""z = mu + sigma eps, with eps given or drawn from `generator` (Kingma and Welling, section 2.4)."""
        if eps is None:
            eps = torch.randn(self.mu.shape, generator=generator, dtype=self.mu.dtype)
        return self.mu + (self.logvar / 2).exp() * eps.to(self.mu.device)

    def kl(self) -> Tensor:
        r"""Divergence from the standard normal in nats, summed over each latent; (B,) (Kingma and Welling, appendix B).

        $$\mathrm{KL}\left(q(z \mid x)\, \Vert\, \mathcal N(0, \mathbf I)\right)
        = \tfrac12 \sum \left(\mu^2 + \sigma^2 - 1 - \log \sigma^2\right)$$
        """
        return 0.5 * (self.mu**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(dim=1)

    def entropy(self) -> Tensor:
        r"""Entropy in nats, summed over each latent; (B,).

        $$H(q) = \tfrac12 \sum \left(\log 2 \pi e + \log \sigma^2\right)$$
        """
        return 0.5 * (math.log(2 * math.pi * math.e) + self.logvar).flatten(1).sum(dim=1)


class Encoder(nn.Module):
    r"""Picture to the numbers of a Gaussian: (B, 3, H, W) -> (B, 2c, h, w)."""

    def __init__(self, channels: tuple[int, ...], layers: int, latent_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = channels[0]
        for k, width in enumerate(channels):
            inputs = [before] + [width] * (layers - 1)
            last = k == len(channels) - 1
            self.down_blocks.append(DownLevel(inputs, width, last, asymmetric=True, eps=EPS))
            before = width
        self.mid_block = MidLevel(before, partial(PixelAttention, before, EPS), eps=EPS)
        self.conv_norm_out = group_norm(before, EPS)
        self.conv_out = nn.Conv2d(before, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, channels[0], H, W)
        for level in self.down_blocks:
            h = level(h)[-1]  # half the size, but for the last level
        h = self.mid_block(h)  # (B, channels[-1], h, w)
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (B, 2c, h, w)


class Decoder(nn.Module):
    r"""Latent to picture: (B, c, h, w) -> (B, 3, H, W); the encoder's mirror with one more ResBlock a level."""

    def __init__(self, channels: tuple[int, ...], layers: int, latent_channels: int):
        super().__init__()
        before = channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, before, 3, padding=1)
        self.mid_block = MidLevel(before, partial(PixelAttention, before, EPS), eps=EPS)
        self.up_blocks = nn.ModuleList()
        for k, width in reversed(list(enumerate(channels))):
            inputs = [before] + [width] * layers
            self.up_blocks.append(UpLevel(inputs, width, last=k == 0, eps=EPS))
            before = width
        self.conv_norm_out = group_norm(before, EPS)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))  # (B, channels[-1], h, w)
        for level in self.up_blocks:
            h = level(h)  # twice the size, but for the last level
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (B, 3, H, W)


class KLVAE(nn.Module):
    r"""The compact KL-regularised autoencoder of Latent Diffusion (section 3.1), trained with `vae_loss`.

    Args:
        channels: one width a level, multiples of 32. Each level after the first halves the side, so (64, 128) gives
            64 -> 32 and (32, 64, 128) gives 64 -> 16.
        layers: ResBlocks a level in the encoder; the decoder has one more.
        latent_channels: c.
    """

    def __init__(self, channels: tuple[int, ...] = (64, 128), layers: int = 2, latent_channels: int = 4):
        super().__init__()
        self.factor = 2 ** (len(channels) - 1)
        self.latent_channels = latent_channels
        self.encoder = Encoder(channels, layers, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(channels, layers, latent_channels)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        r"""q(z | x) of pictures x (B, 3, H, W) in [-1, 1]; H and W multiples of `factor`."""
        fits = x.ndim == 4 and x.shape[1] == 3 and x.shape[2] % self.factor == x.shape[3] % self.factor == 0
        if not fits or not in_range(x):
            expected = f"a tensor (B, 3, H, W) of floats in [-1, 1], H and W multiples of {self.factor}"
            raise ValueError(f"expected {expected}, got {tuple(x.shape)} {x.dtype} up to {x.max()}")
        moments = self.quant_conv(self.encoder(x))  # (B, 2c, h, w)
        mu, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mu, logvar)

    def decode(self, z: Tensor) -> Tensor:
        r"""Pictures (B, 3, H, W), about in [-1, 1] and not clipped, of latents z (B, c, h, w)."""
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ValueError(f"expected latents (B, {self.latent_channels}, h, w), got {tuple(z.shape)}")
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        r"""decode(mu + sigma eps) and q(z | x), as training needs them; mu and logvar in float32 under autocast."""
        q = self.encode(x)
        q = DiagonalGaussian(q.mu.float(), q.logvar.float())
        return self.decode(q.sample(eps=eps)), q


def in_range(x: Tensor) -> bool:
    r"""Whether x has pictures in about [-1, 1] and not in 0..255; unchecked on a GPU, which would have to wait."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return x.device.type != "cpu" or not x.numel() or bool(x.detach().abs().amax() < 10)


def vae_loss(
    x: Tensor, x_hat: Tensor, posterior: DiagonalGaussian, kl_weight: float, norm: str = "l1"
) -> tuple[Tensor, Tensor]:
    r"""Reconstruction error and the whole loss, each averaged over the batch (Kingma and Welling, equation 3).

    $$\mathcal L = \frac1n \lVert x - \hat x \rVert_1 + \lambda \frac1m
    \mathrm{KL}\left(q(z \mid x)\, \Vert\, \mathcal N(0, \mathbf I)\right)$$

    where n and m are the numbers of elements of a picture and of a latent, and $\lambda$ is `kl_weight`. With norm l2
    the first term has the squares. Latent Diffusion sums both terms, with a KL weight of 1e-6. At 64 x 64 x 3 ->
    32 x 32 x 4 the same balance is 3.3e-7 here.

    Returns: the reconstruction term and the sum, two scalars.
    """
    one_of(("l1", "l2"), norm, "norm")
    error = (x - x_hat.float()).abs() if norm == "l1" else (x - x_hat.float()) ** 2
    reconstruction = error.mean()
    elements = posterior.mu[0].numel()
    return reconstruction, reconstruction + kl_weight * posterior.kl().mean() / elements
