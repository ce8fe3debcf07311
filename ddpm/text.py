r"""From a prompt to 77 vectors: OpenCLIP's ViT-B-32 tokenizer and text tower, frozen (CLIP, section 2.4).

The image tower is never built. `ddpm.tools.text_weights` reads the weights, or draws them from a fixed seed.
"""

import warnings
from collections.abc import Iterable

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

ARCHITECTURE = "ViT-B-32"
TOKENS = 77
WIDTH = 512
LETTERS = 4096  # a token has at most 32 letters, and the tokenizer takes a long word's length squared


class TextTower(nn.Module):
    r"""c = TextTower(prompts): the states after the final layer norm and before the projection.

    The tower is causal: the state of a token depends on the tokens up to it, so padding changes no word.

    Args: quick_gelu: use x sigmoid(1.702 x) for GELU, as the weights `openai` and `laion400m` were trained.
    Shapes: B prompts -> (B, 77, 512) float32. The empty prompt is the unconditional one.
    """

    def __init__(self, quick_gelu: bool = False):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.tokenizer = SimpleTokenizer()
        activation = QuickGELU if quick_gelu else nn.GELU
        with torch.device("meta"):  # weights are read later; drawing 63 million of them takes a second
            self.tower = TextTransformer(output_dim=None, output_tokens=True, act_layer=activation)
        self.tower.to_empty(device="cpu")
        self.tower.attn_mask = self.tower.build_causal_mask()
        for part in (self.tower.transformer, *(block.attn for block in self.tower.transformer.resblocks)):
            part.batch_first = False  # tokens before prompts: one matmul for all prompts
        self.requires_grad_(False).eval()

    def tokenize(self, prompts: list[str]) -> Tensor:
        r"""Token numbers (B, 77): start, words, end, zeros. One warning names what is cut off the long ones."""
        prompts = [prompt[:LETTERS] for prompt in prompts]
        too_long = [words for words in map(self.tokenizer.encode, prompts) if len(words) > TOKENS - 2]
        if too_long:
            cut = self.tokenizer.decode(too_long[0][TOKENS - 2 :]).strip()
            cut = cut if len(cut) <= 200 else cut[:200] + "..."
            which = "a prompt" if len(too_long) == 1 else f"{len(too_long)} prompts, the first"
            message = f"{which} of {len(too_long[0])} tokens is cut to {TOKENS - 2}; left out: {cut!r}"
            warnings.warn(message, stacklevel=3)
        return self.tokenizer(prompts, context_length=TOKENS)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenize(list_of_strings(prompts, "prompts"))  # (B, 77)
        pooled, states = self.tower(tokens.to(self.tower.positional_embedding.device))
        return states.float()  # (B, 77, 512)


def list_of_strings(prompts: Iterable[str], name: str) -> list[str]:
    r"""`prompts` as a list; ValueError unless it is some strings and not a single one."""
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"expected {name} as a list of strings, got {prompts!r:.80}")
    return prompts
