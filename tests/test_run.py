r"""Runs that are stopped, damaged, locked, out of disk or not finite: none is lost, and each ends in the same bits."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import refusal_of
from safetensors.torch import load_file
from small_runs import (
    FP32,
    QUICK,
    PlainTower,
    assert_same_run,
    leftovers,
    make_runs_cheap,
    metrics,
    run_train,
)

from ddpm.celeba import dataset
from ddpm.celeba.dataset import pictures_in_memory
from ddpm.celeba.faces import write_celeba
from ddpm.celeba.lists import VALID
from ddpm.config import Config
from ddpm.evaluation import __main__ as evaluation
from ddpm.model import TextToImage
from ddpm.tools import files, text_weights
from ddpm.tools.arrays import Records
from ddpm.tools.files import digest_of
from ddpm.training import loops, run_folder, stages
from ddpm.training.optimization import BAD_STEPS, Optimization
from ddpm.training.run_folder import Damaged, Run, read_state, save_state, trained_on
from ddpm.training.session import train
from ddpm.training.stages import UnetStage

STATES = ("state.pt", "state.previous.pt")


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


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


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    r"""A function: such a run stopped after so many steps of both stages, 1 to 12; each is made once."""
    made = {}

    def stop(steps: int):
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("stopped") / "run"
            assert start(made[steps], whole, "--stop-after", steps) == 0
        return made[steps]

    return stop


@pytest.fixture
def begun(stopped, tmp_path):
    r"""A function: a copy of the run that was stopped after so many steps."""
    return lambda steps: shutil.copytree(stopped(steps), tmp_path / "run")


def start(folder, whole, *more) -> int:
    return run_train(*QUICK, *FP32, "--out", folder, "--cache", whole.parent / "cache", *more)


def resume(folder, whole, *more) -> int:
    return run_train("--resume", folder, "--device", "cpu", "--cache", whole.parent / "cache", *more)


def one_error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def bytes_of_states(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in STATES}


def at_step(monkeypatch, number: int, action):
    r"""Have `action` called within step `number` of the command, both stages counted."""
    count, end_step = [0], Optimization.end_step

    def counted(self, *arguments):
        count[0] += 1
        if count[0] == number:
            action()
        return end_step(self, *arguments)

    monkeypatch.setattr(Optimization, "end_step", counted)


# ------------------------------------------------------------------------------------- interrupted equals whole

VARIANTS = {
    "fp32": [*FP32],
    "bf16": ["--precision", "bf16"],
    "muon": [*FP32, "--muon-lr", 0.01],
    "in parts": [*FP32, "--accumulation", 4],
    "epochs of two steps": [*FP32, "--batch-size", 16, "--vae-batch-size", 16, "--caption-variants", 3],
}


@pytest.mark.parametrize("variant", ["fp32", *map(slow, [*VARIANTS][1:])])
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


@pytest.mark.slow
def test_the_caches_may_be_lost_between_two_parts(begun, whole, tmp_path):
    folder = begun(8)
    assert run_train("--resume", folder, "--device", "cpu", "--cache", tmp_path / "fresh") == 0
    assert_same_run(folder, whole)


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "step, signum",  # 4 is due for validation, 12 the last
    [(4, signal.SIGTERM), slow(3, signal.SIGINT), slow(9, signal.SIGHUP), slow(12, signal.SIGINT)],
)
def test_a_signal_ends_a_run_after_the_step_saved(signum, step, whole, tmp_path, monkeypatch, capsys):
    r"""Sent twice, as where torchrun passes on what the whole group got."""
    folder = tmp_path / "run"
    if signal.getsignal(signum) is signal.SIG_IGN:
        pytest.skip("this process was started with the signal ignored, as under nohup")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: [os.kill(os.getpid(), signum) for _ in range(2)])
        assert start(folder, whole) == 128 + signum
    place = ("vae", step) if step <= 6 else ("unet", step - 6)
    last_line = [line for line in capsys.readouterr().err.splitlines() if line][-1]
    assert f"stopped at {place[0]} step {place[1]}" in last_line
    assert last_line.endswith(f"--resume {folder} --cache {whole.parent / 'cache'} --device cpu")
    state = read_state(folder / "state.pt")
    assert (state["stage"], state["step"]) == place
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_signal_within_a_validation_gives_it_up_and_the_resumed_run_does_it(whole, tmp_path, monkeypatch):
    folder, draw = tmp_path / "run", UnetStage.draw_samples

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(UnetStage, "draw_samples", interrupted)
        assert start(folder, whole) == 143
    assert not list((folder / "samples").iterdir()) and metrics(folder)[-1][-1] == ""
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)
    assert len(list((folder / "samples").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [(dataset, "drawn_pictures"), (stages, "measure_latent_scale")])
def test_a_signal_between_the_trainings_ends_at_once_in_one_line(module, name, whole, tmp_path, capsys):
    folder, work = tmp_path / "run", getattr(module, name)
    begin = [*QUICK, *FP32, "--out", folder, "--cache", tmp_path / "cache"]

    def interrupted(*arguments, **more):
        def progress(things, total, label):
            for thing in things:
                os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored in the background of a shell
                yield thing

        return work(*arguments[:-1], progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert run_train(*begin) == 143
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert line.startswith("stopped; ") and leftovers(tmp_path) == []
    assert folder.exists() == (name == "measure_latent_scale")
    again = ["--resume", folder, "--device", "cpu", "--cache", tmp_path / "cache"]
    assert run_train(*(again if folder.exists() else begin)) == 0
    assert_same_run(folder, whole)


def test_a_loop_in_python_that_ends_early_leaves_a_run_that_goes_on(whole, tmp_path):
    config = Config.read(whole / "config.json")
    given = {"folder": tmp_path / "run", "cache": whole.parent / "cache", "device": "cpu"}
    taken = []
    for stage, report in train(config, **given):
        taken.append((stage, report.step))
        if taken[-1] == ("unet", 3):
            break
    assert taken == [("vae", step) for step in range(1, 7)] + [("unet", step) for step in range(1, 4)]
    assert [report.step for _, report in train(config, **given, resume=True)] == [4, 5, 6]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("losses, warned", [([0.5, 0.4, 0.407], False), ([0.5, 0.4, 0.409], True)])
def test_a_validation_loss_that_rises_is_told_as_overfitting(
    losses, warned, whole, tmp_path, monkeypatch, capsys
):
    told = iter(losses)
    monkeypatch.setattr(stages, "loss_by_timestep", lambda *_, **__: [next(told)])
    assert start(tmp_path / "run", whole, "--sample-every", 2) == 0
    assert ("was 0.4000 at step 4; the UNet begins to learn" in capsys.readouterr().out) == warned


def test_minutes_end_both_stages_and_go_on_after_a_resume(whole, tmp_path, monkeypatch):
    now, stages_of_steps = [0.0], []
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bounds = {"max_minutes": 1.0, "vae_share": 0.4, "vae_steps": 10**6, "unet_steps": 10**6}
    config = Config.read(whole / "config.json").changed(**bounds)
    for begun in (0.0, 1000.0):  # two processes, each with a clock of its own
        now[0] = begun
        resume = begun > 0
        for stage, _ in train(config, tmp_path / "run", resume, device="cpu", started=begun):
            now[0] += 4.0
            stages_of_steps.append(stage)
            if not resume and len(stages_of_steps) == 3:
                break
    assert (
        stages_of_steps == ["vae"] * 6 + ["unet"] * 7
    )  # until 24 seconds, and until 50: ten are left to draw


def test_pictures_may_come_from_memory(whole, tmp_path):
    config = Config.read(whole / "config.json").changed(vae_steps=1, unet_steps=1)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    captions = [f"number {i}" for i in range(20)]
    pictures = pictures_in_memory(pixels, captions)
    assert len(list(train(config, str(tmp_path / "run"), device="cpu", pictures=pictures))) == 2
    assert (tmp_path / "run" / "words.txt").read_text().split() == sorted(
        {"number", *map(str, range(20))} - {"9", "19"}
    )
    assert TextToImage.load(tmp_path / "run").sample(["number 3"], steps=1).shape == (1, 3, 16, 16)
    resumed = train(config, tmp_path / "run", resume=True, device="cpu")  # on drawn faces
    assert "which a program gave" in refusal_of(next, resumed)
    assert "which a program gave" in refusal_of(evaluation.main, [str(tmp_path / "run"), "--device", "cpu"])
    assert "got (32, 32, 3)" in refusal_of(
        lambda: next(
            train(
                config,
                tmp_path / "other",
                device="cpu",
                pictures=pictures_in_memory(np.zeros((20, 32, 32, 3), np.uint8), captions),
            )
        )
    )
    assert "one a picture, got 19" in refusal_of(pictures_in_memory, pixels, captions[1:])
    assert "of float64" in refusal_of(pictures_in_memory, pixels / 255, captions)
    assert "expected captions as texts, got 0" in refusal_of(pictures_in_memory, pixels, range(20))


def test_the_held_out_pictures_are_spread_over_those_that_are_sorted_by_class():
    pictures = pictures_in_memory(np.zeros((100, 16, 16, 3), np.uint8), ["cat"] * 50 + ["dog"] * 50)
    assert pictures.held_out(3).tolist() == [9, 49, 99]
    assert pictures.held_out(64).tolist() == pictures.rows(VALID).tolist() == list(range(9, 100, 10))


# --------------------------------------------------------------------------------------------- damaged states


@pytest.mark.slow
def test_a_state_that_is_cut_or_has_a_flipped_bit_is_never_taken_for_another(tmp_path):
    path, rng = tmp_path / "state.pt", random.Random(0)
    state = {"format": 1, "stage": "vae", "step": 3, "elapsed": 1.5, "config": {"lr": 0.5}}
    state["vae"] = torch.randn(40)
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


@pytest.mark.parametrize(
    "steps, before, kind",
    [
        (9, "unet step 2", "flipped"),
        *[slow(9, "unet step 2", kind) for kind in ("cut", "empty", "gone")],
        *[slow(5, "vae step 4", kind) for kind in ("flipped", "cut", "empty", "gone")],
    ],
)
def test_a_damaged_state_is_told_and_the_one_before_it_used(kind, steps, before, begun, whole, capsys):
    folder = begun(steps)
    path = folder / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"cut": data[: len(data) // 3], "flipped": bytes(data)}.get(kind, b""))
    if kind == "gone":  # killed between the two renamings
        path.unlink()
    capsys.readouterr()
    assert resume(folder, whole) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if line.startswith("warning: ") and "state" in line]
    assert len(warned) == (kind != "gone")
    assert kind == "gone" or ("state.pt is damaged" in warned[0] and before in warned[0])
    assert_same_run(folder, whole)


def test_the_weights_are_those_of_the_checkpoint_and_its_average(whole):
    state = read_state(whole / "state.pt")["unet"]
    last, average = (load_file(whole / f"{name}.safetensors") for name in ("unet", "ema"))
    assert all(torch.equal(last[name], tensor) for name, tensor in state["network"].items())
    assert all(torch.equal(average[name], tensor) for name, tensor in state["ema"].items())
    assert last.keys() == average.keys() and not torch.equal(
        last["conv_in.weight"], average["conv_in.weight"]
    )
    assert trained_on(whole) == read_state(whole / "state.pt")["data"] != trained_on(whole / "samples") == {}


def test_a_text_tower_that_was_downloaded_is_kept_in_the_run(whole, tmp_path, monkeypatch):
    folder, tower = tmp_path / "run", PlainTower()
    monkeypatch.setattr(text_weights, "save_tower", lambda text, path: path.write_bytes(b"a tower"))
    monkeypatch.setattr(text_weights, "tower_from_file", lambda path: tower)
    with monkeypatch.context() as patch:
        patch.setattr(text_weights, "tower_from_tag", lambda tag: tower)
        assert start(folder, whole, "--text-weights", "laion2b_s34b_b79k", "--stop-after", 8) == 0
    assert (folder / "text.safetensors").read_bytes() == b"a tower"
    monkeypatch.setattr(text_weights, "download_pretrained", None)  # from here on there is no network
    assert resume(folder, whole) == 0
    assert TextToImage.load(folder).text is tower


def test_a_smaller_card_may_take_a_run_over(begun, whole):
    folder = begun(8)
    assert resume(folder, whole, "--accumulation", 2, "--gradient-checkpointing") == 0
    training = json.loads((folder / "config.json").read_text())["training"]
    assert (training["accumulation"], training["gradient_checkpointing"]) == (2, True)
    expected, losses = ([float(row[2]) for row in metrics(run)] for run in (whole, folder))
    assert losses == pytest.approx(expected, rel=1e-4)  # other sums, in fp32


def test_a_validation_finds_its_step_saved_and_the_checkpoint_before_stays(whole, tmp_path, monkeypatch):
    r"""The UNet validates at the steps 2, 4 and 6, of which --save-every names the last alone."""
    seen = []

    def validate(self, figures=UnetStage.validate):
        seen.extend(read_state(self.run.folder / name)["step"] for name in STATES)
        return figures(self)

    monkeypatch.setattr(UnetStage, "validate", validate)
    assert start(tmp_path / "run", whole, "--save-every", 3, "--sample-every", 2) == 0
    assert seen == [2, 6, 4, 3, 6, 4]
    assert [read_state(tmp_path / "run" / name)["step"] for name in STATES] == [6, 4]


def test_a_damaged_state_does_not_push_out_the_whole_one_before_it(begun, whole):
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
    error = one_error(capsys)
    assert "state.pt" in error and "state.previous.pt" in error and "--out" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps, change",  # 6 is at the border, where the checkpoint is the VAE's; 8 is beyond
    [(6, "cut"), (6, "flipped"), (8, "cut"), (8, "another's")],
)
def test_a_damaged_vae_is_written_again_from_the_checkpoint(change, steps, begun, whole, capsys):
    folder = begun(steps)
    path = folder / "vae.safetensors"
    if not path.exists():  # stopped at the VAE's last step: the next command encodes and writes it
        assert resume(folder, whole, "--stage", "vae") == 0
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data[:-100] if change == "cut" else data)
    if change == "another's":
        TextToImage(Config.read(folder / "config.json").model).save_vae(folder)
    assert resume(folder, whole) == 0
    assert "vae.safetensors" in capsys.readouterr().err
    assert_same_run(folder, whole)


@pytest.mark.slow
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
    assert resume(folder, whole, "--vae-steps", 9) == 2
    assert "expected no --vae-steps, because the VAE of" in one_error(capsys)
    assert resume(folder, whole, "--stage", "vae", "--vae-steps", 9) == 2
    assert "the second has begun" in one_error(capsys)
    assert (folder / "config.json").read_bytes() == before


def test_a_state_that_may_not_be_read_is_not_called_damaged(begun, whole, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    folder = begun(5)
    monkeypatch.setattr(run_folder, "check_not_packed", refuse)
    assert resume(folder, whole) == 2
    error = one_error(capsys)
    assert "Permission denied" in error and "damaged" not in error


def test_weights_that_the_loss_cannot_get_are_told_before_there_is_a_folder(
    tmp_path, whole, monkeypatch, capsys
):
    def refuse(weights):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "vgg16", refuse)
    assert start(tmp_path / "run", whole, "--perceptual-weight", 0.1) == 2
    error = one_error(capsys)
    assert "VGG16" in error and "no route to host" in error and "--perceptual-weight" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_a_killed_command_made_no_run_may_be_begun_again(tmp_path, whole):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.json.1.01234567.tmp").write_bytes(b"{")
    (folder / "text.safetensors").write_bytes(b"of another tower")
    assert start(folder, whole, "--stop-after", 1) == 0
    assert leftovers(folder) == [] and not (folder / "text.safetensors").exists()


def test_a_state_of_a_newer_version_says_so(begun, whole, capsys):
    folder = begun(5)
    state = {"format": run_folder.FORMAT + 1, "levels": []}
    torch.save({**state, "sha256": digest_of(state)}, folder / "state.pt")
    assert resume(folder, whole) == 2
    assert "a newer version of ddpm made it" in one_error(capsys)


def test_a_state_of_another_configuration_names_the_fields_that_differ(begun, whole, capsys):
    folder = begun(5)
    values = json.loads((folder / "config.json").read_text())
    values["model"]["channels"], values["training"]["lr"] = [32, 64], 0.5
    (folder / "config.json").write_text(json.dumps(values))
    assert resume(folder, whole) == 2
    error = one_error(capsys)
    assert "channels (config.json (32, 64), state (32, 32))" in error and "lr (config.json 0.5" in error
    assert "max_minutes" not in error and "seed" not in error


@pytest.mark.parametrize("key", ["network", slow("optimizers"), slow("step")])
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


def test_metrics_that_are_damaged_are_kept_and_do_not_stop_a_run(begun, whole, capsys):
    folder = begun(5)
    path = folder / "metrics.csv"
    damaged = path.read_bytes().replace(b"vae,2,", b"vae,two\0,")[:-20] + b"\xff\xfe,,nan\n"
    (folder / "metrics.kept.1.csv").write_bytes(b"kept before")
    path.write_bytes(damaged)
    assert resume(folder, whole, "--stop-after", 1) == 0
    assert f"kept as {folder / 'metrics.kept.2.csv'}" in capsys.readouterr().err
    assert (folder / "metrics.kept.1.csv").read_bytes() == b"kept before"
    assert (folder / "metrics.kept.2.csv").read_bytes() == damaged
    steps = [row[:2] for row in metrics(folder)]
    assert len(set(steps)) == len(steps) and steps[-1] == ("vae", "6")


def test_metrics_that_a_spreadsheet_saved_keep_their_history(begun, whole):
    folder = begun(8)
    path = folder / "metrics.csv"
    saved_again = path.read_text().replace(",", ";").replace(".", ",")
    path.write_text(saved_again, encoding="utf-8-sig")
    assert resume(folder, whole) == 0
    assert metrics(folder) == metrics(whole)


# ------------------------------------------------------------------------------------------------ what changed


def test_weights_without_a_checkpoint_are_not_trained_over(begun, whole, capsys):
    folder = begun(11)
    for name in STATES:
        (folder / name).unlink()
    before = (folder / "ema.safetensors").read_bytes()
    assert resume(folder, whole) == 2
    assert "expected a checkpoint state.pt" in one_error(capsys)
    assert (folder / "ema.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "name, saved",
    [("samples", "unet step 4"), slow("loss.png", "unet step 2"), slow("metrics.csv", "unet step 1")],
)
def test_a_file_in_a_folders_place_or_a_folder_in_a_files_stops_the_run_saved(
    name, saved, begun, whole, monkeypatch, capsys
):
    folder = begun(7)
    path = folder / name
    aside = folder.parent / name

    def replace():
        was_folder = path.is_dir()
        path.rename(aside)
        path.touch() if was_folder else path.mkdir()

    with monkeypatch.context() as patch:
        at_step(patch, 1, replace)
        assert resume(folder, whole) == 2
    error = one_error(capsys)
    assert "see that its folder is there" in error and f"{saved} is saved" in error
    path.unlink() if path.is_file() else path.rmdir()
    aside.rename(path)
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_data_may_move_and_what_changed_in_it_is_named(tmp_path, capsys):
    data = tmp_path / "celeba"
    write_celeba(data, 60, seed=1)
    folder = tmp_path / "run"
    flags = ["--max-steps", 2, "--stage", "vae", "--out", folder]
    assert run_train(*QUICK, *FP32, "--data", data, *flags, "--stop-after", 1) == 0
    data.rename(tmp_path / "moved")
    renamed = tmp_path / "moved" / ".." / "moved"
    again = ["--resume", folder, "--device", "cpu", "--stop-after", 1]
    assert run_train(*again) == 2
    assert "with --data" in one_error(capsys)
    assert run_train(*again, "--data", tmp_path / "moved") == 0
    assert "changed" not in capsys.readouterr().err
    attributes = tmp_path / "moved" / "list_attr_celeba.txt"
    attributes.write_text(attributes.read_text().replace(" -1", "  1", 1))
    assert run_train(*again, "--data", renamed) == 0
    assert "warning: the captions of" in capsys.readouterr().err
    write_celeba(tmp_path / "other", 60, seed=2)
    assert run_train(*again, "--data", tmp_path / "other") == 2
    assert "expected the pictures of the run" in one_error(capsys)


# ------------------------------------------------------------------------------------------------------- locks


def test_a_second_training_in_the_folder_is_refused_in_one_line(begun, whole, capsys):
    folder = begun(5)
    with Run(folder, Config.read(folder / "config.json"), True, 0.0) as run:
        if files.flock(run.lock) is None:
            pytest.skip("no locks here")
        assert resume(folder, whole) == 2
        error = one_error(capsys)
        assert f"process {os.getpid()}" in error and "is training" in error
    assert resume(folder, whole, "--stop-after", 1) == 0


def test_a_lock_or_a_cache_that_is_a_link_is_refused_and_what_it_names_is_left(
    begun, whole, tmp_path, capsys
):
    r"""Both are written to, and a run folder with its cache may be a stranger's."""
    folder = begun(5)
    mine = tmp_path / "mine"
    mine.write_text("text")
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(mine)
    assert resume(folder, whole) == 2
    assert f"could not write to {folder}" in one_error(capsys)
    (tmp_path / "records.bin").symlink_to(mine)
    refusal = refusal_of(Records, tmp_path / "records.bin", (1,), np.float16, lambda i: [i], None)
    assert "could not open" in refusal and mine.read_text() == "text"


@pytest.mark.skipif(files.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("another", ["none", "is training in", "has trained in"])
def test_a_lock_that_is_removed_is_taken_again_unless_another_has_it(
    another, begun, whole, monkeypatch, capsys
):
    folder = begun(5)
    before = bytes_of_states(folder)
    with open(folder.parent / "lock", "a+b") as held:
        assert files.flock(held)

        def remove():
            (folder / ".lock").unlink()
            if another == "is training in":
                (folder.parent / "lock").rename(folder / ".lock")
            if another == "has trained in":
                files.write_atomically(folder / "state.pt", before["state.pt"])

        at_step(monkeypatch, 1, remove)
        assert resume(folder, whole, "--stop-after", 2) == (0 if another == "none" else 2)
    assert another == "none" or another in one_error(capsys)
    assert (bytes_of_states(folder) == before) == (another != "none")


def test_of_two_that_make_one_folder_the_second_is_refused(tmp_path):
    config = Config.from_preset("tiny")
    with (
        Run(tmp_path / "run", config, False, 0.0) as first,
        Run(tmp_path / "run", config, False, 0.0) as second,
    ):
        first.create()
        assert "is there already" in refusal_of(second.create) or files.fcntl is None


# ----------------------------------------------------------------------------------------- disks that are full


@pytest.mark.parametrize(
    "name, number",
    [
        ("state.pt", errno.ENOSPC),
        slow("state.pt", errno.EROFS),
        slow("metrics.csv", errno.EDQUOT),
        slow("unet.safetensors", errno.EFBIG),
        slow("step_000004.png", errno.EACCES),
    ],
)
def test_a_file_that_cannot_be_written_leaves_the_checkpoint_and_says_how_to_go_on(
    name, number, begun, whole, monkeypatch, capsys
):
    folder = begun(7)
    before = bytes_of_states(folder)
    replace = os.replace

    def fail(source, target):
        if str(target).endswith(name):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        assert resume(folder, whole) == 2
    error = one_error(capsys)
    for part in (name, os.strerror(number), f"--resume {folder}", "is saved"):
        assert part in error
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert re.search(r"needs [0-9.,]+ MB, [0-9.,]+ MB are free", error)
    assert leftovers(folder) == []
    assert any(read_state(folder / n) for n in STATES if (folder / n).exists())
    assert name != "metrics.csv" or bytes_of_states(folder) == before
    assert resume(folder, whole) == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_disk_that_fills_in_a_checkpoint_is_told_and_the_run_goes_on_when_there_is_room(
    whole, tmp_path, capsys
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    try:
        folder = disk / "run"
        assert start(folder, whole, "--stop-after", 8) == 0
        before = bytes_of_states(folder)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
        capsys.readouterr()
        assert resume(folder, whole) == 2
        error = one_error(capsys)
        assert os.strerror(errno.ENOSPC) in error and "unet step 2 is saved" in error
        numbers = re.search(r"needs ([0-9.]+) MB, ([0-9.]+) MB are free", error).groups()
        needed, free = map(float, numbers)
        assert needed > 1 > free > 0.1
        assert bytes_of_states(folder) == before
        (disk / "filler").unlink()
        assert resume(folder, whole) == 0
        assert_same_run(folder, whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_limit_on_the_size_of_files_stops_a_run_at_its_checkpoint(begun, whole, capsys):
    folder = begun(7)
    before = bytes_of_states(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "state.pt").stat().st_size // 2, limits[1]))
    try:
        assert resume(folder, whole, "--sample-every", 100) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = one_error(capsys)
    assert "state.pt" in error and os.strerror(errno.EFBIG) in error and "unet step 1 is saved" in error
    assert bytes_of_states(folder) == before
    assert leftovers(folder) == []


# --------------------------------------------------------------------------------------- steps that are not finite


def broken_loss(monkeypatch, name: str, steps: range):
    r"""Have the loss `name` be NaN in these steps, from 1."""
    count, loss = [0], getattr(loops, name)

    def broken(*arguments, **more):
        count[0] += 1
        result = loss(*arguments, **more)
        factor = float("nan") if count[0] in steps else 1.0
        return (result[0], result[1] * factor) if isinstance(result, tuple) else result * factor

    monkeypatch.setattr(loops, name, broken)


def test_a_step_that_is_not_finite_is_skipped_and_told_with_its_pictures_and_times(
    whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    broken_loss(monkeypatch, "diffusion_loss", range(2, 2 + BAD_STEPS - 1))
    seen, batch_rows = [], loops.batch_rows
    monkeypatch.setattr(loops, "batch_rows", lambda *a: seen.append(batch_rows(*a)) or seen[-1])
    assert start(folder, whole) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == BAD_STEPS - 1
    parts = re.fullmatch(r"skipped unet step 2: loss nan, .*; pictures ([\d ]+); t ([\d ]+)", skipped[0])
    assert parts[1].split() == [str(i) for i in seen[7][0]]  # six batches of the VAE came before
    timesteps = [int(t) for t in parts[2].split()]
    assert len(timesteps) == 8 and all(0 <= t < 1000 for t in timesteps)
    assert [row[:2] for row in metrics(folder)] == [row[:2] for row in metrics(whole)]
    losses = [row[2] for row in metrics(folder)][6:]
    assert losses[0] == metrics(whole)[6][2] and losses[1:5] == ["nan"] * 4 and losses[5] != "nan"


def test_files_are_told_by_their_names(tmp_path, monkeypatch, capsys):
    write_celeba(tmp_path / "celeba", 60, seed=1)
    broken_loss(monkeypatch, "vae_loss", range(1, 2))
    data = ["--data", tmp_path / "celeba", "--stage", "vae", "--max-steps", 2]
    assert run_train(*QUICK, *FP32, *data, "--out", tmp_path / "runs" / "x") == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("skipped vae step 1"))
    assert len(re.findall(r"\d{6}\.jpg", line)) == 8 and "; t " not in line


@pytest.mark.slow
@pytest.mark.parametrize("loss, stage, first", [("vae_loss", "vae", 1), ("diffusion_loss", "unet", 2)])
def test_several_such_steps_in_a_row_stop_the_run_saved_with_advice(
    loss, stage, first, whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken_loss(patch, loss, range(first, 1000))
        assert start(folder, whole, "--max-steps", 30) == 2
    error = one_error(capsys)
    last = first + BAD_STEPS - 1
    for part in (f"not finite for {BAD_STEPS} steps", "--precision fp32", f"--resume {folder}"):
        assert part in error
    state = read_state(folder / "state.pt")
    assert (state["stage"], state["step"]) == (stage, last)
    assert [row[1] for row in metrics(folder) if row[0] == stage] == [str(n + 1) for n in range(last)]
    for name, tensor in state[stage]["network"].items():
        assert torch.isfinite(tensor).all(), name
    more = ("--max-steps", last + 1, "--precision", "bf16")  # another precision may be tried
    assert resume(folder, whole, *more) == 0
    assert np.isfinite(float(metrics(folder)[-1][2]))
