r"""Executes the notebooks and writes their outputs into them, the same on every machine and in every run.

    python notebooks/make.py            # all of them
    python notebooks/make.py 05 07      # some
    python notebooks/make.py --check    # write nothing; exit 1 unless all run and all are committed with their outputs

Notebook 00 is also a script, 00_everything.py, and its cells are made from that.
Needs the extra `notebooks`. The kernel is this Python, with the repository's ddpm and `notebooks/` as its folder.
Photographs must not land in the repository, so outputs are written without DDPM_CELEBA; `--check` leaves it set.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

FOLDER = Path(__file__).resolve().parent
LARGEST = 600_000  # bytes of a notebook
SECONDS = 900  # for a cell; a whole notebook is meant to take less than 60 on two cores, 00 about 5 minutes
QUICK = {"EVERYTHING_STEPS": "20"}  # how --check shortens the training of notebook 00
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT = ("mystnb", "tags", "source_digest")  # metadata: a picture in words, equations, see `digests`
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"  # with sliders a kernel may not end


class Fault(Exception):
    r"""What is wrong with a notebook, in one line."""


def find(numbers: list[str]) -> list[Path]:
    r"""The notebooks of these numbers, in order; all where there is none."""
    paths = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if unknown := set(numbers) - {path.name[:2] for path in paths}:
        there = ", ".join(path.name[:2] for path in paths) or "none"
        raise Fault(f"expected numbers of notebooks out of {there}, got {' '.join(sorted(unknown))}")
    return [path for path in paths if not numbers or path.name[:2] in numbers]


def execute(notebook: NotebookNode, celeba: bool):
    r"""Run all cells in a fresh kernel, which leaves their outputs in the notebook; `celeba`: with DDPM_CELEBA."""
    environment = {name: value for name, value in os.environ.items() if celeba or name != "DDPM_CELEBA"}
    environment |= (QUICK if celeba else {}) | {
        "PYTHONPATH": str(FOLDER.parent),
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore:IProgress",  # tqdm's, where ipywidgets is missing
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    begun = []
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR", f"--IPKernelApp.exec_lines={NO_WIDGETS}"],
        on_cell_start=lambda cell, cell_index: begun.append(cell_index),
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise Fault(f"cell {begun[-1] + 1}: {error.ename}: {' '.join(error.evalue.split())}") from None
    except CellTimeoutError:
        raise Fault(f"cell {begun[-1] + 1}: took more than {SECONDS} s; make it do less") from None
    except DeadKernelError:
        raise Fault(f"cell {begun[-1] + 1}: the kernel died; was there memory for it?") from None


def tidy(notebook: NotebookNode, number: str):
    r"""Leave nothing that differs from run to run or tells of the machine; name every cell by its place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, (cell, digest) in enumerate(zip(notebook.cells, digests(notebook), strict=True), 1):
        cell.id = f"{number}-{i:02}"
        if cell.cell_type == "code":
            cell.metadata["source_digest"] = digest
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT if key in cell.metadata})
        cell.pop("attachments", None)
        if "plt." in cell.source and not re.search("imshow|labelled_grid|strip", cell.source):
            image = cell.metadata.get("mystnb", {}).get("image", {})
            image |= {"classes": "plot"} if image else {}  # the site inverts plots in the dark
        for output in cell.get("outputs", ()):
            _tidy_output(output, i)


def _tidy_output(output: NotebookNode, cell: int):
    if output.output_type == "stream" and output.name == "stderr":
        told = re.sub(r"^\S+:\d+: ", "", output.text.strip()).splitlines()[0]  # a warning without its place
        raise Fault(f"cell {cell}: expected nothing on stderr, got {told!r}")
    if output.output_type == "stream":
        output.text = _plain(output.text, cell)
        return
    output.metadata = NotebookNode()
    for kind in set(output.data) - {"text/plain", "text/html", "text/markdown", "image/png"}:
        del output.data[kind]  # what only some front ends show
    for kind, content in output.data.items():
        output.data[kind] = _small(content) if kind == "image/png" else _plain(content, cell)


def _plain(text: str, cell: int) -> str:
    r"""The text without addresses in memory; Fault where it names a place on this machine."""
    for place in {str(FOLDER.parent), str(Path.home()), sys.prefix}:
        if place + os.sep in text:
            raise Fault(f"cell {cell}: expected no path of this machine in an output, got {place}")
    return ADDRESS.sub(" at 0x...", text)


def _small(png: str) -> str:
    r"""The picture without the drawing program's name and version, and without transparency that it does not use."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)  # Pillow leaves out what is not asked for, such as texts
    return base64.b64encode(file.getvalue()).decode() + "\n"


def digests(notebook: NotebookNode) -> list[str]:
    r"""For each cell, a digest of all code up to it: another one than its outputs carry means that they are stale."""
    code = hashlib.sha256()
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            code.update(cell.source.encode() + b"\0")
        found.append(code.hexdigest()[:12])
    return found


def from_script(path: Path) -> NotebookNode:
    r"""The notebook of a script: cells begin with `# %%`, then `[markdown]` or what the cell's picture shows."""
    cells = []
    for part in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(new_markdown_cell("\n".join(lines)))
        else:
            metadata = {"mystnb": {"image": {"alt": head.strip()}}} if head.strip() else {}
            cells.append(new_code_cell(body.strip(), metadata=metadata))
    return new_notebook(cells=cells)


def check_committed(notebook: NotebookNode):
    r"""Fault unless every code cell was run, in order, with the code that stands there now."""
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)) or not any(cell.get("outputs") for cell in notebook.cells):
        raise Fault("is not committed with its outputs; run python notebooks/make.py on it")
    for i, (cell, digest) in enumerate(zip(notebook.cells, digests(notebook), strict=True), 1):
        if cell.cell_type == "code" and cell.metadata.get("source_digest") != digest:
            raise Fault(f"cell {i}: its outputs are those of other code; run python notebooks/make.py on it")


def content_of(notebook: NotebookNode) -> bytes:
    r"""The notebook as its file has it; Fault where that is too large."""
    content = (nbformat.writes(notebook) + "\n").encode()
    if len(content) > LARGEST:
        raise Fault(
            f"expected at most {LARGEST // 1000} KB, got {len(content) / 1000:.0f}; make its pictures smaller"
        )
    return content


def make(path: Path, check: bool) -> str:
    r"""Execute a notebook and, unless only to `check`, write it; a line that says what it took."""
    script = path.with_suffix(".py")
    from_its_script = script.exists() and not check
    notebook = from_script(script) if from_its_script else nbformat.read(path, as_version=4)
    if check:
        check_committed(notebook)
        content_of(notebook)
    start = time.monotonic()
    execute(notebook, celeba=check)
    seconds = time.monotonic() - start
    if not check:
        tidy(notebook, path.name[:2])
        content = content_of(notebook)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} KB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks and write their outputs into them.")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="which, such as 05; all when there is none")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 unless all run and have outputs"
    )
    options = parser.parse_args(arguments)
    failed = 0
    try:
        paths = find(options.numbers)
    except Fault as fault:
        parser.error(str(fault))
    for path in paths:
        try:
            print(make(path, options.check), flush=True)
        except Fault as fault:
            failed = 1
            print(f"{path.name}: {fault}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
