r"""Two processes on the CPU take the steps that one would, and a process that dies takes no step with it."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm.tools.errors import UserError
from ddpm.training.parallel import Group, is_lost

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--preset",
    "tiny",
    "--image-size",
    "16",
    "--channels",
    "32,32",
    "--drawn-images",
    "64",
    "--device",
    "cpu",
]
FLAGS += ["--save-every", "5", "--warmup", "2", "--precision", "fp32", "--variance", "learned"]
FLAGS += ["--gradient-checkpointing"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


def start(*arguments, launcher=TORCHRUN) -> subprocess.Popen:
    command = [*launcher, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(*arguments, launcher=TORCHRUN) -> str:
    process = start(*arguments, launcher=launcher)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def rows(run: Path) -> list[dict]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    same = [*FLAGS, "--max-steps", 20, "--accumulation", 2, "--sample-every", 20]
    finished(*same, "--out", folder / "one", "--cache", folder / "cache_1", launcher=[sys.executable])
    said = finished(*same, "--out", folder / "two", "--cache", folder / "cache_2")
    assert "2 processes" in said and said.count("held-out PSNR") == 2  # the first process alone speaks
    return folder / "one", folder / "two"


def test_two_processes_with_half_the_batch_follow_one_with_the_whole(one_and_two):
    r"""Losses of all 20 steps of both stages to 1e-5 of their size, as rounded in the file; held-out figures too."""
    one, two = map(rows, one_and_two)
    assert [(r["stage"], r["step"]) for r in one] == [(r["stage"], r["step"]) for r in two]
    assert len(one) == 40
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1.5e-5)
        for name in ("psnr", "val_loss"):
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)


def test_their_weights_end_at_the_same_place(one_and_two):
    r"""To 1e-3 of their length: sums are rounded in another order, and where a gradient is 0 but for rounding, as of a
    bias before a normalisation, Adam makes a whole step of it."""
    for name in ("unet", "ema", "vae"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in one_and_two)
        one, two = (torch.cat([state[k].flatten() for k in sorted(state)]) for state in (one, two))
        assert (one - two).norm() < 1e-3 * one.norm()


def test_under_muon_two_processes_follow_one(tmp_path):
    r"""To 1e-3: what is rounding in a small direction of a gradient is made a hundred times as large by Muon."""
    same = [
        *FLAGS,
        "--max-steps",
        10,
        "--sample-every",
        20,
        "--muon-lr",
        0.005,
        "--cache",
        tmp_path / "cache",
    ]
    finished(*same, "--out", tmp_path / "one", launcher=[sys.executable])
    finished(*same, "--out", tmp_path / "two")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


def test_caches_are_made_once_and_only_one_process_writes(one_and_two):
    one, two = one_and_two
    names = [
        {p.name.split("-")[0] for p in (run.parent / cache).iterdir()}
        for run, cache in ((one, "cache_1"), (two, "cache_2"))
    ]
    assert names[0] == names[1] == {"pictures", "latents", "texts"}
    assert len(list((two.parent / "cache_2").iterdir())) == 3
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}


def training(folder: Path, *more) -> tuple[subprocess.Popen, list[int]]:
    r"""A long run that has taken some steps: torchrun, and the ids of its processes, the first one first."""
    long = ["--max-steps", 2000, "--sample-every", 2000]
    process = start(*FLAGS, *long, *more, "--out", folder / "run", "--cache", folder / "cache")
    deadline = time.monotonic() + 240
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find the processes")
    while not (folder / "run" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)  # some steps
    return process, [int(pid) for pid in children.read_text().split()]


@pytest.mark.parametrize("how", ["a process is killed", "the launcher is told to stop"])
def test_a_group_that_ends_early_leaves_a_checkpoint_that_one_process_goes_on_from(how, tmp_path):
    process, children = training(tmp_path, "--save-every", 2000)
    if how == "a process is killed":
        os.kill(children[-1], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    wanted = (
        "error: lost the other processes at vae step"
        if how == "a process is killed"
        else "stopped at vae step"
    )
    assert wanted in said and f"--resume {tmp_path / 'run'}" in said, said
    at = int(said.split(" is saved")[0].split("vae step ")[-1])
    assert 0 < at < 2000
    resume = ["--resume", tmp_path / "run", "--cache", tmp_path / "cache", "--stop-after", 2]
    finished(*resume, launcher=[sys.executable])
    finished(*resume)  # and two from one
    assert [int(r["step"]) for r in rows(tmp_path / "run")] == list(range(1, at + 5))


def test_where_the_first_process_is_killed_nobody_says_that_it_saved(tmp_path):
    process, children = training(tmp_path, "--save-every", 5)
    os.kill(children[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "error: lost the other processes at vae step" in said and " is saved" not in said, said
    assert (
        f"what the first process saved stands; go on with python train.py --resume {tmp_path / 'run'}" in said
    )
    finished(
        "--resume",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
        "--stop-after",
        2,
        launcher=[sys.executable],
    )
    steps = [int(r["step"]) for r in rows(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) % 5 == 2  # from a checkpoint


def test_where_the_first_process_is_killed_while_it_makes_the_caches_the_others_say_so(tmp_path):
    many = ["--drawn-images", 50_000, "--max-steps", 2]
    process = start(*FLAGS, *many, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    children, deadline = (Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 240)
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find the processes")
    while not (tmp_path / "cache").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0 and "nothing is saved yet; give the command again" in said, said
    assert "error: lost the other processes (" in said and 'ddpm/parallel.py", line' not in said, said


def test_an_error_that_is_not_the_groups_is_not_taken_for_a_lost_process():
    assert is_lost(torch.distributed.DistBackendError("NCCL error"))
    assert is_lost(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_batch_that_the_processes_cannot_share_is_refused_in_one_line(tmp_path):
    process = start(
        *FLAGS, "--max-steps", 2, "--batch-size", 7, "--out", tmp_path / "run", "--cache", tmp_path / "c"
    )
    said, _ = process.communicate(timeout=240)
    assert "error: expected a batch that 2 processes x 1 parts divide, got 7" in said
    assert "Traceback (most recent call last)" not in said.split("error: expected")[0]


def test_what_the_first_process_refuses_ends_the_others_in_one_line(tmp_path):
    process = start(*FLAGS, "--max-steps", 2, "--data", tmp_path / "none", "--out", tmp_path / "run")
    said, _ = process.communicate(timeout=240)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert f"error: {tmp_path / 'none'}: expected a folder of pictures" in said, said
    assert "error: the first process could not go on; it says why" in said and "dist.barrier" not in said, (
        said
    )


def test_a_process_that_torchrun_did_not_start_is_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="start them with torchrun"), Group.joined(torch.device("cpu")):
        pass
    with (
        pytest.raises(UserError, match="cuda or cpu for several processes, got mps"),
        Group.joined(torch.device("mps")),
    ):
        pass


def test_a_share_is_a_processs_part_of_the_batch_and_together_they_are_the_batch():
    batch = torch.arange(12)
    groups = [Group(torch.device("cpu"), rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([group.share(batch) for group in groups]), batch)
    assert groups[1].share(list(range(6))) == [2, 3]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_follow_one(tmp_path):
    same = [
        *FLAGS,
        "--device",
        "cuda",
        "--max-steps",
        20,
        "--sample-every",
        20,
        "--cache",
        tmp_path / "cache",
    ]
    finished(*same, "--out", tmp_path / "one", launcher=[sys.executable])
    finished(*same, "--out", tmp_path / "two")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)
