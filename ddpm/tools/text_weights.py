r"""Weights of the text tower: from an OpenCLIP tag, from a file, or from a fixed seed (`random`).

A frozen random tower still tells prompts apart, and needs no download.
"""

import contextlib
import logging
import math
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import open_clip
import torch
from huggingface_hub import constants
from open_clip.pretrained import download_pretrained

from ddpm.text import ARCHITECTURE, WIDTH, TextTower
from ddpm.tools.errors import UserError, is_name
from ddpm.tools.files import digest_of
from ddpm.tools.seeding import generator
from ddpm.tools.weights import read_metadata, read_tensors, save_weights, shapes_of


def named_tower(weights: str, quick_gelu: bool = False) -> TextTower:
    r"""The tower with `weights`: `random`, a file, or an OpenCLIP tag of ViT-B-32; raises UserError.

    A bare word is a name, whatever lies in the current folder; a file has a suffix or a folder, ./weights.
    """
    if weights == "random":
        return random_tower()
    file = Path(os.path.expanduser(weights))
    if not is_name(weights) and file.is_file():
        return tower_from_file(file, quick_gelu)
    return tower_from_tag(weights)


@torch.no_grad()
def random_tower() -> TextTower:
    r"""Weights from a fixed seed, the same bits on every machine.

    Each matrix is uniform with the variance that OpenCLIP's initialisation has; only the token and position
    embeddings are larger (0.5 and 0.1), because untrained layers would drown the words. A uniform number is exact
    in floating point, while a normal one depends on how a machine rounds logarithms.
    """
    text = TextTower()
    blocks = len(text.tower.transformer.resblocks)
    std = {
        "token_embedding.weight": 0.5,
        "positional_embedding": 0.1,
        "attn.in_proj_weight": WIDTH**-0.5,
        "attn.out_proj.weight": (WIDTH * 2 * blocks) ** -0.5,
        "mlp.c_fc.weight": (2 * WIDTH) ** -0.5,
        "mlp.c_proj.weight": (WIDTH * 2 * blocks) ** -0.5,
    }
    for name, parameter in text.tower.named_parameters():
        scale = next((s for suffix, s in std.items() if name.endswith(suffix)), None)
        if scale is not None:
            uniform = torch.rand(parameter.shape, generator=generator("text tower", name))
            parameter.copy_((uniform - 0.5) * (math.sqrt(12) * scale))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return text


def tower_from_tag(tag: str) -> TextTower:
    r"""Pretrained weights that OpenCLIP downloads, or finds in the Hugging Face cache."""
    tags = open_clip.list_pretrained_tags_by_model(ARCHITECTURE)
    if tag not in tags:
        raise UserError(
            f"expected text weights `random`, a file that is there, or an OpenCLIP tag of {ARCHITECTURE} "
            f"({', '.join(tags[:5])}, ...), got {tag!r}"
        )
    settings = open_clip.get_pretrained_cfg(ARCHITECTURE, tag)
    reachable = True
    try:
        with impatient_hub() as reachable:
            path = download_pretrained(settings)
    except Exception as error:  # whatever the network, the hub or the proxy makes of it
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        reason = reason if reachable else "no connection, and not in the cache"
        raise UserError(
            f"could not download the text weights {tag!r} ({reason}); pass --text-weights random, "
            "or --text-weights FILE with a file fetched elsewhere"
        ) from None
    return tower_from_file(Path(path), quick_gelu=settings.get("quick_gelu", False))


def tower_from_file(path: Path, quick_gelu: bool = False) -> TextTower:
    r"""Weights in a file that OpenCLIP published (both towers together) or that a run saved.

    A .safetensors file, or a pickle of tensors alone (.bin, .pt), from which nothing is executed.
    """
    if path.suffix == ".safetensors":
        quick_gelu = read_metadata(path).get("quick_gelu", str(quick_gelu)) == "True"
    text = TextTower(quick_gelu)
    shapes = shapes_of(text.tower.state_dict())

    def known_as(name: str) -> str | None:
        r"""Published files have `module.` or `text.` before a name, and the image tower's tensors beside ours."""
        name = name.removeprefix("module.").removeprefix("text.")
        return name if name in shapes else None

    state, _ = read_tensors(path, shapes, known_as, f"OpenCLIP's {ARCHITECTURE} text tower")
    text.tower.load_state_dict(state)
    return text


def save_tower(text: TextTower, path: Path):
    r"""Write the tower as safetensors that `tower_from_file` reads, activation included."""
    save_weights(path, text.tower.state_dict(), {"quick_gelu": str(text.quick_gelu)})


def fingerprint(text: TextTower) -> str:
    r"""SHA-256 of all weights and the activation; caches of embedded captions are keyed by it."""
    return digest_of([text.state_dict(), text.quick_gelu])


@contextlib.contextmanager
def impatient_hub():
    r"""Let the Hugging Face hub answer from its cache at once where the host is out of reach, and log only errors.

    Left alone it tries each file six times, with longer and longer waits and a line of log for each.
    """
    logger = logging.getLogger("huggingface_hub")
    before = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    reachable = True
    if not getproxies() and not constants.HF_HUB_OFFLINE:  # behind a proxy only the hub itself can tell
        address = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
        except OSError:
            reachable = False
    constants.HF_HUB_OFFLINE = before[1] or not reachable
    try:
        yield reachable
    finally:
        level, constants.HF_HUB_OFFLINE = before
        logger.setLevel(level)
