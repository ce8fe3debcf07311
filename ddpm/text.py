r"""From a prompt to 77 vectors: OpenCLIP's ViT-B-32 tokenizer and text tower, frozen (CLIP, section 2.4).

The image tower is never built. Weights come from an OpenCLIP tag, from a file, or from a fixed seed (`random`): a
frozen random tower still tells prompts apart, and needs no download.
"""

import contextlib
import hashlib
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm.config import UserError, is_name
from ddpm.files import check_not_packed
from ddpm.seeding import generator

ARCHITECTURE = "ViT-B-32"
TOKENS = 77
LETTERS = 4096  # of a prompt that are read: no token has more than 32, and a long word takes its length squared
WIDTH = 512


class TextTower(nn.Module):
    r"""c = TextTower(prompts): the states after the final layer norm and before the projection, (B, 77, 512).

    The tower is causal: the state of a token depends on the tokens up to it, so padding changes nothing before it.

    Args:
        quick_gelu: use x sigmoid(1.702 x) for GELU, as the weights `openai` and `laion400m` were trained.
    """

    def __init__(self, quick_gelu: bool = False):
        super().__init__()
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transformer import QuickGELU, TextTransformer

        self.quick_gelu = quick_gelu
        self.tokenizer = SimpleTokenizer()
        activation = QuickGELU if quick_gelu else nn.GELU
        with torch.device("meta"):  # no weights are drawn that are thrown away again
            self.tower = TextTransformer(output_dim=None, output_tokens=True, act_layer=activation)
        self.tower.to_empty(device="cpu")
        self.tower.attn_mask = self.tower.build_causal_mask()
        for part in (self.tower.transformer, *(block.attn for block in self.tower.transformer.resblocks)):
            part.batch_first = False  # tokens before prompts: one matmul for all, where torch copies weights for each
        self.requires_grad_(False).eval()

    def tokenize(self, prompts: list[str]) -> Tensor:
        r"""Token numbers (B, 77): start, words, end, zeros; warns and names what it cuts of a prompt too long."""
        prompts = [prompt[:LETTERS] for prompt in prompts]
        for prompt in prompts:
            words = self.tokenizer.encode(prompt)
            if len(words) > TOKENS - 2:
                cut = self.tokenizer.decode(words[TOKENS - 2 :]).strip()
                cut = cut if len(cut) <= 200 else cut[:200] + "..."
                warnings.warn(
                    f"a prompt of {len(words)} tokens is cut to {TOKENS - 2}; left out: {cut!r}", stacklevel=3
                )
        return self.tokenizer(prompts, context_length=TOKENS)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        r"""States (B, 77, 512) float32 of B prompts; the empty prompt is the unconditional one."""
        tokens = self.tokenize(list_of_strings(prompts, "prompts")).to(self.tower.positional_embedding.device)
        return self.tower(tokens)[1].float()

    def save(self, path: Path):
        r"""Write the tower as safetensors that `from_file` reads, activation included."""
        state = {k: v.cpu().contiguous() for k, v in self.tower.state_dict().items()}
        save_file(state, path, {"format": "pt", "quick_gelu": str(self.quick_gelu)})

    def fingerprint(self) -> str:
        r"""SHA-256 of all weights, which caches of embedded captions are keyed by."""
        digest = hashlib.sha256(b"quick" if self.quick_gelu else b"gelu")
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    @classmethod
    def named(cls, weights: str, quick_gelu: bool = False) -> "TextTower":
        r"""The tower with `weights`: `random`, a file, or an OpenCLIP tag of ViT-B-32; raises UserError.

        A bare word is a name, whatever lies in the current folder; a file has a suffix or a folder, ./weights.
        """
        if weights == "random":
            return cls.random()
        if not is_name(weights) and os.path.isfile(weights):
            return cls.from_file(Path(weights), quick_gelu)
        return cls.from_tag(weights)

    @classmethod
    def random(cls) -> "TextTower":
        r"""Weights from a fixed seed, the same bits on every machine.

        Each matrix is uniform with the variance that OpenCLIP's initialisation has; only the token and position
        embeddings are larger (0.5 and 0.1), so that untrained layers do not drown the words. Uniform, since
        a uniform number is exact in floating point while a normal one depends on how a machine rounds logarithms.
        """
        tower = cls()
        blocks = len(tower.tower.transformer.resblocks)
        std = {
            "token_embedding.weight": 0.5,
            "positional_embedding": 0.1,
            "attn.in_proj_weight": WIDTH**-0.5,
            "attn.out_proj.weight": (WIDTH * 2 * blocks) ** -0.5,
            "mlp.c_fc.weight": (2 * WIDTH) ** -0.5,
            "mlp.c_proj.weight": (WIDTH * 2 * blocks) ** -0.5,
        }
        for name, parameter in tower.tower.named_parameters():
            scale = next((s for suffix, s in std.items() if name.endswith(suffix)), None)
            if scale is not None:
                uniform = torch.rand(parameter.shape, generator=generator("text tower", name))
                parameter.copy_((uniform - 0.5) * (math.sqrt(12) * scale))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return tower

    @classmethod
    def from_tag(cls, tag: str) -> "TextTower":
        r"""Pretrained weights that OpenCLIP downloads, or finds in the Hugging Face cache."""
        import open_clip
        from open_clip.pretrained import download_pretrained

        tags = open_clip.list_pretrained_tags_by_model(ARCHITECTURE)
        if tag not in tags:
            raise UserError(
                f"expected text weights `random`, a file that is there, or an OpenCLIP tag of {ARCHITECTURE} "
                f"({', '.join(tags[:5])}, ...), got {tag!r}"
            )
        settings = open_clip.get_pretrained_cfg(ARCHITECTURE, tag)
        reachable = True
        try:
            with _impatient_hub() as reachable:
                path = download_pretrained(settings)
        except Exception as error:  # whatever the network, the hub or the proxy makes of it
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            reason = reason if reachable else "no connection, and not in the cache"
            raise UserError(
                f"could not download the text weights {tag!r} ({reason}); pass --text-weights random, "
                "or --text-weights FILE with a file fetched elsewhere"
            ) from None
        return cls.from_file(Path(path), quick_gelu=settings.get("quick_gelu", False))

    @classmethod
    def from_file(cls, path: Path, quick_gelu: bool = False) -> "TextTower":
        r"""Weights in a file that OpenCLIP published (both towers together) or that a run saved.

        A .safetensors file, or a pickle of tensors alone (.bin, .pt), from which nothing is executed.
        """
        state, metadata = _read_state(path)
        state = {k.removeprefix("module."): v for k, v in state.items()}
        quick_gelu = metadata.get("quick_gelu", str(quick_gelu)) == "True"
        prefix = "text." if any(k.startswith("text.") for k in state) else ""
        tower = cls(quick_gelu)
        wanted = tower.tower.state_dict()
        picked = {name: state.get(prefix + name) for name in wanted}
        wrong = [n for n, v in picked.items() if v is None or v.shape != wanted[n].shape]
        if wrong:
            came = picked[wrong[0]]
            raise UserError(
                f"expected {path} to hold OpenCLIP's {ARCHITECTURE} text tower; "
                f"{len(wrong)} of {len(wanted)} tensors do not fit: {wrong[0]} should be "
                f"{tuple(wanted[wrong[0]].shape)}, got {'nothing' if came is None else tuple(came.shape)}"
            )
        try:
            tower.tower.load_state_dict(picked)
        except RuntimeError as error:  # sparse, quantized or without content, which weights_only lets pass
            raise UserError(f"expected plain tensors in {path}, got others: {str(error)[:300]}") from None
        return tower


def list_of_strings(prompts: Iterable[str], name: str) -> list[str]:
    r"""`prompts` as a list; ValueError unless it is some strings and not a single one."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ValueError(f"expected {name} as a list of strings, got {type(prompts).__name__}")
    prompts = list(prompts)
    wrong = next((p for p in prompts if not isinstance(p, str)), "")
    if wrong != "":
        raise ValueError(f"expected {name} as a list of strings, got {type(wrong).__name__} in it")
    return prompts


@contextlib.contextmanager
def _impatient_hub():
    r"""Let the Hugging Face hub answer from its cache at once where the host is out of reach, and log only errors.

    Left alone it tries each file six times, with longer and longer waits and a line of log for each.
    """
    from huggingface_hub import constants

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


def _read_state(path: Path) -> tuple[dict, dict]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        check_not_packed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else None
    except Exception as error:  # each reader has its own kinds
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"expected a file of tensors (.safetensors, .bin or .pt) at {path}, could not read it: {reason}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"expected a dictionary of tensors in {path}, got something else")
    return state, {}
