r"""Figures of sets of pictures: moments of latents, how well prompts are followed, how two sets differ."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ddpm.tools.seeding import generator
from ddpm.vae import DiagonalGaussian

Z = 1.96  # standard deviations to either side that hold 95 % of a normal distribution
MIN_EACH = 8  # pictures with an attribute, and as many without, for its accuracy to count
DRAWS = 1000  # of the bootstrap


def latent_health(q: DiagonalGaussian, scale: float) -> dict[str, list]:
    r"""Moments of the scaled latents z = s (mu + sigma eps), q(z | x) of (N, c, h, w), by channel.

    $$\mathbb E[z] = s\,\mathbb E[\mu], \qquad
    \mathrm{Cov}[z] = s^2 \left(\mathrm{Cov}[\mu] + \mathrm{diag}\,\mathbb E[\sigma^2]\right)$$

    over pictures and places. Healthy are means near 0, variances near 1, small correlations, and no KL of 0, because
    a channel with a KL of 0 carries nothing.

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


def enough(wanted: Tensor, each: int = MIN_EACH) -> Tensor:
    r"""(A,) bool: the attributes that at least `each` of the pictures want and as many do not; wanted (N, A) bool."""
    return (wanted.sum(dim=0) >= each) & ((~wanted).sum(dim=0) >= each)


def adherence(
    wanted: Tensor, seen: Tensor, names: tuple[str, ...], groups: Tensor, countable: Tensor
) -> dict:
    r"""Balanced accuracy of the attributes `seen` in pictures against those that their prompts want.

    Args:
        wanted, seen: (N, A) bool. names: of the attributes. groups: (N,) long, the number of each picture's prompt.
        countable: (A,) bool, the attributes that count where these pictures have both values of them.

    Returns: `n`, the number of distinct `prompts`, `mean` over the counted attributes (None if there are none), its
    `interval`, how many are `counted`, and `attributes`: for each how many pictures want it, its balanced accuracy,
    interval, and whether it counts.
    """
    _, groups, sizes = groups.unique(return_inverse=True, return_counts=True)
    accuracy = balanced_accuracy(wanted, seen)
    low, high = balanced_interval(wanted, seen, 1 / sizes[groups])
    counted = countable & enough(wanted, 1)
    attributes = {
        name: {
            "wanted": int(wanted[:, i].sum()),
            "balanced_accuracy": accuracy[i].item(),
            "interval": [low[i].item(), high[i].item()],
            "counted": bool(counted[i]),
        }
        for i, name in enumerate(names)
    }
    mean = interval = None
    if counted.any():
        mean = accuracy[counted].mean().item()
        interval = bootstrap_interval(wanted[:, counted], seen[:, counted], groups)
    return {
        "n": len(wanted),
        "prompts": len(sizes),
        "mean": mean,
        "interval": interval,
        "counted": int(counted.sum()),
        "attributes": attributes,
    }


def balanced_accuracy(wanted: Tensor, seen: Tensor) -> Tensor:
    r"""The rate of right answers among pictures that want an attribute and among the others, averaged; (A,) float64.

    $$\frac12 \left(\frac{n_{\text{wanted and seen}}}{n_{\text{wanted}}}
    + \frac{n_{\text{neither}}}{n_{\text{not wanted}}}\right)$$

    One half is what guessing gives, however rare the attribute; nan where either count is zero.

    Args:
        wanted, seen: (N, A) bool.
    """
    right = wanted == seen
    positive = wanted.double()
    negative = 1 - positive
    return ((positive * right).sum(0) / positive.sum(0) + (negative * right).sum(0) / negative.sum(0)) / 2


def wilson_interval(right: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    r"""The 95 % interval [l, u] of a rate p, estimated by `right` of n answers (Wilson 1927).

    $$l, u = \frac{\hat p + \frac{Z^2}{2 n} \mp Z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{Z^2}{4 n^2}}}
    {1 + \frac{Z^2}{n}}$$

    where p_hat = right / n, and Z = 1.96.
    """
    centre = (right + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * (right * (n - right) / n + Z**2 / 4).sqrt()
    return centre - half, centre + half


def balanced_interval(wanted: Tensor, seen: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""The 95 % interval of `balanced_accuracy`, from the intervals of its two rates (Newcombe 1998, method 10).

    $$\hat p - \tfrac12 \sqrt{\textstyle\sum_i (\hat p_i - l_i)^2}, \qquad
    \hat p + \tfrac12 \sqrt{\textstyle\sum_i (u_i - \hat p_i)^2}$$

    where p_hat is the balanced accuracy, and l_i and u_i are the `wilson_interval` of its rate p_hat_i, i = 1, 2.
    It does not shrink to a point when all answers are right.

    Args:
        weight: (N,) how much evidence a picture is: 1 / k where k pictures have one prompt, because they are one piece
            of evidence together. A rate is of pictures; the n of its interval is the sum of their weights.
    """
    right = wanted == seen
    p = balanced_accuracy(wanted, seen)
    below = torch.zeros_like(p)
    above = torch.zeros_like(p)
    for group in (wanted, ~wanted):
        rate = (group & right).sum(0) / group.double().sum(0)
        n = weight.double() @ group.double()
        low, high = wilson_interval(rate * n, n)
        below += (rate - low) ** 2
        above += (high - rate) ** 2
    return p - below.sqrt() / 2, p + above.sqrt() / 2


def bootstrap_interval(wanted: Tensor, seen: Tensor, groups: Tensor) -> tuple[float, float]:
    r"""The 95 % interval of the mean of `balanced_accuracy` over the attributes, by resampling whole groups.

    An attribute without an error has none in any resample, so near 1 the interval is too narrow, and at 1 a point.

    Args:
        groups: (N,) long; pictures of one prompt have one number, because they are no independent evidence.
    """
    count = int(groups.max()) + 1
    drawn = torch.randint(count, (DRAWS, count), generator=generator(0, "bootstrap"))
    weight = torch.zeros(DRAWS, count, dtype=torch.float64)
    weight.scatter_add_(1, drawn, torch.ones_like(weight))
    weight = weight[:, groups]  # (DRAWS, N)
    right = wanted == seen
    rates = [(weight @ (group & right).double()) / (weight @ group.double()) for group in (wanted, ~wanted)]
    means = ((rates[0] + rates[1]) / 2).nanmean(dim=1)
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


# ------------------------------------------------------------------------------------ two sets of pictures


def gaussian_of(features: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean (D,) and covariance (D, D) of features (N, D), in float64; N of 2 or more."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mu_1: Tensor, S_1: Tensor, mu_2: Tensor, S_2: Tensor) -> float:
    r"""Squared Frechet distance between two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, equation 6).

    $$d^2 = \lVert \mu_1 - \mu_2 \rVert^2 + \mathrm{tr}\left(S_1 + S_2
    - 2 \left(S_1^{1/2} S_2 S_1^{1/2}\right)^{1/2}\right)$$

    The matrix under the outer root is symmetric, so its eigenvalues are real, and their roots sum to the trace.
    Fitted to N pictures each, the distance is above 0 even for two samples of one distribution, and the more so the
    smaller N is: only distances at equal N compare.
    """
    values, vectors = torch.linalg.eigh(S_1.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S_2.double() @ root).clamp(min=0).sqrt().sum()
    between_means = (mu_1.double() - mu_2.double()).square().sum()
    return float(between_means + S_1.double().trace() + S_2.double().trace() - 2 * cross)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    r"""How many generated pictures lie among the real ones, and the reverse (Kynkaanniemi et al. 2019, section 2).

    A set Y covers the balls around its members that reach to their k-th nearest fellow; x lies in one when

    $$\exists\, y \in Y: \lVert x - y \rVert \le \lVert y - \mathrm{NN}_k(y, Y) \rVert$$

    Precision is the fraction of generated features (M, D) that the real ones (N, D) cover, recall the fraction of real
    ones that the generated cover.
    """

    def covered(x: Tensor, by: Tensor) -> float:
        reaches = [_distances(part, by).kthvalue(k + 1, dim=1).values for part in by.split(1024)]
        reach = torch.cat(reaches)  # to the k-th beside itself
        inside = [(_distances(part, by) <= reach).any(dim=1) for part in x.split(1024)]
        return torch.cat(inside).double().mean().item()

    return covered(generated, by=real), covered(real, by=generated)


def nearest(queries: Tensor, chunks: Iterable[Tensor], k: int = 3) -> tuple[Tensor, Tensor]:
    r"""Euclidean distances and places of the k nearest neighbours of each query, (N, k) each, the nearest first.

    Args:
        queries: (N, D). chunks: the pool (M, D) in parts, which need not fit into memory together.
    """
    distances = torch.empty(len(queries), 0, dtype=torch.float64)
    places = torch.empty(len(queries), 0, dtype=torch.long)
    begin = 0
    queries = queries.double()
    for chunk in chunks:
        new_places = torch.arange(begin, begin + len(chunk)).expand(len(queries), -1)
        distances = torch.cat([distances, _distances(queries, chunk)], dim=1)
        places = torch.cat([places, new_places], dim=1)
        distances, order = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
        places = places.gather(1, order)
        begin += len(chunk)
    return distances, places


def _distances(x: Tensor, y: Tensor) -> Tensor:
    r"""Euclidean distances (N, M); by products, which is fast, in float64, which keeps the digits of near twins."""
    return torch.cdist(x.double(), y.double(), compute_mode="use_mm_for_euclid_dist")
