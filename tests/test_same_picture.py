r"""A seed names a picture and a training: bit for bit on one machine, and as the same 8-bit picture, give or take one
level, in other batches, orders, processes, threads and on other CPUs. Nothing is drawn from a global generator.

What differs between CPUs is the order in which sums are rounded, and the logarithm inside a normal number.
docs/promises.md says how much that is.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, without_zeros
from safetensors import safe_open
from small_runs import FP32, QUICK, make_runs_cheap, run_train

from ddpm.model import TextToImage
from ddpm.tools.grids import to_uint8
from ddpm.training import session

ROOT = Path(__file__).parents[1]
PROMPTS = ["a bald man", "a smiling woman with blond hair", "", "a bald man", "an older man wearing a hat"]
SETTINGS = {"dpm++": {}, "ddpm": {}, "ddim": {"eta": 0.5}}
SHORT = [*QUICK, *FP32, "--max-steps", "3", "--text-cache-gb", "0.01"]  # which is read whole


def pictures(model, prompts=PROMPTS, sampler="ddpm", **changes):
    return model.sample(prompts, **{"sampler": sampler, "steps": 5, "seed": 7} | SETTINGS[sampler] | changes)


def levels(x, y) -> int:
    r"""The largest difference of two batches as pictures of 8 bits."""
    return int(np.abs(to_uint8(x).astype(int) - to_uint8(y).astype(int)).max())


def global_state():
    r"""Of the three global generators that a careless line would draw from."""
    kind, keys, *place = np.random.get_state()
    return (random.getstate(), (kind, keys.tobytes(), *place), torch.get_rng_state().numpy().tobytes())


def content(path):
    r"""What a file holds, byte for byte; but for safetensors, which write their metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        names = file.keys()
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in names}


def poison(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ----------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("sampler", SETTINGS)
def test_a_picture_depends_on_no_global_generator_and_moves_none(tiny, sampler):
    poison(1)
    first = pictures(tiny, sampler=sampler)
    poison(2)
    before = global_state()
    assert torch.equal(pictures(tiny, sampler=sampler), first)
    assert global_state() == before


@pytest.mark.parametrize("sampler", SETTINGS)
def test_a_picture_is_the_same_in_every_batch_order_and_share(tiny, sampler):
    r"""Shares are what several processes would compute, each with the numbers of its own pictures."""
    whole = pictures(tiny, sampler=sampler)
    for batch_size in (1, 2, 3, 32):
        assert levels(pictures(tiny, sampler=sampler, batch_size=batch_size), whole) <= 1
    for begin, end in ((0, 2), (2, 3), (3, 5)):
        assert levels(pictures(tiny, PROMPTS[begin:end], sampler, first=begin), whole[begin:end]) <= 1
    for i in (4, 0, 2):
        assert levels(pictures(tiny, [PROMPTS[i]], sampler, first=i), whole[i : i + 1]) <= 1
    others = pictures(tiny, ["another", *PROMPTS[1:2], "and", "more", "prompts", "than", "before"], sampler)
    assert levels(others[1:2], whole[1:2]) <= 1
    assert levels(whole[0:1], whole[3:4]) > 10  # one prompt, two numbers: two pictures


def test_the_number_of_threads_changes_no_picture(tiny):
    one, threads = pictures(tiny), torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert levels(pictures(tiny), one) <= 1
    finally:
        torch.set_num_threads(threads)


CHILD = r"""
import sys
import numpy as np
import torch
from ddpm.model import TextToImage
torch.set_num_threads(int(sys.argv[4]))
x = TextToImage.load(sys.argv[1]).sample(sys.argv[5:], sampler=sys.argv[3], steps=5, seed=7)
np.save(sys.argv[2], x.numpy())
print(torch.backends.cpu.get_cpu_capability())
"""
CAPABILITIES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")  # variables that limit the libraries
OLDER = {"the same": (), "without AVX": ("default", "SSE41", "COMPATIBLE"), "AVX2": ("avx2", "AVX2", "AVX2")}


@pytest.mark.slow
def test_another_process_gives_the_same_bits_and_another_cpu_the_same_pictures(remembering, tower, tmp_path):
    torch.manual_seed(0)
    model = TextToImage(TINY, remembering)
    without_zeros(model.unet, seed=2)
    model.save(tmp_path / "run")
    here, capability, threads = pictures(model), {}, torch.get_num_threads()
    for cpu, values in OLDER.items():
        out = tmp_path / f"{cpu}.npy"
        environment = os.environ | dict(zip(CAPABILITIES, values, strict=False))
        command = [sys.executable, "-c", CHILD, tmp_path / "run", out, "ddpm", str(threads), *PROMPTS]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=600
        )
        capability[cpu] = done.stdout.strip()
        there = torch.from_numpy(np.load(out))
        assert levels(there, here) <= 1
        if cpu == "the same":
            assert torch.equal(there, pictures(TextToImage.load(tmp_path / "run")))
    if capability["the same"].startswith("AVX"):
        assert capability["without AVX"] == "DEFAULT"  # it was another CPU


# ----------------------------------------------------------------------------------------------- trainings


@pytest.fixture
def cheap(monkeypatch):
    make_runs_cheap(monkeypatch)


def test_two_trainings_of_one_seed_write_the_same_whatever_the_global_generators_say(
    cheap, tmp_path, monkeypatch
):
    r"""They are poisoned, a different way each time, as soon as the weights are drawn: from there to the last picture
    nothing may draw from them. What the clock writes (metrics.csv, loss.png, state.pt) is left out.
    """
    restore_vae, poisons = session.restore_vae, iter([1, 2])

    def poisoned(*arguments):
        poison(next(poisons))
        states.append(global_state())
        return restore_vae(*arguments)

    monkeypatch.setattr(session, "restore_vae", poisoned)
    states, files = [], []
    for name in ("first", "second"):
        folder = tmp_path / name  # with a cache of its own
        assert run_train(*SHORT, "--out", folder / "run") == 0
        assert global_state() == states[-1]
        patterns = ("run/*.safetensors", "run/samples/*", "cache/*")
        paths = [path for pattern in patterns for path in folder.glob(pattern)]
        files.append({path.relative_to(folder): content(path) for path in paths})
    assert {path.name for path in files[0]} > {"vae.safetensors", "unet.safetensors", "ema.safetensors"}
    assert len(files[0]) == 3 + 1 + 3  # weights, a sheet of samples, caches
    assert files[0] == files[1]
    assert states[0] != states[1]


def test_another_seed_is_another_training(cheap, tmp_path):
    weights = []
    for seed in ("0", "1"):
        folder = tmp_path / seed / "run"
        assert run_train(*SHORT, "--stage", "vae", "--seed", seed, "--out", folder) == 0
        weights.append(content(folder / "vae.safetensors")[1])
    assert weights[0] != weights[1]
