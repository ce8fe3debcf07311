r"""The parts `frechet`, `spread` and `neighbours`: are pictures like real ones, as various, and none a copy of one?"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from ddpm.evaluation import metrics
from ddpm.evaluation.classifier import gaussian_blur
from ddpm.evaluation.shared import SPREAD_EACH, Evaluation
from ddpm.tools.command import progress_bar
from ddpm.tools.grids import labelled_grid

POOL = 512  # training pictures that are compared at once


def frechet(e: Evaluation) -> dict:
    r"""Distance, precision and recall against the held-out pictures, beside those of baselines."""
    real = metrics.gaussian_of(e.real_features)
    train = e.train_pictures
    side = train.shape[-1]
    sets = {
        "generated": e.draw(e.main),
        "train pictures": train,
        "train pictures through the VAE": e.decoded(train),
        "train pictures, blurred by 2 pixels of 64": gaussian_blur(train, side / 32, max(6, 6 * side // 64)),
        "their mean": train.mean(dim=0, keepdim=True),
    }
    result = {}
    for name, x in sets.items():
        features = e.features(x)
        if name == "their mean":  # one picture stands for n
            features = features.expand(e.n, -1)
        drawn = metrics.gaussian_of(features)
        figures = {"distance": metrics.frechet_distance(*real, *drawn)}
        figures["means"] = (real[0] - drawn[0]).square().sum().item()  # the distance's first term
        figures["precision"], figures["recall"] = metrics.precision_recall(e.real_features, features)
        result[name] = {"n": len(features), **figures}
    return result


def spread(e: Evaluation) -> dict:
    r"""How far apart the pictures of one prompt are: mean distances between features, beside those of other pictures.

    Returns: `within` prompts, `between` the first pictures of different prompts, and of the `held_out` pictures.
    """
    means = {"held_out": torch.pdist(e.real_features).mean()}  # first: without a classifier nothing is drawn
    features = e.features(e.draw(e.main, "spread")).unflatten(0, (-1, SPREAD_EACH))  # (prompts, each, D)
    means["within"] = torch.stack([torch.pdist(of_one).mean() for of_one in features]).mean()
    means["between"] = torch.pdist(features[:, 0]).mean()
    return {"prompts": len(features), "each": SPREAD_EACH} | {name: x.item() for name, x in means.items()}


def neighbours(e: Evaluation) -> dict:
    r"""How near the generated pictures come to training pictures, and to their mirror images if trained on as well.

    Beside it how near held-out pictures come, as they are and through the VAE, because what is smooth is near to
    much. A ratio of medians near 1 is as new as new photographs are; near 0, copies.
    """
    queries = torch.cat([e.draw(e.main), e.x, e.reconstructed])
    found = {"pixels": nearest_train(e, nn.Flatten(), queries, "pixels")}
    if e.classifier is not None:
        found["features"] = nearest_train(e, e.classifier.features, queries, "features")
    result = {}
    for space, (distances, _) in found.items():
        generated, held_out, reconstructed = distances[:, 0].split(e.n)
        result[space] = {"n_train": len(e.train_rows), "generated_median": generated.median().item()}
        for name, others in (("held_out", held_out), ("reconstructed", reconstructed)):
            nearer = generated < others.quantile(0.01)
            result[space] |= {
                f"{name}_median": others.median().item(),
                f"ratio_to_{name}": (generated.median() / others.median()).item(),
                f"nearer_than_1_percent_of_{name}": nearer.double().mean().item(),
            }
    e.files["neighbours.png"] = neighbour_grid(e, found)
    return result


def nearest_train(e: Evaluation, network: Callable, queries: Tensor, label: str) -> tuple[Tensor, Tensor]:
    r"""`metrics.nearest` among all training pictures, and after them all their mirror images if trained on."""
    train = e.train_rows
    ways = (False, True) if e.training.flip else (False,)
    both = [(train[i : i + POOL], flip) for flip in ways for i in range(0, len(train), POOL)]
    parts = progress_bar(both, len(both), f"nearest training pictures, {label}")
    pool = (e.pictures.batch(rows, torch.full((len(rows),), flip)) for rows, flip in parts)
    return metrics.nearest(e.through(network, queries), (e.through(network, x) for x in pool))


def neighbour_grid(e: Evaluation, found: dict) -> Image.Image:
    r"""The eight generated pictures that come nearest to a training picture, each before its neighbours."""
    train = e.train_rows
    nearest, _ = found.get("features", found["pixels"])
    closest = nearest[: e.n, 0].argsort(stable=True)[:8].tolist()
    pictures = []
    labels = []
    for i in closest:
        pictures.append(e.draw(e.main)[i : i + 1])
        labels.append(e.prompts["full"][i])
        for space, (distances, places) in found.items():
            rows = train[(places[i] % len(train)).numpy()]
            pictures.append(e.pictures.batch(rows, flip=places[i] >= len(train)))
            labels += [f"{space} {distance:.2f}" for distance in distances[i].tolist()]
    return labelled_grid(torch.cat(pictures), labels, columns=len(labels) // len(closest), side=96)
