r"""ddpm: a text-to-image latent diffusion model written by hand, to be read.

>>> from ddpm import TextToImage  # doctest: +SKIP
>>> TextToImage.load("runs/drawn64").sample(["a bald man with a mustache"])  # doctest: +SKIP
"""

__version__ = "0.1.0"
__all__ = ["TextToImage", "__version__"]


def __getattr__(name: str):
    if name == "TextToImage":  # imported when asked for, so that `--help` need not wait for torch
        from ddpm.model import TextToImage

        return TextToImage
    raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
