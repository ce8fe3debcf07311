r"""How good it is, in numbers.

Reconstruction (PSNR, SSIM), the latents, the validation loss by timestep, bits a dimension; how well pictures follow
their prompts (balanced accuracy), and how two sets of pictures differ (Frechet distance, precision and recall, nearest
neighbours)."""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.diffusion import q_sample
from ddpm.losses import prior_term, split_output, variational_term
from ddpm.model import TextToImage
from ddpm.tools.devices import autocast
from ddpm.tools.seeding import generator
from ddpm.training.caches import Latents, Texts
from ddpm.vae import DiagonalGaussian

Z = 1.96  # standard deviations to either side that hold 95 % of a normal distribution


@torch.no_grad()
def bits_per_dimension(
    model: TextToImage,
    latents: Latents,
    texts: Texts,
    pictures: Pictures,
    rows: np.ndarray,
    width: float,
    precision: str = "fp32",
    seed: int = 0,
    strata: int = 24,
    batch: int = 64,
) -> dict:
    r"""The full variational bound of held-out pictures: of their latents, and of the 8-bit pictures themselves.

    Of the latents, scaled as the UNet sees them, it bounds a density and may be below 0 (DDPM, equation 5):

    $$-\log p(z_0) \le L_T + \sum_{t=2}^{T} L_{t-1} + L_0$$

    L_T and L_0 are computed for each picture, the sum from one random time for each picture in each of `strata` slices
    of 1..T-1, short where t is small and the terms are large. Of the pictures it is the bound of the VAE with the
    diffusion as its prior (Kingma and Welling 2014, equation 2):

    $$-\log P(x) \le \mathbb E_{q(z_0 \mid x)}\left[-\log P(x \mid z_0) + \log q(z_0 \mid x) - \log p(z_0)\right]$$

    where P(x | z_0) is a Laplace distribution around the decoded picture, see `laplace_bits`.

    Args:
        width: of that distribution; best is the mean absolute error, taken from other pictures than these.

    Returns: `latent`: for each form of Sigma that the model has, {prior, steps, last, total, standard_error} in bits a
    dimension of z; `picture`: {latent, error, total, standard_error} in bits a dimension of x, for the model's own
    Sigma; `by_time`: [first t, last t, mean L_{t-1}] of each slice, for the model's own Sigma. Errors are those of a
    mean over pictures.
    """
    T, learned = model.schedule.timesteps, model.config.variance == "learned"
    forms = ("posterior", "beta", "learned")[: 3 if learned else 2]
    g = generator(seed, "bound")
    q = latents.gaussian(rows, torch.zeros(len(rows), dtype=torch.bool))
    z_0 = q.sample(g) * model.latent_scale
    context = texts([pictures.full_caption(i) for i in rows])
    edges = sorted({0, *np.geomspace(1, T, strata + 1).round().astype(int).tolist()})
    slices = list(itertools.pairwise(edges))  # the first is t = 0 alone
    terms = {form: torch.zeros(len(slices), len(rows), dtype=torch.float64) for form in forms}
    for k, (first, end) in enumerate(slices):
        t = torch.randint(first, end, (len(rows),), generator=g)
        z_t = q_sample(model.schedule, z_0, t, torch.randn(z_0.shape, generator=g))
        for begin in range(0, len(rows), batch):
            part = slice(begin, begin + batch)
            z, z_at, at, c = (x[part].to(model.device) for x in (z_0, z_t, t, context))
            with autocast(model.device, precision):
                output, nu = split_output(model.unet(z_at, at, c).float(), z_at)
            for form in forms:
                term = variational_term(
                    model.schedule, z, z_at, at, output, model.config.prediction, form, nu
                )
                terms[form][k, part] = term.cpu().double()
    widths = torch.tensor([end - first for first, end in slices], dtype=torch.float64)
    prior = prior_term(model.schedule, z_0).double()
    latent = {form: _summed(term, widths, prior) for form, term in terms.items()}
    own = model.config.variance
    by_time = [[a, b - 1, mean] for (a, b), mean in zip(slices, terms[own].mean(dim=1).tolist(), strict=True)]
    entropy = q.entropy().double() / (z_0[0].numel() * math.log(2)) + math.log2(model.latent_scale)
    rate = (prior + widths @ terms[own] - entropy) * z_0[0].numel() / pictures.pixels[0].size
    error = _decoded_bits(model, z_0 / model.latent_scale, pictures, rows, width, precision, batch)
    picture = {
        "latent": rate.mean().item(),
        "error": error.mean().item(),
        "total": (rate + error).mean().item(),
        "standard_error": _standard_error(rate + error),
    }
    return {"latent": latent, "picture": picture, "by_time": by_time}


def _summed(terms: Tensor, widths: Tensor, prior: Tensor) -> dict[str, float]:
    r"""The bound from its slices' terms (K, B), each of which stands for `widths` (K,) steps, and L_T (B,)."""
    last, steps, total = terms[0], widths[1:] @ terms[1:], prior + widths @ terms
    parts = {"prior": prior, "steps": steps, "last": last, "total": total}
    return {
        **{name: part.mean().item() for name, part in parts.items()},
        "standard_error": _standard_error(total),
    }


def _standard_error(values: Tensor) -> float:
    r"""Of the mean of values (B,), which are independent of each other."""
    return values.std().item() / len(values) ** 0.5


def _decoded_bits(
    model: TextToImage,
    z: Tensor,
    pictures: Pictures,
    rows: np.ndarray,
    width: float,
    precision: str,
    batch: int,
) -> Tensor:
    r"""-log2 P(x | z) a dimension of each picture, (B,), whose latents, not scaled, are z."""
    bits = []
    for begin in range(0, len(rows), batch):
        part = slice(begin, begin + batch)
        with autocast(model.device, precision):
            x_hat = model.vae.decode(z[part].to(model.device))
        found = laplace_bits(pictures.batch(rows[part]), x_hat.float().cpu().clamp(-1, 1), width)
        bits.append(found.flatten(1).mean(dim=1))
    return torch.cat(bits)


def laplace_bits(x: Tensor, x_hat: Tensor, width: float) -> Tensor:
    r"""-log2 of the probability of 8-bit values x in [-1, 1] under a Laplace distribution around x_hat, each element.

    $$P(x) = F\left(x + \tfrac{1}{255}\right) - F\left(x - \tfrac{1}{255}\right), \qquad
    F(y) = \frac12 \left[1 + \mathrm{sign}(y - \hat x) \left(1 - e^{-|y - \hat x| / b}\right)\right]$$

    with the tails in the outermost bins, as DDPM's equation 13 has it for a normal distribution.
    """
    x, x_hat = x.double(), x_hat.double()
    low = torch.where(x <= -1, -math.inf, x - 1 / 255 - x_hat)
    high = torch.where(x >= 1, math.inf, x + 1 / 255 - x_hat)
    above = x > x_hat  # mirrored, so that F is small and its differences exact
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)

    def F(y: Tensor) -> Tensor:
        return torch.where(y < 0, 0.5 * torch.exp(y / width), 1 - 0.5 * torch.exp(-y / width))

    return -torch.log2((F(high) - F(low)).clamp(min=1e-300))


def latent_health(q: DiagonalGaussian, scale: float) -> dict[str, list]:
    r"""Moments of the scaled latents z = s (mu + sigma eps), q(z | x) of (N, c, h, w), by channel.

    $$\mathbb E[z] = s\,\mathbb E[\mu], \qquad
    \mathrm{Cov}[z] = s^2 \left(\mathrm{Cov}[\mu] + \mathrm{diag}\,\mathbb E[\sigma^2]\right)$$

    over pictures and places. Healthy are means near 0, variances near 1, small correlations, and no KL of 0: such a
    channel carries nothing.

    Returns: `mean`, `variance`, `kl` (nats an element, of q to the standard normal), each of c numbers, and
    `correlation`, c lists of c.
    """
    mu, logvar = (v.double().transpose(0, 1).flatten(1) for v in (q.mu, q.logvar))  # (c, N h w)
    covariance = scale**2 * (torch.cov(mu).reshape(len(mu), len(mu)) + logvar.exp().mean(dim=1).diag())
    variance = covariance.diagonal()
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean(dim=1)
    correlation = covariance / (variance[:, None] * variance).sqrt()
    return {
        "mean": (scale * mu.mean(dim=1)).tolist(),
        "variance": variance.tolist(),
        "kl": kl.tolist(),
        "correlation": correlation.tolist(),
    }


# ------------------------------------------------------------------------------------------------ adherence


def balanced_accuracy(wanted: Tensor, seen: Tensor) -> Tensor:
    r"""The share of right answers among those that want an attribute and those that do not, averaged; (A,) float64.

    $$\frac12 \left(\frac{n_{\text{wanted and seen}}}{n_{\text{wanted}}}
    + \frac{n_{\text{neither}}}{n_{\text{not wanted}}}\right)$$

    One half is what guessing gives, however rare the attribute; nan where either count is zero.

    Args:
        wanted, seen: (N, A) bool.
    """
    right, rows = wanted == seen, wanted.double()
    return ((rows * right).sum(0) / rows.sum(0) + ((1 - rows) * right).sum(0) / (1 - rows).sum(0)) / 2


def wilson_interval(right: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    r"""The 95 % interval [l, u] of a share p, of which `right` of n = `of` were counted (Wilson 1927).

    $$l, u = \frac{\hat p + \frac{Z^2}{2 n} \mp Z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{Z^2}{4 n^2}}}
    {1 + \frac{Z^2}{n}}$$
    """
    centre = (right + Z**2 / 2) / (of + Z**2)
    half = Z / (of + Z**2) * (right * (of - right) / of + Z**2 / 4).sqrt()
    return centre - half, centre + half


def balanced_interval(wanted: Tensor, seen: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The 95 % interval of `balanced_accuracy`, from those of its two shares (Newcombe 1998, method 10).

    $$\hat p - \tfrac12 \sqrt{\textstyle\sum_i (\hat p_i - l_i)^2}, \qquad
    \hat p + \tfrac12 \sqrt{\textstyle\sum_i (u_i - \hat p_i)^2}$$

    It does not shrink to a point when all of them are right.

    Args:
        weight: (N,) how much evidence a picture is; 1 / k where k share one prompt, for they are one piece of it
            together. None: each is one. A share is of pictures; the n of its interval is the sum of their weights.
    """
    weight = torch.ones(len(wanted)) if weight is None else weight
    below, above, p = 0.0, 0.0, balanced_accuracy(wanted, seen)
    for group in (wanted, ~wanted):
        share, n = (
            (group & (wanted == seen)).sum(0) / group.double().sum(0),
            weight.double() @ group.double(),
        )
        low, high = wilson_interval(share * n, n)
        below, above = below + (share - low) ** 2, above + (high - share) ** 2
    return p - below.sqrt() / 2, p + above.sqrt() / 2


def bootstrap_interval(
    wanted: Tensor, seen: Tensor, groups: Tensor, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    r"""The 95 % interval of the mean of `balanced_accuracy` over the attributes, by resampling whole groups.

    Args:
        groups: (N,) long; pictures of one prompt share a number, for they are no independent evidence.
    """
    count = int(groups.max()) + 1
    drawn = torch.randint(count, (draws, count), generator=generator(seed, "bootstrap"))
    weight = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn).double()
    )
    weight, right = weight[:, groups], wanted == seen  # (draws, N)
    shares = [(weight @ (group & right).double()) / (weight @ group.double()) for group in (wanted, ~wanted)]
    means = ((shares[0] + shares[1]) / 2).nanmean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


# ------------------------------------------------------------------------------------ two sets of pictures


def gaussian_of(features: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean (D,) and covariance (D, D) of features (N, D), in float64; N of 2 or more."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features (N, D) with N of at least 2, got {tuple(features.shape)}")
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mu_1: Tensor, S_1: Tensor, mu_2: Tensor, S_2: Tensor) -> float:
    r"""Squared Frechet distance between two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, equation 6).

    $$d^2 = \lVert \mu_1 - \mu_2 \rVert^2 + \mathrm{tr}\left(S_1 + S_2
    - 2 \left(S_1^{1/2} S_2 S_1^{1/2}\right)^{1/2}\right)$$

    The matrix under the outer root is symmetric, so its eigenvalues are real, and their roots sum to the trace.
    Fitted to N pictures each, it is above 0 even for two samples of one distribution, the more the smaller N is:
    only distances at equal N compare.
    """
    values, vectors = torch.linalg.eigh(S_1.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S_2.double() @ root).clamp(min=0).sqrt().sum()
    apart = (mu_1.double() - mu_2.double()).square().sum()
    return float(apart + S_1.double().trace() + S_2.double().trace() - 2 * cross)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    r"""How many generated pictures lie among the real ones, and the reverse (Kynkaanniemi et al. 2019, equation 2).

    A set Y covers the balls around its members that reach to their k-th nearest fellow; x lies in one when

    $$\exists\, y \in Y: \lVert x - y \rVert \le \lVert y - \mathrm{NN}_k(y, Y) \rVert$$

    Precision is the share of generated features (M, D) that the real ones (N, D) cover, recall the share of real ones
    that the generated cover.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(
            f"expected more than k = {k} pictures in each set, got {len(real)} and {len(generated)}"
        )

    def covered(x: Tensor, by: Tensor) -> float:
        reach = _distances(by, by).kthvalue(k + 1, dim=1).values  # the nearest is itself
        return (_distances(x, by) <= reach).any(dim=1).double().mean().item()

    return covered(generated, by=real), covered(real, by=generated)


def nearest(queries: Tensor, chunks: Iterable[Tensor], k: int = 3) -> tuple[Tensor, Tensor]:
    r"""Euclidean distances and places of the k nearest neighbours of each query, (N, k) each, the nearest first.

    Args:
        queries: (N, D). chunks: the pool (M, D) in parts, which need not fit into memory together.
    """
    best = torch.empty(len(queries), 0, dtype=torch.float64)
    places, begin = torch.empty(len(queries), 0, dtype=torch.long), 0
    for chunk in chunks:
        best = torch.cat([best, _distances(queries, chunk)], dim=1)
        places = torch.cat([places, torch.arange(begin, begin + len(chunk)).expand(len(queries), -1)], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
        places, begin = places.gather(1, order), begin + len(chunk)
    return best, places


def _distances(x: Tensor, y: Tensor) -> Tensor:
    r"""Euclidean distances (N, M); by products, which is fast, in float64, which keeps the digits of near twins."""
    return torch.cdist(x.double(), y.double(), compute_mode="use_mm_for_euclid_dist")
