r"""The notebooks: as they are committed, and executed again; and make.py, which writes them.

Needs the extra `notebooks`: `pip install -e '.[notebooks]'`.
"""

import ast
import json
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
for package in ("nbclient", "ipykernel"):
    pytest.importorskip(package, reason="needs the extra notebooks")

import make  # noqa: E402
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook  # noqa: E402

from ddpm import diffusion, sampling  # noqa: E402
from ddpm.attention import Attention  # noqa: E402
from ddpm.layers import timestep_embedding  # noqa: E402
from ddpm.schedule import Schedule  # noqa: E402

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EVERYTHING = ROOT / "notebooks" / "00_everything.py"
SOLUTIONS = ROOT / "notebooks" / "solutions.md"
LINES = 20  # of a code cell; those of 00, which defines classes, may have more
NETWORK = ("http", "requests", "socket", "urllib", "urlopen", "download", "hf_hub", "from_pretrained", "pip ")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def code_of(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose_of(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def names_of_the_house() -> set[str]:
    r"""The classes and functions of ddpm, methods aside."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "ddpm").rglob("*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, DEFINITIONS)}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


# ------------------------------------------------------------------------------------------- as committed


def test_they_are_numbered_without_a_gap_and_listed_in_the_docs():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02}_" for i in range(len(NOTEBOOKS))]
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+)\]\(\.\./notebooks/(.+?)\)", index, re.MULTILINE)
    assert [name for _, name in listed] == [path.name for path in NOTEBOOKS]
    for title, name in listed:
        first = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells[0].source
        assert first.splitlines()[0] == f"# {title}"


def test_it_is_what_make_writes_outputs_and_all(path, notebook, monkeypatch):
    r"""Up to the packing of pictures, which differs between versions of Pillow."""
    nbformat.validate(notebook)
    make.check_committed(notebook)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    monkeypatch.setattr(make, "_small", lambda png: png)
    make.tidy(notebook, path.name[:2])
    assert make.content_of(notebook) == path.read_bytes()


def test_it_imports_from_ddpm_and_defines_nothing_that_is_there(path, notebook):
    if path.stem == EVERYTHING.stem:
        pytest.skip("it is the whole thing in one file")
    trees = [ast.parse(source) for source in code_of(notebook)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert any(isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm") for node in nodes)
    assert {node.name for node in nodes if isinstance(node, DEFINITIONS)} & names_of_the_house() == set()


def test_its_cells_are_short_and_need_no_network(path, notebook):
    for source in code_of(notebook):
        assert len(source.splitlines()) <= (40 if path.stem == EVERYTHING.stem else LINES), source
        assert [word for word in NETWORK if word in source] == [], source


def test_its_pictures_are_told_in_words(notebook):
    for cell in notebook.cells:
        if any("image/png" in output.get("data", ()) for output in cell.get("outputs", ())):
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.id


def test_its_links_lead_to_files(path, notebook):
    links = re.findall(r"\]\(([^)]+)\)", prose_of(notebook))
    inside = [link.partition("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert inside, "the first cell names a file of ddpm/"
    assert [link for link in inside if not (path.parent / link).is_file()] == []


def test_it_ends_with_exercises_whose_solutions_have_a_file_of_their_own(notebook):
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    exercises = notebook.cells[-1].source.partition("## Exercises\n")[2]
    solutions = SOLUTIONS.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    numbers, solved = (re.findall(r"^\*\*(\d)\.\*\*", text, re.MULTILINE) for text in (exercises, solutions))
    assert 2 <= len(numbers) <= 3 and solved == numbers
    for source in re.findall(r"```python\n(.+?)```", solutions, re.DOTALL):
        ast.parse(source)


# ------------------------------------------------------------------------------------------- 00


def test_notebook_00_has_the_cells_of_its_script():
    cells = nbformat.read(EVERYTHING.with_suffix(".ipynb"), as_version=4).cells
    expected = make.from_script(EVERYTHING).cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in expected]


@pytest.mark.slow
def test_the_equations_of_notebook_00_are_those_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("EVERYTHING_STEPS", "3")
    monkeypatch.chdir(tmp_path)
    own = SimpleNamespace(**runpy.run_path(str(EVERYTHING)))
    assert (tmp_path / "everything.png").exists()
    cosine = Schedule.named("cosine")
    t, s = torch.tensor([0, 300, 700]), torch.tensor([-1, 200, 500])
    x_0, eps, x_t = torch.randn(3, 3, 3, 8, 8)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(own.alpha_bar[:-1].double(), cosine.alpha_bar)
    close(own.q_sample(x_0, t, eps), diffusion.q_sample(cosine, x_0, t, eps))
    v = diffusion.v_from(cosine, x_0, t, eps)
    close(own.velocity(x_0, t, eps), v)
    close(own.x_0_and_eps(x_t, t, v), diffusion.x_0_and_eps(cosine, x_t, t, v, "v"))
    x_0_hat, eps_hat = diffusion.x_0_and_eps(cosine, x_t, t, v, "v")
    close(
        own.ddim_step(x_t, t, s, v), sampling.ddim_step(cosine, x_t, t, s, x_0_hat, eps_hat, torch.zeros(1))
    )
    close(own.time_embedding(t, 64), timestep_embedding(t, 64))
    q, k, v = torch.randn(3, 2, 5, 8)
    close(own.attention(q, k, v), Attention.attend(q, k, v))

    def network(x, t, tokens):
        return x * (1 + tokens.sum(dim=1)[:, None, None, None])

    tokens = torch.tensor([[1, 2], [3, 0], [0, 4]])
    guided = sampling.guided(network, tokens, torch.zeros_like(tokens), 3.0)
    close(own.guided(network, x_t, t, tokens, 3.0), guided(x_t, t))


# ------------------------------------------------------------------------------------------- executed


def test_it_runs_again_without_an_error(path, capsys):
    assert make.main(["--check", path.name[:2]]) == 0, capsys.readouterr().err


# ------------------------------------------------------------------------------------------- make.py


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    r"""An empty folder that make.py takes for its own."""
    monkeypatch.setattr(make, "FOLDER", tmp_path / "notebooks")
    make.FOLDER.mkdir()
    return make.FOLDER


def write(folder: Path, *sources: str, **metadata) -> Path:
    r"""A notebook numbered 01: a heading, then these code cells; the metadata goes to every cell."""
    cells = [new_markdown_cell("# Title"), *(new_code_cell(source, metadata=metadata) for source in sources)]
    path = folder / "01_title.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_two_runs_write_the_same_bytes_which_name_no_address_and_no_time(folder):
    drawing = (
        "import matplotlib.pyplot as plt\nplt.rcParams['figure.dpi'] = 36\nplt.plot([1, 2])\nplt.show()\n"
    )
    drawing += "print(1)\nobject()"
    path = write(folder, drawing, tags=["eq-kl"], trusted=True, execution={"iopub.status.busy": "2020-01-01"})
    assert make.main([]) == 0
    written = path.read_bytes()
    assert make.main(["01"]) == 0
    assert path.read_bytes() == written and list(folder.iterdir()) == [path]
    notebook = json.loads(written)
    assert [cell["id"] for cell in notebook["cells"]] == ["01-01", "01-02"]
    assert notebook["cells"][1]["metadata"].keys() == {"tags", "source_digest"}
    kinds = [output["output_type"] for output in notebook["cells"][1]["outputs"]]
    assert sorted(kinds) == ["display_data", "execute_result", "stream"]
    assert b" at 0x..." in written and b"2020" not in written and b"matplotlib.org" not in written


@pytest.mark.parametrize(
    "source, told",
    [
        ("raise ValueError('expected 1,\\ngot 2')", "cell 3: ValueError: expected 1, got 2"),
        ("import os\nos._exit(1)", "cell 3: the kernel died"),
        (
            "import warnings\nwarnings.warn('old')",
            "cell 3: expected nothing on stderr, got 'UserWarning: old'",
        ),
        ("import os\nprint(os.getcwd())", "cell 3: expected no path of this machine in an output, got"),
    ],
)
def test_a_fault_is_told_in_one_line_with_its_cell_and_nothing_is_written(source, told, folder, capsys):
    path = write(folder, "1", source)
    before = path.read_bytes()
    assert make.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"01_title.ipynb: {told}") and err.count("\n") == 1
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_an_output_is_stale_when_code_up_to_its_cell_has_changed_since(folder, capsys):
    path = write(folder, "x = 1", "x + 1")
    assert make.main([]) == 0
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    assert make.main(["--check"]) == 1
    assert "cell 2: its outputs are those of other code" in capsys.readouterr().err


def test_check_writes_nothing_and_demands_committed_outputs_and_a_small_file(folder, monkeypatch, capsys):
    path = write(folder, "1 + 1")
    assert make.main(["--check"]) == 1
    assert "is not committed with its outputs; run python notebooks/make.py" in capsys.readouterr().err
    assert make.main([]) == 0
    written = path.read_bytes()
    assert make.main(["--check"]) == 0 and path.read_bytes() == written
    monkeypatch.setattr(make, "LARGEST", len(written) - 1)
    for arguments in (["--check"], []):
        assert make.main(arguments) == 1
        assert "make its pictures smaller" in capsys.readouterr().err and path.read_bytes() == written


def test_photographs_are_seen_by_check_alone(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_CELEBA", str(tmp_path))
    write(
        folder,
        "import os\nfrom pathlib import Path\nPath('seen').write_text(os.environ.get('DDPM_CELEBA', 'none'))",
    )
    for arguments, seen in (([], "none"), (["--check"], str(tmp_path))):
        assert make.main(arguments) == 0
        assert (folder / "seen").read_text() == seen


def test_a_number_that_is_not_there_is_refused_with_those_that_are(folder, capsys):
    write(folder, "1")
    with pytest.raises(SystemExit) as refusal:
        make.main(["07"])
    assert refusal.value.code == 2
    assert "expected numbers of notebooks out of 01, got 07" in capsys.readouterr().err
