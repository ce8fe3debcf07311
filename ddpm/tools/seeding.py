r"""Random numbers from counters.

Every random draw of the project belongs to a name such as `(seed, "unet", step)` or `(seed, picture)`. The
draw follows from the name alone, so nothing depends on what was drawn before it: a resumed run goes on with
the same numbers, and picture 3 is the same picture in any batch."""

import hashlib
import operator

import torch


def seed_of(*keys) -> int:
    r"""A 63-bit seed from any tuple of whole numbers and strings, the same on every machine.

    >>> seed_of(0, "unet", 17) == seed_of(0, "unet", 17) != seed_of(0, "unet", 18)
    True
    """
    plain = tuple(key if isinstance(key, str) else int(operator.index(key)) for key in keys)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys) -> torch.Generator:
    r"""A CPU generator at the start of the stream that `keys` name."""
    return torch.Generator().manual_seed(seed_of(*keys))
