r"""The pages on promises, many processes and evaluation, held against the tests, the parsers and the source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import test_hostile
import test_kill
from test_docs import BLOCK, PAGES, ROOT, names_of_tests

from ddpm.evaluation import __main__ as evaluation

QUOTING = ("promises.md", "parallel.md", "evaluate.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_is_in_the_file_that_it_links(page):
    links = re.findall(r"\[([^\]]+)\]\(\.\./(tests/[\w/]+\.py)\)", PAGES[page])
    named = [(text, ROOT / path) for text, path in links if not text.endswith(".py")]
    for text, path in named if page != "equations.md" else ():  # which is made from the tests
        assert f"test_{text.replace(' ', '_')}" in names_of_tests(path), text
    assert len(named) > 40 or page != "promises.md"


def test_the_flags_and_parts_of_the_evaluation_are_all_told():
    page, parser = PAGES["evaluate.md"], evaluation.parser()
    flags = {s for action in parser._actions for s in action.option_strings if s not in ("-h", "--help")}
    assert flags == set(re.findall(r"`(--[a-z-]+)`", page.partition("## What it prints")[0]))
    assert f"`{','.join(evaluation.PARTS)}`" in page
    assert all(f"`{name}`" in page for name in evaluation.EXTRACTORS)


def test_the_fields_of_the_json_are_those_that_the_evaluation_writes():
    table = PAGES["evaluate.md"].partition("## The JSON")[2]
    listed = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    fields = {name for cell in listed for name in re.findall(r"\w+", cell)} - {"classifier", "inception"}
    assert fields == {"format", "settings", "left_out", "seconds", *evaluation.PARTS}


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
    bodies = [body for language, body in BLOCK.findall(PAGES[page]) if language == "text"]
    lines = [line for body in bodies for line in body.splitlines()]
    return [line.partition(": ")[2] for line in lines if line.startswith(("error: ", "warning: "))]


@pytest.mark.parametrize("page", QUOTING)
def test_every_clause_of_a_quoted_message_is_in_the_source(page):
    messages = quoted(page)
    assert messages
    for message in messages:
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
    names = names_of_tests(Path(t.__file__))
    payloads = [name for name in names if "payload" in name and "executes_nothing" in name]
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
