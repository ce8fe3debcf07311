r"""All of CelebA against a sample of it: does a run wait longer for its first step where there are more pictures?"""

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.lists import ImageTable, open_table

from .measure import ROOT, Row, spread

SPLITS = (162_770, 19_867, 19_962)  # of CelebA
ANOTHER = 0.03  # share of attributes that differ from the sample's, so that rows are as various as CelebA's


def enlarge(table: ImageTable, folder: Path):
    r"""A folder of CelebA's layout and size: links to the sample's photographs, attributes near the sample's."""
    rng = np.random.default_rng(0)
    count = sum(SPLITS)
    pictures = folder / "img_align_celeba"
    pictures.mkdir(parents=True)
    rows = np.arange(count) % len(table)
    attributes = table.attributes[rows] ^ (rng.random((count, len(ATTRIBUTES))) < ANOTHER)
    lines, split = [], np.repeat([0, 1, 2], SPLITS)
    for i, row in enumerate(rows):
        name = f"{i + 1:06d}.jpg"
        (pictures / name).symlink_to((table.root / table.files[row]).resolve())
        lines.append(" ".join([name, *("1" if value else "-1" for value in attributes[i])]))
    head = [str(count), " ".join(ATTRIBUTES)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*head, *lines]) + "\n")
    partition = "\n".join(f"{i + 1:06d}.jpg {split[i]}" for i in range(count))
    (folder / "list_eval_partition.txt").write_text(partition + "\n")


def trained(data: Path, folder: Path, steps: int) -> dict[str, float]:
    r"""Train a little; seconds before the UNet's first step, seconds a step, and MiB of memory that no file backs."""
    run = folder / "run"
    flags = ["--preset", "celeba64-laptop", "--text-weights", "random", "--max-minutes", "0"]
    flags += f"--max-pictures 0 --vae-steps 5 --unet-steps {steps}".split()
    flags += ["--sample-every", "1000000", "--save-every", "1000000"]
    words = [sys.executable, "train.py", "--data", str(data), "--out", str(run), *flags]
    peak = 0
    with subprocess.Popen(words, cwd=ROOT, stdout=sys.stderr) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            now = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *now])
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = {
        stage: [float(row["seconds"]) for row in rows if row["stage"] == stage] for stage in ("vae", "unet")
    }
    began = seconds["unet"][0] - seconds["vae"][-1]
    return {"began": began, "step": median(np.diff(seconds["unet"][1:])), "memory": peak / 1024}


def large(quick: bool, celeba: str | None, **_) -> Iterator[Row]:
    r"""202,599 rows against the sample's own, in one run of each."""
    if not celeba:
        raise FileNotFoundError("DDPM_CELEBA names no folder of CelebA")
    table = open_table(celeba)
    with tempfile.TemporaryDirectory() as folder:
        enlarge(table, Path(folder) / "celeba")
        steps = 40 if quick else 200
        many = trained(Path(folder) / "celeba", Path(folder) / "many", steps)
        few = trained(Path(celeba).resolve(), Path(folder) / "few", steps)
    what = f"{sum(SPLITS):,} pictures against {len(table):,}"
    names = {
        "began": ("from the end of the VAE's stage to the UNet's first step", "s", 1.2),
        "step": (f"a step of the UNet among the first {steps}, new latents and captions included", "s", 1.05),
        "memory": ("memory that no file backs, at its peak", "MiB", 1.05),
    }
    for name, (label, unit, goal) in names.items():
        sides = [f"{side[name]:.2f} {unit}" for side in (many, few)]
        yield spread("large", f"{label}, {what}", sides, [many[name] / few[name]], goal)
