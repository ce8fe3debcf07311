r"""The figures of docs/results.md are those of the evaluations in docs/measured."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MEASURED = sorted((DOCS / "measured").glob("*.json"))


def figures(result: dict) -> list[str]:
    r"""What must stand in the table of a result, rounded as people read it."""
    found = []
    for part in ("held_out", "unseen", "far"):
        if part in result["adherence"]:
            generated = result["adherence"][part]["generated"]
            low, high = generated["interval"]
            found += [f"{generated['mean']:.3f} ({low:.3f} to {high:.3f})", f"{generated['n']} "]
    found += [f"{result['adherence']['held_out'][of]['mean']:.3f}" for of in ("real", "reconstructed")]
    found += [f"{result['frechet'][name]['distance']:.3g}" for name in ("generated", "train pictures")]
    found += [f"{result['frechet']['generated'][name]:.2f}" for name in ("precision", "recall")]
    if "vae" in result:
        found += [f"{result['vae']['psnr']:.1f} dB", f"{result['vae']['ssim']:.3f}"]
    return found


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_tables_say_what_was_measured(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    sections = re.split(r"^## ", (DOCS / "results.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [section for section in sections if f"(measured/{path.name})" in section]
    for figure in figures(result):
        assert figure in section, figure


def test_the_table_of_the_readme_has_the_same_figures():
    table = (DOCS.parent / "README.md").read_text(encoding="utf-8").split("## How good it is")[1]
    for path in MEASURED:
        result = json.loads(path.read_text(encoding="utf-8"))
        if "drawn" in path.stem or path.stem in ("celeba64", "celeba64-laptop", "celeba64-laptop-slow"):
            assert f"{result['adherence']['held_out']['generated']['mean']:.3f}" in table, path.stem


def test_there_are_some():
    assert len(MEASURED) >= 2
