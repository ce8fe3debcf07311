r"""Sampling against StableDiffusionPipeline, which opens the folder that `ddpm.export` wrote of our model."""

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ddpm.config import ModelConfig
from ddpm.export.diffusers_folder import export
from ddpm.model import TextToImage
from ddpm.tools.command import keep_freed_memory
from ddpm.tools.devices import autocast, choose_precision

from .measure import Row, alternate, by_themselves, compared
from .networks import CPU, nowhere_zero

STEPS, GUIDANCE = 20, 3.0
PROMPTS = [
    f"a {age} {who} with {hair} hair"
    for age in ("young", "old")
    for who in ("man", "woman")
    for hair in ("black", "blond", "brown", "gray")
]


def pipeline(model: TextToImage):
    r"""Their pipeline on our weights, by way of the export."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "exported")
        from_pretrained = diffusers.StableDiffusionPipeline.from_pretrained
        pipe = from_pretrained(Path(folder) / "exported", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_and_theirs(model: TextToImage, pipe, ours: str, other: str, steps: int) -> list[Callable]:
    r"""Both from prompts to pixels on the model's device, text tower and decoder included, each in its precision."""

    def mine():
        model.sample(PROMPTS, steps=steps, guidance_scale=GUIDANCE, precision=ours).cpu()

    def diffusers():
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        with autocast(model.device, other):
            pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images.cpu()

    return [mine, diffusers]


def sample(quick: bool, **_) -> Iterator[Row]:
    r"""16 prompts, 20 steps, guidance 3; our precision out of the box is the one that sample.py chooses by itself."""
    torch.manual_seed(0)
    model = TextToImage(ModelConfig(text_weights="random")).eval()
    for network in (model.vae, model.unet):
        nowhere_zero(network)
    pipe, steps = pipeline(model), 4 if quick else STEPS
    chosen = choose_precision(importlib.import_module("sample").parser().get_default("precision"), CPU)
    what = (
        f"{len(PROMPTS)} prompts to pixels, {steps} steps, guidance {GUIDANCE:.0f}, text tower on both sides"
    )
    cases = [(f"as each comes out of the box (ours {chosen})", chosen, "fp32", 2.5, False)]
    if (faster := choose_precision("auto", CPU)) != chosen:
        cases += [
            (f"ours by --precision auto ({faster}), theirs out of the box", faster, "fp32", None, False)
        ]
    cases += [(f"{p}, channels-last", p, p, 1.25, True) for p in (["bf16"] if quick else ["fp32", "bf16"])]
    for told, ours, other, goal, alike in cases:
        if alike:
            for network in (model.unet, model.vae, pipe.unet, pipe.vae):
                network.to(memory_format=torch.channels_last)
        one_step = ours_and_theirs(model, pipe, ours, other, 1)
        for warm in one_step:
            warm()
        both = ours_and_theirs(model, pipe, ours, other, steps)
        before = () if alike else by_themselves(*one_step)
        a, b = alternate(both, rounds=2 if quick else 3, warm=0, before=before)
        keep_freed_memory()
        yield compared("sample", f"{what}: {told}", a, b, len(PROMPTS), "pictures/s", goal)
