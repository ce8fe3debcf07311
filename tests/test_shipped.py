r"""The weights that ship: small, named by a card, good enough to be the first picture that people see, and the same
pictures whatever becomes of the code."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import TextToImage
from ddpm.celeba.faces import draw_many, drawn_rows
from ddpm.model import SHIPPED
from ddpm.tools import text_weights
from ddpm.training.validation import psnr

MEGABYTE = 1_000_000
PROMPTS = [
    "a smiling woman with blond hair and eyeglasses",
    "a bald man with a mustache",
    "an older man wearing a hat",
    "",
]
SAMPLERS = ("ddpm", "ddim", "dpm++")
DIGESTS = {  # of the pictures in 8 bits, computed with AVX-512 by one thread
    "ddpm": "eb778df546549d29fca0c3a77db1374fb7606157c6f617021eae3858c36bd374",
    "ddim": "195883c479830a5d0b947133bc60d9deb95fcc877e6d5f16d6f3cd809085a5ca",
    "dpm++": "355927944b32da89546f55183f0a8d5d717e76b0bc94376b0c42192bd47139f4",
}


@pytest.fixture(scope="module")
def model(tower):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_weights, "random_tower", lambda: tower)
        return TextToImage.load()


@pytest.fixture(scope="module")
def pictures(model):
    r"""Sampler -> four pictures in 8 bits, computed by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    drawn = {sampler: model.sample(PROMPTS, sampler, steps=8) for sampler in SAMPLERS}
    torch.set_num_threads(threads)
    return {sampler: ((x + 1) * 127.5).round().to(torch.uint8) for sampler, x in drawn.items()}


def test_the_pictures_are_those_of_the_first_code_that_drew_them(pictures):
    r"""Means over 4 x 4 pixels, within one level of 8 bits, on every CPU; tests/shipped.png has a row a sampler."""
    kept = torch.tensor(np.array(Image.open(Path(__file__).with_name("shipped.png")))).float()
    for row, sampler in enumerate(SAMPLERS):
        small = torch.nn.functional.avg_pool2d(pictures[sampler].float(), 4)
        expected = kept[16 * row : 16 * row + 16].unflatten(1, (4, 16)).permute(1, 3, 0, 2)
        assert (small - expected).abs().max() <= 1


IS_INTEL = not torch.cpu.get_capabilities().get("sse4a")  # an extension of AMD's


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or not IS_INTEL, reason="other CPUs round otherwise"
)
@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_pictures_are_those_of_the_first_code_bit_for_bit(pictures, sampler):
    assert hashlib.sha256(pictures[sampler].numpy().tobytes()).hexdigest() == DIGESTS[sampler]


def test_the_folder_has_a_model_card_and_weights_of_at_most_12_megabytes():
    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {"README.md", "config.json", "vae.safetensors", "ema.safetensors", "words.txt"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12 * MEGABYTE


def test_the_card_names_the_numbers_that_the_command_was_given():
    card = (SHIPPED / "README.md").read_text()
    config = json.loads((SHIPPED / "config.json").read_text())
    for name in ("vae_steps", "unet_steps", "drawn_images", "ema_decay"):
        assert f"--{name.replace('_', '-')} {config['training'][name]}" in card


@torch.no_grad()
def test_faces_that_it_never_saw_pass_the_vae(model):
    faces = torch.stack([torch.tensor(face) for face in draw_many(drawn_rows(32, 1234, 1), 1234)])
    x = faces.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert psnr(x, model.vae.decode(model.vae.encode(x).mode())).mean() > 30


@pytest.mark.slow
def test_hair_has_the_colour_that_was_asked_for(model):
    colours = ("black", "brown", "gray", "blond")  # from dark to light
    x = model.sample(
        [f"a woman with {colour} hair" for colour in colours for _ in range(4)], precision="fp32"
    )
    crown = x[:, :, 8:14, 26:38].mean(dim=(1, 2, 3)).reshape(4, 4).median(dim=1).values
    assert crown[0] < crown[1] < crown[2:].min()
    yellow = (x[:, 0] - x[:, 2])[:, 8:14, 26:38].mean(dim=(1, 2)).reshape(4, 4).median(dim=1).values
    assert yellow[3] > 0.3 > yellow[2]
