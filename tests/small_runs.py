r"""What the tests of whole runs share: a training of seconds, and when two of them are the same."""

import csv
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ddpm import config
from ddpm.tools import text_weights
from ddpm.tools.command import exit_code
from ddpm.training import __main__ as train
from ddpm.training import run_folder
from ddpm.training.run_folder import read_state
from ddpm.training.stages import UnetStage

QUICK = ["--preset", "tiny", "--image-size", "16", "--channels", "32,32", "--drawn-images", "40"]
QUICK += ["--sample-every", "4", "--save-every", "2", "--warmup", "2", "--max-steps", "6", "--device", "cpu"]
FP32 = ["--precision", "fp32"]
SAME = ("stage", "step", "loss", "lr", "grad_norm", "psnr", "ssim", "val_loss")  # the rest are times


class PlainTower(nn.Module):
    r"""In the text tower's place: states that depend on the prompt and cost nothing."""

    quick_gelu = False

    def __init__(self):
        super().__init__()
        self.register_buffer("states", torch.randn(7, 77, 512, generator=torch.Generator().manual_seed(0)))

    def tokenize(self, prompts):
        pass

    def forward(self, prompts):
        return self.states[[len(prompt) % 7 for prompt in prompts]]


def in_two_steps(draw_samples):
    r"""The same with two steps of the sampler in place of twenty."""

    def draw(stage, batch):
        guided, config.GUIDED = config.GUIDED, ("dpm++", 2, 3.0)
        try:
            draw_samples(stage, batch)
        finally:
            config.GUIDED = guided

    return draw


def make_runs_cheap(patch):
    r"""Leave out what takes a small run's time and cannot change its outcome: the text tower, plots, most of a grid."""
    patch.setattr(text_weights, "random_tower", PlainTower)
    patch.setattr(run_folder, "plot_losses", lambda path, rows: path.write_bytes(b"a plot"))
    patch.setattr(UnetStage, "draw_samples", in_two_steps(UnetStage.draw_samples))


def run_train(*arguments) -> int:
    return exit_code(train.main, [str(a) for a in arguments])


def metrics(folder: Path) -> list[tuple]:
    with open(folder / "metrics.csv", newline="") as file:
        return [tuple(row[name] for name in SAME) for row in csv.DictReader(file)]


def assert_same_run(folder: Path, expected: Path):
    r"""Weights, averages, optimizer and every figure of the metrics, bit for bit; no row twice, nothing left over."""
    for name in ("vae", "unet", "ema"):
        ours, theirs = (load_file(f / f"{name}.safetensors") for f in (folder, expected))
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert torch.equal(ours[key], theirs[key]), (name, key)
    ours, theirs = (tensors_of(read_state(f / "state.pt")) for f in (folder, expected))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    assert metrics(folder) == metrics(expected)
    assert leftovers(folder) == []


def tensors_of(value, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in tensors_of(part, f"{name}/{key}").items()}
    return {name: value} if isinstance(value, torch.Tensor) else {}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*.tmp")]


def wait_for(condition, seconds: float = 60):
    r"""Wait until `condition()`; an upper limit alone, so that a broken test ends."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
