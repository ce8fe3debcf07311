r"""The dry run: what it counts is what is there, and what it predicts is what a process then takes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Remembering
from torch import nn

from ddpm.celeba.dataset import drawn_pictures
from ddpm.celeba.lists import TRAIN, VALID
from ddpm.config import Config
from ddpm.model import TextToImage
from ddpm.tools.arrays import TOGETHER
from ddpm.tools.command import exit_code
from ddpm.training import __main__ as train
from ddpm.training.caches import Latents
from ddpm.training.dry_run import (
    ATTENTION_ON_CPU,
    MIB,
    FlopCounterMode,
    LiveBytes,
    bytes_kept,
    distinct,
    measure,
    measure_caches,
    minutes,
    minutes_of_distillation,
    seconds_of_a_picture,
)
from ddpm.training.optimization import EMA
from ddpm.training.stages import inference_batch
from ddpm.training.validation import loss_by_timestep

ROOT = Path(__file__).parents[1]


def test_live_bytes_follow_tensors_until_the_last_view_of_them_goes():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        view = x[:10]
        assert (live.now, live.peak) == (4000, 4000)
        x += 1
        y = x.double()
        assert live.now == 12_000
        del x, y
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 12_000)


def test_what_is_kept_is_each_storage_once_and_no_weight():
    layer = nn.Linear(100, 50)
    x = torch.ones(8, 100, requires_grad=True)
    # x for the weight's gradient, layer(x) for the square's; layer.weight for x's gradient is there in any case
    assert bytes_kept(lambda: layer(x).square().sum() + x[:4].square().sum(), layer) == 4 * 8 * (100 + 50)


def test_a_distillation_is_told_the_teachers_minutes_and_the_students_steps(capsys):
    settings = {"few_steps": 4, "trajectories": 536, "max_minutes": 10.0, "unet_steps": 10**6}
    config = Config.from_preset("tiny", **settings)
    line = minutes_of_distillation(config, count=100, step=0.5, call=0.01)
    assert "4.0 for 536 pictures of the teacher, 40 calls each, and 5.8 for 696 steps of the student" in line
    train.main(["--distill", "shipped", "--dry-run", "--max-minutes", "0", "--unet-steps", "7"])
    told = capsys.readouterr().out
    assert "for 224 pictures of the teacher" in told and "for 7 steps of the student" in told
    assert "vae:" not in told


@pytest.mark.parametrize("learn", [False, True])
def test_attention_has_the_same_flops_in_torchs_kernel_for_cpus_and_by_hand(learn):
    q, k, v = (torch.randn(2, 4, length, 16, requires_grad=learn) for length in (400, 400, 400))
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as fused:
        F.scaled_dot_product_attention(q, k, v)
    with FlopCounterMode(display=False) as by_hand:
        (q @ k.transpose(2, 3)).softmax(dim=3) @ v
    assert fused.get_total_flops() == by_hand.get_total_flops() == 2 * 2 * 2 * 4 * 400 * 400 * 16


def test_a_need_adds_up(tower):
    torch.manual_seed(0)
    config = Config.from_preset("tiny", channels=(32, 32), image_size=16)
    model = TextToImage(config.model, tower)
    whole, parts = (measure("unet", model, config.changed(accumulation=n), "fp32", 3) for n in (1, 4))
    size = 4 * sum(p.numel() for p in model.unet.parameters())
    assert whole["parameters"] == size // 4 and whole["optimizer"] == 2 * size
    assert whole["gradients"] == whole["average"] == size
    assert whole["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["kept"] < whole["kept"] / 3
    for need in (whole, parts):
        assert need["peak"] > need["weights"] + 3 * size + max(size, need["kept"])
    assert parts["peak"] < whole["peak"]
    muon = measure("unet", model, config.changed(muon_lr=0.01), "fp32", 3)  # one moment in place of two
    assert size < muon["optimizer"] < 1.2 * size and muon["peak"] < whole["peak"]
    assert parts["flops"] == whole["flops"] > 0  # micro-batches do not change what is computed


def test_minutes_are_shared_out_and_few_pictures_bound_the_steps():
    r"""450 pictures in batches of 16; a second reads ten of all 500."""
    split = np.repeat([TRAIN, VALID], [450, 50])
    seconds = {"vae": 1.0, "unet": 0.6, "latent": 0.0, "caption": 0.0}
    hour = Config.from_preset("celeba64", max_minutes=60.0, vae_share=0.1)
    line, warning = minutes(hour, split, 0.1, seconds)
    assert ": 0.8 for 500 pictures, 5.2 for 310 steps of the VAE, " in line
    assert "52.8 for 5,280 steps of the UNet, 187.7 epochs" in line
    assert "in 188 epochs; for 50 of them take --unet-steps 1406" in warning
    [line] = minutes(Config.from_preset("celeba64", max_minutes=10.0), split, 1.15, seconds)
    assert (
        "9.6 for 500 pictures, 0.0 for 0 steps of the VAE, 0.0 for the latents' scale, 0.2 for 22 steps"
        in line
    )
    [line] = minutes(Config.from_preset("celeba64", max_minutes=5.0), split, 1.15, seconds)
    assert " 0 steps of the UNet, 0.0 epochs" in line
    [line] = minutes(Config.from_preset("celeba64", max_minutes=10.0), split, 0.1, seconds, "unet")
    assert "for 0 steps of the VAE, 0.0 for the latents' scale" in line
    *_, warning = minutes(Config.from_preset("celeba64", epochs=100), split, 0.1, seconds)
    assert "take --epochs 0 --vae-steps 2800 --unet-steps 1406 --sample-every 140, and fewer" in warning
    few = Config.from_preset("celeba64", max_minutes=60.0, vae_steps=60, unet_steps=100)  # which end first
    [line] = minutes(few, split, 0.1, seconds)
    assert "1.0 for 60 steps of the VAE, " in line and "1.0 for 100 steps of the UNet, 3.6 epochs" in line


def test_what_must_be_made_anew_is_what_the_epochs_see():
    r"""Of three variants an epoch sees one, the second another with two chances in three."""
    assert [distinct(3, epochs) for epochs in (0, 0.5, 1, 1.5, 2)] == pytest.approx([0, 0.5, 1, 4 / 3, 5 / 3])
    assert [distinct(1, epochs) for epochs in (0.25, 1, 7)] == [0.25, 1, 1]
    g = np.random.default_rng(0)
    seen = np.mean([len(set(draws)) for draws in g.integers(0, 5, (20_000, 4))])
    assert distinct(5, 4) == pytest.approx(seen, rel=0.01)


def test_a_dry_run_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert exit_code(train.main, ["--dry-run"]) == 2
    assert "expected --dry-run in one process, got 4" in capsys.readouterr().err


def test_a_file_of_which_no_picture_was_chosen_is_passed_over_in_the_measurement():
    table = SimpleNamespace(batches=lambda some: iter([[], [("a", io.BytesIO(b"no picture"))]]))
    assert seconds_of_a_picture(Config.from_preset("celeba64"), table) > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_the_specs_model_stays_below_what_a_card_of_4_gb_has(stage, tower):
    config = Config.from_preset("celeba64", text_weights="random")
    model = TextToImage(config.model, tower)
    assert measure(stage, model, config, "fp32", 3)["peak"] < 3.5e9


@pytest.mark.slow
def test_what_is_made_between_the_stages_is_counted_and_small(tower):
    config = Config.from_preset("celeba64", text_weights="random")
    model = TextToImage(config.model, tower)
    (latents, captions), *_ = measure_caches(model, "fp32")
    one_map = TOGETHER * 64**2 * config.model.vae_channels[0] * 4
    assert 2 * one_map <= latents < 6 * one_map  # what goes into a layer and what comes out, at the least
    states = TOGETHER * 77 * 512 * 4
    assert 5 * states <= captions < 20 * states  # the feed-forward is four times as wide
    lowvram = measure("unet", model, Config.from_preset("lowvram", text_weights="random"), "fp32", 3)
    assert lowvram["weights"] + max(latents, captions) < 1.1 * lowvram["peak"]


@pytest.mark.slow
def test_validation_and_a_grid_take_no_more_than_a_step(tower, tmp_path):
    r"""Of `lowvram`, whose step takes the least; the copy of the weights is in the gradients' place."""
    config = Config.from_preset("lowvram", text_weights="random")
    model = TextToImage(config.model, Remembering(tower))
    model.unet.set_gradient_checkpointing(config.training.gradient_checkpointing)
    model.text([""])  # remembered from now on
    need = measure("unet", model, config, "fp32", 3)
    step = need["peak"] - need["weights"] - need["optimizer"] - need["average"]
    pictures = drawn_pictures(tmp_path, 24, seed=0, size=64)
    batch = inference_batch(config.training.batch_size, config.training.accumulation)
    latents = Latents(np.zeros((24, 2, 2, *model.latent_shape), np.float16))
    rows, ema = np.arange(24), EMA(model.unet, 0.99)
    with LiveBytes() as live, ema.applied(model.unet):
        loss_by_timestep(model, latents, model.text, pictures, rows, buckets=1, batch=batch)
        model.sample([""] * 8, steps=1, batch_size=batch // 2)
    assert batch == 4 and live.peak < step
    with LiveBytes() as live, ema.applied(model.unet):
        loss_by_timestep(model, latents, model.text, pictures, rows, buckets=1)
    assert live.peak > 1.5 * step  # all of them at once


CHILD = r"""
import json, sys
import numpy as np, open_clip.transformer, torch
from pathlib import Path
from ddpm.celeba.dataset import drawn_pictures
from ddpm.config import Config
from ddpm.model import TextToImage
from ddpm.text import TextTower
from ddpm.training import __main__ as train
from ddpm.training.caches import Latents
from ddpm.training.loops import train_unet
from ddpm.training.optimization import Bound, Optimization

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

config = Config.from_preset("celeba64", **json.loads(sys.argv[1]))
pictures = drawn_pictures(Path(sys.argv[2]), 16, seed=0, size=64)
layer = torch.nn.Conv2d(32, 32, 3)  # what a library sets up at its first call is not the training's
layer(torch.randn(2, 32, 32, 32)).sum().backward()
before = status("VmRSS")
text = TextTower()
for parameter in text.parameters():
    parameter.fill_(0.01)
model = TextToImage(config.model, text)
model.unet.set_gradient_checkpointing(config.training.gradient_checkpointing)
latents = Latents(np.zeros((16, 2, 2, *model.latent_shape), np.float16))
opt = Optimization(model.unet, config, 1e-4, Bound(3), True, "fp32")
texts = lambda captions: torch.zeros(len(captions), 77, 512)
list(train_unet(model, latents, texts, pictures, config, opt))
print(status("VmHWM") - before)
"""


def predicted_and_taken(changes, tower, folder) -> tuple[float, float]:
    r"""MiB: the predicted peak, and what a process of its own has at most, less what it had before the model."""
    config = Config.from_preset("celeba64", text_weights="random", **changes)
    model = TextToImage(config.model, tower)
    model.unet.set_gradient_checkpointing(config.training.gradient_checkpointing)
    predicted = measure("unet", model, config, "fp32", 3)["peak"]
    command = [sys.executable, "-c", CHILD, json.dumps(changes), str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return predicted / MIB, int(done.stdout.split()[-1]) / MIB


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_three_steps_of_the_specs_unet_take_the_memory_that_is_predicted(tower, tmp_path):
    r"""But for what the libraries take for themselves at their first calls, 150 to 220 MiB here."""
    plain = predicted_and_taken({"batch_size": 4}, tower, tmp_path)
    small = {"batch_size": 4, "accumulation": 2, "gradient_checkpointing": True}
    thrifty = predicted_and_taken(small, tower, tmp_path)
    for predicted, taken in (plain, thrifty):
        assert 0.95 * predicted < taken < predicted + 250
    assert plain[1] - thrifty[1] == pytest.approx(plain[0] - thrifty[0], rel=0.3)
