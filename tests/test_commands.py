r"""train.py and sample.py: what they write, what they refuse and in which words, and that --help answers at once."""

import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import FP32, QUICK, PlainTower, make_runs_cheap, run_train

from ddpm import __main__ as sample
from ddpm import diffusion, sampling
from ddpm.celeba.dataset import Pictures
from ddpm.celeba.images import read_image
from ddpm.config import PRESETS, SHIPPED, Config
from ddpm.evaluation import __main__ as evaluation
from ddpm.model import TextToImage
from ddpm.tools import command
from ddpm.tools.command import Output, exit_code
from ddpm.training import session, stages

ROOT = Path(__file__).parents[1]
SMALL = [*QUICK, *FP32]


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    make_runs_cheap(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        make_runs_cheap(patch)
        assert run_train(*SMALL, "--out", folder) == 0
    return folder


def run_sample(*arguments) -> int:
    return exit_code(sample.main, [str(a) for a in (*arguments, "--device", "cpu")])


def rows_of(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


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


# ------------------------------------------------------------------------------------------- what is written


def test_a_run_folder_holds_what_the_contract_says(trained):
    weights = {"vae.safetensors", "unet.safetensors", "ema.safetensors"}
    resume = {"config.json", "state.pt", "state.previous.pt", ".lock"}
    shown = {"metrics.csv", "loss.png", "samples", "words.txt"}
    assert {path.name for path in trained.iterdir()} == weights | resume | shown
    samples = sorted(path.name for path in (trained / "samples").iterdir())
    assert samples == ["step_000004.png", "step_000006.png"]


def test_metrics_have_one_row_a_step_and_held_out_figures(trained):
    rows = rows_of(trained)
    steps = [(row["stage"], int(row["step"])) for row in rows if row["loss"]]
    assert steps == [(stage, n) for stage in ("vae", "unet") for n in range(1, 7)]
    assert [row["stage"] for row in rows if row["psnr"] and row["ssim"]] == ["vae", "vae"]
    assert [row["stage"] for row in rows if row["val_loss"]] == ["unet", "unet"]


@pytest.mark.slow
def test_a_learned_variance_is_trained_resumed_and_sampled_with(tmp_path):
    whole, sliced = tmp_path / "whole", tmp_path / "sliced"
    flags = [*SMALL, "--variance", "learned", "--vlb-weight", "0.01", "--max-steps", 4]
    assert run_train(*flags, "--out", whole) == 0
    assert run_train(*flags, "--out", sliced, "--stop-after", 6) == 0
    assert run_train("--resume", sliced, "--device", "cpu") == 0
    ema, resumed = (load_file(folder / "ema.safetensors") for folder in (whole, sliced))
    assert ema["conv_out.weight"].shape[0] == 8
    assert ema["conv_out.weight"][4:].abs().max() > 0
    assert all(torch.equal(ema[name], resumed[name]) for name in ema)
    pictures = []
    for variance in ([], ["--variance", "learned"], ["--variance", "beta"]):
        out = tmp_path / f"{len(pictures)}.png"
        drawing = ["--model", whole, "--sampler", "ddpm", "--steps", 5, "--out", out, *variance]
        assert run_sample("a man", *drawing) == 0
        pictures.append(Image.open(out).tobytes())
    own, learned, beta = pictures
    assert own == learned != beta


@pytest.mark.slow
def test_the_stages_may_be_run_apart_and_a_resumed_run_may_move_its_bound(tmp_path):
    folder = tmp_path / "run"
    assert run_train(*SMALL, "--max-steps", 2, "--stage", "vae", "--out", folder) == 0
    assert not (folder / "unet.safetensors").exists()
    assert run_train("--resume", folder, "--stage", "unet", "--device", "cpu") == 0
    assert run_train("--resume", folder, "--max-steps", 4, "--device", "cpu") == 0
    steps = [(row["stage"], int(row["step"])) for row in rows_of(folder) if row["loss"]]
    assert steps == [("vae", 1), ("vae", 2), ("unet", 1), ("unet", 2), ("unet", 3), ("unet", 4)]


def test_a_grid_and_single_pictures_carry_prompt_seed_and_settings(trained, tmp_path):
    prompts = ["a bald man", ""]
    drawing = [*prompts, "--model", trained, "--steps", 2, "--seed", 5, "--num", 2]
    assert run_sample(*drawing, "--out", tmp_path / "grid.png") == 0
    with Image.open(tmp_path / "grid.png") as grid:
        text = grid.text
    assert json.loads(text["prompt"]) == ["a bald man", "a bald man", "", ""]
    assert (text["seed"], text["steps"], text["sampler"], text["eta"]) == ("5", "2", "dpm++", "0.0")
    assert "variance" not in text  # which ddpm alone has
    assert run_sample(*drawing, "--out", tmp_path / "single") == 0
    files = sorted((tmp_path / "single").iterdir())
    assert len(files) == 4
    with Image.open(files[0]) as picture:
        assert picture.size == (16, 16) and picture.text["prompt"] == "a bald man"


def test_words_that_no_training_caption_had_are_named_and_the_picture_is_drawn(trained, tmp_path, capsys):
    drawing = ["--model", trained, "--steps", 1, "--out"]
    assert run_sample("A redhead Wizard with sunglasses", *drawing, tmp_path / "a.png") == 0
    assert "warning: no training caption of this model has: redhead, wizard; " in capsys.readouterr().err
    assert run_sample("a girl with sunglasses", *drawing, tmp_path / "b.png") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_model_of_pictures_without_captions_takes_the_empty_prompt_alone(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("*.pt"))
    (run / "words.txt").write_text("\n")
    drawing = ["--model", run, "--steps", 1, "--out", tmp_path / "a.png"]
    assert run_sample("", *drawing) == 0
    assert run_sample("a man", *drawing) == 2
    assert "learned without captions, got one with 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_every_sampler_makes_a_picture_and_a_film(sampler, trained, tmp_path):
    film = tmp_path / ("film.gif" if sampler == "ddim" else "film.png")
    drawing = ["--model", trained, "--steps", 3, "--sampler", sampler, "--eta", 0.5 * (sampler != "ddpm")]
    drawing += ["--noise-scale", 0.9]
    assert run_sample("a woman", *drawing, "--out", tmp_path / "s.png", "--film", film) == 0
    with Image.open(film) as picture:
        assert picture.size[0] == 3 * 64 if film.suffix == ".png" else picture.n_frames == 3
        text = picture.text if film.suffix == ".png" else json.loads(picture.info["comment"])
    assert (text["sampler"], text["steps"], text["noise_scale"]) == (sampler, "3", "0.9")


def test_a_file_has_a_prompt_a_line_and_its_pictures_are_written_as_they_are_drawn(
    trained, tmp_path, monkeypatch
):
    r"""An empty line is the empty prompt, so picture i is of line i; the end of the last line begins no other."""
    lines = [b"a bald man", b"", *[b"caf\xc3\xa9"] * 33]
    written = []
    own = TextToImage.sample

    def sample(self, prompts, *arguments):
        written.append((len(prompts), len(list(tmp_path.glob("*/*.png")))))
        return own(self, prompts, *arguments)

    monkeypatch.setattr(TextToImage, "sample", sample)
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n")
    drawing = ["--model", trained, "--steps", 1]
    assert run_sample("--prompts", tmp_path / "lines", *drawing, "--out", tmp_path / "of_file") == 0
    assert written == [(32, 0), (3, 32)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a bald man\n\n")))
    assert run_sample("--prompts", "-", *drawing, "--out", tmp_path / "of_input") == 0
    assert len(list((tmp_path / "of_input").iterdir())) == 2
    for i, prompt in ((0, "a bald man"), (1, ""), (34, "caf\xe9")):
        with Image.open(tmp_path / "of_file" / f"{i:04d}.png") as picture:
            assert (picture.text["prompt"], picture.text["index"]) == (prompt, str(i))
            if i < 2:
                other = np.asarray(Image.open(tmp_path / "of_input" / f"{i:04d}.png")).astype(int)
                assert np.abs(np.asarray(picture) - other).max() <= 1  # batches of another size


def test_a_picture_is_drawn_over_and_what_the_mask_keeps_has_its_own_pixels(trained, tmp_path, capsys):
    r"""Both are cropped as in training: of 178 x 218 the middle 148. The mask is white on the right of them."""
    levels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    photo, mask, out = (tmp_path / name for name in ("photo.png", "mask.png", "out"))
    Image.fromarray(levels).save(photo)
    Image.fromarray(np.where(np.arange(178) < 89, 0, 255).astype(np.uint8)[None].repeat(218, 0)).save(mask)
    drawing = ["a man", "--model", trained, "--steps", 2, "--init-image", photo, "--out", out]
    assert run_sample(*drawing, "--mask", mask) == 0
    with Image.open(out / "0000.png") as picture:
        drawn, text = np.asarray(picture), picture.text
    assert (text["init_image"], text["mask"], text["strength"]) == (str(photo), str(mask), "1.0")
    given = read_image(photo, 16)
    assert np.array_equal(drawn[:, :8], given[:, :8])
    assert np.abs(drawn[:, 8:].astype(int) - given[:, 8:]).mean() > 10
    for given, strength in ((["--strength", 0.5], "0.5"), (["--steps", 1], "1.0")):
        assert run_sample(*drawing, *given) == 0
        with Image.open(out / "0000.png") as picture:
            assert (picture.text["strength"], picture.text["precision"]) == (strength, "fp32")
            assert "mask" not in picture.text
    Image.new("RGBA", (178, 218)).save(mask)  # which is black, and transparent
    assert run_sample(*drawing, "--mask", mask) == 0
    assert "mask.png is white everywhere, so nothing is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("", "expected prompts, or --prompts with a file of them, got neither"),
        ("man --prompts lines", "got both"),
        ("--prompts nowhere", "nowhere"),
        ("--prompts empty", "expected a prompt a line in empty"),
        ("--prompts photo.png", "expected UTF-8 in photo.png, got b'\\x89PNG"),
        ("--prompts /dev/zero", "up to 16,777,216 bytes, got more"),
        ("man --mask photo.png", "expected --init-image with --mask"),
        ("man --strength 0.5", "expected --init-image with --mask"),
        ("man --init-image nowhere", "for --init-image, got nowhere, missing"),
        ("man --init-image lines", "for --init-image, got lines, not a picture"),
        ("man --init-image photo.png --mask empty", "for --mask, got empty, zero bytes"),
        (
            "man --init-image photo.png --mask small.png",
            "expected --mask of 20 x 30, as photo.png is, got 20 x 20",
        ),
        ("man --init-image photo.png --mask photo.png", "expected white in --mask photo.png"),
        (
            "man --init-image photo.png --strength 0",
            "expected --strength from 0.05, one of 20 steps, to 1, got 0.0",
        ),
        ("man --init-image photo.png --strength 0 --steps 30", "from 0.0334, one of 30 steps"),
        ("man --init-image photo.png --strength nan", "got nan"),
        ("man --init-image photo.png --strength 1.5", "got 1.5"),
        ("man --init-image photo.png --out photo.png", "expected --out and --film apart from photo.png"),
        ("man --init-image photo.png --film photo.png", "apart from photo.png, which is read"),
        ("man --init-image faces/0000.png --out faces", "apart from faces/0000.png"),
        ("man --negative hat --guidance 1", "expected --guidance above 1 with --negative, got 1"),
        ("man --negative hat --guidance 0", "got 0, which does not lead away"),
    ],
)
def test_prompts_and_pictures_that_cannot_be_used_are_told_in_one_line(
    arguments, named, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("a man\n")
    (tmp_path / "empty").touch()
    Image.new("RGB", (20, 30)).save("photo.png")
    Image.new("L", (20, 20)).save("small.png")
    assert named in refused(capsys, run_sample, *arguments.split(), "--model", trained)
    assert not (tmp_path / "samples.png").exists()


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_train(*SMALL, "--dry-run") == 0
    printed = capsys.readouterr().out
    for figure in (
        "parameters",
        "GFLOP",
        "predicted peak",
        "a step",
        "for 40 pictures",
        "for 6 steps of the UNet, ",
    ):
        assert figure in printed
    assert list(tmp_path.iterdir()) == []


def test_a_run_begins_with_what_fits_of_another_and_with_its_settings(trained, tmp_path, capsys):
    begin = [
        "--config",
        trained / "config.json",
        "--max-steps",
        1,
        "--device",
        "cpu",
        "--lr",
        0,
        "--vae-lr",
        0,
    ]
    assert run_train(*begin, "--init", trained, "--out", tmp_path / "same") == 0
    begun = f"begins with the VAE of {trained}, the UNet of {trained}\n"
    assert begun in capsys.readouterr().out and (tmp_path / "same" / "init.txt").read_text() == begun
    for name in ("vae", "ema"):
        old, new = (load_file(folder / f"{name}.safetensors") for folder in (trained, tmp_path / "same"))
        assert all((old[key] - new[key]).abs().max() < 1e-6 for key in old)
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert (config["training"]["init"], config["model"]["channels"]) == (str(trained), [32, 32])
    wider = [*begin, "--channels", "64,64", "--out", tmp_path / "wider"]
    assert run_train(*wider, "--init", trained) == 0
    assert "begins with the VAE of" in (said := capsys.readouterr().out) and "no UNet: expected" in said
    assert run_train("--resume", tmp_path / "wider", "--max-steps", 2, "--device", "cpu") == 0
    assert "begins with" not in capsys.readouterr().out


def test_a_run_on_photographs_may_begin_with_the_vae_that_ships():
    model = TextToImage(Config.from_preset("celeba64-laptop").model, PlainTower())
    said = session.begin_from(model, "shipped", "all")
    assert said.startswith(f"begins with the VAE of {SHIPPED}, no UNet: expected")
    shipped = load_file(SHIPPED / "vae.safetensors")
    assert all((value == shipped[name].float()).all() for name, value in model.vae.state_dict().items())


def test_a_run_that_is_stopped_in_its_first_stage_still_begins_with_the_unet_of_another(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "other")
    for name, first in (("whole", []), ("parts", ["--stop-after", 1])):
        assert run_train(*SMALL, "--init", tmp_path / "other", *first, "--out", tmp_path / name) == 0
    shutil.rmtree(tmp_path / "other")
    assert run_train("--resume", tmp_path / "parts", "--device", "cpu") == 0
    whole, parts = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_second_stage_alone_may_have_the_vae_of_another_run(trained, tmp_path, capsys):
    r"""A run that was killed before its first checkpoint begins in the same way again."""
    flags = [*SMALL, "--prediction", "eps", "--init", trained, "--stage", "unet", "--out", tmp_path / "run"]
    assert run_train(*flags) == 0
    assert "that UNet has learned with another prediction\n" in capsys.readouterr().out
    assert {row["stage"] for row in rows_of(tmp_path / "run")} == {"unet"}
    old, new = (load_file(folder / "vae.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(old[key], new[key]) for key in old)
    for path in (tmp_path / "run").glob("*.*"):
        if path.name != "config.json":
            path.unlink()
    first = run_train("--resume", tmp_path / "run", "--stage", "unet", "--stop-after", 1, "--device", "cpu")
    said = capsys.readouterr().out
    assert (
        first == 0 and "begins with the VAE" in said and f"--resume {tmp_path / 'run'} --stage unet" in said
    )


def test_a_first_validation_writes_a_checkpoint_before_its_weights(trained, tmp_path, monkeypatch):
    r"""--resume refuses weights without a checkpoint, so a command that is killed then could not go on."""
    run = tmp_path / "run"
    there = []
    monkeypatch.setattr(
        stages, "save_weights", lambda path, _: there.append((path.name, (run / "state.pt").exists()))
    )
    assert run_train(*SMALL, "--save-every", 100, "--init", trained, "--stage", "unet", "--out", run) == 0
    assert there[:2] == [("unet.safetensors", True), ("ema.safetensors", True)]


@pytest.mark.parametrize("data, mirrored", [("--flip", True), ("--no-flip", False)])
def test_pictures_are_mirrored_unless_left_and_right_matter(data, mirrored, tmp_path, monkeypatch):
    seen = []
    batch = Pictures.batch
    monkeypatch.setattr(
        Pictures, "batch", lambda self, rows, flip=None: seen.append(flip) or batch(self, rows, flip)
    )
    assert run_train(*SMALL, data, "--out", tmp_path / "run") == 0
    assert any(flip is not None and flip.any() for flip in seen) == mirrored


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--preset imagenet", "imagenet"),
        ("--sampler ddim", "--sampler"),
        ("--data /no/such/folder", "/no/such/folder"),
        ("--batch-size 0", "batch_size"),
        ("--batch-size many", "many"),
        ("--lr nan", "nan"),
        ("--channels 64,x", "64,x"),
        ("--channels 48", "32 divides"),
        ("--max-steps 0", "max-steps"),
        ("--stop-after -1", "stop-after"),
        ("--resume /no/such/run", "/no/such/run"),
        ("--resume . --out x", "--resume"),
        ("--resume .", "config.json"),
        ("--stage unet", "vae.safetensors"),
        ("--download", "--data"),
        ("--text-weights no_such_tag", "no_such_tag"),
        ("--device tpu", "tpu"),
        ("--init /no/such/run", "has no config.json"),
        ("--init /no/such/run --stage unet", "has no config.json"),
        ("--dry-run --drawn-images 1", "to train on and others to validate, got 0 and 1"),
        ("--config /no/such/run", "/no/such/run"),
        ("--config x --preset tiny", "or --config, got both"),
        ("--data=", "a folder after --data, or `drawn`, got"),
        ("--preset lowvram --unet-steps 5", "--epochs 0 with --unet-steps, got 3 epochs"),
        ("--drawn-images 1", "to train on and others to validate, got 0 and 1"),
    ],
)
def test_a_wrong_train_command_is_told_in_one_line_and_makes_nothing(
    arguments, named, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = arguments.split()
    begin = [] if {"--preset", "--resume", "--config"} & set(arguments) else SMALL
    assert named in refused(capsys, run_train, *begin, "--cache", "cache", *arguments)
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left <= {"runs"} and not list(tmp_path.glob("runs/*/*.safetensors"))


def test_an_output_folder_that_is_taken_a_file_or_not_writable_is_refused(trained, tmp_path, capsys):
    assert "--resume" in refused(capsys, run_train, *SMALL, "--out", trained)
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path / "file" / "below", "/proc/run"):
        refused(capsys, run_train, *SMALL, "--out", taken)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_resumed_run_names_the_settings_that_differ(trained, capsys):
    refusal = refused(capsys, run_train, "--resume", trained, "--lr", "0.5", "--channels", "64,64")
    assert "lr (is" in refusal and "channels (is" in refusal


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--sampler euler", "euler"),
        ("--sampler ddpm --variance learned", "--variance posterior or beta"),
        ("--steps 0", "steps"),
        ("--steps 5000", "1000"),
        ("--guidance nan", "guidance"),
        ("--guidance inf", "guidance"),
        ("--eta 2", "eta"),
        ("--noise-scale 0", "--noise-scale above 0 and at most 1, got 0.0"),
        ("--eta 0.5 --sampler ddpm", "--eta with the samplers ddim and dpm++"),
        ("--variance beta", "--variance with --sampler ddpm"),
        ("--num 5000", "60,000,000 pixels for --out"),
        ("--num 2355 --columns 2354", "60,000,000 pixels for --out"),
        ("--num 100 --steps 900 --out folder --film film.gif", "60,000,000 pixels for --film"),
        ("--num 3000 --steps 2 --out folder --film film.gif", "60,000,000 pixels for --film"),
        ("--out x.png --film x.png", "--film apart from --out"),
        ("--out . --film 0000.png", "--film apart from --out"),
        ("--out=", "expected a path"),
        ("--num 0", "num"),
        ("--model /no/such/run", "/no/such/run"),
        ("--out picture.jpg", "picture.jpg"),
        ("--out no/such/folder/x.png", "no/such/folder"),
        ("--film film.mp4", "film.mp4"),
    ],
)
def test_a_wrong_sample_command_is_told_in_one_line(arguments, named, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = arguments.split()
    model = [] if "--model" in arguments else ["--model", trained]
    assert named in refused(capsys, run_sample, "a man", *model, *arguments)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- the command line


def test_a_tilde_is_the_home_folder_and_a_folder_may_have_a_point_in_its_name(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "v1.5").mkdir()
    for out in ("~/x.png", "~/v1.5"):
        assert run_sample("a man", "--model", trained, "--steps", 1, "--out", out) == 0
    assert (tmp_path / "x.png").exists() and (tmp_path / "v1.5" / "0000.png").exists()


def test_output_goes_on_when_its_reader_leaves_and_escapes_what_its_encoding_lacks():
    reader, writer = os.pipe()
    os.close(reader)
    for _ in range(2):
        with os.fdopen(os.dup(writer), "w") as stream:
            output = Output(stream)
            assert output.write("x" * 100_000) == 100_000
            output.flush()
    os.close(writer)
    content = io.BytesIO()
    output = Output(io.TextIOWrapper(content, encoding="cp1252"))
    output.write("caf\xe9 \u0142\n")
    output.flush()
    assert content.getvalue() == b"caf\xe9 \\u0142\n"


def test_without_a_terminal_a_line_tells_how_far_it_is_where_ten_seconds_had_none(monkeypatch, capsys):
    clock = itertools.count(0, 4)
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(command, "_newest", 0)
    assert list(command.progress_bar(range(10), 10, "drawing faces")) == list(range(10))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" [")[0] for line in lines] == [f"drawing faces: {n} of 10" for n in (3, 6, 9)]


@pytest.mark.slow
def test_a_training_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert error.count("standard output ended") == 1
    assert (tmp_path / "run" / "ema.safetensors").exists()


@pytest.mark.parametrize("command", ["train.py", "sample.py", "-m ddpm.evaluation", "-m ddpm.export"])
def test_help_and_a_mistyped_flag_are_answered_where_torch_cannot_be_had(command, tmp_path):
    for module in ("torch", "numpy"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('loaded')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for flag, code, begins in (("--help", 0, "usage: "), ("--hlep", 2, "error: ")):
        words = [sys.executable, *command.split(), flag]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode, begins in done.stdout + done.stderr) == (code, True), done.stderr
        if command == "train.py" and code == 0:
            assert all(preset in done.stdout for preset in PRESETS)


def test_the_names_on_the_command_lines_are_those_of_the_library():
    assert sample.SAMPLERS == evaluation.SAMPLERS == sampling.SAMPLERS
    assert sample.VARIANCES == diffusion.VARIANCES
