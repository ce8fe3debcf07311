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
from conftest import TINY, refusal_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import sample
import train
from ddpm.celeba.captions import ATTRIBUTES, parse
from ddpm.celeba.faces import write_celeba
from ddpm.celeba.images import BadImage, read_image
from ddpm.celeba.lists import open_table
from ddpm.celeba.sheets import MAX_BYTES
from ddpm.config import TEXT_FILE, Config, ModelConfig, add_flags, given_flags, parameters
from ddpm.export import __main__ as export
from ddpm.model import TextToImage, networks
from ddpm.text import TextTower
from ddpm.tools import command as cli
from ddpm.tools import text_weights
from ddpm.tools.arrays import cached_array
from ddpm.tools.errors import UserError
from ddpm.tools.grids import labelled_grid, save_png
from ddpm.training.run import COLUMNS, Damaged, Run, read_metrics, read_state

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
QUICK += ["--precision", "fp32", "--max-steps", "2"]


@pytest.fixture(autouse=True)
def one_tower(tower, monkeypatch):
    monkeypatch.setattr(text_weights, "random_tower", (lambda: tower))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tower):
    r"""A run with every file that a run folder can have, and its caches beside it."""
    home = tmp_path_factory.mktemp("runs")
    text_weights.save_tower(tower, home / "mine.safetensors")
    arguments = [*QUICK, "--text-weights", str(home / "mine.safetensors"), "--out", str(home / "run")]
    assert cli.exit_code(train.main, arguments) == 0
    (home / "mine.safetensors").unlink()
    return home / "run"


@pytest.fixture(scope="module")
def exported(trained):
    assert cli.exit_code(export.main, [str(trained), str(trained.parent / "diffusers")]) == 0
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


def refused(capsys, main, *arguments) -> str:
    r"""The one printable line, after the lines of progress, with which the command ends in exit code 2."""
    capsys.readouterr()
    try:
        code = cli.exit_code(main, [str(a) for a in arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    told = err.strip("\n").split("\n")[-1]
    assert code == 2, (out, err)
    assert told.startswith("error: ") and "Traceback" not in err
    assert all(line.isprintable() for line in (out + err).split("\n"))
    return told


# ------------------------------------------------------------------------------------------ payloads


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


def as_npy(trap):
    return to_bytes(lambda to: np.save(to, np.array([trap], dtype=object), allow_pickle=True))


def as_npz(trap):
    return to_bytes(lambda to: np.savez(to, a=np.array([trap], dtype=object)))


def as_torch(trap, zipped=True):
    return to_bytes(lambda to: torch.save({"weight": trap}, to, _use_new_zipfile_serialization=zipped))


def as_tar(trap):
    r"""What torch wrote before version 0.1.10."""

    def write(to):
        with tarfile.open(fileobj=to, mode="w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                member = tarfile.TarInfo(name)
                member.size = len(content := pickle.dumps(trap, 2))
                tar.addfile(member, io.BytesIO(content))

    return to_bytes(write)


PAYLOADS = {
    "pickle": lambda trap: pickle.dumps(trap, 2),
    "pickle as text": lambda trap: pickle.dumps(trap, 0),
    "pickle of a state": lambda trap: pickle.dumps({"weight": trap}, 4),
    "torch zip": as_torch,
    "torch legacy": lambda trap: as_torch(trap, zipped=False),
    "torch tar": as_tar,
    "npy of objects": as_npy,
    "npz of objects": as_npz,
}
TRUSTING = {
    "torch zip": lambda path: torch.load(path, weights_only=False),
    "torch legacy": lambda path: torch.load(path, weights_only=False),
    "torch tar": lambda path: torch.load(path, weights_only=False),
    "npy of objects": lambda path: np.load(path, allow_pickle=True),
    "npz of objects": lambda path: np.load(path, allow_pickle=True)["a"],
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_fires_where_it_is_trusted(payload, tmp_path):
    (tmp_path / "file").write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    with contextlib.suppress(Exception):  # what comes out is no state, but by then it is too late
        TRUSTING.get(payload, lambda path: pickle.loads(path.read_bytes()))(tmp_path / "file")
    assert (tmp_path / "mark").exists()


# a file of a run folder -> the commands that read it
RUN_FILES = {
    "config.json": [(sample.main, "a man", "--model"), (train.main, "--resume"), (export.main, "OUT")],
    "vae.safetensors": [(sample.main, "a man", "--model"), (export.main, "OUT")],
    "ema.safetensors": [(sample.main, "a man", "--model"), (export.main, "OUT")],
    "unet.safetensors": [(sample.main, "a man", "--weights", "unet", "--model")],
    "text.safetensors": [(sample.main, "a man", "--model"), (train.main, "--resume"), (export.main, "OUT")],
    "state.pt": [(train.main, "--resume")],
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_payload_in_a_run_folder_executes_nothing(name, payload, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in [run / name, *run.glob("state.previous.pt")] if name == "state.pt" else [run / name]:
        replace(path, PAYLOADS[payload](Trap(tmp_path / "mark")))
    for main, *arguments in RUN_FILES[name]:
        arguments = ["--weights=ema", run, "out"] if main is export.main else [*arguments, run]
        assert name in refused(capsys, main, *arguments)
    assert not (tmp_path / "mark").exists()
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_for_metrics_executes_nothing(payload, run, tmp_path):
    replace(run / "metrics.csv", PAYLOADS[payload](Trap(tmp_path / "mark")))
    with contextlib.suppress(ValueError):
        Run(run, Config.read(run / "config.json"), True, 0.0)
    assert not (tmp_path / "mark").exists()


DIFFUSERS_FILES = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", DIFFUSERS_FILES)
def test_a_payload_in_a_diffusers_folder_executes_nothing(name, payload, exported, tmp_path, capsys):
    folder = linked(exported, tmp_path / "diffusers")
    replace(folder / name, PAYLOADS[payload](Trap(tmp_path / "mark")))
    assert name in refused(capsys, export.main, "--reverse", folder, tmp_path / "out")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pt", "w.npy"])
def test_a_payload_as_text_weights_executes_nothing(name, payload, tmp_path, capsys):
    (tmp_path / name).write_bytes(PAYLOADS[payload](Trap(tmp_path / "mark")))
    arguments = [*QUICK, "--text-weights", tmp_path / name, "--out", tmp_path / "run"]
    assert name in refused(capsys, train.main, *arguments)
    assert not (tmp_path / "mark").exists()


LISTS = (
    "list_attr_celeba.txt",
    "list_attr_celeba.csv",
    "captions.csv",
    "metadata.csv",
    "metadata.jsonl",
    "any.csv",
)


@pytest.mark.parametrize("payload", PAYLOADS)
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


def test_the_commands_refuse_a_payload_in_every_cache(trained, run, tmp_path, capsys):
    caches = sorted((trained.parent / "cache").glob("*.npy"))
    assert [path.name.split("-")[0] for path in caches] == ["latents", "pictures", "texts"]
    for path in caches:
        cache = linked(trained.parent / "cache", tmp_path / path.stem)
        replace(cache / path.name, as_npy(Trap(tmp_path / "mark")))
        told = refused(
            capsys, train.main, "--resume", run, "--max-steps", 3, "--cache", cache, "--device", "cpu"
        )
        assert path.name in told and "delete the file" in told
    assert not (tmp_path / "mark").exists()


# --------------------------------------------------------------------------- paths and names inside files


OUTSIDE = [
    "/etc/passwd",
    "../secret.safetensors",
    "../../secret",
    r"\\evil\share\w",
    r"C:\w.pt",
    "a/b",
    "w.pt",
    "",
    ".",
]


@pytest.mark.parametrize("weights", OUTSIDE)
def test_a_configuration_cannot_name_text_weights_outside_its_folder(
    weights, run, tmp_path, capsys, monkeypatch
):
    (run / TEXT_FILE).rename(tmp_path / "secret.safetensors")  # it would load, if it were let
    change_config(run, "model", text_weights=weights)
    monkeypatch.setattr(TextTower, "from_file", classmethod(lambda *a, **k: pytest.fail("a file was read")))
    for main, *arguments in RUN_FILES["config.json"]:
        arguments = [run, tmp_path / "out"] if main is export.main else [*arguments, run]
        told = refused(capsys, main, *arguments)
        assert "text_weights" in told and TEXT_FILE in told


def test_the_runs_own_text_weights_go_before_any_path(run, tower):
    change_config(run, "model", text_weights="/etc/passwd")
    loaded = TextToImage.load(run)
    assert text_weights.fingerprint(loaded.text) == text_weights.fingerprint(tower)


def test_a_bare_word_is_a_tag_whatever_file_has_its_name(tmp_path, monkeypatch, tower):
    monkeypatch.chdir(tmp_path)
    text_weights.save_tower(tower, tmp_path / "openai")
    monkeypatch.setattr(TextTower, "from_tag", classmethod(lambda cls, tag: f"tag {tag}"))
    assert text_weights.named_tower("openai") == "tag openai"
    assert (
        text_weights.named_tower("./openai.pt") == "tag ./openai.pt"
    )  # no such file: told with the known tags


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
    told = refusal_of(lambda: open_table(data))
    assert "a path inside the folder" in told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_pipe_under_a_name_of_a_run_is_not_waited_for(name, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (run / name).unlink()
    os.mkfifo(run / name)
    if name in ("text.safetensors", "state.pt"):  # no file of that name: the run is one without it
        return
    for main, *arguments in RUN_FILES[name]:
        arguments = [run, "out"] if main is export.main else [*arguments, run]
        assert name in refused(capsys, main, *arguments)


def test_what_a_link_leads_to_is_not_told(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("password: swordfish\n" * 50)
    for name in ("vae.safetensors", "config.json"):
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "secret")
        assert "swordfish" not in refused(capsys, sample.main, "a man", "--model", run)


def change_config(folder, section, **values):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content[section].update(values)
    replace(path, json.dumps(content).encode())


# ----------------------------------------------------------------------------------- settings as JSON


GOOD = Config.from_preset("tiny").to_json()
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
    "escape codes as a name": (GOOD.replace('"seed": 0', r'"\u001b[2Jseed": 0'), r"unknown settings"),
    "escape codes as a preset": (GOOD.replace('"preset": "tiny"', r'"preset": "\u001b[2J"'), "preset"),
    "a preset of a list": (GOOD.replace('"preset": "tiny"', '"preset": []'), "preset"),
    "a width of 10^9": (GOOD.replace('"channels": [', '"channels": [1000000000,'), "widths up to 4096"),
    "64 ResBlocks of giant widths": (
        json.dumps({"format": 1, "training": {}, "model": {"channels": [4096] * 6, "res_blocks": 64}}),
        "a model of at most 1,000,000,000 parameters",
    ),
    "a VAE of giant widths": (
        json.dumps({"format": 1, "model": {"vae_channels": [4096] * 6, "image_size": 1024}, "training": {}}),
        "a model of at most 1,000,000,000 parameters",
    ),
    "timesteps": (
        GOOD.replace('"timesteps": 1000', '"timesteps": 1000000000'),
        "timesteps from 30 to 100000",
    ),
    "wordings": (
        GOOD.replace('"caption_variants": 1', '"caption_variants": 1000000000000'),
        "caption_variants of at",
    ),
    "drawn faces": (
        GOOD.replace('"drawn_images": 128', '"drawn_images": 1000000000000'),
        "drawn_images of at most",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_hostile_configuration_is_refused_in_one_printable_line(case, tmp_path):
    content, told = SETTINGS[case]
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal_of(lambda: Config.read(path))
    assert told in line
    assert line.isprintable() and len(line) < 2500


def test_a_byte_order_mark_before_the_settings_is_no_harm(tmp_path):
    (tmp_path / "config.json").write_text(GOOD, encoding="utf-8-sig")
    assert Config.read(tmp_path / "config.json") == Config.from_preset("tiny")


@pytest.mark.parametrize("preset", ["tiny", "drawn64", "celeba64", "lowvram"])
def test_the_parameters_are_counted_within_a_factor_of_two(preset):
    config = Config.from_preset(preset).model
    with torch.device("meta"):
        count = sum(p.numel() for network in networks(config) for p in network.parameters())
    assert count / 2 < parameters(config) < count * 2


def test_a_diffusers_folder_may_not_ask_for_an_absurd_model(exported, tmp_path, capsys):
    for i, (part, key, value) in enumerate(
        (
            ("vae", "block_out_channels", [32] * 100_000),  # the picture's side would have 30,000 digits
            ("unet", "block_out_channels", [32] * 100_000),
            ("unet", "block_out_channels", [10**9, 10**9]),
            ("unet", "block_out_channels", [4096] * 6),
            ("unet", "layers_per_block", 10**6),
            ("unet", "sample_size", 1e300),
        )
    ):
        path = linked(exported, tmp_path / str(i)) / part / "config.json"
        replace(path, json.dumps(json.loads(path.read_text()) | {key: value}).encode())
        refused(capsys, export.main, "--reverse", tmp_path / str(i), tmp_path / "out")


# ------------------------------------------------------------------------------- sizes, before memory is taken


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
        + chunk(b"IEND", b"")
    )


def deflated(megabytes):
    packer = zlib.compressobj(1)
    return b"".join([packer.compress(bytes(2**20)) for _ in range(megabytes)] + [packer.flush()])


def riff(width, height):
    r"""A WebP whose canvas is of any size, an animation of one frame of 16 x 16."""
    inner = to_bytes(lambda to: Image.new("RGB", (16, 16)).save(to, "WEBP", lossless=True))[12:]
    three = lambda n: struct.pack("<I", n)[:3]  # noqa: E731
    frame = three(0) * 2 + three(15) * 2 + three(100) + b"\0" + inner
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + three(width - 1) + three(height - 1)
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def claims(fmt, places, width, height):
    r"""A picture of 16 x 16 whose header says another size; `places` are (offset, struct format, value)."""
    content = bytearray(to_bytes(lambda to: Image.new("RGB", (16, 16)).save(to, fmt)))
    for place, kind, value in places(content, width, height):
        struct.pack_into(kind, content, place, value)
    return bytes(content)


def jpeg_places(content, width, height):
    start = content.index(b"\xff\xc0")
    return [(start + 5, ">H", height), (start + 7, ">H", width)]


def gif_places(content, width, height):
    frame = content.index(b"\x2c", 13)
    return [(6, "<H", width), (8, "<H", height), (frame + 5, "<H", width), (frame + 7, "<H", height)]


def bmp_places(content, width, height):
    return [(18, "<i", width), (22, "<i", height)]


def tiff(width, height):
    r"""Uncompressed, one strip of nothing."""
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 4, 1, height),
        (279, 4, 1, 8),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


TEXT_BOMB = deflated(200)
PICTURES = {
    "PNG": png(60_000, 60_000),
    "PNG of 64 megapixels": png(8000, 8000),
    "PNG with a bomb in zTXt": png(8, 8, chunk(b"zTXt", b"a\0\0" + TEXT_BOMB)),
    "PNG with a bomb in iTXt": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + TEXT_BOMB)),
    "PNG with a thousand texts": png(
        8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1)))] * 1000
    ),
    "JPEG": claims("JPEG", jpeg_places, 65_500, 65_500),
    "JPEG of 64 megapixels": claims("JPEG", jpeg_places, 8000, 8000),
    "GIF": claims("GIF", gif_places, 65_535, 65_535),
    "GIF of 64 megapixels": claims("GIF", gif_places, 8000, 8000),
    "BMP": claims("BMP", bmp_places, 60_000, 60_000),
    "BMP of 64 megapixels": claims("BMP", bmp_places, 8000, 8000),
    "WebP": riff(16_383, 16_383),
    "WebP of the largest canvas": riff(65_535, 65_535),
    "TIFF": tiff(60_000, 60_000),
    "TIFF of 64 megapixels": tiff(8000, 8000),
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
    plain = to_bytes(lambda buffer: torch.save({"token_embedding.weight": torch.ones(25)}, buffer))
    with (
        zipfile.ZipFile(io.BytesIO(plain)) as source,
        zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            with target.open(entry.filename, "w") as out:
                for _ in range(500 if entry.filename.endswith("data/0") else 1):
                    out.write(bytes(2**20) if entry.filename.endswith("data/0") else source.read(entry))


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
LINES = {
    "one line of 100 MB": ("captions.csv", b"file,caption\n" + b"," * 100_000_000),
    "millions of columns": ("captions.csv", b"file,caption\n" + b"a.png,b\n" + b"a," * 5_000_000),
    "a row of quotes over many lines": ("captions.csv", b"file,caption\n" + (b'"\n"' + b"," * 1000) * 20_000),
    "a field beyond csv's limit": ("captions.csv", b"file,caption\na.png," + b"x" * 200_000),
    "words of 100 MB": ("list_attr_celeba.txt", b"1\n" + b"a " * 50_000_000),
    "a word of 100 MB": ("list_attr_celeba.txt", b"1\n" + b"Male" * 25_000_000),
    "a count of 5,000 digits": ("list_attr_celeba.txt", b"9" * 5000 + b"\nMale\n"),
    "a count with a strange space": ("list_attr_celeba.txt", b"3\x1f\nMale\n"),
    "deep jsonl": ("metadata.jsonl", b'{"file": ' + b"[" * 100_000),
    "a name twice in jsonl": ("metadata.jsonl", b'{"file": "a.png", "file": "b.png", "text": "a man"}'),
    "1e999 in jsonl": ("metadata.jsonl", b'{"file": "a.png", "text": 1e999}'),
    "NUL": ("captions.csv", b"file,caption\na.png,a\0man\n"),
    "UTF-16 without its mark": ("captions.csv", "file,caption\na.png,a man\n".encode("utf-16-le")),
    "half a pair in UTF-16": (
        "captions.csv",
        "file,caption\na.png,\ud800\n".encode("utf-16", "surrogatepass"),
    ),
    "latin-1": ("captions.csv", "file,caption\na.png,Ren\xe9\n".encode("latin-1")),
    "escape codes": ("captions.csv", b"file,\x1b[2Jcaption\x07\na.png,\x1b]0;title\x07\n"),
}


CHILD = r"""
import json, re, resource, sys, warnings
from pathlib import Path
import numpy as np
from ddpm.cache import cached_array
from ddpm.config import Config, UserError
from ddpm.data import BadImage, open_table, read_image
from ddpm.model import TextToImage
from ddpm.text import TextTower

warnings.simplefilter("ignore")
text_weights.random_tower = lambda: TOWER
TOWER = TextTower()
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
            told = "not refused"
        except (UserError, BadImage) as error:
            told = "refused: " + str(error)
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        print(json.dumps([kind, path.name, told, (status("VmHWM") - before) / 1024]), flush=True)
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


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="limits the memory by what Linux tells"
)
def test_what_claims_to_be_large_is_refused_in_little_memory(trained, tmp_path):
    r"""Every case in one process that may take 1 GiB of addresses; a list of 100 MB is read before its lines are."""
    cases = lay_out(tmp_path, trained)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path, str(2**30)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == cases
    for kind, name, answer, grown in told:
        assert answer.startswith("refused: ") and answer.isprintable(), (kind, name, answer)
        assert grown < (400 if "100 MB" in name else 200 if "tensors" in name else 120), (
            kind,
            name,
            answer,
            grown,
        )


def test_a_list_beyond_its_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "captions.csv", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "a list of at most 128 MiB" in refusal_of(lambda: open_table(tmp_path))


# ------------------------------------------------------------------------------------------------ prompts


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


@pytest.mark.parametrize("case", PROMPTS)
def test_a_strange_prompt_draws_a_picture_and_names_no_file(case, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt = PROMPTS[case]
    common = ["--model", str(run), "--steps", "1", "--guidance", "1", "--device", "cpu"]
    before = {path for path in tmp_path.rglob("*")}
    for out in ("grid.png", "folder"):
        assert cli.exit_code(sample.main, [prompt, *common, "--out", out, "--negative", prompt]) == 0
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} - {
        path.relative_to(tmp_path).as_posix() for path in before
    }
    assert made == {"grid.png", "folder", "folder/0000.png"}
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).replace("\r", "\n").split("\n"))
    with Image.open("grid.png") as grid, Image.open("folder/0000.png") as single:
        grid.load(), single.load()
        assert json.loads(grid.text["prompt"]) == [prompt]
        expected = prompt.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
        assert single.text["prompt"] == single.text["negative"] == expected


def test_a_hundred_thousand_characters_are_cut_and_said_to_be(tower):
    with pytest.warns(UserWarning, match="is cut to 75") as told:
        states = tower(["\x1b[2J man " * 12_500])
    assert states.shape == (1, 77, 512) and bool(states.isfinite().all())
    assert all(str(warning.message).isprintable() and len(str(warning.message)) < 2000 for warning in told)


def test_no_more_of_a_prompt_is_read_than_can_matter(tower, monkeypatch):
    r"""Merging the letters of one word takes the square of its length."""
    lengths, encode = [], tower.tokenizer.encode
    monkeypatch.setattr(tower.tokenizer, "encode", lambda text: (lengths.append(len(text)), encode(text))[1])
    with pytest.warns(UserWarning, match="is cut to 75"):
        tower.tokenize(["a" * 100_000])
    assert lengths and max(lengths) <= 4096


# --------------------------------------------------------------------------------------------- the screen


def test_a_refusal_is_one_printable_line_whatever_came(capsys):
    def main(argv):
        raise UserError(
            "expected a name,\n got \x1b[2J\x1b]0;title\x07\x9b\u202e\ud800\r" + "x" * 10_000 + "; mend it"
        )

    told = refused(capsys, main)
    assert r"\x1b[2J" in told and r"\u202e" in told and told.endswith("; mend it")
    assert len(told) < 2500


def test_names_from_a_data_folder_reach_no_screen_raw(tmp_path, capsys):
    data = tmp_path / "\x1b[2Jdata"
    data.mkdir()
    (data / "captions.csv").write_text("file,caption\n\x1b]0;title\x07.png,a man\n")
    told = refused(capsys, train.main, *QUICK, "--data", data, "--out", tmp_path / "run")
    assert r"\x1b[2Jdata" in told and r"\x1b]0;title\x07.png" in told


# ------------------------------------------------------------------------------------------ drawn at random


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
FIELDS = {"model": list(vars(ModelConfig())), "training": list(vars(Config.from_preset("tiny").training))}


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
@given(data=st.data(), value=st.text(max_size=30) | st.integers().map(str) | st.floats().map(str))
def test_any_value_of_any_flag_is_refused_or_comes_back_from_json(data, value, tmp_path):
    parser = cli.Parser("")
    add_flags(parser)
    name = data.draw(st.sampled_from([n for names in FIELDS.values() for n in names]))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            flags = given_flags(parser.parse_args([f"--{name.replace('_', '-')}={value}"]))
    except SystemExit as exit_:
        assert exit_.code == 2 and told.getvalue().startswith("error: ")
        return
    config = answers_or_refuses(lambda: Config.from_preset("tiny", **flags))
    if config is not None:
        (tmp_path / TEXT_FILE).touch()
        (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8", errors="surrogatepass")
        assert Config.read(tmp_path / "config.json") == config


PIECES = st.sampled_from(
    [
        *ATTRIBUTES[:4],
        "Male",
        "a.png",
        "images/b.jpg",
        "../c.png",
        "file",
        "caption",
        "split",
        "train",
        "1",
        "-1",
        "0",
        "2",
        "12",
        ",",
        ";",
        "\t",
        " ",
        "\n",
        "\r\n",
        '"',
        "'",
        "{",
        "}",
        "[",
        ":",
        '"file": "a.png"',
        "\0",
        "\x1b[2J",
        "\ufeff",
        "é",
        "\x1f",
        "\x85",
        "999999999999999999999",
    ]
) | st.text(max_size=5)
SHEETS = st.lists(PIECES, max_size=60).map("".join)
ENCODINGS = st.sampled_from(["utf-8", "utf-16", "utf-16-le", "latin-1", "utf-8-sig"])


@QUIETLY
@given(
    text=SHEETS,
    name=st.sampled_from([*LISTS, "list_eval_partition.txt", "list_eval_partition.csv"]),
    to=ENCODINGS,
)
def test_any_list_of_pictures_is_a_table_or_refused(text, name, to, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "a.png").touch()
    if name.startswith("list_eval"):
        row = " ".join(["1"] * 40)
        (data / "list_attr_celeba.txt").write_text(f"{' '.join(ATTRIBUTES)}\na.png {row}\n")
    (data / name).write_bytes(text.encode(to, "replace"))
    table = answers_or_refuses(lambda: open_table(data))
    if table is not None:
        assert table.files == ("a.png",) and len(table.split) == 1
    shutil.rmtree(data)


ROWS = st.lists(
    st.sampled_from(
        ["stage", "step", "loss", "vae", "unet", "1", "2", "-1", "1e999", "nan", ",", "\n", '"', "\0"]
    )
    | st.text(max_size=5),
    max_size=40,
).map("".join)


@settings(QUIETLY, max_examples=40, phases=[Phase.generate])
@given(text=ROWS, header=st.booleans(), to=ENCODINGS)
def test_any_metrics_are_read_or_refused(text, header, to, run):
    whole = ",".join(COLUMNS) + "\n" + text if header else text
    replace(run / "metrics.csv", whole.encode(to, "replace"))
    answers_or_refuses(lambda: Run(run, Config.read(run / "config.json"), True, 0.0))


@QUIETLY
@given(text=st.dictionaries(st.sampled_from(["prompt", "seed", "negative"]), st.text(max_size=200)))
def test_any_text_in_a_png_comes_back(text, tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), text)
    with Image.open(tmp_path / "a.png") as read:
        read.load()
        assert read.text == {
            key: value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
            for key, value in text.items()
        }
    assert read_image(tmp_path / "a.png", 8).shape == (8, 8, 3)


@QUIETLY
@given(label=st.text(max_size=600))
def test_any_label_is_drawn_on_a_sheet_of_sane_size(label):
    sheet = labelled_grid(torch.zeros(1, 3, 16, 16), [label])
    assert sheet.width == 16 * 8 + 16 and 128 < sheet.height < 128 + 8 * 14 + 24


@QUIETLY
@given(sentence=st.text(max_size=300))
def test_any_sentence_is_parsed(sentence):
    assert set(parse(sentence)) <= set(ATTRIBUTES)


@settings(QUIETLY, max_examples=60)
@given(
    name=st.sampled_from(["config.json", "vae.safetensors", "ema.safetensors", TEXT_FILE]),
    place=st.floats(0, 1),
    content=st.binary(max_size=40),
    header=st.booleans(),
)
def test_a_run_folder_with_random_bytes_in_a_file_loads_or_is_refused(
    name, place, content, header, small_run
):
    r"""In the first kilobytes, where headers are, or anywhere."""
    path = small_run / name
    whole = path.read_bytes()
    at = int(place * min(len(whole), 4000 if header else len(whole)))
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = answers_or_refuses(lambda: TextToImage.load(small_run))
    assert loaded is None or isinstance(loaded, TextToImage)
    path.write_bytes(whole)


@pytest.fixture
def small_run(tmp_path, monkeypatch, remembering):
    r"""A run whose own text tower is one small matrix: loading it takes milliseconds."""

    def from_file(cls, path, quick_gelu=False):
        from ddpm.text import _read_state

        state, _ = _read_state(path)
        if set(state) != {"weight"} or state["weight"].shape != (2, 2):
            raise UserError(f"expected a small matrix in {path}, got others: {sorted(state)}")
        return remembering

    TextToImage(TINY, remembering).save(tmp_path / "run")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "run" / TEXT_FILE)
    monkeypatch.setattr(TextTower, "from_file", classmethod(from_file))
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------------- the corpus


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


def test_a_state_that_claims_or_inflates_to_more_than_its_file_is_damaged_before_memory_is_taken(tmp_path):
    claims, packed = tmp_path / "claims.pt", tmp_path / "packed.pt"
    torch.save({"format": 1, "sha256": "", "network": torch.ones(1).expand(700_000_000)}, claims)
    torch.save({"format": 1, "sha256": "", "network": torch.zeros(50_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file,
    ):
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    for path in (claims, packed):
        assert path.stat().st_size < 10_000_000
        tracemalloc.start()
        with pytest.raises(Damaged, match="claims more numbers|packed"):
            read_state(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
        tracemalloc.stop()


def test_a_field_of_metrics_too_long_for_csv_is_one_line(tmp_path):
    (tmp_path / "metrics.csv").write_text(",".join(COLUMNS) + "\n" + "1" * 200_000 + "\n")
    assert "expected the metrics of a run" in refusal_of(lambda: read_metrics(tmp_path / "metrics.csv"))


def test_no_line_of_a_command_carries_escape_codes(capsys):
    def main(argv):
        warnings.warn("a \x1b[2J name", stacklevel=1)
        cli.say("skipped \x1b[2Jx.jpg")
        raise OSError(2, "No such file", "\x1b[2Jx")

    assert cli.exit_code(main) == 2
    with pytest.raises(SystemExit):
        cli.Parser("x").parse_args(["--\x1b[2Jx"])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and said.err.count("\\x1b") == 3
