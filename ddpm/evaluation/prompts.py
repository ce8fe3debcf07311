r"""Prompts beside the full captions: the rows of held-out pictures in other words, and what people type."""

from itertools import count

import numpy as np

from ddpm.celeba.captions import describe, parse

SPECIFICATION = "a person with black hair and sunglasses"  # its own example
FREE = (
    "black hair, sunglasses, man",
    "portrait of an elderly gentleman wearing spectacles",
    "redhead woman with curly hair",
    "laughing blonde lady",
    "a boy in a cap",
    "girl with glasses",
    "old guy, bald, mustache",
    "dude with a beard and a tie",
    "smile",
    "grandma smiling",
    "gray-haired grandpa with glasses",
    "Young woman, long brown hair, red lipstick",
    "man without a beard",
    "a lady who wears a hat and a necklace",
    "she has blonde hair and earrings",
    "teenage boy with bangs",
    "brunette in a hat",
    "PHOTO OF A GUY WITH A GOATEE",
    "woman, no smile",
    "bearded man with thick eyebrows",
)


def prompts_of(attributes: np.ndarray, seed: int) -> dict[str, list[str]]:
    r"""Prompts by kind, of rows of attributes (n, 40).

    Returns: `trained`, for each row a caption as training has it, the first that states all that the full caption
    states; `kept`, one in wordings that no training caption has; `free`, the specification's example 16 times and the
    others of `FREE` four times each.
    """
    trained = []
    for i, row in enumerate(attributes):
        full = parse(describe(row)).keys()
        captions = (describe(row, seed=[seed, i, k]) for k in count())
        trained.append(next(caption for caption in captions if full <= parse(caption).keys()))
    kept = [describe(row, seed=[seed, i], kept=True) for i, row in enumerate(attributes)]
    return {
        "trained": trained,
        "kept": kept,
        "free": [SPECIFICATION] * 16 + [p for p in FREE for _ in range(4)],
    }
