r"""Departs from every equation at many places, one at a time, and demands that a test which holds it fails.

    python tests/mutations.py           # all of them
    python tests/mutations.py kl ema    # those of some equations

A departure is a small change of one node of the syntax tree: + for -, a root left out, two arguments swapped. It is
made in the functions that the rows of docs/equations.py name, and in their private helpers and constants. The tests
that are marked with the equation then run, its formula first; those in tests/compat do not, because they need other
packages. A departure that no test notices is a missing test, or belongs into `EQUIVALENT`. Exits 1 if there is one, or
if a test fails on the code as it is.
"""

import ast
import contextlib
import gc
import importlib
import inspect
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "docs", "notebooks", "tests")]

import equations  # noqa: E402

MOST = 12  # departures of a function; of more, as many are taken in equal distances
SECONDS = 60  # after which a test of a departure is stopped, and it has been noticed
TINY = 1e-6  # smaller numbers only guard against a division by zero
ROWS = {row.id: row for row in equations.ROWS}
FORMULA = "tests/test_equations.py::test_a_formula_gives_the_numbers_of_its_code"

# Parts of (function, operator, expression): why no test can notice the departure, or why it is from no equation.
EQUIVALENT = {
    ("captions.describe", "", "rng"): "how often a word is left out is no truth",
    ("captions.describe", "", "denials"): "the same",
    ("captions.describe", "", "Male"): "the same",
    ("captions.describe", "another number", ""): "the same",
    ("captions._sentence", "", ""): "how words are joined",
    ("captions._clauses", "", ""): "the same",
    ("images._rgb", "", ""): "which kinds of files there are",
    ("bits.bits_per_dimension", "", "SLICES + 1"): "any number of slices estimates the same sum",
    ("bits.bits_per_dimension", "another number", "1"): "slices may begin anywhere",
    ("metrics.precision_recall", "another number", "1024"): "how many are compared at once",
    ("losses.diffusion_loss", "another number", "0.001"): "a default that the configuration replaces",
    ("sampling.ddim_step", "another number", "0.0"): "a default",
    (
        "sampling.sample_loop",
        "another number",
        "1.0",
    ): "a larger strength begins at T - 1 too, and a factor of 1 is none",
    ("sampling.ddim_step", "", "clamp"): "guards devices without float64 against rounding",
    ("muon.Muon.__init__", "another number", "0.0"): "a default",
    ("muon.Muon.step", "", "TOGETHER"): "how many matrices go together",
    ("TextToImage.sample", "another number", ""): "where a warning is from",
    ("TextToImage.sample", "mean for sum", "x.sum()"): "one is finite where the other is",
    ("TextToImage.sample", "Sub for Add", "first + i"): "which of several calls; a promise of its own",
    ("sampling._log_snr", "another number", "0.5"): "only ratios of its differences are used",
    ("Schedule.__init__", "another number", "1"): "a second clean time that nobody reads",
    ("Schedule.to", "", ""): "where the tables are",
    ("TextTower.tokenize", "", ""): "the wording of a warning",
    ("kernels.GroupNorm.", "", ""): "chooses between two ways to the same numbers",
    ("ChannelsLastGroupNorm.forward", "", "H * W"): "the same",
    ("ChannelsLastGroupNorm.forward", "", "1024"): "the same",
    ("ChannelsLastGroupNorm.backward", "swapped arguments", "addcmul"): "the factors of a product",
    ("caches.Texts.", "", ""): "chooses between two ways to the same states",
    ("loops.train_unet", "swapped names", "eps_vae, eps"): "which of two noises comes first",
    ("images.crop_and_resize", "another number", "64"): "a default",
    ("metrics.precision_recall", "another number", "3"): "a default",
    ("loops.train_unet", "sum for mean", "loss"): "the size of a step, which tests of micro-batches hold",
    ("optimization.EMA.", "no detach", ""): "no gradient is kept there anyway",
    ("validation.measure_latent_scale", "", "batch"): "which latents it is measured on",
    ("validation.measure_latent_scale", "another number", "0"): "the same",
    ("UNet.set_gradient_checkpointing", "", ""): "which levels are computed again",
    ("UNet.__init__", "another number", "1e-05"): "too small to see; parity compares it",
}

# ----------------------------------------------------------------------------------------------- operators

OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OPPOSITES = ((ast.Lt, ast.GtE), (ast.Gt, ast.LtE), (ast.Eq, ast.NotEq))
OPPOSITE = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
PAIRS = (("mean", "sum"), ("cos", "sin"), ("min", "max"), ("any", "all"))
TRADED = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
LEFT_OUT = {"sqrt", "exp", "log", "log1p", "square", "abs", "clamp"}
LEFT_OUT |= {"silu", "gelu", "softmax", "detach", "round"}
LIBRARIES = ("torch", "math", "F", "np")
PLACES = ("dim", "dtype", "device", "generator")  # keywords whose change is an error, not another equation


def departures(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    r"""(operator, what takes the place of the node) for every way to depart there."""
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in OTHER and not is_tiny(right):
                other = OTHER[type(op)]
                yield f"{other.__name__} for {type(op).__name__}", ast.BinOp(left, other(), right)
            if isinstance(op, ast.Pow):
                yield "no power", left
            if isinstance(op, ast.Sub) and isinstance(left, ast.Constant):
                yield "nothing to subtract from", right
        case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield "no minus", operand
        case ast.Constant(int() | float() as value) if not isinstance(value, bool) and not is_tiny(node):
            doubled = isinstance(value, float) and value != 0
            yield "another number", ast.Constant(2 * value if doubled else value + 1)
        case ast.Compare(left, [op], right) if type(op) in OPPOSITE:
            yield "the opposite", ast.Compare(left, [OPPOSITE[type(op)]()], right)
        case ast.IfExp(test, body, orelse):
            yield "the other branch", ast.IfExp(test, orelse, body)
        case ast.Assign([ast.Tuple([ast.Name() as a, ast.Name() as b])]):
            swapped = ast.Tuple([b, a], ast.Store())
            yield "swapped names", ast.Assign([swapped], node.value, lineno=node.lineno)
        case ast.Call(func, args, keywords):
            yield from departures_of_call(func, args, keywords)


def departures_of_call(func: ast.expr, args: list, keywords: list) -> Iterator[tuple[str, ast.AST]]:
    match func:
        case ast.Attribute(ast.Name(library), name) if name in LEFT_OUT and library in LIBRARIES:
            yield f"no {name}", args[0]
        case ast.Attribute(value, name) if name in LEFT_OUT:
            yield f"no {name}", value
        case ast.Attribute(value, name) if name in TRADED:
            traded = ast.Attribute(value, TRADED[name], ast.Load())
            yield f"{TRADED[name]} for {name}", ast.Call(traded, args, keywords)
        case ast.Name(name) if name in TRADED:
            yield f"{TRADED[name]} for {name}", ast.Call(ast.Name(TRADED[name], ast.Load()), args, keywords)
            return  # the order of its arguments means nothing
    for i in range(len(args) - 1):
        a, b = args[i : i + 2]
        if isinstance(a, ast.Name) and isinstance(b, ast.Name) and a.id != b.id:
            yield "swapped arguments", ast.Call(func, [*args[:i], b, a, *args[i + 2 :]], keywords)


def is_tiny(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and 0 < node.value < TINY


def nodes_of(node: ast.AST, symbols: set[str]) -> Iterator[ast.AST]:
    r"""The nodes below, in the order of the text, but for refusals, types, indices and places.

    Of the arguments' defaults only those of the equation's symbols, which are numbers of the papers.
    """
    if isinstance(node, ast.If) and any(isinstance(inner, ast.Raise) for inner in node.body):
        return
    if isinstance(node, ast.arguments):
        with_default = node.args[len(node.args) - len(node.defaults) :]
        pairs = zip(with_default, node.defaults, strict=True)
        yield from (default for argument, default in pairs if argument.arg in symbols)
        return
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children if name not in ("annotation", "returns", "decorator_list", "slice") else ():
            if isinstance(child, ast.AST) and getattr(child, "arg", None) not in PLACES:
                yield child
                yield from nodes_of(child, symbols)


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


# -------------------------------------------------------------------------------------------------- places


@dataclass
class Place:
    r"""A function or a constant of a module of ddpm, by its names, and the equations that it is part of."""

    module: str
    name: str
    ids: list[str] = field(default_factory=list)

    def departures(self) -> tuple[ast.Module, list[tuple[str, ast.AST, ast.AST]]]:
        r"""The tree of its file, freshly parsed, and (operator, node, replacement) of every departure in it."""
        tree = ast.parse(Path(importlib.import_module(self.module).__file__).read_text("utf-8"))
        found = reduce(lambda node, name: members(node)[name], self.name.split("."), tree)
        symbols = {symbol for id in self.ids for symbol in ROWS[id].symbols.split()}
        return tree, [(op, node, new) for node in nodes_of(found, symbols) for op, new in departures(node)]

    def chosen(self) -> list[int]:
        r"""The numbers of at most MOST departures that are not equivalent, spread over the function."""
        found = self.departures()[1]
        numbers = [i for i, departure in enumerate(found) if not self.reasons(departure)]
        count = min(MOST, len(numbers))
        return [numbers[i * len(numbers) // count] for i in range(count)]

    def key(self, departure: tuple[str, ast.AST, ast.AST]) -> tuple[str, str, str]:
        return f"{self.module.removeprefix('ddpm.')}.{self.name}", departure[0], ast.unparse(departure[1])

    def reasons(self, departure: tuple[str, ast.AST, ast.AST]) -> set[tuple[str, str, str]]:
        r"""The keys of EQUIVALENT that fit."""
        key = self.key(departure)
        return {
            known
            for known in EQUIVALENT
            if all(part in whole for part, whole in zip(known, key, strict=True))
        }

    def depart(self, number: int):
        r"""Let the loaded module, and all that hold its functions, compute the departure of this number."""
        tree, found = self.departures()
        _, old, new = found[number]
        module = importlib.import_module(self.module)
        departed = {"__name__": module.__name__, "__file__": module.__file__}
        exec(
            compile(ast.fix_missing_locations(Replace(old, new).visit(tree)), module.__file__, "exec"),
            departed,
        )
        first, *inner = self.name.split(".")
        there, here = departed[first], getattr(module, first)
        for name in inner:
            there, here = (inspect.getattr_static(owner, name) for owner in (there, here))
        if not hasattr(plain(here), "__code__"):
            setattr(module, self.name, there)
            return
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(plain(here), part, getattr(plain(there), part))


def members(node: ast.AST) -> dict[str, ast.AST]:
    r"""The functions, classes and assignments right below a module or a class, by name."""
    found = {}
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            found[child.name] = child
        elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            found[child.targets[0].id] = child
    return found


def plain(value):
    r"""The function within a property, a static method or a decorator."""
    return inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))


def places() -> list[Place]:
    r"""Every function that an equation's row names, its private helpers, and the constants among its symbols."""
    found: dict[tuple[str, str], Place] = {}

    def add(module: str, name: str, node: ast.AST, row: equations.Row, others: dict[str, ast.AST]):
        if isinstance(node, ast.ClassDef):
            for inner, method in members(node).items():
                add(module, f"{name}.{inner}", method, row, others)
            return
        place = found.setdefault((module, name), Place(module, name))
        if row.id in place.ids:
            return
        place.ids.append(row.id)
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        for other in used & set(others):
            if other.startswith("_") or other in row.symbols.split():
                add(module, other, others[other], row, others)

    for row in equations.ROWS:
        for name in row.code.split():
            path, inner = equations.file_of(name)
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            definition = equations.definition(name)
            if isinstance(definition, ast.FunctionDef | ast.ClassDef) and module != "ddpm.config":
                add(module, ".".join(inner), definition, row, members(equations.parsed(path)))
    return sorted(found.values(), key=lambda place: (place.module, place.name))


def tests_of(ids: Iterable[str]) -> set[str]:
    r"""The tests that hold equations, with their formulas."""
    marked = equations.marked_tests()
    formulas = {f"{FORMULA}[{id}]" for id in ids if ROWS[id].formula}
    tests = {test for id in ids for test in marked.get(id, ()) if "/compat/" not in test}
    return (tests - {FORMULA}) | formulas


# ------------------------------------------------------------------------------------------------- running


class Seconds(dict):
    r"""A pytest plugin that sums the seconds of each test."""

    limit = 0  # seconds of a test; 0: none

    def pytest_runtest_setup(self):
        signal.alarm(self.limit)

    def pytest_runtest_logreport(self, report):
        test = report.nodeid if report.nodeid.startswith(FORMULA) else report.nodeid.partition("[")[0]
        self[test] = self.get(test, 0) + report.duration


def outcome(job: tuple[Place | None, int, list[str]]) -> tuple[int, dict[str, float], str]:
    r"""Run tests, with a departure where a place is given: pytest's exit code, seconds of tests, what it printed.

    Runs in a process of its own, forked with ddpm and the tests loaded.
    """
    import pytest

    def too_long(*_):
        raise TimeoutError(f"took more than {SECONDS} s")

    place, number, tests = job
    seconds = Seconds()
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        options = ["-q", "--assert=plain", "-o", "addopts=", f"--rootdir={ROOT}", f"--basetemp={folder}/t"]
        options += [f"-pno:{name}" for name in ("cacheprovider", "unraisableexception", "threadexception")]
        if place is not None:
            options += ["-x", "--tb=no"]
            place.depart(number)
            if place.module == "ddpm.text":
                text_tower().cache_clear()
            seconds.limit = SECONDS
        with contextlib.redirect_stderr(printed):
            code = int(pytest.main([*options, *tests], plugins=[seconds]))
        signal.alarm(0)
    return code, dict(seconds), printed.getvalue()[-3000:]


@cache
def text_tower():
    r"""The function of the random text tower, which now draws once for all forked processes."""
    text_weights = importlib.import_module("ddpm.tools.text_weights")
    text_weights.random_tower = cache(text_weights.random_tower)
    return text_weights.random_tower


def load(tests: set[str]):
    r"""Load once what every forked process needs."""
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    importlib.import_module("pytest")
    text_tower()()
    for file in {test.partition("::")[0] for test in tests}:
        importlib.import_module(Path(file).stem)
    gc.freeze()  # what is loaded here is no garbage, and looking through it takes a second


def seconds_of(tests: set[str], pool) -> dict[str, float]:
    r"""How long each test takes on the code as it is, where all must pass."""
    files = sorted({test.partition("::")[0] for test in tests})
    jobs = [(None, 0, sorted(test for test in tests if test.startswith(f"{file}::"))) for file in files]
    seconds = {}
    for code, of_file, printed in pool.imap(outcome, jobs, chunksize=1):
        if code:
            sys.exit(f"a test fails on the code as it is:\n{printed}")
        seconds |= of_file
    return seconds


def faults() -> list[str]:
    r"""Equations without a departure, and entries of EQUIVALENT that fit none."""
    everywhere = places()
    reasons = {
        key for place in everywhere for departure in place.departures()[1] for key in place.reasons(departure)
    }
    found = [f"no departure fits {key}; delete it from EQUIVALENT" for key in set(EQUIVALENT) - reasons]
    departed = {id for place in everywhere if place.chosen() for id in place.ids}
    return found + [f"expected a departure from {id}, got none" for id in ROWS if id not in departed]


def main(wanted: list[str]) -> int:
    if unknown := set(wanted) - set(ROWS):
        print(f"expected ids of docs/equations.md, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if found := faults():
        print(*found, sep="\n", file=sys.stderr)
        return 1
    chosen = [place for place in places() if not wanted or set(place.ids) & set(wanted)]
    tests = tests_of({id for place in chosen for id in place.ids})
    load(tests)
    begin, missed = time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        seconds = seconds_of(tests, pool)
        print(f"{len(tests)} tests pass on the code as it is ({time.monotonic() - begin:.0f} s)", flush=True)
        jobs = []
        for place in chosen:
            fastest = sorted(tests_of(place.ids), key=lambda test: (seconds.get(test, 0), test))
            jobs += [(place, number, fastest) for number in place.chosen()]
        outcomes = pool.imap(outcome, jobs, chunksize=1)
        for (place, number, _), (code, _, printed) in zip(jobs, outcomes, strict=True):
            if code != 1:
                missed += 1
                departure = place.departures()[1][number]
                print(
                    place.key(departure), "->", ast.unparse(departure[2]), printed * (code != 0), flush=True
                )
    waited = time.monotonic() - begin
    print(f"{len(jobs)} departures at {len(chosen)} places, {missed} not noticed ({waited:.0f} s)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
