r"""The weights that ship: small enough, named by a card, and good enough to be the first picture that people see."""

import json

import pytest
import torch

from ddpm import TextToImage
from ddpm.celeba.faces import draw_many, drawn_rows
from ddpm.model import SHIPPED
from ddpm.tools import text_weights
from ddpm.training.validation import psnr

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def model(tower):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_weights, "random_tower", (lambda: tower))
        return TextToImage.load()


def test_the_folder_has_a_model_card_and_weights_of_at_most_12_megabytes():
    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {"README.md", "config.json", "vae.safetensors", "ema.safetensors"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12 * MEGABYTE


def test_the_card_names_the_numbers_that_the_command_was_given():
    card, config = ((SHIPPED / "README.md").read_text(), json.loads((SHIPPED / "config.json").read_text()))
    for name in ("vae_steps", "unet_steps", "drawn_images", "ema_decay"):
        assert f"--{name.replace('_', '-')} {config['training'][name]}" in card


@torch.no_grad()
def test_faces_that_it_never_saw_pass_the_vae(model):
    faces = torch.stack([torch.tensor(face) for face in draw_many(drawn_rows(32, 1234, 1), 1234)])
    x = faces.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert psnr(x, model.vae.decode(model.vae.encode(x).mode())).mean() > 30


def test_hair_has_the_colour_that_was_asked_for(model):
    colours = ("black", "brown", "gray", "blond")  # from dark to light
    x = model.sample(
        [f"a woman with {colour} hair" for colour in colours for _ in range(4)], precision="fp32"
    )
    crown = x[:, :, 8:14, 26:38].mean(dim=(1, 2, 3)).reshape(4, 4).median(dim=1).values
    assert crown[0] < crown[1] < crown[2:].min()
    yellow = (x[:, 0] - x[:, 2])[:, 8:14, 26:38].mean(dim=(1, 2)).reshape(4, 4).median(dim=1).values
    assert yellow[3] > 0.3 > yellow[2]
