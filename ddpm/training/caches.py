r"""What the second stage computes once: latents of pictures, states of captions, each when it is first needed."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.tools import text_weights
from ddpm.tools.arrays import Progress, Records, key_of, silent
from ddpm.tools.devices import autocast
from ddpm.tools.files import digest_of
from ddpm.vae import KLVAE, DiagonalGaussian

AT_ONCE = 64  # pictures or captions between two steps of a progress bar
PLACES = 4  # in the file of captions, for each; when all are taken, the newest caption stays


@dataclass(frozen=True)
class Latents:
    r"""Pictures and their mirror images as the VAE encodes them.

    Attributes: `moments`, (N, 2, 2, c, h, w): picture, mirrored or not, mu or logvar; an array, or `Encoded`.
    """

    moments: "np.ndarray | Encoded"

    def gaussian(self, rows: np.ndarray, flip: Tensor) -> DiagonalGaussian:
        r"""q(z | x) of some pictures, mirrored where `flip` (B,) says so; not scaled."""
        mu, logvar = torch.from_numpy(self.moments[rows, flip.long().numpy()]).float().unbind(1)
        return DiagonalGaussian(mu, logvar)


class Encoded:
    r"""encoded[rows, flipped] -> (B, 2, c, h, w) float16: mu and logvar of pictures, kept in a file of `folder`."""

    def __init__(self, folder: Path, vae: KLVAE, pictures: Pictures, precision: str = "fp32"):
        self.vae = vae
        self.pictures = pictures
        self.precision = precision
        side = pictures.pixels.shape[1] // vae.factor
        key = key_of("latents", pictures.key, digest_of(vae.state_dict()), precision)
        path = folder / f"latents-{key}.bin"
        shape = (2, vae.latent_channels, side, side)
        self.records = Records(path, shape, np.float16, lambda key: [2 * key[0] + key[1]], self.encode)

    def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        rows, flipped = index
        return self.records(list(zip(rows.tolist(), flipped.tolist(), strict=True)))

    @torch.no_grad()
    def encode(self, keys: Sequence[tuple[int, int]]) -> np.ndarray:
        r"""Through the VAE: (picture, mirrored) -> (mu, logvar)."""
        device = next(self.vae.parameters()).device
        rows, flipped = np.array(keys).T
        x = self.pictures.batch(rows, torch.from_numpy(flipped) > 0).to(device)
        with autocast(device, self.precision):
            z = self.vae.encode(x.contiguous(memory_format=torch.channels_last))
        return torch.stack([z.mu, z.logvar], dim=1).float().cpu().numpy()


def encode_latents(
    folder: Path,
    vae: KLVAE,
    pictures: Pictures,
    precision: str = "fp32",
    progress: Progress = silent,
    ways: int = 2,
) -> Latents:
    r"""The latents of all pictures, encoded now and not when needed; with 2 `ways` also of their mirror images."""
    encoded = Encoded(folder, vae, pictures, precision)
    rows, flipped = np.indices((len(pictures.pixels), ways)).reshape(2, -1)
    fill(lambda some: encoded[rows[some], flipped[some]], len(rows), progress, "encoding pictures")
    return Latents(encoded)


def fill(lookup: Callable[[slice], object], count: int, progress: Progress, label: str):
    r"""Ask for things 0..count-1, AT_ONCE at a time, so that they are kept from now on."""
    starts = range(0, count, AT_ONCE)
    for start in progress(starts, len(starts), f"{label}, {AT_ONCE} at a time"):
        lookup(slice(start, start + AT_ONCE))


class Texts:
    r"""Sentences to context vectors, each distinct sentence embedded once and kept in a file of `folder`.

    Callable: sentences -> (B, 77, 512) float32. In bf16 a CPU with matrix units embeds more than three times as many a
    second. The rounding is about a hundredth of the difference between two sentences. A warning names the first
    sentence that is cut.

    Args:
        sentences: those that are embedded now, others when they are first asked for.
        limit_gb: size of the file at most; with 0 there is none, and sentences go through the tower at every call.
    """

    def __init__(
        self,
        folder: Path,
        tower: TextTower,
        sentences: Iterable[str] = (),
        precision: str = "fp32",
        limit_gb: float = 8.0,
        progress: Progress = silent,
    ):
        self.tower = tower
        self.precision = precision
        self.device = next(tower.parameters(), torch.empty(0)).device
        self.has_warned = False
        count = int(limit_gb * 2**30 / (TOKENS * WIDTH * 2))

        def places(sentence: str) -> list[int]:
            digest = hashlib.sha256(sentence.encode()).digest()
            first = int.from_bytes(digest[:8], "big")
            return [(first + k) % count for k in range(min(PLACES, count))]

        def make(sentences: list[str]) -> np.ndarray:
            return self.embed(sentences).cpu().numpy()

        key = key_of("texts", text_weights.fingerprint(tower), precision, count)
        path = folder / f"texts-{key}.bin"
        self.records = Records(path, (TOKENS, WIDTH), np.float16, places, make) if count else None
        known = sorted(set(sentences)) if count else []
        fill(lambda some: self(known[some]), len(known), progress, "embedding captions")

    def embed(self, sentences: Sequence[str]) -> Tensor:
        r"""Through the tower."""
        if not self.has_warned:
            self.warn_of_long(sentences)
        with autocast(self.device, self.precision), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is cut to ")
            return self.tower(list(sentences))

    def warn_of_long(self, sentences: Sequence[str]):
        r"""Warn of the first sentence that the tokenizer cuts; one has no more tokens than bytes."""
        for sentence in sentences:
            if len(sentence.encode()) > TOKENS - 2:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    self.tower.tokenize([sentence])
                if caught:
                    self.has_warned = True
                    advice = "other long ones are cut without a further line"
                    warnings.warn(f"{caught[0].message}; {advice}", stacklevel=2)
                    return

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        if self.records is None:
            return self.embed(sentences)
        return torch.from_numpy(self.records(sentences)).float()
