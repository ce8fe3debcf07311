r"""Records what the film on the home page plays: docs/_static/film/*.webp and film_runs.js. It takes a minute.

    python docs/film.py

For each prompt, guidance scale and seed it draws a picture with the weights that ship (DPM-Solver++, 20 steps). What it
keeps of that is a sheet of 21 columns, from noise to the result, and three rows: z_t, z_t decoded, and the picture that
the network predicts from z_t.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddpm import TextToImage
from ddpm.tools.grids import to_uint8
from ddpm.tools.seeding import generator

FOLDER = Path(__file__).parent / "_static" / "film"
PROMPTS = [
    "a smiling woman with blond hair and eyeglasses",
    "a bald man with a mustache",
    "an older woman with gray hair",
    "a young man with black hair, wearing a hat",
]
SCALES = (1, 3, 6)
SEEDS = (0, 1)
STEPS = 20


def as_colours(z: Tensor) -> Tensor:
    r"""The first three channels of latents as colours, each latent place 4 x 4 pixels; black and white are -3 and 3."""
    return F.interpolate((z[:, :3] / 3).clamp(-1, 1), scale_factor=4, mode="nearest")


@torch.no_grad()
def record(model: TextToImage, prompt: str, scale: float, seed: int) -> tuple[list[int], Image.Image]:
    r"""The times of a run, and its sheet."""
    states = []
    model.sample([prompt], steps=STEPS, guidance_scale=scale, seed=0, first=seed, callback=states.append)
    noise = model.draw_noise([generator(0, seed)])
    z = torch.cat([noise, *(state.x for state in states)])
    x_0 = torch.cat([*(state.x_0 for state in states), states[-1].x])
    rows = [as_colours(z), model.decode(z), model.decode(x_0)]
    columns = np.concatenate([to_uint8(row) for row in rows], axis=1)  # (21, 3 x 64, 64, 3)
    return [*(state.t for state in states), -1], Image.fromarray(np.concatenate(columns, axis=1))


def main():
    model = TextToImage.load()
    FOLDER.mkdir(exist_ok=True)
    for i, prompt in enumerate(PROMPTS):
        for scale in SCALES:
            for seed in SEEDS:
                times, sheet = record(model, prompt, scale, seed)
                sheet.save(FOLDER / f"{i}-{scale}-{seed}.webp", quality=80)
    about = {"prompts": PROMPTS, "scales": SCALES, "seeds": SEEDS, "times": times}
    (FOLDER / "film_runs.js").write_text(f"const FILM = {json.dumps(about, indent=1)};\n")


if __name__ == "__main__":
    main()
