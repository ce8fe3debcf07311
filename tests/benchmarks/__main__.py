r"""Ours and diffusers side by side, in one process, with the goal beside each figure.

python tests/benchmarks                              all parts, within 15 minutes
python tests/benchmarks --quick                      fewer rounds, within 5 minutes
python tests/benchmarks --only train,sample --out FILE.json
python tests/benchmarks --only compile               torch.compile, which takes minutes to begin
python tests/benchmarks --only large                 as many pictures as CelebA has, which takes minutes to decode

Run it from the repository's folder, on a machine that does nothing else; parts that need diffusers need the extra
`compat`. Photographs are decoded where the environment variable DDPM_CELEBA names a folder of CelebA.
"""

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

from ddpm.tools import command as cli

PARTS = {  # name: the module and the function
    "train": ("networks", "train"),
    "train-like": ("networks", "train_like"),
    "peak": ("networks", "peak"),
    "operations": ("operations", "operations"),
    "sample": ("sampling", "sample"),
    "vae": ("networks", "vae"),
    "overhead": ("training", "overhead"),
    "checkpointing": ("training", "checkpointing"),
    "data-size": ("training", "data_size"),
    "caches": ("training", "caches"),
    "decode": ("commands", "decode"),
    "large": ("large", "large"),
    "start": ("commands", "start"),
    "compile": ("networks", "compiled"),
}
BY_DEFAULT = [name for name in PARTS if name not in ("large", "compile")]  # which take minutes for a figure


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    p.prog = "python tests/benchmarks"
    p.add_argument(
        "--only",
        metavar="PART,...",
        default=",".join(BY_DEFAULT),
        help=f"out of {', '.join(PARTS)} [all but large and compile]",
    )
    p.add_argument("--quick", action="store_true", help="fewer rounds: wider ranges")
    p.add_argument("--out", metavar="FILE", help="write the figures as JSON too")
    p.add_argument(
        "--model", metavar="RUN", help="the run folder that the part `start` draws from [shipped weights]"
    )
    return p


def main(argv: list[str] | None = None):
    p = parser()
    a = p.parse_args(argv)
    names = a.only.split(",")
    if not set(names) <= set(PARTS):
        p.error(f"expected parts out of {', '.join(PARTS)}, got {a.only}")
    warnings.simplefilter("ignore")  # diffusers speaks of its own future
    from benchmarks import measure

    begun, rows, skipped = time.monotonic(), [], {}
    about = measure.machine(a.quick)
    print(json.dumps(about, indent=2), flush=True)
    for name in names:
        module, function = PARTS[name]
        try:
            part = getattr(importlib.import_module(f"benchmarks.{module}"), function)
            for row in part(
                quick=a.quick, machine=about, model=a.model, celeba=os.environ.get("DDPM_CELEBA")
            ):
                rows.append(row)
                print(" | ".join(row.cells()), flush=True)
        except (ImportError, FileNotFoundError) as error:  # a package or data that is not here
            skipped[name] = str(error)
            print(f"skipped {name}: {error}", flush=True)
    print(f"\n{measure.table(rows)}\n\n{time.monotonic() - begun:.0f} s")
    if a.out:
        content = {"machine": about, "quick": a.quick, "rows": measure.as_json(rows), "skipped": skipped}
        Path(a.out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests), str(tests.parent)]  # not by the name `tests`: other packages bring one too
    sys.exit(cli.exit_code(main))  # as the commands start
