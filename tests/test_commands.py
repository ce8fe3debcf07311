import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from ddpm import diffusion, sampling
from ddpm.celeba.faces import write_celeba
from ddpm.config import PRESETS
from ddpm.evaluation import __main__ as evaluation
from ddpm.tools import command as cli
from ddpm.tools import text_weights

ROOT = Path(__file__).parents[1]
QUICK = [
    "--preset",
    "tiny",
    "--image-size",
    "16",
    "--channels",
    "32,32",
    "--drawn-images",
    "40",
    "--device",
    "cpu",
]
QUICK += ["--sample-every", "4", "--save-every", "2", "--warmup", "2", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def one_tower(tower, monkeypatch):
    monkeypatch.setattr(text_weights, "random_tower", (lambda: tower))


def run_train(*arguments) -> int:
    return cli.exit_code(train.main, [str(a) for a in arguments])


def run_sample(*arguments) -> int:
    return cli.exit_code(sample.main, [str(a) for a in arguments])


def losses(folder) -> list[tuple[str, str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["stage"], row["step"], row["loss"]) for row in csv.DictReader(file)]


def refused(capsys, call, *arguments) -> str:
    r"""The one line that `call` prints while it returns 2."""
    try:
        code = call(*arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tower):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_weights, "random_tower", (lambda: tower))
        assert run_train(*QUICK, "--max-steps", 6, "--out", folder) == 0
    return folder


def test_a_run_folder_holds_what_the_contract_says(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        "config.json",
        "vae.safetensors",
        "unet.safetensors",
        "ema.safetensors",
        "state.pt",
        "state.previous.pt",
        "metrics.csv",
        "loss.png",
        "samples",
        ".lock",
    }
    assert [p.name for p in sorted((trained / "samples").iterdir())] == ["step_000004.png", "step_000006.png"]


def test_a_learned_variance_is_trained_resumed_and_sampled_with(tmp_path, capsys):
    whole, sliced = tmp_path / "whole", tmp_path / "sliced"
    flags = [*QUICK, "--variance", "learned", "--vlb-weight", "0.01", "--max-steps", 4]
    assert run_train(*flags, "--out", whole) == 0
    assert run_train(*flags, "--out", sliced, "--stop-after", 6) == 0
    assert run_train("--resume", sliced) == 0
    ema = [load_file(folder / "ema.safetensors") for folder in (whole, sliced)]
    assert ema[0]["conv_out.weight"].shape[0] == 8
    assert ema[0]["conv_out.weight"][4:].abs().max() > 0
    assert all(torch.equal(ema[0][name], ema[1][name]) for name in ema[0])
    pictures = {}
    for variance in ([], ["--variance", "learned"], ["--variance", "beta"]):
        out = tmp_path / f"{len(pictures)}.png"
        assert (
            run_sample("a man", "--model", whole, "--sampler", "ddpm", "--steps", 5, "--out", out, *variance)
            == 0
        )
        pictures[tuple(variance)] = Image.open(out).tobytes()
    own, learned, beta = pictures.values()
    assert own == learned != beta


def test_a_variance_that_the_model_never_learned_is_refused(trained, tmp_path, capsys):
    error = refused(
        capsys,
        run_sample,
        "a man",
        "--model",
        trained,
        "--sampler",
        "ddpm",
        "--variance",
        "learned",
        "--out",
        tmp_path / "x.png",
    )
    assert "--variance posterior or beta" in error


def test_metrics_have_one_row_a_step_and_held_out_figures(trained):
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [(r["stage"], int(r["step"])) for r in rows if r["loss"]]
    assert steps == [(stage, n) for stage in ("vae", "unet") for n in range(1, 7)]
    assert [r["stage"] for r in rows if r["psnr"] and r["ssim"]] == ["vae", "vae"]
    assert [r["stage"] for r in rows if r["val_loss"]] == ["unet", "unet"]


@pytest.mark.parametrize("slices", [(3, 6), (6, 3)])
def test_a_run_in_slices_ends_with_the_weights_of_a_whole_run_bit_for_bit(slices, trained, tmp_path):
    folder = tmp_path / "sliced"
    assert run_train(*QUICK, "--max-steps", 6, "--out", folder, "--stop-after", slices[0]) == 0
    assert run_train("--resume", folder, "--stop-after", slices[1], "--device", "cpu") == 0
    assert run_train("--resume", folder, "--device", "cpu") == 0
    for name in ("vae", "unet", "ema"):
        whole, sliced = (load_file(f / f"{name}.safetensors") for f in (trained, folder))
        for key in whole:
            assert torch.equal(whole[key], sliced[key]), (name, key)
    assert losses(trained) == losses(folder)


def test_a_resumed_run_may_move_its_bound(tmp_path):
    folder = tmp_path / "run"
    assert run_train(*QUICK, "--max-steps", 2, "--out", folder) == 0
    assert run_train("--resume", folder, "--max-steps", 4, "--device", "cpu") == 0
    with open(folder / "metrics.csv", newline="") as file:
        rows = [(r["stage"], int(r["step"])) for r in csv.DictReader(file) if r["loss"]]
    assert rows == [("vae", 1), ("vae", 2), ("unet", 1), ("unet", 2), ("unet", 3), ("unet", 4)]


def test_the_stages_may_be_run_apart(tmp_path):
    folder = tmp_path / "run"
    assert run_train(*QUICK, "--max-steps", 2, "--stage", "vae", "--out", folder) == 0
    assert not (folder / "unet.safetensors").exists()
    assert run_train("--resume", folder, "--stage", "unet", "--device", "cpu") == 0
    assert (folder / "ema.safetensors").exists()


def test_photographs_in_celebas_layout_train(tmp_path):
    write_celeba(tmp_path / "celeba", 60, seed=1)
    out = tmp_path / "runs" / "photos"
    assert run_train(*QUICK, "--max-steps", 2, "--data", tmp_path / "celeba", "--out", out) == 0
    assert (out / "ema.safetensors").exists()


def test_images_with_captions_train(tmp_path):
    data = tmp_path / "mine"
    data.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 30), (i * 20, 90, 120)).save(data / f"{i}.png")
    (data / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{i}.png,a flat colour number {i}\n" for i in range(12))
    )
    assert run_train(*QUICK, "--max-steps", 2, "--data", data, "--out", tmp_path / "runs" / "mine") == 0


def test_a_grid_and_single_pictures_carry_prompt_seed_and_settings(trained, tmp_path):
    prompts = ["a bald man", ""]
    common = [*prompts, "--model", trained, "--steps", 2, "--seed", 5, "--num", 2, "--device", "cpu"]
    assert run_sample(*common, "--out", tmp_path / "grid.png") == 0
    with Image.open(tmp_path / "grid.png") as grid:
        text = grid.text
    assert json.loads(text["prompt"]) == ["a bald man", "a bald man", "", ""]
    assert (text["seed"], text["steps"], text["sampler"]) == ("5", "2", "dpm++")
    assert run_sample(*common, "--out", tmp_path / "single") == 0
    files = sorted((tmp_path / "single").iterdir())
    assert len(files) == 4
    with Image.open(files[0]) as picture:
        assert picture.size == (16, 16) and picture.text["prompt"] == "a bald man"


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_every_sampler_makes_a_picture_and_a_film(sampler, trained, tmp_path):
    film = tmp_path / ("film.gif" if sampler == "ddim" else "film.png")
    common = ["--model", trained, "--steps", 3, "--sampler", sampler, "--eta", 0.5, "--device", "cpu"]
    assert run_sample("a woman", *common, "--out", tmp_path / "s.png", "--film", film) == 0
    with Image.open(film) as picture:
        assert picture.size[0] == 3 * 64 if film.suffix == ".png" else picture.n_frames == 3


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_train(*QUICK, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert all(told in printed for told in ("parameters", "GFLOP", "predicted peak", "a step"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--preset", "imagenet"], "imagenet"),
        (["--sampler", "ddim"], "--sampler"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--batch-size", "0"], "batch_size"),
        (["--batch-size", "many"], "many"),
        (["--lr", "nan"], "nan"),
        (["--channels", "64,x"], "64,x"),
        (["--channels", "48"], "32 divides"),
        (["--max-steps", "0"], "max-steps"),
        (["--stop-after", "-1"], "stop-after"),
        (["--resume", "/no/such/run"], "/no/such/run"),
        (["--resume", ".", "--out", "x"], "--resume"),
        (["--resume", "."], "config.json"),
        (["--stage", "unet"], "vae.safetensors"),
        (["--download"], "--data"),
        (["--text-weights", "no_such_tag"], "no_such_tag"),
        (["--device", "tpu"], "tpu"),
        (["--drawn-images", "1"], "to train on and others to validate, got 0 and 1"),
    ],
)
def test_a_wrong_train_command_is_told_in_one_line_and_makes_nothing(
    arguments, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    preset = [] if {"--preset", "--resume"} & set(arguments) else QUICK
    assert told in refused(capsys, run_train, *preset, "--cache", "cache", *arguments)
    left = {p.name for p in tmp_path.iterdir()} - {"cache"}
    assert left <= {"runs"} and not list(tmp_path.glob("runs/*/*.safetensors"))


def test_an_output_folder_that_is_taken_a_file_or_not_writable_is_refused(trained, tmp_path, capsys):
    assert "--resume" in refused(capsys, run_train, *QUICK, "--out", trained)
    (tmp_path / "file").write_text("mine")
    refused(capsys, run_train, *QUICK, "--out", tmp_path / "file")
    refused(capsys, run_train, *QUICK, "--out", tmp_path / "file" / "below")
    refused(capsys, run_train, *QUICK, "--out", "/proc/run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_keeps_the_text_weights_that_came_from_a_file(tower, tmp_path):
    text_weights.save_tower(tower, tmp_path / "mine.safetensors")
    folder = tmp_path / "runs" / "own_text"
    arguments = [*QUICK, "--text-weights", tmp_path / "mine.safetensors", "--max-steps", 2]
    assert run_train(*arguments, "--out", folder) == 0
    (tmp_path / "mine.safetensors").unlink()
    assert (
        run_sample("a man", "--model", folder, "--steps", 1, "--device", "cpu", "--out", tmp_path / "s.png")
        == 0
    )


def test_a_resumed_run_names_the_settings_that_differ(trained, capsys):
    told = refused(capsys, run_train, "--resume", trained, "--lr", "0.5", "--channels", "64,64")
    assert "lr (is" in told and "channels (is" in told


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--sampler", "euler"], "euler"),
        (["--steps", "0"], "steps"),
        (["--steps", "5000"], "1000"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "inf"], "guidance"),
        (["--eta", "2"], "eta"),
        (["--num", "0"], "num"),
        (["--model", "/no/such/run"], "/no/such/run"),
        (["--out", "picture.jpg"], "picture.jpg"),
        (["--out", "no/such/folder/x.png"], "no/such/folder"),
        (["--film", "film.mp4"], "film.mp4"),
        (["--device", "cuda"], "cuda"),
    ],
)
def test_a_wrong_sample_command_is_told_in_one_line(arguments, told, trained, tmp_path, monkeypatch, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", trained]
    assert told in refused(capsys, run_sample, "a man", *model, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_half_a_run_says_how_to_go_on(trained, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    assert "--resume" in refused(capsys, run_sample, "a man", "--model", tmp_path)
    (tmp_path / "vae.safetensors").write_bytes(b"cut")
    (tmp_path / "ema.safetensors").write_bytes(b"cut")
    assert "vae.safetensors" in refused(capsys, run_sample, "a man", "--model", tmp_path)


def test_help_comes_without_torch_and_lists_every_preset():
    code = "import sys, train\ntry: train.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for preset in PRESETS:
        assert preset in printed


TAKES_AND_FREES = """
import resource, sys
import numpy as np
if sys.argv[1] == "kept":
    from ddpm.tools.command import keep_freed_memory
    keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_memory_that_a_command_frees_is_not_taken_from_the_system_again():
    def page_faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", TAKES_AND_FREES, how], capture_output=True, check=True, cwd=ROOT
        )
        return int(done.stdout)

    assert page_faults("kept") < page_faults("left alone") / 10


@pytest.mark.parametrize(
    "command", [["train.py"], ["sample.py"], ["-m", "ddpm.evaluation"], ["-m", "ddpm.export"]]
)
def test_help_and_a_mistyped_flag_are_answered_where_torch_cannot_be_had(command, tmp_path):
    for module in ("torch", "numpy"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('loaded')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for flag, code, told in (("--help", 0, "usage: "), ("--hlep", 2, "error: ")):
        done = subprocess.run(
            [sys.executable, *command, flag], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert (done.returncode, told in done.stdout + done.stderr) == (code, True), done.stderr


def test_the_names_on_the_command_lines_are_those_of_the_library():
    assert sample.SAMPLERS == evaluation.SAMPLERS == sampling.SAMPLERS
    assert sample.VARIANCES == diffusion.VARIANCES
