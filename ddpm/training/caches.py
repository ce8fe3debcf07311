r"""What the second stage computes once: latents of pictures, states of captions."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.tools import text_weights
from ddpm.tools.arrays import cached_array, key_of, silent
from ddpm.tools.devices import autocast
from ddpm.tools.files import digest_of
from ddpm.vae import KLVAE, DiagonalGaussian

AT_ONCE = 64  # pictures encoded, and captions embedded, in one go


@dataclass(frozen=True)
class Latents:
    r"""Every picture and its mirror image as the VAE encodes them.

    Attributes: `moments`, (N, 2, 2, c, h, w) float16, memory-mapped: picture, mirrored or not, mu or logvar.
    """

    moments: np.ndarray

    def gaussian(self, rows: np.ndarray, flip: Tensor) -> DiagonalGaussian:
        r"""q(z | x) of some pictures, mirrored where `flip` (B,) says so; not scaled."""
        mu, logvar = torch.from_numpy(self.moments[rows, flip.long().numpy()]).float().unbind(1)
        return DiagonalGaussian(mu, logvar)


@torch.no_grad()
def encode_latents(
    folder: Path, vae: KLVAE, pictures: Pictures, precision="fp32", progress=silent, batch=AT_ONCE
) -> Latents:
    r"""Encode all pictures, both ways round, once."""
    device = next(vae.parameters()).device
    count = len(pictures.pixels)
    side = pictures.pixels.shape[1] // vae.factor
    key = key_of("latents", pictures.key, digest_of(vae.state_dict()), precision)

    def fill(moments: np.ndarray):
        starts = range(0, count, batch)
        for begin in progress(starts, len(starts), f"encoding pictures, {batch} at a time"):
            x = pictures.batch(np.arange(begin, min(begin + batch, count))).to(device)
            for flipped, view in enumerate((x, x.flip(3))):
                with autocast(device, precision):
                    z = vae.encode(view.contiguous(memory_format=torch.channels_last))
                both = torch.stack([z.mu, z.logvar], dim=1)
                moments[begin : begin + batch, flipped] = both.float().cpu().numpy()

    shape = (count, 2, 2, vae.latent_channels, side, side)
    return Latents(cached_array(folder / f"latents-{key}.npy", shape, np.float16, fill))


class Texts:
    r"""Sentences to context vectors, each distinct sentence embedded once, the empty one among them.

    Callable: sentences -> (B, 77, 512) float32. When `limit_gb` is less than the file would take, sentences go through
    the tower at every call instead. In bf16 a CPU with matrix units embeds more than three times as many a second. The
    rounding is about a hundredth of the difference between two sentences. One warning names the long ones that are cut.
    """

    def __init__(
        self, folder: Path, tower: TextTower, sentences, precision="fp32", limit_gb=8.0, progress=silent
    ):
        self.tower = tower
        self.precision = precision
        self.device = next(tower.parameters(), torch.empty(0)).device
        distinct = sorted({"", *sentences})
        self.cached = len(distinct) * TOKENS * WIDTH * 2 <= limit_gb * 2**30
        if not self.cached:
            self.warn_of_long(distinct)
            return
        self.row = {sentence: i for i, sentence in enumerate(distinct)}
        key = key_of("texts", text_weights.fingerprint(tower), precision, distinct)

        def fill(states: np.ndarray):
            self.warn_of_long(distinct)
            starts = range(0, len(distinct), AT_ONCE)
            for begin in progress(starts, len(starts), f"embedding captions, {AT_ONCE} at a time"):
                some = slice(begin, begin + AT_ONCE)
                states[some] = self.embed(distinct[some]).cpu().numpy()

        shape = (len(distinct), TOKENS, WIDTH)
        self.states = cached_array(folder / f"texts-{key}.npy", shape, np.float16, fill)

    def warn_of_long(self, sentences: Sequence[str]):
        r"""Let the tokenizer warn once of all that it cuts; a sentence has no more tokens than bytes."""
        if long := [sentence for sentence in sentences if len(sentence.encode()) > TOKENS - 2]:
            self.tower.tokenize(long)

    def embed(self, sentences: Sequence[str]) -> Tensor:
        r"""Through the tower."""
        with autocast(self.device, self.precision), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is cut to ")  # of them all `warn_of_long` has warned
            return self.tower(list(sentences))

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        if not self.cached or any(s not in self.row for s in sentences):
            return self.embed(sentences)
        return torch.from_numpy(self.states[[self.row[s] for s in sentences]]).float()
