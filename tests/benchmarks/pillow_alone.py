r"""What photographs are measured against: Pillow decodes a picture, and nothing else, in processes of its own."""

from PIL import Image


def load(path: str):
    r"""Decode one picture and let it go."""
    with Image.open(path) as image:
        image.load()
