r"""The commands that README and the docs show, executed in a small form: the page's own flags, sizes cut to seconds.

Of commands with the same flags the first is executed; tests/test_docs.py parses them all. Each runs in a folder of its
own that holds what the page presumes: the data, and the run that it goes on from. `.ci/run` executes the commands of
pip, pytest and sphinx, and tests/test_parallel.py launches `torchrun`.
"""

import copy
import shutil
from pathlib import Path

import pytest
from PIL import Image
from small_runs import make_runs_cheap
from test_docs import blocks, commands

from ddpm import __main__ as sample
from ddpm.celeba.faces import write_celeba
from ddpm.evaluation import __main__ as evaluation
from ddpm.evaluation import classifier, shared
from ddpm.export import __main__ as export
from ddpm.tools import text_weights
from ddpm.tools.command import exit_code
from ddpm.training import __main__ as train

MAINS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "ddpm.export": export.main,
    "ddpm.evaluation": evaluation.main,
}
BY_CI = ("python3 -m venv", "pip install", "python -m pytest", "python -m sphinx")
BY_A_TEST = ("python docs/derivation.py", "python tests/benchmarks")  # test_derivation.py, test_benchmarks.py
LONG = ("python tests/trials.py",)  # trainings that are measured
SMALL_MODEL = (
    "--image-size 16 --vae-channels 32,32 --vae-layers 1 --latent-channels 4 --channels 32,32 --attention-levels 1 "
    "--res-blocks 1 --head-width 32 --text-weights random --drawn-images 400"
)
SMALL_TRAINING = (
    "--batch-size 8 --vae-batch-size 8 --vae-steps 3 --unet-steps 3 --steps-per-epoch 0 --epochs 0 --max-minutes 0 "
    "--warmup 1 --save-every 2 --sample-every 3"
)
SMALL = f"{SMALL_MODEL} {SMALL_TRAINING}".split()
SMALLER = {
    "--steps": "2",
    "--num": "2",
    "--n": "8",
    "--stop-after": "2",
    "--max-steps": "8",
    "--unet-steps": "8",
    "--max-minutes": "1",
}
FAST = ["train.py"]  # the default run: it needs no run before it


def shown() -> list:
    r"""[program, *arguments] of each command shown, of those with the same flags the first, named by its page."""
    found = {}
    for page, text in (block.values for block in blocks("")):
        for words in commands(text):
            words = [word.removeprefix(".venv/bin/") for word in words]
            if words[0] == "torchrun":
                words = ["python", *words[words.index("train.py") :]]
            if words[0] == "error:" or " ".join(words).startswith((*BY_CI, *BY_A_TEST, *LONG)):
                continue
            program = words[1:] if words[1] != "-m" else words[2:]
            flags = {word for word in program if word.startswith("--")} - {*SMALL, *SMALLER}
            found.setdefault((program[0], *sorted(flags)), (program, page))
    return [
        pytest.param(
            words, id=f"{page} {' '.join(words)}"[:80], marks=[] if words == FAST else [pytest.mark.slow]
        )
        for words, page in found.values()
    ]


def small(words: list[str]) -> list[str]:
    r"""The arguments of a command, its sizes replaced by small ones, and those of a new model added."""
    program, *arguments = words
    arguments = [SMALLER.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
    if program == "train.py":
        added = [] if "--resume" in arguments else SMALL
        if "--distill" in arguments:  # the model is the teacher's
            added = [*SMALL_TRAINING.split(), "--trajectories", "8"]
        return [*arguments, *added, "--device", "cpu"]
    return arguments if program == "ddpm.export" else [*arguments, "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tower) -> Path:
    r"""A finished run, one stopped on its way, one whose VAE alone is trained, and an exported one."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        make_runs_cheap(patch)
        begin = ["--preset", "tiny", *SMALL, "--cache", str(folder / "cache"), "--device", "cpu"]
        for name, more in {"whole": [], "begun": ["--stop-after", "4"], "vae": ["--stage", "vae"]}.items():
            run = ["--timesteps", "50", "--out", str(folder / name)]
            assert exit_code(train.main, [*begin, *run, *more]) == 0
        patch.setattr(text_weights, "random_tower", lambda: tower)  # an export writes it
        assert exit_code(export.main, [str(folder / "whole"), str(folder / "exported")]) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    r"""The working folder of a reader, with what takes a command's time and not its meaning left out."""
    monkeypatch.chdir(tmp_path)
    make_runs_cheap(monkeypatch)
    monkeypatch.setattr(classifier, "STEPS", 3)
    for name, scope in evaluation.SCOPES.items():
        short = scope._replace(prompts=8, curve_prompts=4, guidances=(1.0, 3.0), steps=(2,))
        monkeypatch.setitem(evaluation.SCOPES, name, short)
    monkeypatch.setattr(shared, "feature_extractor", lambda *_: lambda x: x.flatten(1)[:, :64])
    write_celeba(tmp_path / "PATH", 200, seed=1)
    (tmp_path / "mine").mkdir()
    for i in range(12):
        Image.new("RGB", (40, 30), (i * 20, 90, 120)).save(tmp_path / f"mine/{i}.png")
    (tmp_path / "prompts.txt").write_text("a man\na woman\n")
    lines = ["file,caption", *(f"{i}.png,a flat colour number {i}" for i in range(12))]
    (tmp_path / "mine/captions.csv").write_text("\n".join(lines))
    return tmp_path


def at_hand(words: list[str], request, place: Path) -> list[str]:
    r"""Put the runs that a command names where it expects them; folders outside the reader's are moved into it."""
    words = [str(place / word[1:]) if word.startswith("/") else word for word in words]
    kind = "whole"
    if words[0] == "train.py":
        kind = "vae" if "unet" in words else "begun"
    if "--distill" in words:
        kind, words = "whole", ["runs/ships" if word == "shipped" else word for word in words]
    for before, word in zip(words, words[1:], strict=False):
        is_read = word.startswith("runs/") and before != "--out" and "--reverse" not in words
        if before in ("--init-image", "--mask"):
            (place / word).parent.mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), "white").save(place / word)
        if before == "--reverse":
            shutil.copytree(request.getfixturevalue("runs") / "exported", place / word)
        elif word == "ddpm/weights" or is_read:
            shutil.copytree(request.getfixturevalue("runs") / kind, place / word)
    return words


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


MAKES = {"train.py": ".csv", "sample.py": ".png", "ddpm.export": ".json", "ddpm.evaluation": ".json"}


@pytest.mark.parametrize("words", shown())
def test_every_command_that_the_docs_show_runs(words, request, place, tower, monkeypatch, capsys):
    if words[0] == "ddpm.export":
        monkeypatch.setattr(text_weights, "random_tower", lambda: copy.deepcopy(tower))  # --half changes it
    if "--download" in words:
        monkeypatch.setattr("torchvision.datasets.CelebA", lambda *_, **__: None)  # the pictures are there
    arguments = small(at_hand(words, request, place))
    before = files(place)
    code = exit_code(MAINS[words[0]], arguments)
    printed = capsys.readouterr()
    assert code == 0 and "Traceback" not in printed.err, printed.err
    made = {path.suffix for path in files(place) - before}
    if "--dry-run" in words:
        assert not made and "parameters" in printed.out
    elif words[0] in MAKES and "--resume" not in words:
        assert MAKES[words[0]] in made
    elif words[0] == "train.py":
        (metrics,) = place.glob("runs/*/metrics.csv")
        assert len(metrics.read_text().splitlines()) > 1 + 4


def test_the_docs_show_each_program():
    programs = [block.values[0][0] for block in shown()]
    assert set(programs) == set(MAINS) and len(programs) > 35
