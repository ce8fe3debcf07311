r"""Timing that takes turns, what the machine reaches at best, and rows of a table with their goals.

Two things are compared in rounds: in each, both run once, one after the other, and give one ratio. What else the
machine does then meets both. A row tells the median and the range over the rounds.
"""

import contextlib
import ctypes
import dataclasses
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ddpm.tools.command import keep_freed_memory

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "Pillow")


@dataclass(frozen=True)
class Row:
    r"""One comparison: what it came to, and the goal.

    Attributes:
        part: the name that --only takes. what: in words.
        ours, other: the two sides as they are to be read, with their units.
        value, low, high: the figure that the goal is about, its median and range.
        goal: None for a row that only informs. at_least: the goal is a floor, not a ceiling.
        unit: of the value: x, % or s.
        times: seconds of each side in each round, where sides took turns.
    """

    part: str
    what: str
    ours: str
    other: str
    value: float
    low: float
    high: float
    goal: float | None = None
    at_least: bool = True
    unit: str = "x"
    times: tuple[Sequence[float], ...] = ()

    @property
    def met(self) -> bool | None:
        r"""Whether the median reaches the goal; None without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def cells(self) -> list[str]:
        r"""The row as text."""
        bound = "at least" if self.at_least else "at most"
        limit = "" if self.goal is None else f"{bound} {self.told(self.goal)}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        spread = self.told(self.value)
        if self.low < self.high:
            spread += f" ({self.told(self.low)} to {self.told(self.high)})"
        return [self.part, self.what, self.ours, self.other, spread, limit, met]

    def told(self, value: float) -> str:
        r"""A figure and its unit."""
        return f"{digits(value)} {self.unit}"


def spread(part: str, what: str, sides: Sequence[str], values: Sequence[float], goal=None, **options) -> Row:
    r"""A row whose figure is the median of `values`, with their range; a goal is a ceiling."""
    options = {"at_least": False} | options
    return Row(part, what, *sides, statistics.median(values), min(values), max(values), goal, **options)


HEAD = ("part", "what", "ours", "other", "figure (range)", "goal", "met")


def digits(value: float) -> str:
    r"""Three digits that count, all of a large number, and never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows: Iterable[Row]) -> str:
    r"""The rows in Markdown, columns in line."""
    lines = [list(HEAD), *(row.cells() for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def as_json(rows: Iterable[Row]) -> list[dict]:
    r"""The rows as plain values."""
    return [
        dataclasses.asdict(row) | {"met": row.met, "times": [list(side) for side in row.times]}
        for row in rows
    ]


def seconds(action: Callable[[], object]) -> float:
    r"""How long one call takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def give_memory_back():
    r"""Undo `keep_freed_memory`: glibc gives memory back, from the sizes to which it comes by itself in the end."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((mmap_max, 65_536), (mmap_threshold, 2**25), (trim_threshold, 2**26)):
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def by_themselves(ours: Callable, other: Callable) -> list[Callable[[], None]]:
    r"""What to call before either is timed, so that each has memory as in a process of its own: we keep it."""

    def before_ours():
        keep_freed_memory()
        ours()

    def before_other():
        give_memory_back()
        other()

    return [before_ours, before_other]


def alternate(
    actions: Sequence[Callable[[], object]], rounds: int, warm: int = 1, before: Sequence[Callable] = ()
) -> list[list[float]]:
    r"""Seconds of each action in each round, after `warm` calls of each; every other round goes backwards.

    `before` has for each action what is called each time before it, untimed.
    """
    for action in actions:
        for _ in range(warm):
            action()
    times = [[0.0] * rounds for _ in actions]
    for r in range(rounds):
        for k in range(len(actions)) if r % 2 == 0 else reversed(range(len(actions))):
            if before:
                before[k]()
            times[k][r] = seconds(actions[k])
    return times


def compared(
    part: str,
    what: str,
    ours: Sequence[float],
    other: Sequence[float],
    amount: float,
    unit: str,
    goal: float | None,
) -> Row:
    r"""How many times faster we are: `amount` of `unit` was done in the seconds of each round."""
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    sides = [f"{digits(amount / statistics.median(times))} {unit}" for times in (ours, other)]
    return spread(part, what, sides, ratios, goal, at_least=True, times=(ours, other))


def matmul_peak(dtype: torch.dtype, quick: bool) -> float:
    r"""Multiply-adds times two, a second, of the fastest square matrix product that was tried."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        out = torch.empty(n, n, dtype=dtype)
        multiply = partial(torch.mm, a, b, out=out)
        (times,) = alternate([multiply], rounds=5 if quick else 15, warm=2)
        best = max(best, 2 * n**3 / min(times))
    return best


def machine(quick: bool) -> dict:
    r"""What a figure has to be read with: the processor, what it reaches at best, packages and commit."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": {"avx512": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()},
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": commit(),
        "matmul_gflops": {name: matmul_peak(dtype, quick) / 1e9 for name, dtype in dtypes.items()},
    }


def cpu_name() -> str:
    r"""As Linux calls it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    r"""The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    r"""The commit that was measured, with a + where files differ from it; empty outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "ddpm", "*.py", "tests/benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""
