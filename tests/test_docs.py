r"""What the docs say, held against the code: names, commands, flags, messages, links. Needs no extra.

tests/browser looks at the built site.
"""

import ast
import importlib
import inspect
import re
import shlex
import socket
from collections import Counter
from configparser import ConfigParser
from functools import cached_property
from pathlib import Path

import pytest
import torch
import trials
from _ext import parsed
from benchmarks import __main__ as benchmarks
from benchmarks import gpu, quality
from PIL import Image
from torch.distributed.run import get_args_parser

from ddpm import __main__ as sample
from ddpm.celeba.faces import write_celeba
from ddpm.config import Config
from ddpm.evaluation import __main__ as evaluation
from ddpm.export import __main__ as export
from ddpm.layers import Downsample, Upsample
from ddpm.model import TextToImage
from ddpm.tools import text_weights
from ddpm.tools.command import exit_code
from ddpm.training import __main__ as train
from ddpm.unet import UNet
from ddpm.vae import KLVAE

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = [parsed.parse(file) for file in parsed.files()]


def blocks(language: str) -> list:
    r"""(page, text) of every block of a language."""
    return [
        pytest.param(page, text, id=f"{page}-{k}")
        for page, whole in PAGES.items()
        for k, (lang, text) in enumerate(BLOCK.findall(whole))
        if lang == language
    ]


def names_of_tests(path: Path) -> set[str]:
    r"""The test functions of a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


# -------------------------------------------------------------------------------------- the pages of the code


def test_every_file_of_the_house_has_one_page_and_the_core_comes_first():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ddpm").rglob("*.py")}
    assert sorted(files | {"train.py", "sample.py"}) == sorted(module.file for module in MODULES)
    assert len({parsed.page_of(module.file) for module in MODULES}) == len(MODULES)
    core = ["schedule", "diffusion", "losses", "layers", "attention", "vae", "unet", "text", "sampling"]
    assert [module.name for module in MODULES[:9]] == [f"ddpm.{name}" for name in core]


def is_method(name: str, value) -> bool:
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    written = inspect.isfunction(value) and "<string>" not in value.__code__.co_filename  # not by dataclass
    return not name.startswith("_") and (written or isinstance(value, property | cached_property))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_every_public_name_has_exactly_one_place(module):
    there = importlib.import_module(module.name)
    body = ast.parse(inspect.getsource(there)).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    names = {n for n, value in vars(there).items() if not n.startswith("_") and not inspect.ismodule(value)}
    listed = [name for thing in module.things for name in thing.names]
    assert {f"{module.name}.{name}" for name in names - imported} == set(listed)
    for thing in module.things:
        if thing.kind == "class":
            (name,) = thing.names
            methods = {n for n, v in vars(getattr(there, name.rpartition(".")[2])).items() if is_method(n, v)}
            placed = [m for member in thing.members for m in member.names] + list(thing.untold)
            assert {f"{name}.{method}" for method in methods} == set(placed)
            listed += placed
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_no_line_of_a_file_is_hidden_and_none_is_shown_twice(module):
    def lines_of(*texts: str) -> Counter:
        lines = [line.strip() for text in texts for line in text.splitlines() if not parsed.RULER.match(line)]
        bare = [line.removeprefix('r"""').removesuffix('"""').strip() for line in lines]
        return Counter(line for line in bare if line)

    things = [one for thing in module.things for one in (thing, *thing.members)]
    shown = lines_of(module.docstring, module.rest, *(t.docstring for t in things), *(t.code for t in things))
    assert shown == lines_of((ROOT / module.file).read_text(encoding="utf-8"))


def test_every_docstring_is_raw():
    for file in [*parsed.files(), "docs/conf.py", "docs/_ext/parsed.py", "docs/_ext/beside.py"]:
        text = (ROOT / file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                line = node.body[0].lineno
                assert text.splitlines()[line - 1].lstrip().startswith('r"""'), (file, line)


def test_the_diagram_of_the_unet_has_the_shapes_that_pass_through_it():
    shapes = Counter({"32 × 32 × 4": 2})  # what goes in and what comes out

    def note(block, args, output):
        shapes[" × ".join(map(str, (*output.shape[2:], output.shape[1])))] += 1

    with torch.device("meta"):
        unet = UNet()
        ends = [level.resnets[-1] for level in (*unet.down_blocks, *unet.up_blocks)]
        sizes = [part for part in unet.modules() if isinstance(part, Downsample | Upsample)]
        for block in (unet.conv_in, unet.mid_block, unet.conv_out, *ends, *sizes):
            block.register_forward_hook(note)
        unet(torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 512))
    drawn = (ROOT / "docs/images/diagram-unet.svg").read_text(encoding="utf-8")
    assert Counter(re.findall(r"\d+ × \d+ × \d+", drawn)) == shapes


# -------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    r"""The commands of a block, without comments, line ends, loops and settings of the environment."""
    lines = [part for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    words = [shlex.split(line, comments=True) for line in lines]
    words = [w[1:] if w and re.match(r"[A-Z_]+=", w[0]) else w for w in words]
    return [w for w in words if w and w[0] not in ("for", "done", "error:")]


def commands_of(page: str) -> list[list[str]]:
    r"""The commands of a page, in its blocks and its prose; --help parses nothing else."""
    text = PAGES[page]
    found = [
        words
        for language, block in BLOCK.findall(text)
        if language in ("", "sh")
        for words in commands(block)
    ]
    prose = re.findall(r"`((?:python|torchrun) [^`]+)`", BLOCK.sub("", text))
    found += [shlex.split(command.replace("--preset NAME", "--preset tiny")) for command in prose]
    return [words for words in found if words[-1] != "--help"]


def check_training(arguments: list[str], processes: int):
    r"""Parse as train.py does; the batches of a new run must be ones that its processes can share."""
    a = train.parser().parse_args(arguments)
    if a.distill:
        a.distill = Path("shipped")  # a teacher that is there
    if a.resume is None:
        settings = train.configuration(a).training
        for batch in (settings.batch_size, settings.vae_batch_size):
            assert batch % (processes * settings.accumulation) == 0, arguments


def check_tests(file: str, options: list[str]):
    r"""What -k chooses is some test of the file."""
    words = options[options.index("-k") + 1] if "-k" in options else ""
    names = names_of_tests(ROOT / file)
    assert any(all(word in name for word in words.split(" and ")) for name in names), (file, words)


def check_command(words: list[str]):
    r"""Parse a command as its program would, without running it."""
    match [word.removeprefix(".venv/bin/") for word in words]:
        case ["torchrun", *arguments]:
            a = get_args_parser().parse_args(arguments)
            assert a.training_script == "train.py"
            check_training(a.training_script_args, int(a.nnodes.split(":")[-1]) * int(a.nproc_per_node))
        case ["python", "train.py", *arguments] | ["python", "-m", "ddpm.training", *arguments]:
            check_training(arguments, 1)
        case ["python", "sample.py", *arguments] | ["python", "-m", "ddpm", *arguments]:
            sample.check(sample.parser().parse_args(arguments))
        case ["python", "-m", "ddpm.export", *arguments]:
            export.parser().parse_args(arguments)
        case ["python", "-m", "ddpm.evaluation", *arguments]:
            evaluation.parser().parse_args(arguments)
        case ["python", "tests/benchmarks", *arguments]:
            assert set(benchmarks.parser().parse_args(arguments).only.split(",")) <= set(benchmarks.PARTS)
        case ["python", "tests/benchmarks/gpu.py", *arguments]:
            gpu.parser().parse_args(arguments)
        case ["python", "tests/benchmarks/quality.py", *arguments]:
            quality.parser().parse_args(arguments)
        case ["python", "tests/trials.py", *arguments]:
            trials.parser().parse_args(arguments)
        case ["pip", "install", "-e", extras]:
            parts = ConfigParser()
            parts.read(ROOT / "setup.cfg")
            assert set(re.findall(r"\w+", extras)) <= set(parts["options.extras_require"])
        case ["python", "-m", "pytest", file, *options] if file.startswith("tests/"):
            check_tests(file, options)
        case ["python", script, *_] if not script.startswith("-"):
            assert (ROOT / script).is_file(), words
        case ["python3" | "python", "-m", "venv" | "pytest" | "sphinx" | "ddpm.celeba.faces", *_]:
            pass
        case _:
            pytest.fail(f"unknown: {words}")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("PATH", "pictures"):
        (tmp_path / folder).mkdir()
    for words in commands_of(page):
        check_command(words)


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_prose_are_taken_too(page):
    known = " ".join(m.parser().format_help() for m in (train, sample, evaluation, export, trials))
    for flag in re.findall(r"`(--[a-z][a-z-]+)", BLOCK.sub("", PAGES[page])):
        assert re.search(rf"{flag}\b", known), flag


# ----------------------------------------------------------------------------------------------- transcripts


@pytest.fixture
def sandbox(tmp_path, tower, monkeypatch):
    r"""A folder with the data sets and runs that the transcripts name; no network."""

    def unreachable(*_, **__):
        raise OSError("no network in tests")

    def refused(*_, **__):
        raise RuntimeError(
            "To download files from GDrive, 'gdown' is required. You can install it with 'pip install gdown'."
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("ddpm.tools.text_weights.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torchvision.datasets.CelebA", refused)
    monkeypatch.setattr(text_weights, "random_tower", lambda: tower)
    for folder in ("celeba", "quota", "cut", "torn"):
        write_celeba(tmp_path / folder, 60, seed=1)
    (tmp_path / "quota/list_attr_celeba.txt").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    listing = tmp_path / "cut/list_attr_celeba.txt"
    listing.write_text("202599\n" + listing.read_text().partition("\n")[2])
    for i in (1, 2, 3):
        picture = tmp_path / f"torn/img_align_celeba/{i:06}.jpg"
        picture.write_bytes(picture.read_bytes()[:600])
    (tmp_path / "celeba.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "wrong").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / "wrong" / name)
    (tmp_path / "wrong/captions.csv").write_text("picture,words\na.png,a cat\nb.png,a dog\n")
    (tmp_path / "runs/half").mkdir(parents=True)
    (tmp_path / "runs/half/config.json").write_text(Config.from_preset("tiny").to_json())
    return tmp_path


def transcripts(page: str) -> list[tuple[str, list[str]]]:
    r"""(command, lines that it prints) from the console blocks of a page; a line `...` stands for any."""
    found = []
    for language, text in BLOCK.findall(PAGES[page]):
        for line in text.splitlines() if language == "console" else ():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line != "...":
                found[-1][1].append(line)
    return found


def without_numbers(line: str) -> str:
    r"""Figures that training measures differ from machine to machine."""
    return line if line.startswith("error:") else re.sub(r"\d+\.\d+", "#", line)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if transcripts(page)])
def test_the_messages_in_the_docs_are_what_the_commands_print(page, sandbox, capsys):
    mains = {"train.py": train.main, "sample.py": sample.main, "-m": export.main}
    printed = {}
    for command, expected in transcripts(page):
        if command not in printed:
            program, *arguments = shlex.split(command)[1:]
            exit_code(mains[program], arguments[1:] if program == "-m" else arguments)
            printed[command] = [without_numbers(line) for line in "".join(capsys.readouterr()).splitlines()]
        for line in expected:
            there = "\n".join([command, line, "got:", *printed[command]])
            assert without_numbers(line) in printed[command], there


# ----------------------------------------------------------------------------------------- Python, links, facts


@pytest.mark.parametrize("page, text", blocks("python"))
def test_python_in_the_docs_runs(page, text, tiny, monkeypatch, tmp_path):
    code = compile(text, page, "exec")
    if "diffusers" in text:
        return  # tests/compat runs the pipeline
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToImage, "load", classmethod(lambda cls, folder=None: tiny))
    exec(code, {})


@pytest.mark.parametrize("page", PAGES)
def test_links_to_the_code_name_what_is_there(page):
    things = [one for module in MODULES for thing in module.things for one in (thing, *thing.members)]
    known = {name for thing in things for name in (*thing.names, *thing.untold)}
    up = ROOT if page == "README.md" else ROOT / "docs"
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", PAGES[page])):
        if target.startswith("https://"):
            continue
        file = (up / target).resolve()
        assert file.is_file() or target.startswith("code/"), target
        name = text.strip("`")
        if re.fullmatch(r"\w+(\.\w+)+", name) and file.suffix == ".py" and not name.endswith(".py"):
            assert parsed.meant(name, file.relative_to(ROOT).as_posix()) in known, name


def test_with_the_widths_in_the_docs_the_networks_have_stable_diffusions_size():
    (words,) = commands(BLOCK.findall(PAGES["to-stable-diffusion.md"])[0][1])
    config = train.configuration(train.parser().parse_args(words[2:])).model
    with torch.device("meta"):
        unet = UNet(4, 4, config.channels, config.attention_levels, config.res_blocks, 768, config.head_width)
        vae = KLVAE(config.vae_channels, config.vae_layers, config.latent_channels)
    for network in (unet, vae):
        assert f"{sum(p.numel() for p in network.parameters()):,}" in PAGES["to-stable-diffusion.md"]
