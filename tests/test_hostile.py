r"""Files and prompts from strangers: nothing in them is executed, nothing outside its place is read, nothing fills the
memory or the screen, and what is refused is refused in one printable line.

The payloads are real: each is shown to fire in the reader that trusts it.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import string
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm import __main__ as sample
from ddpm.celeba.faces import write_celeba
from ddpm.celeba.images import BadImage, read_image
from ddpm.celeba.lists import open_table
from ddpm.celeba.sheets import MAX_BYTES
from ddpm.config import TEXT_FILE, Config, ModelConfig, TrainConfig, parameters
from ddpm.export import __main__ as export
from ddpm.export.diffusers_folder import SETTINGS as SETTINGS_FILES
from ddpm.export.diffusers_folder import TEXT_WEIGHTS, UNET_WEIGHTS, VAE_WEIGHTS
from ddpm.model import TextToImage, networks
from ddpm.text import TextTower
from ddpm.tools import text_weights
from ddpm.tools.arrays import cached_array
from ddpm.tools.command import Parser, exit_code, say
from ddpm.tools.errors import UserError
from ddpm.tools.grids import save_png
from ddpm.training import __main__ as train
from ddpm.training.run_folder import COLUMNS, Damaged, read_metrics, read_state

ROOT = Path(__file__).parents[1]
QUICK = "--preset tiny --image-size 16 --channels 32,32 --drawn-images 40 --device cpu --precision fp32 --max-steps 2"
QUICK = QUICK.split()


def slow_but_first(cases):
    r"""The cases for parametrize, of which the default run takes the first."""
    return [pytest.param(case, marks=[pytest.mark.slow] if i else []) for i, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def one_tower(tower, monkeypatch):
    monkeypatch.setattr(text_weights, "random_tower", lambda: tower)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tower):
    r"""A run with every file that a run folder can have, and its caches beside it."""
    home = tmp_path_factory.mktemp("runs")
    text_weights.save_tower(tower, home / "mine.safetensors")
    arguments = [*QUICK, "--text-weights", str(home / "mine.safetensors"), "--out", str(home / "run")]
    assert exit_code(train.main, arguments) == 0
    (home / "mine.safetensors").unlink()
    return home / "run"


@pytest.fixture(scope="module")
def exported(trained):
    assert exit_code(export.main, [str(trained), str(trained.parent / "diffusers")]) == 0
    return trained.parent / "diffusers"


@pytest.fixture
def run(trained, tmp_path):
    return linked(trained, tmp_path / "run")


def linked(source, target):
    r"""A copy of a folder that shares its files until they are replaced."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace(path, content: bytes):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def change_config(folder, section, **values):
    content = json.loads((folder / "config.json").read_text())
    content[section].update(values)
    replace(folder / "config.json", json.dumps(content).encode())


def refused(capsys, main, *arguments) -> str:
    r"""The one printable line, after the lines of progress, with which the command ends in exit code 2."""
    capsys.readouterr()
    try:
        code = exit_code(main, [str(a) for a in arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    refusal = err.strip("\n").split("\n")[-1]
    assert code == 2, (out, err)
    assert refusal.startswith("error: ") and "Traceback" not in err
    assert all(line.isprintable() for line in (out + err).split("\n"))
    return refusal


# ---------------------------------------------------------------------------------------- payloads


class Trap:
    r"""Whoever unpickles this in trust writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "executed")


def to_bytes(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def torch_file(content, zipped=True):
    return to_bytes(lambda to: torch.save({"weight": content}, to, _use_new_zipfile_serialization=zipped))


def torch_tar(content):
    r"""What torch wrote before version 0.1.10."""

    def write(to):
        with tarfile.open(fileobj=to, mode="w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                member = tarfile.TarInfo(name)
                member.size = len(pickled := pickle.dumps(content, 2))
                tar.addfile(member, io.BytesIO(pickled))

    return to_bytes(write)


def array_file(content, save=np.save):
    return to_bytes(lambda to: save(to, np.array([content], dtype=object)))


PAYLOADS = {
    "pickle": lambda trap: pickle.dumps(trap, 2),
    "pickle as text": lambda trap: pickle.dumps(trap, 0),
    "pickle of a state": lambda trap: pickle.dumps({"weight": trap}, 4),
    "torch zip": torch_file,
    "torch legacy": lambda trap: torch_file(trap, zipped=False),
    "torch tar": torch_tar,
    "npy of objects": array_file,
    "npz of objects": lambda trap: array_file(trap, np.savez),
}


def read_trustingly(payload, path):
    if payload.startswith("torch"):
        torch.load(path, weights_only=False)
    elif payload.startswith("np"):
        content = np.load(path, allow_pickle=True)
        [content[name] for name in getattr(content, "files", [])]
    else:
        pickle.loads(path.read_bytes())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_fires_where_it_is_trusted(payload, tmp_path):
    (tmp_path / "file").write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    with contextlib.suppress(Exception):  # what comes out is no state, but by then it is too late
        read_trustingly(payload, tmp_path / "file")
    assert (tmp_path / "mark").exists()


COMMANDS = {
    "sample": lambda run, out: (sample.main, "a man", "--model", run),
    "sample the last weights": lambda run, out: (sample.main, "a man", "--weights", "unet", "--model", run),
    "resume": lambda run, out: (train.main, "--resume", run),
    "export": lambda run, out: (export.main, run, out),
}
READERS = {  # a file of a run folder -> the commands that read it
    "config.json": ("sample", "resume", "export"),
    "vae.safetensors": ("sample", "export"),
    "ema.safetensors": ("sample", "export"),
    "unet.safetensors": ("sample the last weights",),
    "text.safetensors": ("sample", "resume", "export"),
    "state.pt": ("resume",),
}


@pytest.mark.parametrize("payload", slow_but_first(PAYLOADS))
@pytest.mark.parametrize("name", READERS)
def test_a_payload_in_a_run_folder_executes_nothing(name, payload, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    replace(run / name, PAYLOADS[payload](Trap(tmp_path / "mark")))
    if name == "state.pt":
        shutil.copy(run / name, run / "state.previous.pt")
    for reader in READERS[name]:
        assert name in refused(capsys, *COMMANDS[reader](run, "out"))
    assert not (tmp_path / "mark").exists()
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of lines that are no metrics
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_for_metrics_executes_nothing(payload, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    read_metrics(tmp_path / "metrics.csv")
    assert not (tmp_path / "mark").exists()


DIFFUSERS_FILES = [*SETTINGS_FILES, UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS]
DIFFUSERS_FILES += ["unet/diffusion_pytorch_model.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", DIFFUSERS_FILES)
def test_a_payload_in_a_diffusers_folder_executes_nothing(name, payload, exported, tmp_path, capsys):
    folder = linked(exported, tmp_path / "diffusers")
    if name.endswith(".bin"):
        (folder / UNET_WEIGHTS).unlink()
    replace(folder / name, PAYLOADS[payload](Trap(tmp_path / "mark")))
    assert name in refused(capsys, export.main, "--reverse", folder, tmp_path / "out")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("payload", slow_but_first(PAYLOADS))
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pt", "w.npy"])
def test_a_payload_as_text_weights_executes_nothing(name, payload, tmp_path, capsys):
    (tmp_path / name).write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    arguments = [*QUICK, "--text-weights", tmp_path / name, "--out", tmp_path / "run"]
    assert name in refused(capsys, train.main, *arguments)
    assert not (tmp_path / "mark").exists()


LISTS = ["list_attr_celeba.txt", "list_attr_celeba.csv", "captions.csv", "metadata.csv"]
LISTS += ["metadata.jsonl", "any.csv"]


@pytest.mark.parametrize("payload", slow_but_first(PAYLOADS))
@pytest.mark.parametrize("name", [*LISTS, "list_eval_partition.txt", "1.png"])
def test_a_payload_in_a_data_folder_executes_nothing(name, payload, tmp_path, capsys):
    data = tmp_path / "data"
    if name == "list_eval_partition.txt":
        write_celeba(data, 4)
    else:
        data.mkdir()
        (data / "captions.csv").write_text("file,caption\n1.png,a man\n")
        Image.new("RGB", (8, 8)).save(data / "1.png")
        if name in LISTS:
            (data / "captions.csv").unlink()
    (data / name).write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    refused(capsys, train.main, *QUICK, "--data", data, "--out", tmp_path / "run")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_a_cache_executes_nothing(payload, tmp_path):
    (tmp_path / "a.npy").write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    assert "delete the file" in refusal_of(lambda: cached_array(tmp_path / "a.npy", (1,), np.uint8, None))
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_the_commands_refuse_a_payload_in_a_cache_or_compute_it_again(trained, run, tmp_path, capsys):
    caches = sorted((trained.parent / "cache").iterdir())
    assert [path.name.split("-")[0] for path in caches] == ["latents", "pictures", "texts"]
    for path in caches:
        cache = linked(trained.parent / "cache", tmp_path / path.stem)
        replace(cache / path.name, array_file(Trap(tmp_path / "mark")))
        resume = ("--resume", run, "--max-steps", 3, "--cache", cache, "--device", "cpu")
        if path.suffix == ".npy":
            refusal = refused(capsys, train.main, *resume)
            assert path.name in refusal and "delete the file" in refusal
        else:
            assert exit_code(train.main, [str(a) for a in resume]) == 0
    assert not (tmp_path / "mark").exists()


# -------------------------------------------------------------------- paths and names inside files


OUTSIDE = ["/etc/passwd", "../secret.safetensors", r"\\evil\share\w", r"C:\w.pt", "a/b", "w.pt", "", "."]


@pytest.mark.parametrize("weights", OUTSIDE)
def test_a_configuration_cannot_name_text_weights_outside_its_folder(weights, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.safetensors").touch()
    values = json.loads(Config.from_preset("tiny").to_json())
    values["model"]["text_weights"] = weights
    (run / "config.json").write_text(json.dumps(values))
    refusal = refusal_of(Config.read, run / "config.json")
    assert "text_weights" in refusal and TEXT_FILE in refusal


def test_a_bare_word_is_a_tag_whatever_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").touch()
    monkeypatch.setattr(text_weights, "tower_from_tag", lambda tag: f"tag {tag}")
    assert text_weights.named_tower("openai") == "tag openai"
    assert (
        text_weights.named_tower("./openai.pt") == "tag ./openai.pt"
    )  # no such file: refused with the known tags


def test_a_model_is_loaded_without_a_look_at_the_data_it_was_trained_on(run, monkeypatch):
    change_config(run, "training", data="//evil/share")
    monkeypatch.setattr("ddpm.celeba.dataset.open_table", lambda path: pytest.fail("the data was opened"))
    assert TextToImage.load(run).config.image_size == 16


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a/../../x.png", r"..\x.png", r"C:\x.png", "C:x.png", r"\\h\x.png"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list_cannot_name_a_picture_outside_its_folder(name, kind, tmp_path):
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    row = json.dumps({"file": name, "caption": "a man"})
    (data / f"metadata.{kind}").write_text(row if kind == "jsonl" else f"file,caption\n{name},a man\n")
    assert "a path inside the folder" in refusal_of(open_table, data)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["config.json", "vae.safetensors", "ema.safetensors"])
def test_a_pipe_under_a_name_of_a_run_is_not_waited_for(name, run, tmp_path, capsys):
    (run / name).unlink()
    os.mkfifo(run / name)
    for reader in READERS[name]:
        assert name in refused(capsys, *COMMANDS[reader](run, tmp_path / "out"))


def test_what_a_link_leads_to_is_not_told(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("password: swordfish\n" * 50)
    for name in ("vae.safetensors", "config.json"):
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "secret")
        assert "swordfish" not in refused(capsys, sample.main, "a man", "--model", run)


NO_LISTS = ["API_KEY=swordfish\nroot:x", "swordfish,1\n2,3", "51423\nx", '{"swordfish": 1, "swordfish": 2}']


@pytest.mark.parametrize("secret", NO_LISTS)
@pytest.mark.parametrize("name", [*LISTS, "list_eval_partition.txt"])
def test_the_content_of_what_is_no_list_is_not_told(name, secret, tmp_path):
    write_celeba(tmp_path / "data", 4)
    if name not in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        (tmp_path / "data" / "list_attr_celeba.txt").unlink()
    (tmp_path / "secret").write_text(secret)
    (tmp_path / "data" / name).unlink(missing_ok=True)
    (tmp_path / "data" / name).symlink_to(tmp_path / "secret")
    assert not re.search("swordfish|51,?423", refusal_of(open_table, tmp_path / "data"))


@pytest.mark.parametrize("name", ["captions.csv", "list_attr_celeba.txt", "list_eval_partition.txt"])
@pytest.mark.parametrize("target", ["/dev/zero", "nowhere"])
def test_a_list_that_is_a_device_or_a_broken_link_is_named(name, target, tmp_path):
    write_celeba(tmp_path / "data", 4)
    (tmp_path / "data" / name).unlink(missing_ok=True)
    if name == "captions.csv":
        (tmp_path / "data" / "list_attr_celeba.txt").unlink()
    (tmp_path / "data" / name).symlink_to(target)
    assert f"{name}: expected a list that can be read" in refusal_of(open_table, tmp_path / "data")


def test_a_link_in_a_data_folder_may_lead_to_pictures_elsewhere(tmp_path):
    write_celeba(tmp_path / "disk", 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "disk" / "img_align_celeba")
    (tmp_path / "data" / "captions.csv").write_text("file,caption\n000001.JPG,a man\n000002.jpg,a woman\n")
    with pytest.warns(UserWarning, match="left out 2 pictures"):
        table = open_table(tmp_path / "data")
    assert read_image(table.root / table.files[0]).shape == (64, 64, 3)


# ---------------------------------------------------------------------- settings as JSON


GOOD = Config.from_preset("tiny").to_json()


def changed(**model) -> str:
    r"""`GOOD` with other settings of the model."""
    settings = json.loads(GOOD)
    settings["model"] |= model
    return json.dumps(settings)


SETTINGS = {
    "nested too deep": ("[" * 100_000, "nested too deep"),
    "objects nested too deep": ('{"a":' * 100_000, "nested too deep"),
    "a name twice": (GOOD.replace('"format": 1', '"format": 1, "format": 1'), "'format' is given twice"),
    "a setting twice": (GOOD.replace('"seed": 0', '"seed": 0, "seed": 1'), "'seed' is given twice"),
    "NaN": (GOOD.replace('"seed": 0', '"seed": NaN'), "NaN is not finite"),
    "Infinity": (GOOD.replace('"lr": 0.0003', '"lr": -Infinity'), "-Infinity is not finite"),
    "1e999": (GOOD.replace('"lr": 0.0003', '"lr": 1e999'), "1e999 is not finite"),
    "a number of 5,000 digits": (GOOD.replace('"seed": 0', '"seed": ' + "9" * 5000), "beyond 64 bits"),
    "a number of 65 bits": (GOOD.replace('"seed": 0', f'"seed": {2**63}'), "beyond 64 bits"),
    "2 MB": (GOOD + " " * 2_000_000, "more than 1,048,576 bytes"),
    "UTF-16": (GOOD.encode("utf-16"), "could not read"),
    "latin-1": (GOOD.replace("drawn", "dr\xe4wn").encode("latin-1"), "could not read"),
    "NUL": (GOOD + "\0", "could not read"),
    "two in one": (GOOD + GOOD, "could not read"),
    "a setting that is missing": (GOOD.replace('"prediction": "v",', ""), "missing settings"),
    "escape codes as a name": (GOOD.replace('"seed": 0', r'"\u001b[2Jseed": 0'), r"unknown settings"),
    "escape codes as a preset": (GOOD.replace('"preset": "tiny"', r'"preset": "\u001b[2J"'), "preset"),
    "a preset of a list": (GOOD.replace('"preset": "tiny"', '"preset": []'), "preset"),
    "a width of 10^9": (
        GOOD.replace('"channels": [', '"channels": [1000000000,'),
        "channels of at most 4096",
    ),
    "64 ResBlocks of giant widths": (
        changed(channels=[4096] * 6, res_blocks=64, image_size=1024),
        "a model of at most 1,000,000,000 parameters",
    ),
    "a VAE of giant widths": (
        changed(vae_channels=[4096] * 6, image_size=1024),
        "a model of at most 1,000,000,000 parameters",
    ),
    "timesteps": (
        GOOD.replace('"timesteps": 1000', '"timesteps": 1000000000'),
        "timesteps of at most 100000",
    ),
    "wordings": (
        GOOD.replace('"caption_variants": 1', f'"caption_variants": {10**12}'),
        "caption_variants of at most",
    ),
    "drawn faces": (
        GOOD.replace('"drawn_images": 128', f'"drawn_images": {10**12}'),
        "drawn_images of at most",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_hostile_configuration_is_refused_in_one_printable_line(case, tmp_path):
    content, expected = SETTINGS[case]
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal = refusal_of(Config.read, path)
    assert expected in refusal
    assert refusal.isprintable() and len(refusal) < 2500


def test_a_byte_order_mark_before_the_settings_is_no_harm(tmp_path):
    (tmp_path / "config.json").write_text(GOOD, encoding="utf-8-sig")
    assert Config.read(tmp_path / "config.json") == Config.from_preset("tiny")


@pytest.mark.parametrize("preset", ["tiny", "drawn64", "drawn128", "celeba64", "celeba128"])
def test_the_parameters_are_counted_within_a_factor_of_two(preset):
    config = Config.from_preset(preset).model
    with torch.device("meta"):
        count = sum(p.numel() for network in networks(config) for p in network.parameters())
    assert count / 2 < parameters(config) < count * 2


ABSURD = [
    ("vae", "block_out_channels", [32] * 100_000),  # the picture's side would have 30,000 digits
    ("unet", "block_out_channels", [32] * 100_000),
    ("unet", "block_out_channels", [10**9, 10**9]),
    ("unet", "block_out_channels", [4096] * 6),
    ("unet", "layers_per_block", 10**6),
    ("unet", "sample_size", 1e300),
]


@pytest.mark.slow
def test_a_diffusers_folder_may_not_ask_for_an_absurd_model(exported, tmp_path, capsys):
    for i, (part, key, value) in enumerate(ABSURD):
        path = linked(exported, tmp_path / str(i)) / part / "config.json"
        replace(path, json.dumps(json.loads(path.read_text()) | {key: value}).encode())
        refused(capsys, export.main, "--reverse", tmp_path / str(i), tmp_path / "out")


# ------------------------------------------------------------------- sizes, before memory is taken


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [head, *chunks, chunk(b"IDAT", zlib.compress(bytes(8 * 25))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deflated(megabytes):
    packer = zlib.compressobj(1)
    return b"".join([packer.compress(bytes(2**20)) for _ in range(megabytes)] + [packer.flush()])


def claims(fmt, kind, side):
    r"""A picture of 263 x 263 whose header says another size."""
    content = to_bytes(lambda to: Image.new("RGB", (263, 263)).save(to, fmt))
    return content.replace(struct.pack(kind, 263, 263), struct.pack(kind, side, side))


TEXT_BOMB = deflated(200)
PICTURES = {
    "PNG": png(60_000, 60_000),
    "PNG of 64 megapixels": png(8000, 8000),
    "PNG with a bomb in zTXt": png(8, 8, chunk(b"zTXt", b"a\0\0" + TEXT_BOMB)),
    "PNG with a bomb in iTXt": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + TEXT_BOMB)),
    "PNG with a thousand texts": png(
        8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1)))] * 1000
    ),
    "JPEG": claims("JPEG", ">HH", 65_500),
    "JPEG of 64 megapixels": claims("JPEG", ">HH", 8000),
    "GIF": claims("GIF", "<HH", 65_535),
    "GIF of 64 megapixels": claims("GIF", "<HH", 8000),
    "BMP": claims("BMP", "<ii", 60_000),
    "BMP of 64 megapixels": claims("BMP", "<ii", 8000),
}


def safetensors(header, length=None, content=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHTS = {
    "10^12 elements": safetensors({"conv_in.bias": tensor([10**6, 10**6], 0, 4 * 10**12)}),
    "10^12 elements in 8 bytes": safetensors({"conv_in.bias": tensor([10**12], 0, 8)}, content=bytes(8)),
    "2^64 elements": safetensors({"conv_in.bias": tensor([2**32, 2**32], 0, 0)}),
    "a header longer than the file": safetensors({}, length=10**6),
    "a header of 2^63 bytes": safetensors({}, length=2**63),
    "tensors that overlap": safetensors(
        {"conv_in.bias": tensor([2], 0, 8), "conv_in.weight": tensor([2], 4, 12)}, content=bytes(12)
    ),
    "a hole between tensors": safetensors({"conv_in.bias": tensor([1], 4, 8)}, content=bytes(8)),
    "a tensor twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        content=bytes(4),
    ),
    "a nested header": safetensors(b"[" * 100_000),
    "a number beyond all bits": safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 400 + b'],"data_offsets":[0,4]}}'
    ),
    "an unknown type": safetensors({"conv_in.bias": tensor([1], 0, 4, "F33")}, content=bytes(4)),
    "100,000 tensors": safetensors({f"t{i}": tensor([0], 0, 0) for i in range(10**5)}),
    "escape codes as a name": safetensors({"\x1b[2J": tensor([1], 0, 4)}, content=bytes(4)),
}


def torch_bomb(to):
    r"""A torch file, deflated: 500 MB of zeros in 500 KB."""
    plain = zipfile.ZipFile(
        io.BytesIO(to_bytes(lambda to: torch.save({"token_embedding.weight": torch.ones(25)}, to)))
    )
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as file:
        for name in plain.namelist():
            with file.open(name, "w") as out:
                for part in [bytes(2**20)] * 500 if name.endswith("data/0") else [plain.read(name)]:
                    out.write(part)


def sparse_state(to):
    r"""Right in every name and shape."""
    shapes = {name: tensor.shape for name, tensor in torch.nn.Module.state_dict(TextTower().tower).items()}
    with torch.sparse.check_sparse_tensor_invariants(True):
        torch.save({name: torch.sparse_coo_tensor(size=shape) for name, shape in shapes.items()}, to)


BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**46).to_bytes(6, "little") + b"\x85R."
TEXTS = {  # states of text weights, each of which torch's own reader lets pass or tries
    "a bomb": torch_bomb,
    "10^12 elements that share one": lambda to: torch.save(
        {"positional_embedding": torch.ones(1).expand(10**12)}, to
    ),
    "sparse": sparse_state,
    "an enormous bytearray": BYTEARRAY,
}
HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"


def npy(descr, shape):
    header = (HEADER % (descr, shape)).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64)


ARRAYS = {
    "10^12 elements": npy("<f4", "(1000000000000,)"),
    "2^70 elements": npy("<f4", f"({2**70},)"),
    "fewer than none": npy("<f4", "(-5,)"),
    "another shape": npy("|u1", "(4,)"),
    "objects": npy("|O", "(1,)"),
    "code for a header": npy("<f4", "__import__('os').abort()"),
    "nothing": b"",
}
LINES = {  # what takes 100 MB is made when it is needed
    "one line of 100 MB": ("captions.csv", lambda to: to.write(b"file,caption\n" + b"," * 100_000_000)),
    "millions of columns": ("captions.csv", b"file,caption\n" + b"a.png,b\n" + b"a," * 5_000_000),
    "a row of quotes over many lines": ("captions.csv", b"file,caption\n" + (b'"\n"' + b"," * 1000) * 20_000),
    "a field beyond csv's limit": ("captions.csv", b"file,caption\na.png," + b"x" * 200_000),
    "words of 100 MB": ("list_attr_celeba.txt", lambda to: to.write(b"1\n" + b"a " * 50_000_000)),
    "a word of 100 MB": ("list_attr_celeba.txt", lambda to: to.write(b"1\n" + b"Male" * 25_000_000)),
    "a count of 5,000 digits": ("list_attr_celeba.txt", b"9" * 5000 + b"\nMale\n"),
    "a count with a strange space": ("list_attr_celeba.txt", b"3\x1f\nMale\n"),
    "deep jsonl": ("metadata.jsonl", b'{"file": ' + b"[" * 100_000),
    "a name twice in jsonl": ("metadata.jsonl", b'{"file": "a.png", "file": "b.png", "text": "a man"}'),
    "1e999 in jsonl": ("metadata.jsonl", b'{"file": "a.png", "text": 1e999}'),
    "NUL": ("captions.csv", b"file,caption\na.png,a\0man\n"),
    "UTF-16 without its mark": ("captions.csv", "file,caption\na.png,a man\n".encode("utf-16-le")),
    "escape codes": ("captions.csv", b"file,\x1b[2Jcaption\x07\na.png,\x1b]0;title\x07\n"),
}


CHILD = r"""
import json, re, resource, sys, warnings
from pathlib import Path
import numpy as np
from ddpm.celeba.images import BadImage, read_image
from ddpm.celeba.lists import open_table
from ddpm.model import TextToImage
from ddpm.text import TextTower
from ddpm.tools import text_weights
from ddpm.tools.arrays import cached_array
from ddpm.tools.errors import UserError

warnings.simplefilter("ignore")
TOWER = TextTower()
text_weights.random_tower = lambda: TOWER
home = Path(sys.argv[1])
readers = {
    "pictures": lambda p: read_image(p, 16),
    "arrays": lambda p: cached_array(p, (3,), np.float32, None),
    "texts": lambda p: text_weights.named_tower(str(p)),
    "runs": TextToImage.load,
    "lists": open_table,
}
def status(what):
    return int(re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") * 1024 + int(sys.argv[2]),) * 2)
for kind, read in readers.items():
    for path in sorted((home / kind).iterdir()):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        try:
            read(path)
            answer = "not refused"
        except (UserError, BadImage) as error:
            answer = "refused: " + str(error)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps([kind, path.name, answer, (status("VmHWM") - before) / 1024]), flush=True)
"""


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, content if isinstance(content, bytes) else to_bytes(content))


def gigabyte(path):
    r"""A file of that length, all holes."""
    put(path, b"")
    os.truncate(path, 10**9)


def lay_out(home, trained) -> int:
    r"""Every case below `home`, in a folder named after its reader; how many there are."""
    for case, content in PICTURES.items():
        put(home / "pictures" / case, content)
    for case, content in ARRAYS.items():
        put(home / "arrays" / case, content)
    for case, content in TEXTS.items():
        put(home / "texts" / f"{case}.pt", content)
    for case, content in WEIGHTS.items():
        put(home / "texts" / f"{case}.safetensors", content)
        for part in ("vae", "ema", "text"):
            put(linked(trained, home / "runs" / f"{part}, {case}") / f"{part}.safetensors", content)
    large = linked(trained, home / "runs" / "weights of another size")
    change_config(large, "model", channels=[1024, 1024], res_blocks=5, head_width=32)
    gigabyte(linked(trained, home / "runs" / "settings of 1 GB") / "config.json")
    for case, (name, content) in LINES.items():
        put(home / "lists" / case / name, content)
    for name in ("captions.csv", "metadata.jsonl", "list_attr_celeba.txt"):
        gigabyte(home / "lists" / f"1 GB in {name}" / name)
    return len(PICTURES) + len(ARRAYS) + len(TEXTS) + 4 * len(WEIGHTS) + 2 + len(LINES) + 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="limits the memory as Linux allows to")
def test_what_claims_to_be_large_is_refused_in_little_memory(trained, tmp_path):
    r"""Every case in one process that may take 1 GiB of addresses; a list of 100 MB is read before its lines are."""
    cases = lay_out(tmp_path, trained)
    child = [sys.executable, "-c", CHILD, tmp_path, str(2**30)]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == cases
    for kind, name, answer, grown in answers:
        most = 400 if "100 MB" in name else 200 if "tensors" in name else 120
        assert answer.startswith("refused: ") and answer.isprintable(), (kind, name, answer)
        assert grown < most, (kind, name, answer, grown)


@pytest.mark.parametrize("case", ["10^12 elements", "a header of 2^63 bytes", "100,000 tensors"])
def test_weights_that_claim_to_be_large_are_refused(case, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS[case])
    assert "w.safetensors" in refusal_of(text_weights.named_tower, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_that_claims_to_be_large_is_refused(case, tmp_path):
    (tmp_path / "x").write_bytes(PICTURES[case])
    with pytest.raises(BadImage):
        read_image(tmp_path / "x", 16)


def test_a_list_beyond_its_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "captions.csv", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "a list of at most 128 MiB" in refusal_of(open_table, tmp_path)


# ----------------------------------------------------------------------------------------- prompts


PROMPTS = {
    "10,000 characters": "a smiling woman " * 625,
    "one word of 10,000 letters": "".join(
        np.random.default_rng(0).choice(list(string.ascii_letters), 10_000)
    ),
    "10,000 emoji": "\U0001f600" * 10_000,
    "emoji of many parts": "\U0001f468‍\U0001f469‍\U0001f467 \U0001f3f4\U000e0067\U000e0062 \U0001f1e9\U0001f1ea",
    "right to left": "امرأة تبتسم ‮ אישה",
    "control characters": "a\x01man\x1b[2J\x1b]0;title\x07\x7f\x9b31m\r\n\t\x0b",
    "a lone surrogate": "a \ud83d man \udcff",
    "only punctuation": "!?.,;:'\"()[]{}<>/\\|@#$%^&*_-+=~`",
    "a path": "../../etc/passwd",
    "an absolute path": "/tmp/x.png",
    "a path of Windows": r"C:\NUL.png",
    "a flag in it": "a man --out x",
    "a format": "{prompt} %s ${HOME} $(id) `id`",
    "combining marks": "a" + "̈" * 1000,
    "spaces alone": "   　​﻿",
    "NUL": "a\0man",
    "HTML": "&lt;script&gt;alert(1)&lt;/script&gt;" * 100,
    "nothing": "",
}


@pytest.fixture(scope="module")
def model(trained):
    return TextToImage.load(trained)


@pytest.mark.parametrize("case", slow_but_first(PROMPTS))
def test_a_strange_prompt_draws_a_picture_and_names_no_file(case, run, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToImage, "load", lambda *_: model)  # each time the same
    prompt = PROMPTS[case]
    before = set(tmp_path.rglob("*"))
    for out in ("grid.png", "folder"):
        arguments = [prompt, "--model", str(run), "--steps", "1", "--guidance", "2", "--device", "cpu"]
        assert exit_code(sample.main, [*arguments, "--out", out, "--negative", prompt]) == 0
    made = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert made == {"grid.png", "folder", "folder/0000.png"}
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).replace("\r", "\n").split("\n"))
    with Image.open("grid.png") as grid, Image.open("folder/0000.png") as single:
        grid.load(), single.load()
        assert json.loads(grid.text["prompt"]) == [prompt]
        assert single.text["prompt"] == single.text["negative"] == as_png_text(prompt)


def as_png_text(text):
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def test_no_more_of_a_prompt_is_read_than_can_matter(tower, monkeypatch):
    r"""Merging the letters of one word takes the square of its length."""
    lengths, encode = [], tower.tokenizer.encode
    monkeypatch.setattr(tower.tokenizer, "encode", lambda text: (lengths.append(len(text)), encode(text))[1])
    with pytest.warns(UserWarning, match="is cut to 75"):
        tower.tokenize(["a" * 100_000])
    assert lengths and max(lengths) <= 4096


# -------------------------------------------------------------------------------------- the screen


def test_a_refusal_is_one_printable_line_whatever_came(capsys):
    def main(argv):
        name = "\x1b[2J\x1b]0;title\x07\x9b\u202e\ud800\r" + "x" * 10_000
        raise UserError(f"expected a name,\n got {name}; mend it")

    refusal = refused(capsys, main)
    assert r"\x1b[2J" in refusal and r"\u202e" in refusal and refusal.endswith("; mend it")
    assert len(refusal) < 2500


def test_names_from_a_data_folder_reach_no_screen_raw(tmp_path, capsys):
    data = tmp_path / "\x1b[2Jdata"
    data.mkdir()
    (data / "captions.csv").write_text("file,caption\n\x1b]0;title\x07.png,a man\n")
    refusal = refused(capsys, train.main, *QUICK, "--data", data, "--out", tmp_path / "run")
    assert r"\x1b[2Jdata" in refusal and r"\x1b]0;title\x07.png" in refusal


# --------------------------------------------------------------------------------- drawn at random


QUIETLY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = {"model": list(vars(ModelConfig())), "training": list(vars(TrainConfig()))}


def answers_or_refuses(action):
    r"""What `action` returns; None when it refuses, which is one printable line."""
    try:
        return action()
    except (UserError, BadImage) as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 2500
        return None


@QUIETLY
@given(value=JSON)
def test_any_json_is_a_configuration_or_refused(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert answers_or_refuses(lambda: Config.read(tmp_path / "config.json")) is None


@QUIETLY
@given(data=st.data(), value=JSON | st.sampled_from([0, -1, 2**31, 1.5, "random", [32, 64], "../x", "v"]))
def test_a_configuration_with_anything_in_one_place_is_refused_or_goes_round(data, value, tmp_path):
    section = data.draw(st.sampled_from(sorted(FIELDS)))
    values = json.loads(GOOD)
    values[section][data.draw(st.sampled_from(FIELDS[section]))] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    config = answers_or_refuses(lambda: Config.read(path))
    if config is not None:
        path.write_text(config.to_json())
        assert Config.read(path) == config


@QUIETLY
@given(text=st.dictionaries(st.sampled_from(["prompt", "seed", "negative"]), st.text(max_size=200)))
def test_any_text_in_a_png_comes_back(text, tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), text)
    with Image.open(tmp_path / "a.png") as read:
        read.load()
        assert read.text == {key: as_png_text(value) for key, value in text.items()}
    assert read_image(tmp_path / "a.png", 8).shape == (8, 8, 3)


# -------------------------------------------------------------------------------------- the corpus


def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz_readers", ROOT / "tests/fuzz/fuzz_readers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fuzzers_corpus_is_small_and_nothing_in_it_escapes_a_reader():
    fuzz = fuzzer()
    paths = [path for path in fuzz.CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in paths} == set(fuzz.TARGETS)
    assert sum(path.stat().st_size for path in paths) < 50_000
    for path in paths:
        fuzz.check(path.parent.name, path.read_bytes())


def test_the_fuzzer_sees_a_traceback_and_a_line_that_is_not_printable(monkeypatch):
    fuzz = fuzzer()
    fuzz.TARGETS["wrong"] = lambda data: {}[data]
    with pytest.raises(KeyError):
        fuzz.check("wrong", b"a")
    fuzz.TARGETS["raw"] = lambda data: (_ for _ in ()).throw(BadImage("\x1b[2J"))
    with pytest.raises(AssertionError, match="not one printable line"):
        fuzz.check("raw", b"a")


@pytest.mark.slow
def test_a_state_that_claims_or_inflates_to_more_than_its_file_is_damaged_before_memory_is_taken(tmp_path):
    claims, packed = tmp_path / "claims.pt", tmp_path / "packed.pt"
    torch.save({"format": 1, "sha256": "", "network": torch.ones(1).expand(700_000_000)}, claims)
    packed.write_bytes(to_bytes(torch_bomb))
    for path in (claims, packed):
        assert path.stat().st_size < 10_000_000
        tracemalloc.start()
        with pytest.raises(Damaged, match="claims more numbers|packed"):
            read_state(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
        tracemalloc.stop()


def test_a_field_of_metrics_too_long_for_csv_is_one_line(tmp_path):
    (tmp_path / "metrics.csv").write_text(",".join(COLUMNS) + "\n" + "1" * 200_000 + "\n")
    with pytest.warns(UserWarning, match="1 lines that are no metrics; kept as"):
        assert read_metrics(tmp_path / "metrics.csv") == []
    assert (tmp_path / "metrics.kept.1.csv").stat().st_size > 200_000


def test_no_line_of_a_command_carries_escape_codes(capsys):
    def main(argv):
        warnings.warn("a \x1b[2J name", stacklevel=1)
        say("skipped \x1b[2Jx.jpg")
        raise OSError(2, "No such file", "\x1b[2Jx")

    assert exit_code(main) == 2
    with pytest.raises(SystemExit):
        Parser("x").parse_args(["--\x1b[2Jx"])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and shown.err.count("\\x1b") == 3
