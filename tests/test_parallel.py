r"""Two processes on the CPU take the steps that one would, and a process that dies takes no step with it."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import refusal_of
from safetensors.torch import load_file

from ddpm.training.parallel import Group, is_lost

ROOT = Path(__file__).parents[1]
FLAGS = ["--preset", "tiny", "--image-size", "16", "--channels", "32,32", "--drawn-images", "64"]
FLAGS += ["--save-every", "5", "--warmup", "2", "--precision", "fp32", "--variance", "learned"]
FLAGS += ["--gradient-checkpointing"]
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


def processes(test):
    r"""Mark a test that starts processes."""
    return needs_gloo(pytest.mark.slow(test))


def start(launcher, folder: Path, *arguments, device="cpu") -> subprocess.Popen:
    r"""train.py in `folder`/run; it resumes a run that is there."""
    run = ["--resume", folder / "run"] if (folder / "run").exists() else [*FLAGS, "--out", folder / "run"]
    run += ["--device", device, "--cache", folder / "cache"]
    command = [str(part) for part in (*launcher, ROOT / "train.py", *run, *arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, **output)


def finished(launcher, folder: Path, *arguments, device="cpu") -> str:
    process = start(launcher, folder, *arguments, device=device)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def failed(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    return output


def rows(folder: Path) -> list[dict]:
    with open(folder / "run" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_losses(one: Path, two: Path, tolerance: float, count: int):
    r"""Losses to `tolerance` of their size at all steps, held-out figures to 1e-3."""
    assert len(rows(one)) == count
    for a, b in zip(rows(one), rows(two), strict=True):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=tolerance)
        for name in ("psnr", "val_loss"):
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    same = ["--max-steps", 20, "--accumulation", 2, "--sample-every", 20]
    finished(ONE, one, *same)
    output = finished(TWO, two, *same)
    assert "2 processes" in output and output.count("held-out PSNR") == 1  # the main process alone prints
    return one, two


@processes
def test_two_processes_with_half_the_batch_follow_one_with_the_whole(one_and_two):
    r"""Losses of all 20 steps of both stages to 1e-5 of their size, as rounded in the file; held-out figures too."""
    assert_same_losses(*one_and_two, tolerance=1.5e-5, count=40)


@processes
def test_their_weights_end_at_the_same_place(one_and_two):
    r"""To 1e-3 of their length: sums are rounded in another order, and where a gradient is 0 but for rounding, as of a
    bias before a normalisation, Adam makes a whole step of it."""
    for name in ("unet", "ema", "vae"):
        one, two = (load_file(folder / "run" / f"{name}.safetensors") for folder in one_and_two)
        one, two = (torch.cat([state[k].flatten() for k in sorted(state)]) for state in (one, two))
        assert (one - two).norm() < 1e-3 * one.norm()


@processes
def test_caches_are_made_once_and_only_one_process_writes(one_and_two):
    one, two = one_and_two
    for folder in one_and_two:
        kinds = sorted(path.name.split("-")[0] for path in (folder / "cache").iterdir())
        assert kinds == ["latents", "pictures", "texts"]
    assert {p.name for p in (one / "run").iterdir()} == {p.name for p in (two / "run").iterdir()}


@processes
def test_under_muon_two_processes_follow_one(tmp_path):
    r"""To 1e-3: what is rounding in a small direction of a gradient is made a hundred times as large by Muon."""
    same = ["--max-steps", 10, "--sample-every", 20, "--muon-lr", 0.005]
    finished(ONE, tmp_path / "one", *same)
    finished(TWO, tmp_path / "two", *same)
    assert_same_losses(tmp_path / "one", tmp_path / "two", tolerance=1e-3, count=20)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_follow_one(tmp_path):
    same = ["--max-steps", 20, "--sample-every", 20]
    finished(ONE, tmp_path / "one", *same, device="cuda")
    finished(TWO, tmp_path / "two", *same, device="cuda")
    assert_same_losses(tmp_path / "one", tmp_path / "two", tolerance=1e-3, count=40)


def children_once(exists: Path, process: subprocess.Popen) -> list[int]:
    r"""The ids of torchrun's processes, the main one first, once a file is there and all of them handle SIGTERM."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find the processes")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        pids = [int(pid) for pid in children.read_text().split()]
        if exists.exists() and all(map(handles_sigterm, pids)):
            return pids
        time.sleep(0.2)
    process.kill()
    return pytest.fail(f"waited in vain for {exists}")


def handles_sigterm(pid: int) -> bool:
    r"""Whether a process has got as far as to end in its own way: until then the launcher's signal ends it unheard."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def training(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    r"""A long run that has saved some steps, and its processes."""
    process = start(TWO, folder, "--max-steps", 2000, "--sample-every", 2000, "--save-every", 5)
    return process, children_once(folder / "run" / "state.pt", process)


@processes
@pytest.mark.parametrize("how", ["a process is killed", "the launcher is told to stop"])
def test_a_group_that_ends_early_leaves_a_checkpoint_that_one_process_goes_on_from(how, tmp_path):
    process, children = training(tmp_path)
    if how == "a process is killed":
        os.kill(children[-1], signal.SIGKILL)
        expected = "error: lost the other processes at vae step"
    else:
        process.send_signal(signal.SIGTERM)
        expected = "stopped at vae step"
    output = failed(process)
    assert expected in output and f"--resume {tmp_path / 'run'}" in output, output
    step = int(output.split(" is saved")[0].split("vae step ")[-1])
    assert 0 < step < 2000
    finished(ONE, tmp_path, "--stop-after", 2)
    finished(TWO, tmp_path, "--stop-after", 2)  # and two from one
    assert [int(r["step"]) for r in rows(tmp_path)] == list(range(1, step + 5))


@processes
def test_where_the_first_process_is_killed_nobody_says_that_it_saved(tmp_path):
    process, children = training(tmp_path)
    os.kill(children[0], signal.SIGKILL)
    output = failed(process)
    assert "error: lost the other processes at vae step" in output and " is saved" not in output, output
    advice = f"what the first process saved stands; go on with python train.py --resume {tmp_path / 'run'}"
    assert advice in output, output
    finished(ONE, tmp_path, "--stop-after", 2)
    steps = [int(r["step"]) for r in rows(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) % 5 == 2  # from a checkpoint


@processes
def test_where_the_first_process_is_killed_while_it_makes_the_caches_the_others_say_so(tmp_path):
    process = start(TWO, tmp_path, "--max-steps", 2, "--drawn-images", 50_000)
    os.kill(children_once(tmp_path / "cache", process)[0], signal.SIGKILL)
    output = failed(process)
    assert "nothing is saved yet; give the command again" in output, output
    lost, stopped = "error: lost the other processes (", "stopped; "  # by torchrun, whichever comes first
    assert (lost in output or stopped in output) and 'parallel.py", line' not in output, output


def test_an_error_that_is_not_the_groups_is_not_taken_for_a_lost_process():
    assert is_lost(torch.distributed.DistBackendError("NCCL error"))
    assert is_lost(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@processes
def test_what_the_first_process_refuses_ends_the_others_in_one_line(tmp_path):
    output = failed(start(TWO, tmp_path, "--max-steps", 2, "--batch-size", 7))
    assert "error: expected a batch that 2 processes x 1 parts divide, got 7" in output
    assert "Traceback (most recent call last)" not in output.split("error: expected")[0]
    output = failed(start(TWO, tmp_path, "--max-steps", 2, "--data", tmp_path / "none"))
    assert not (tmp_path / "run").exists()
    assert f"error: {tmp_path / 'none'}: expected a folder of pictures" in output, output
    assert "error: the first process could not go on; it says why" in output, output
    assert "dist.barrier" not in output, output


@needs_gloo
def test_a_process_that_torchrun_did_not_start_is_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    messages = {"cpu": "start them with torchrun", "mps": "cuda or cpu for several processes, got mps"}
    for device, message in messages.items():
        assert message in refusal_of(Group.joined(torch.device(device)).__enter__)


def test_shards_together_are_the_batch():
    batch = torch.arange(12)
    groups = [Group(torch.device("cpu"), rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([group.shard(batch) for group in groups]), batch)
    assert groups[1].shard(list(range(6))) == [2, 3]
