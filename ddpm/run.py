r"""The folder of a run: configuration, resume state, metrics and their plot; each file is whole or not there."""

import csv
import io
import os
import time
from pathlib import Path

import torch

from ddpm.config import Config, UserError
from ddpm.model import write_atomically

STAGES = ("vae", "unet")
COLUMNS = ("stage", "step", "seconds", "loss", "lr", "grad_norm", "images_per_second", "psnr", "ssim", "val_loss")


class Run:
    r"""One run folder.

    Attributes:
        config: the run's configuration.
        state: what state.pt held when the run is resumed, else None.
        rows: of metrics.csv, as far as the state goes.
    """

    def __init__(self, folder: Path, config: Config, resume: bool, started: float):
        self.folder, self.config = folder, config
        self.rows, self.state = [], None
        if resume:
            self._reopen()
        else:
            self._check_new()
        self.started = started - (self.state["elapsed"] if self.state else 0.0)

    def _check_new(self):
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"expected a new folder for the run, {self.folder} is there already; "
                f"choose another --out, or go on with --resume {self.folder}"
            )
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(f"expected a folder that can be written to, {there} cannot; choose another --out")

    def _reopen(self):
        path = self.folder / "state.pt"
        if not path.is_file():
            return
        try:
            self.state = torch.load(path, map_location="cpu", weights_only=True)
            place = (STAGES.index(self.state["stage"]), self.state["step"])
        except Exception as error:  # a cut or foreign file fails in many ways
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"could not read {path} ({reason}); it is damaged: start anew with --out") from None
        metrics = self.folder / "metrics.csv"
        if metrics.is_file():
            with open(metrics, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get("stage") in STAGES]
            self.rows = [row for row in rows if (STAGES.index(row["stage"]), int(row["step"])) <= place]

    def create(self):
        r"""Make the folder, once everything that can be refused has been looked at."""
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.write("config.json", self.config.to_json().encode())

    def write(self, name: str, content):
        r"""Write a file of the run; `content` is bytes or a function of the path to write to."""
        write_atomically(self.folder / name, content)

    def clock(self) -> float:
        r"""Seconds that the run has taken, earlier sessions included."""
        return time.monotonic() - self.started

    def log(self, **row):
        r"""Note a row of metrics; it reaches the file with the next checkpoint."""
        self.rows.append({name: row.get(name, "") for name in COLUMNS})

    def save(self, stage: str, optimization):
        r"""Write the checkpoint, then the metrics up to it and their plot."""
        state = {"stage": stage, "step": optimization.step, "elapsed": self.clock(), stage: optimization.state_dict()}
        self.write("state.pt", lambda to: torch.save(state, to))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        self.write("metrics.csv", text.getvalue().encode())
        self.write("loss.png", lambda to: plot_losses(to, self.rows))


def plot_losses(path: Path, rows: list[dict]):
    r"""Loss and held-out figures over the steps of both stages, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, stage, held_out in zip(figure.subplots(1, 2), STAGES, ("psnr", "val_loss"), strict=True):
        mine = [row for row in rows if row["stage"] == stage]
        axis.set(title=f"{stage} stage", xlabel="step", ylabel="loss")
        loss = [(int(row["step"]), float(row["loss"])) for row in mine if row["loss"] != ""]
        if loss:
            axis.plot(*zip(*loss, strict=True), lw=0.7, color="#4477aa", label="train")
            axis.set_yscale("log")
        valid = [(int(row["step"]), float(row[held_out])) for row in mine if row[held_out] != ""]
        if valid:
            other = axis.twinx() if held_out == "psnr" else axis
            other.plot(*zip(*valid, strict=True), "o-", ms=3, color="#cc6677", label="held out")
            other.set_ylabel("PSNR in dB, held out" if held_out == "psnr" else "loss")
            other.legend(loc="upper right")
    figure.savefig(path, format="png", dpi=110)
