r"""The part `adherence`: do pictures show what their prompts say?"""

import numpy as np
from torch import Tensor

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
FAR = "those of them whose row differs from that of every training picture in two attributes or more"


def adherence(e: Evaluation) -> dict:
    r"""How often the classifier sees in drawn pictures what their prompts want; beside it, in real pictures.

    `reconstructed` is what the VAE alone costs: pictures that are the prompt's own, but for the VAE.
    """
    seen = {
        "real": e.attributes(e.x),
        "reconstructed": e.attributes(e.reconstructed),
        "generated": e.attributes(e.draw(e.main)),
    }
    distance = attribute_distance(e.pictures, e.held_out)
    result = {"rule": RULE, "unseen_means": UNSEEN, "far_means": FAR}
    for least, name in enumerate(("held_out", "unseen", "far")):
        rows = distance >= least
        if rows.any():
            result[name] = {source: e.scores(values[rows], rows) for source, values in seen.items()}
    e.files["adherence.png"] = plots.plot_adherence(result["held_out"])
    return result


def attribute_distance(pictures: Pictures, held_out: Pictures) -> Tensor:
    r"""In how many of the forty attributes a held-out picture differs from the nearest training picture, (n,).

    The attributes are those that full captions say; at 0 the model has seen this row in training.
    """
    own = truths(held_out, np.arange(len(held_out.pixels))).double()
    known = truths(pictures, pictures.rows(TRAIN)).unique(dim=0).double()
    differences = own @ (1 - known).T + (1 - own) @ known.T
    return differences.min(dim=1).values.long()
