import csv
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess

import ddpm.cache
import numpy as np
import pytest
import torch
from conftest import refusal_of
from small_runs import FP32, QUICK, assert_same_run, leftovers, make_runs_cheap, metrics, run_train

import ddpm.training
import ddpm.training.run
from ddpm.celeba.faces import write_celeba
from ddpm.config import Config
from ddpm.tools.command import SIGNALS
from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of
from ddpm.training.optimization import BAD_STEPS, Optimization
from ddpm.training.run import Damaged, Run, read_state, save_state

STATES = ("state.pt", "state.previous.pt")


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    make_runs_cheap(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    r"""An uninterrupted run of 6 steps a stage."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        make_runs_cheap(patch)
        assert run_train(*QUICK, *FP32, "--out", folder) == 0
    return folder


@pytest.fixture
def begun(whole, tmp_path):
    r"""A function: a run stopped after so many steps of both stages, 1 to 12; the caches are those of `whole`."""

    def begin(steps: int, *more):
        folder = tmp_path / "run"
        assert start(folder, whole, "--stop-after", steps, *more) == 0
        return folder

    return begin


def start(folder, whole, *more) -> int:
    return run_train(*QUICK, *FP32, "--out", folder, "--cache", whole.parent / "cache", *more)


def resume(folder, whole, *more) -> int:
    return run_train("--resume", folder, "--device", "cpu", "--cache", whole.parent / "cache", *more)


def one_error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def at_step(monkeypatch, number: int, action):
    r"""Have `action` called within step `number` of the command, both stages counted."""
    count, update = [0], Optimization.update

    def counted(self, *arguments, **more):
        count[0] += 1
        if count[0] == number:
            action()
        return update(self, *arguments, **more)

    monkeypatch.setattr(Optimization, "update", counted)


# ------------------------------------------------------------------------------------- interrupted equals whole

VARIANTS = {
    "fp32": [*FP32],
    "bf16": ["--precision", "bf16"],
    "in parts": [*FP32, "--accumulation", 4],
    "epochs of two steps": [*FP32, "--batch-size", 16, "--vae-batch-size", 16, "--caption-variants", 3],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_at_odd_places_a_run_equals_the_whole_bit_for_bit(variant, tmp_path):
    arguments = [*QUICK, *VARIANTS[variant], "--cache", tmp_path / "cache"]
    assert run_train(*arguments, "--out", tmp_path / "whole") == 0
    assert run_train(*arguments, "--out", tmp_path / "parts", "--stop-after", 3) == 0
    for steps in (3, 1, 100):  # in the VAE, at the border, in the UNet, to the end
        again = ("--resume", tmp_path / "parts", "--device", "cpu", "--cache", tmp_path / "cache")
        assert run_train(*again, "--stop-after", steps) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_is_done_is_not_changed_by_resuming_it(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


def test_the_caches_may_be_lost_between_two_parts(begun, whole, tmp_path):
    folder = begun(8)
    assert run_train("--resume", folder, "--device", "cpu", "--cache", tmp_path / "fresh") == 0
    assert_same_run(folder, whole)


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "step, signum",  # 4 is due for validation, 12 the last
    [(3, signal.SIGINT), (4, signal.SIGTERM), (9, signal.SIGTERM), (12, signal.SIGINT)],
)
def test_a_signal_ends_a_run_after_the_step_saved(signum, step, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signum))
        assert start(folder, whole) == 128 + signum
    place = ("vae", step) if step <= 6 else ("unet", step - 6)
    told = [line for line in capsys.readouterr().err.splitlines() if line][-1]
    assert f"stopped at {place[0]} step {place[1]}" in told and f"--resume {folder}" in told
    state = read_state(folder / "state.pt")
    assert (state["stage"], state["step"]) == place
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


def test_a_signal_within_a_validation_gives_it_up_and_the_resumed_run_does_it(whole, tmp_path, monkeypatch):
    import train

    folder, draw = tmp_path / "run", train.Trainer.draw_samples
    with monkeypatch.context() as patch:
        patch.setattr(
            train.Trainer, "draw_samples", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), draw(*a))
        )
        assert start(folder, whole) == 143
    assert not list((folder / "samples").iterdir()) and metrics(folder)[-1][-1] == ""
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)
    assert len(list((folder / "samples").iterdir())) == 2


@pytest.mark.parametrize("name", ["drawn_pictures", "encode_latents"])
def test_a_signal_between_the_trainings_ends_at_once_in_one_line(name, whole, tmp_path, monkeypatch, capsys):
    folder, work = tmp_path / "run", getattr(ddpm.cache, name)
    begin = [*QUICK, *FP32, "--out", folder, "--cache", tmp_path / "cache"]

    def interrupted(*arguments, **more):
        def progress(things, total, label):
            for thing in things:
                os.kill(os.getpid(), signal.SIGINT)
                yield thing

        return work(*arguments[:4], progress)

    with monkeypatch.context() as patch:
        patch.setattr(ddpm.cache, name, interrupted)
        assert run_train(*begin) == 130
    assert [line for line in capsys.readouterr().err.splitlines() if "stopped" in line][0].startswith(
        "stopped; "
    )
    assert leftovers(tmp_path) == []
    again = (
        ["--resume", folder, "--device", "cpu", "--cache", tmp_path / "cache"] if folder.exists() else begin
    )
    assert folder.exists() == (name == "encode_latents")
    assert run_train(*again) == 0
    assert_same_run(folder, whole)


def test_the_handlers_that_were_there_come_back(whole, begun):
    before = [signal.getsignal(s) for s in SIGNALS]
    begun(1)
    assert [signal.getsignal(s) for s in SIGNALS] == before


# --------------------------------------------------------------------------------------------- damaged states


def test_a_state_that_is_cut_or_has_a_flipped_bit_is_never_taken_for_another(tmp_path):
    path, rng = tmp_path / "state.pt", random.Random(0)
    state = {
        "format": 1,
        "stage": "vae",
        "step": 3,
        "elapsed": 1.5,
        "config": {"lr": 0.5},
        "vae": torch.randn(40),
    }
    expected = digest_of(state)
    save_state(path, {**state, "sha256": expected})
    data = path.read_bytes()
    flips = [data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :] for i in range(len(data))]
    cuts = [data[:length] for length in range(0, len(data), 7)]
    seen = 0
    for damaged in flips + cuts:
        path.write_bytes(damaged)
        try:
            read = read_state(path)
        except Damaged:
            seen += 1
        else:  # in what the zip format does not use
            assert digest_of(read) == expected
    assert seen > len(cuts) + len(data) // 3


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "gone"])
@pytest.mark.parametrize("steps, before", [(5, "vae step 4"), (9, "unet step 2")])
def test_a_damaged_state_is_told_and_the_one_before_it_used(kind, steps, before, begun, whole, capsys):
    folder = begun(steps)
    path = folder / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"cut": data[: len(data) // 3], "flipped": bytes(data), "empty": b"", "gone": b""}[kind])
    if kind == "gone":  # killed between the two renamings
        path.unlink()
    capsys.readouterr()
    assert resume(folder, whole) == 0
    warned = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("warning: ") and "state" in line
    ]
    assert len(warned) == (kind != "gone")
    assert kind == "gone" or ("state.pt is damaged" in warned[0] and before in warned[0])
    assert_same_run(folder, whole)


def test_a_damaged_state_does_not_push_out_the_whole_one_before_it(begun, whole, monkeypatch):
    folder = begun(5)
    (folder / "state.pt").write_bytes(b"damaged")
    before = (folder / "state.previous.pt").read_bytes()
    assert resume(folder, whole, "--stop-after", 1) == 0
    assert (folder / "state.previous.pt").read_bytes() == before
    assert read_state(folder / "state.pt")["step"] == 5


def test_two_damaged_states_are_refused_in_one_line(begun, whole, capsys):
    folder = begun(5)
    for name in STATES:
        (folder / name).write_bytes(b"damaged")
    assert resume(folder, whole) == 2
    told = one_error(capsys)
    assert "state.pt" in told and "state.previous.pt" in told and "--out" in told


@pytest.mark.parametrize("change", ["cut", "another's"])
@pytest.mark.parametrize("steps", [6, 8])  # at the border, where the checkpoint is the VAE's, and beyond
def test_a_damaged_vae_is_written_again_from_the_checkpoint(change, steps, begun, whole, tmp_path, capsys):
    folder = begun(steps)
    path = folder / "vae.safetensors"
    if not path.exists():  # stopped at the VAE's last step: the next command encodes and writes it
        assert resume(folder, whole, "--stage", "vae") == 0
        assert path.exists()
    data = bytearray(path.read_bytes())
    if change == "cut":
        path.write_bytes(data[:-100])
    elif steps == 8:
        from ddpm.model import TextToImage

        other = TextToImage(Config.read(folder / "config.json").model)
        other.save_vae(folder)
    else:
        data[-100] ^= 1
        path.write_bytes(data)
    assert resume(folder, whole) == 0
    assert "vae.safetensors" in capsys.readouterr().err
    assert_same_run(folder, whole)


def test_a_first_stage_that_goes_on_beyond_its_bound_is_not_taken_for_done(whole, tmp_path):
    folder = tmp_path / "run"
    assert start(folder, whole, "--stage", "vae", "--max-steps", 3) == 0
    assert resume(folder, whole, "--stage", "vae", "--max-steps", 6, "--stop-after", 1) == 0
    assert resume(folder, whole, "--stop-after", 1) == 0
    assert (read_state(folder / "state.pt")["stage"], read_state(folder / "state.pt")["step"]) == ("vae", 5)
    assert resume(folder, whole) == 0
    assert [step for stage, step, *_ in metrics(folder) if stage == "vae"] == [*"123456"]


def test_a_first_stage_cannot_go_on_once_the_second_has_begun(begun, whole, capsys):
    folder = begun(8)
    before = (folder / "config.json").read_bytes()
    assert resume(folder, whole, "--stage", "vae", "--vae-steps", 9) == 2
    assert "the second has begun" in one_error(capsys)
    assert (folder / "config.json").read_bytes() == before


def test_a_state_that_may_not_be_read_is_not_called_damaged(begun, whole, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    folder = begun(5)
    monkeypatch.setattr(ddpm.training.run, "check_not_packed", refuse)
    assert resume(folder, whole) == 2
    told = one_error(capsys)
    assert "Permission denied" in told and "damaged" not in told


def test_weights_that_the_loss_cannot_get_are_told_before_there_is_a_folder(
    tmp_path, whole, monkeypatch, capsys
):
    def refuse(device):
        raise UserError("could not get VGG16's weights")

    monkeypatch.setattr(ddpm.training, "perceptual_loss", refuse)
    assert start(tmp_path / "run", whole, "--perceptual-weight", 0.1) == 2
    assert "VGG16" in one_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_new_run_does_not_take_the_text_tower_that_a_killed_one_left(tmp_path, whole):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "text.safetensors").write_bytes(b"of another tower")
    assert start(folder, whole, "--stop-after", 1) == 0


def test_a_state_of_a_newer_version_says_so(begun, whole, capsys):
    folder = begun(5)
    state = {"format": ddpm.training.run.FORMAT + 1, "levels": []}
    torch.save({**state, "sha256": digest_of(state)}, folder / "state.pt")
    assert resume(folder, whole) == 2
    assert "a newer version of ddpm made it" in one_error(capsys)


def test_a_state_without_a_checksum_is_an_older_versions(begun, whole, capsys):
    folder = begun(5)
    torch.save({"stage": "vae", "step": 5}, folder / "state.pt")
    assert resume(folder, whole) == 2
    assert "an older version of ddpm made it" in one_error(capsys)


def test_a_state_of_another_configuration_names_the_fields_that_differ(begun, whole, capsys):
    folder = begun(5)
    values = json.loads((folder / "config.json").read_text())
    values["model"]["channels"], values["training"]["lr"] = [32, 64], 0.5
    (folder / "config.json").write_text(json.dumps(values))
    assert resume(folder, whole) == 2
    told = one_error(capsys)
    assert "channels (config.json (32, 64), state (32, 32))" in told and "lr (config.json 0.5" in told
    assert "max_minutes" not in told and "seed" not in told


@pytest.mark.parametrize("key", ["network", "optimizers", "step"])
def test_a_whole_state_that_does_not_fit_is_refused_in_one_line(key, begun, whole, capsys):
    folder = begun(5)
    state = read_state(folder / "state.pt")
    state["vae"][key] = {}
    if key == "step":
        del state["vae"][key]
    state["sha256"] = digest_of(state)
    torch.save(state, folder / "state.pt")
    assert resume(folder, whole) == 2
    assert "expected the state of this configuration" in one_error(capsys)


def test_metrics_that_are_damaged_do_not_stop_a_run(begun, whole):
    folder = begun(5)
    path = folder / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b"vae,2,", b"vae,two\0,")[:-20] + b"\xff\xfe,,nan\n")
    assert resume(folder, whole) == 0
    with open(path, newline="") as file:
        steps = [(row["stage"], int(row["step"])) for row in csv.DictReader(file)]
    assert len(set(steps)) == len(steps) and steps[-1] == ("unet", 6)


# ------------------------------------------------------------------------------------------------------- locks


def test_a_second_training_in_the_folder_is_refused_in_one_line(begun, whole, capsys):
    folder = begun(5)
    with Run(folder, Config.read(folder / "config.json"), True, 0.0) as run:
        if ddpm.tools.files.flock(run.lock) is None:
            pytest.skip("no locks here")
        assert resume(folder, whole) == 2
        told = one_error(capsys)
        assert f"process {os.getpid()}" in told and "is training" in told
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


def test_of_two_that_make_one_folder_the_second_is_refused(tmp_path):
    config = Config.from_preset("tiny")
    with (
        Run(tmp_path / "run", config, False, 0.0) as first,
        Run(tmp_path / "run", config, False, 0.0) as second,
    ):
        first.create()
        assert "is there already" in refusal_of(second.create) or ddpm.tools.files.fcntl is None


def test_a_folder_in_which_nothing_but_the_lock_was_made_may_be_begun_again(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.json.1.01234567.tmp").write_bytes(b"{")
    assert start(folder, whole) == 0
    assert_same_run(folder, whole)


# ----------------------------------------------------------------------------------------- disks that are full


@pytest.mark.parametrize(
    "name, number",
    [
        ("state.pt", errno.ENOSPC),
        ("state.pt", errno.EROFS),
        ("metrics.csv", errno.EDQUOT),
        ("unet.safetensors", errno.EFBIG),
        ("step_000004.png", errno.EACCES),
    ],
)
def test_a_file_that_cannot_be_written_leaves_the_checkpoint_and_says_how_to_go_on(
    name, number, begun, whole, monkeypatch, capsys
):
    folder = begun(7)
    before = {n: (folder / n).read_bytes() for n in STATES}
    replace = os.replace

    def fail(source, target):
        if str(target).endswith(name):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(ddpm.tools.files.os, "replace", fail)
        assert resume(folder, whole) == 2
    told = one_error(capsys)
    assert (
        name in told and os.strerror(number) in told and f"--resume {folder}" in told and "is saved" in told
    )
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert re.search(r"needs [0-9.,]+ MB, [0-9.,]+ MB are free", told)
    assert leftovers(folder) == []
    saved = [read_state(folder / n) for n in STATES if (folder / n).exists()]
    assert saved and (name != "metrics.csv" or {n: (folder / n).read_bytes() for n in STATES} == before)
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


def test_a_disk_that_fills_in_a_checkpoint_is_told_and_the_run_goes_on_when_there_is_room(
    whole, tmp_path, capsys
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small disk, and not in every container")
    try:
        folder = disk / "run"
        assert start(folder, whole, "--stop-after", 8) == 0
        before = {name: (folder / name).read_bytes() for name in STATES}
        with open(disk / "filler", "wb") as filler:
            filler.write(bytes(shutil.disk_usage(disk).free - 300_000))
        capsys.readouterr()
        assert resume(folder, whole) == 2
        told = one_error(capsys)
        assert os.strerror(errno.ENOSPC) in told and "unet step 2 is saved" in told
        needed, free = (
            float(x) for x in re.search(r"needs ([0-9.]+) MB, ([0-9.]+) MB are free", told).groups()
        )
        assert needed > 1 > free > 0.1
        assert {name: (folder / name).read_bytes() for name in STATES} == before
        (disk / "filler").unlink()
        assert resume(folder, whole) == 0
        assert_same_run(folder, whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_limit_on_the_size_of_files_stops_a_run_at_its_checkpoint(begun, whole, capsys):
    folder = begun(7)
    before = {name: (folder / name).read_bytes() for name in STATES}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "state.pt").stat().st_size // 2, limits[1]))
    try:
        assert resume(folder, whole, "--sample-every", 100) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = one_error(capsys)
    assert "state.pt" in told and os.strerror(errno.EFBIG) in told and "unet step 1 is saved" in told
    assert {name: (folder / name).read_bytes() for name in STATES} == before
    assert leftovers(folder) == []


# --------------------------------------------------------------------------------------- steps that are not finite


def broken_loss(monkeypatch, name: str, steps: range):
    r"""Have the loss `name` of ddpm.training be NaN in these calls, from 1."""
    count, loss = [0], getattr(ddpm.training, name)

    def broken(*arguments, **more):
        count[0] += 1
        result = loss(*arguments, **more)
        factor = float("nan") if count[0] in steps else 1.0
        return (result[0], result[1] * factor) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(ddpm.training, name, broken)


def test_a_step_that_is_not_finite_is_skipped_and_told_with_its_pictures_and_times(
    whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    broken_loss(monkeypatch, "diffusion_loss", range(2, 2 + BAD_STEPS - 1))
    seen, rows_of = [], ddpm.training.batch_rows
    monkeypatch.setattr(ddpm.training, "batch_rows", lambda *a: seen.append(rows_of(*a)) or seen[-1])
    assert start(folder, whole) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == BAD_STEPS - 1
    told = re.fullmatch(r"skipped unet step 2: loss nan, .*; pictures ([\d ]+); t ([\d ]+)", skipped[0])
    assert told[1].split() == [str(i) for i in seen[7][0]]  # six batches of the VAE came before
    times = [int(t) for t in told[2].split()]
    assert len(times) == 8 and all(0 <= t < 1000 for t in times)
    assert [row[:2] for row in metrics(folder)] == [row[:2] for row in metrics(whole)]
    assert [row[2] for row in metrics(folder)][6:] == [
        metrics(whole)[6][2],
        *["nan"] * 4,
        metrics(folder)[-1][2],
    ]


def test_files_are_told_by_their_names(tmp_path, monkeypatch, capsys):
    write_celeba(tmp_path / "celeba", 60, seed=1)
    broken_loss(monkeypatch, "vae_loss", range(1, 2))
    assert (
        run_train(
            *QUICK, *FP32, "--data", tmp_path / "celeba", "--out", tmp_path / "runs" / "x", "--stage", "vae"
        )
        == 0
    )
    told = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped vae step 1")
    )
    assert len(re.findall(r"\d{6}\.jpg", told)) == 8 and "; t " not in told


@pytest.mark.parametrize("loss, stage, first", [("vae_loss", "vae", 1), ("diffusion_loss", "unet", 2)])
def test_several_such_steps_in_a_row_stop_the_run_saved_with_advice(
    loss, stage, first, whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_loss(patch, loss, range(first, 1000))
        assert start(folder, whole, "--max-steps", 30) == 2
    told = one_error(capsys)
    last = first + BAD_STEPS - 1
    assert (
        f"not finite for {BAD_STEPS} steps" in told
        and "--precision fp32" in told
        and f"--resume {folder}" in told
    )
    state = read_state(folder / "state.pt")
    assert (state["stage"], state["step"]) == (stage, last)
    assert [row[1] for row in metrics(folder) if row[0] == stage] == [str(n + 1) for n in range(last)]
    for name, tensor in state[stage]["network"].items():
        assert torch.isfinite(tensor).all(), name
    assert (
        resume(folder, whole, "--max-steps", last + 1, "--precision", "bf16") == 0
    )  # another precision may be tried
    assert np.isfinite(float(metrics(folder)[-1][2]))
