r"""A module as the docs show it: what is public in file order, each with its docstring and its source without it.

The file is parsed and never run, so this needs Python alone.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
RULER = re.compile(r"# -{5,}")


@dataclass(frozen=True)
class Thing:
    r"""What has a place on a page: a function, a class, a documented method, or constants that stand together.

    Attributes:
        kind: function, class, method, property or data: the object types of Sphinx's Python domain.
        names: full names, such as ddpm.vae.KLVAE.encode; several only for constants.
        docstring: cleaned of its indentation; empty where there is none.
        code: the source without the docstring, and for a class without the methods that follow as `members`.
        line: where it begins in its file.
        untold: full names of methods without a docstring, whose code stands in their class's.
    """

    kind: str
    names: tuple[str, ...]
    docstring: str
    code: str
    line: int
    members: tuple["Thing", ...] = ()
    untold: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    r"""A file: its name, docstring and public things; `rest` is the remaining source, imports and private helpers."""

    name: str
    file: str
    docstring: str
    things: tuple[Thing, ...]
    rest: str


def files() -> list[str]:
    r"""The files of the house, in the order of README's table; what it does not name comes last."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| [")]
    named = re.findall(r"\]\(((?:ddpm/)?[\w/]+\.py)\)", "\n".join(rows))
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ddpm").rglob("*.py")}
    return named + sorted(there - set(named))


def module_name(file: str) -> str:
    r"""ddpm/training/caches.py -> ddpm.training.caches, ddpm/celeba/__init__.py -> ddpm.celeba"""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def page_of(file: str) -> str:
    r"""The page of a file, below docs: ddpm/training/caches.py -> code/training.caches"""
    return f"code/{module_name(file).removeprefix('ddpm.')}"


def meant(text: str, file: str) -> str:
    r"""The full name that a link to a file is about: caches.Latents in ddpm/training/caches.py."""
    module = module_name(file)
    return f"{module}.{text.partition(module.rpartition('.')[2] + '.')[2]}"


def parse(file: str) -> Module:
    r"""The module in `file`, a path from the root."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, tree, name = text.splitlines(), ast.parse(text), module_name(file)
    docstring = ast.get_docstring(tree) or ""
    things, rest = [], []
    for kind, group in groupby(tree.body[bool(docstring) :], _kind):
        group = list(group)
        if kind == "data":
            names = tuple(dict.fromkeys(f"{name}.{n}" for node in group for n in _assigned(node)))
            begin = _begin(group[0], lines)
            things.append(Thing(kind, names, "", _cut(lines, begin, group[-1].end_lineno), group[0].lineno))
        elif kind == "definition":
            things += [_definition(node, name, lines) for node in group]
        else:
            rest.append(_cut(lines, _begin(group[0], lines), group[-1].end_lineno))
    return Module(name, file, docstring, tuple(things), "\n\n".join(rest))


def _definition(node: ast.stmt, parent: str, lines: list[str], kind: str = "function") -> Thing:
    name, begin = f"{parent}.{node.name}", _begin(node, lines)
    docstring, members, untold, out = ast.get_docstring(node) or "", [], [], []
    if docstring:
        out.append((node.body[0].lineno, node.body[0].end_lineno))
    if isinstance(node, ast.ClassDef):
        kind = "class"
        for method in [n for n in node.body if _kind(n) == "definition"]:
            marks = {d.id for d in method.decorator_list if isinstance(d, ast.Name)}
            if ast.get_docstring(method):
                is_property = marks & {"property", "cached_property"}
                members.append(_definition(method, name, lines, "property" if is_property else "method"))
                out.append((_begin(method, lines), method.end_lineno))
            else:
                untold.append(f"{name}.{method.name}")
    code = _cut(lines, begin, node.end_lineno, out)
    return Thing(kind, (name,), docstring, code, node.lineno, tuple(members), tuple(untold))


def _kind(node: ast.stmt) -> str:
    if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
        return "definition"
    names = _assigned(node)
    return "data" if names and not any(n.startswith("_") for n in names) else "private"


def _assigned(node: ast.stmt) -> list[str]:
    r"""The names that a statement such as `A, B = 1, 2` gives."""
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return list(dict.fromkeys(names))


def _begin(node: ast.stmt, lines: list[str]) -> int:
    r"""The line where a statement begins, with its decorators and the comment right above it."""
    begin = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    while begin > 1 and lines[begin - 2].lstrip().startswith("#") and not RULER.match(lines[begin - 2]):
        begin -= 1
    return begin


def _cut(lines: list[str], begin: int, end: int, out: Iterable[tuple[int, int]] = ()) -> str:
    r"""Lines begin..end without those of `out`, nor the blank lines after those, nor rulers."""
    dropped = set()
    for first, last in out:
        while last < end and not lines[last].strip():
            last += 1
        dropped |= set(range(first, last + 1))
    kept = [lines[i - 1] for i in range(begin, end + 1) if i not in dropped and not RULER.match(lines[i - 1])]
    return dedent("\n".join(kept)).strip("\n")
