r"""The parts `adherence` and `wordings`: do pictures show what their prompts say?"""

import numpy as np
import torch
from torch import Tensor

from ddpm.celeba.captions import parse
from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.evaluation import plots, shared
from ddpm.evaluation.classifier import truths
from ddpm.evaluation.metrics import MIN_EACH
from ddpm.evaluation.shared import Evaluation

RULE = (
    f"counted are attributes that the captions of at least {MIN_EACH} held-out pictures want and of {MIN_EACH} do not, "
    f"and that the classifier reads from the real ones with a balanced accuracy of at least {shared.MIN_READ}; of a "
    "part of the pictures, those among them that some of it want and some do not"
)
UNSEEN = "held-out pictures whose row of 40 attributes, as the full caption says it, no training picture has"
WORDINGS = (
    "trained and kept: the attributes that count are those of the part adherence, and every caption states all that "
    "the full caption of the picture states; free: right is the share of pictures of a prompt in which the classifier "
    "reads all of `stated`, which is what the prompt states or excludes of these attributes"
)
FAR = "those of them whose row differs from that of every training picture in two attributes or more"


def adherence(e: Evaluation) -> dict:
    r"""How often the classifier sees in drawn pictures what their prompts want; beside it, in real pictures.

    `reconstructed` is what the VAE alone costs: pictures that are the prompt's own, but for the VAE.
    """
    seen = {"real": e.attributes(e.x), "reconstructed": e.attributes(e.reconstructed)}
    distance = attribute_distance(e.pictures, e.held_out)
    seen["generated"] = e.attributes(e.draw(e.main))
    result = {"rule": RULE, "unseen_means": UNSEEN, "far_means": FAR}
    for least, name in enumerate(("held_out", "unseen", "far")):
        rows = distance >= least
        if rows.any():
            result[name] = {source: e.scores(values[rows], rows) for source, values in seen.items()}
    e.files["adherence.png"] = plots.plot_adherence(result["held_out"])
    return result


def wordings(e: Evaluation) -> dict:
    r"""Adherence of the first held-out rows in wordings of the training and in others, and of what people type."""
    countable = e.countable
    names = [name for name, counts in zip(e.classifier.names, countable, strict=True) if counts]
    result = {"rule": WORDINGS}
    for kind in ("trained", "kept"):
        result[kind] = e.scores(e.attributes(e.draw(e.main, kind)), slice(e.curve_n))
    x = e.draw(e.main, "free")
    result["free"] = followed(e.attributes(x)[:, countable], names, e.prompts["free"])
    e.files["wordings.png"] = e.sheet(x, e.prompts["free"])
    return result


def followed(seen: Tensor, names: list[str], prompts: list[str]) -> dict:
    r"""For each distinct prompt the share of its pictures that show all of what it states, and the mean of these.

    Args:
        seen: (N, A) bool, the attributes that are seen in pictures. names: of the attributes; a prompt that states none
            of them has no share. prompts: of the pictures.
    """
    found = {}
    for prompt in dict.fromkeys(prompts):
        stated = {name: value for name, value in parse(prompt).items() if name in names}
        rows = torch.tensor([other == prompt for other in prompts])
        own = seen[rows][:, [names.index(name) for name in stated]]
        wanted = torch.tensor(list(stated.values()), dtype=torch.bool)
        right = (own == wanted).all(dim=1).double().mean().item()
        found[prompt] = {"n": len(own), "stated": stated, "right": right if stated else None}
    rates = [row["right"] for row in found.values() if row["stated"]]
    return {"mean": sum(rates) / len(rates) if rates else None, "prompts": found}


def attribute_distance(pictures: Pictures, held_out: Pictures) -> Tensor:
    r"""In how many of the forty attributes a held-out picture differs from the nearest training picture, (n,).

    The attributes are those that full captions say; at 0 the model has seen this row in training.
    """
    own = truths(held_out, np.arange(len(held_out.pixels))).float()
    known = truths(pictures, pictures.rows(TRAIN)).unique(dim=0).float()
    parts = own.split(256)  # CelebA has more than a hundred thousand different rows
    nearest = [(part @ (1 - known).T + (1 - part) @ known.T).min(dim=1).values for part in parts]
    return torch.cat(nearest).long()
