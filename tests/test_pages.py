r"""The pages on promises, many processes and evaluation, held against the tests, the parsers and the source."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import test_hostile
import test_kill
from torch.distributed.run import get_args_parser

import sample
import train
from ddpm.evaluation import __main__ as evaluation

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("promises.md", "parallel.md", "evaluate.md")
}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def names_of_tests(path: Path) -> set[str]:
    r"""The test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_is_in_the_file_that_it_links(page):
    links = re.findall(r"\[([^\]]+)\]\(\.\./(tests/[\w/]+\.py)\)", PAGES[page])
    named = [(text, ROOT / path) for text, path in links if not text.endswith(".py")]
    for text, path in named:
        assert f"test_{text.replace(' ', '_')}" in names_of_tests(path), text
    assert len(named) > 40 if page == "promises.md" else True


# -------------------------------------------------------------------------------------------------- commands


def commands(page: str) -> list[list[str]]:
    r"""The commands in blocks and in prose."""
    text = "\n".join(body for language, body in BLOCK.findall(PAGES[page]) if language in ("", "sh"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines += [
        " ".join(c.split()) for c in re.findall(r"`((?:python|torchrun) [^`]+)`", BLOCK.sub("", PAGES[page]))
    ]
    words = (shlex.split(line) for line in lines)
    return [list(drop_settings(w)) for w in words if w and w[0] not in ("for", "done")]


def drop_settings(words: list[str]) -> list[str]:
    return words[1:] if re.match(r"[A-Z_]+=", words[0]) else words


def check_training(arguments: list[str], processes: int):
    r"""Parse as train.py does; a new run's batches must be ones that the processes can share."""
    a = train.parser().parse_args(arguments)
    if a.resume is None:
        t = train.configuration(a).training
        for batch in (t.batch_size, t.vae_batch_size):
            assert batch % (processes * t.accumulation) == 0, arguments


def check(words: list[str]):
    if words[0] == "torchrun":
        a = get_args_parser().parse_args(words[1:])
        assert a.training_script == "train.py"
        check_training(a.training_script_args, int(a.nnodes.split(":")[-1]) * int(a.nproc_per_node))
    elif words[:2] == ["python", "train.py"]:
        check_training(words[2:], 1)
    elif words[:2] == ["python", "sample.py"]:
        sample.check(sample.parser().parse_args(words[2:]))
    elif words[:3] == ["python", "-m", "ddpm.evaluation"]:
        evaluation.parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "pytest"]:
        check_tests(words[3], words[words.index("-k") + 1] if "-k" in words else "")
    elif words[:2] == ["python", "tests/fuzz/fuzz_readers.py"]:
        assert words[2] == "$target"
    else:
        assert words == ["pip", "install", "-e", ".[metrics]"], words


def check_tests(file: str, words: str):
    r"""A choice of pytest's takes some test of the file."""
    names = names_of_tests(ROOT / file)
    assert any(all(word in name for word in words.split(" and ")) for name in names), (file, words)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_pages_is_one_that_its_program_takes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PATH").mkdir()
    told = commands(page)
    assert len(told) > 3
    for words in told:
        check(words)


def test_the_flags_and_parts_of_the_evaluation_are_all_told():
    page, parser = PAGES["evaluate.md"], evaluation.parser()
    flags = {s for action in parser._actions for s in action.option_strings if s not in ("-h", "--help")}
    assert flags == set(re.findall(r"`(--[a-z-]+)`", page.partition("## What it says")[0]))
    assert f"`{','.join(evaluation.PARTS)}`" in page
    assert all(f"`{name}`" in page for name in evaluation.EXTRACTORS)


def test_the_fields_of_the_json_are_those_that_the_evaluation_writes():
    listed = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|", PAGES["evaluate.md"].partition("## The JSON")[2], re.MULTILINE
    )
    fields = {name for cell in listed for name in re.findall(r"\w+", cell)}
    assert fields - {"classifier", "inception"} == {
        "format",
        "settings",
        "left_out",
        "seconds",
        *evaluation.PARTS,
    }


# -------------------------------------------------------------------------------------------------- messages


@cache
def templates() -> set[str]:
    r"""The clauses of every string in the source, with NUL where a value is filled in."""
    found = []
    for path in [ROOT / "train.py", *(ROOT / "ddpm").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found += "".join(parts).split("; ")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += node.value.replace("{}", "\0").split("; ")
    return set(found)


def is_said(clause: str) -> bool:
    r"""Whether a string of the source makes this clause, with two words of its own: `expected {}` would make any."""
    return any(
        re.fullmatch(re.escape(template).replace("\0", ".+"), clause)
        for template in templates()
        if len(set(re.findall(r"[a-z]{2,}", template)) - {"expected", "got"}) >= 2
    )


def quoted(page: str) -> list[str]:
    r"""The messages in the text blocks of a page, without their first word."""
    lines = [
        line
        for language, body in BLOCK.findall(PAGES[page])
        if language == "text"
        for line in body.splitlines()
    ]
    return [line.partition(": ")[2] for line in lines if line.startswith(("error: ", "warning: "))]


@pytest.mark.parametrize("page", PAGES)
def test_every_clause_of_a_quoted_message_is_in_the_source(page):
    told = quoted(page)
    assert told
    for message in told:
        for clause in message.split("; "):
            assert is_said(clause), clause


def test_a_message_that_nobody_says_is_seen():
    assert is_said("expected a batch that 3 processes x 1 parts divide, got 7")
    assert not is_said("expected a batch which 3 processes x 1 parts divide, got 7")


# ---------------------------------------------------------------------------------------------------- counts


def cases(test) -> int:
    r"""How many a test is run with, by its marks."""
    count = 1
    for mark in test.pytestmark:
        count *= len(mark.args[1]) if mark.name == "parametrize" else 1
    return count


def test_the_counts_are_those_of_the_tests():
    t, page = test_hostile, PAGES["promises.md"]
    payloads = [
        name for name in names_of_tests(Path(t.__file__)) if "payload" in name and "executes_nothing" in name
    ]
    large = len(t.PICTURES) + len(t.ARRAYS) + len(t.TEXTS) + 4 * len(t.WEIGHTS) + 2 + len(t.LINES) + 3
    fuzzer = t.fuzzer()
    (targets,) = re.findall(r"for target in ([a-z ]+); do", page)
    assert targets.split() == list(fuzzer.TARGETS)
    (runs,) = re.findall(r"-runs=(\d+)", page)
    expected = {
        "runs killed": test_kill.KILLS,
        "forms of payload": len(t.PAYLOADS),
        "places for them": sum(cases(getattr(t, name)) for name in payloads),
        "files that claim": large,
        "hostile configurations": len(t.SETTINGS),
        "strange prompts": len(t.PROMPTS),
        "inputs to 9 readers": int(runs) * len(fuzzer.TARGETS),
    }
    for what, count in expected.items():
        assert f"| {count:,} | {what}" in page, (what, count)
