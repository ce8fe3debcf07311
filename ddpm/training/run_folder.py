r"""The folder of a run: configuration, resume state, metrics and their plot. No file is ever half-written.

A process may be killed between any two lines here. So the metrics are written before the state, and rows beyond the
state are dropped when a run goes on. The state before the last is kept, and a state carries a digest of its content.
"""

import contextlib
import csv
import io
import itertools
import os
import pickle
import platform
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps global state
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ddpm.celeba.dataset import IN_MEMORY
from ddpm.config import MOVABLE, TEXT_FILE, Config
from ddpm.tools.command import TRAIN, check_writable
from ddpm.tools.errors import UserError
from ddpm.tools.files import (
    CannotWrite,
    check_new_folder,
    check_not_packed,
    digest_of,
    flock,
    open_own,
    remove_leftovers,
    write_atomically,
)

STAGES = ("vae", "unet")
HELD_OUT = ("psnr", "ssim", "val_loss")  # figures of held-out pictures, where a step was validated
COLUMNS = ("stage", "step", "seconds", "loss", "lr", "grad_norm", "images_per_second", *HELD_OUT)
FORMAT = 1  # of the state; what `digest_of` makes of it stays the same in all formats
STATE = "state.pt"
PREVIOUS = "state.previous.pt"
LOCK = ".lock"
FROM_PYTHON = "go on with train(config, folder, resume=True, pictures=...) and the same pictures"


class Damaged(Exception):
    r"""A state that is not what was written."""


class Run:
    r"""One run folder, locked from `create` or from its resuming until the end of its context.

    Attributes:
        config: the run's configuration.
        state: what the newest whole state held when the run is resumed; None otherwise, and after `restore`.
        rows: of metrics.csv, as far as the state goes; one for each step.
        saved: (stage, step) of the newest whole state, or None.
        data: digests of the pictures, their captions and their split, see `check_data`.
        stage: that the command trains, as --stage has it.
        places: its flags --cache and --device, for the command that goes on.
        writes: False in all but one of the processes that train together: nothing is locked or written.
    """

    def __init__(self, folder: Path, config: Config, resume: bool, started: float, writes: bool = True):
        self.folder = folder
        self.config = config
        self.stage = "all"
        self.places = ""
        self.writes = writes
        self.rows: list[dict] = []
        self.state: dict | None = None
        self.saved: tuple[str, int] | None = None
        self.lock = None
        self.data: dict[str, str] = {}
        self.newest_is_whole = False
        self.newest: int | None = None  # when the state was written that this process wrote or read last
        try:
            if resume:
                if writes:
                    self._take_lock()
                self._reopen()
            elif writes:
                self._check_new()
        except BaseException:
            self.__exit__()
            raise
        self.started = started - (self.state["elapsed"] if self.state else 0.0)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error):
        if self.lock is not None:
            self.lock.close()

    def _check_new(self):
        of_a_run = ("config.json", STATE, PREVIOUS, "vae.safetensors")
        is_begun = any((self.folder / name).exists() for name in of_a_run)
        was_killed_in_create = (self.folder / LOCK).exists() and not is_begun
        if not was_killed_in_create:
            check_new_folder(self.folder, f"choose another --out, or go on with --resume {self.quoted}")
        check_writable(self.folder)

    def _take_lock(self):
        try:
            self.lock = open_own(self.folder / LOCK)  # held until `__exit__`
        except OSError as error:
            raise CannotWrite(
                f"could not write to {self.folder}: {error.strerror}; see that it is there and can be written to"
            ) from None
        if flock(self.lock) is False:
            self.lock.seek(0)
            who = self.lock.read(200).decode("utf-8", "replace") or "another process"
            raise UserError(
                f"expected a run that is at rest, {who} is training in {self.folder}; "
                "wait for it, stop it, or choose another --out"
            )
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name in it
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {platform.node()}".encode())
        for folder in (self.folder, self.folder / "samples"):
            remove_leftovers(folder)

    def keep_lock(self):
        r"""Take the lock again where its file was removed; refused where another process has trained meanwhile."""
        path = self.folder / LOCK
        is_held = path.exists() and os.path.samestat(path.stat(), os.fstat(self.lock.fileno()))
        if is_held or not self.folder.is_dir():  # where it is gone, the first file that is written says so
            return
        self.lock.close()
        self._take_lock()
        if written_at(self.folder / STATE) not in (None, self.newest):
            raise UserError(
                f"expected {self.folder / STATE} as this process left it, another has trained in {self.folder}; "
                f"go on from there with {TRAIN} --resume {self.quoted}"
            )

    def _reopen(self):
        damaged = []
        for name in (STATE, PREVIOUS):
            if self.state is None and (self.folder / name).is_file():
                try:
                    self.state = read_state(self.folder / name)
                    self.newest_is_whole = name == STATE
                    self.newest = written_at(self.folder / STATE)
                except Damaged as error:
                    damaged.append(f"{self.folder / name} is damaged ({error})")
        if self.state is None:
            if damaged:
                raise UserError(
                    f"{' and '.join(damaged)}, no checkpoint is left to go on from; start anew with --out"
                )
            self._check_no_weights()
            return  # killed before its first checkpoint
        self._check_config()
        stage, step = self.saved = (self.state["stage"], self.state["step"])
        if damaged:
            advice = f"going on from the checkpoint before, {stage} step {step}"
            warnings.warn(f"{damaged[0]}; {advice}", stacklevel=3)
        if self.writes:
            rows = read_metrics(self.folder / "metrics.csv")
            self.rows = [row for row in rows if position(row) <= position(self.state)]

    def _check_no_weights(self):
        r"""Refuse a run without a checkpoint whose weights a training would overwrite."""
        for name in ("ema.safetensors", "unet.safetensors"):
            if (self.folder / name).exists():
                raise UserError(
                    f"expected a checkpoint {STATE} in {self.folder} to go on from, got {name} without one; "
                    "draw from it, or train anew with another --out"
                )

    def _check_config(self):
        now = self.config.settings()
        differing = [
            f"{name} (config.json {now[name]}, state {value})"
            for name, value in self.state["config"].items()
            if name in now and name not in MOVABLE and value != now[name]
        ]
        if differing:
            raise UserError(
                f"expected config.json and the state in {self.folder} to agree, they differ in "
                f"{', '.join(differing)}; put config.json back"
            )

    def check_data(self, data: dict[str, str]):
        r"""Compare digests of the data with those of the checkpoint, and warn of what changed.

        Raises: UserError if --data names other pictures than those the run began with.
        """
        self.data = data
        before = self.state.get("data", {}) if self.state else {}
        if IN_MEMORY in before and IN_MEMORY not in data:
            raise UserError(
                f"expected the pictures that {self.folder} began with, which a program gave, got those of "
                f"{self.config.training.data}; {FROM_PYTHON}"
            )
        changed = [part for part, digest in before.items() if data.get(part) != digest]
        folder = self.config.training.data
        has_moved = changed and Path(folder).resolve() != Path(self.state["config"]["data"]).resolve()
        if has_moved and "pictures" in changed:
            raise UserError(
                f"expected the pictures of the run in --data {folder}, got others; "
                "give the folder they are in now, or train anew with --out"
            )
        if changed:
            names = " and ".join(changed)
            warnings.warn(f"the {names} of {folder} changed since {self.folder} was saved", stacklevel=3)

    def create(self, text: Callable[[Path], None] | None = None):
        r"""Make the folder, after every check that may refuse the run; config.json comes last.

        Args: text: writes the text tower's weights, unless they are the random ones.
        """
        if not self.writes:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        if self.lock is None:
            self.folder.joinpath(LOCK).touch()
            self._check_new()
            self._take_lock()
            (self.folder / TEXT_FILE).unlink(missing_ok=True)  # of a command that was killed here
        if text is not None:
            write_atomically(self.folder / TEXT_FILE, text)
        write_atomically(self.folder / "config.json", self.config.to_json().encode())

    @property
    def quoted(self) -> str:
        r"""The folder quoted for a shell, for a command that is printed."""
        return shlex.quote(str(self.folder))

    @property
    def in_second_stage(self) -> bool:
        r"""Whether the run is resumed within its second stage; until `restore`."""
        return self.state is not None and self.state["stage"] == "unet"

    def clock(self) -> float:
        r"""Seconds that the run has taken, earlier sessions included."""
        return time.monotonic() - self.started

    def advice(self) -> str:
        r"""What is saved and how to go on."""
        if not (self.folder / "config.json").exists():
            return "nothing is saved yet; give the command again"
        saved = "{} step {} is saved".format(*self.saved) if self.saved else "no step is saved yet"
        if not self.writes:  # only the main process knows whether it saved
            saved = "what the first process saved stands"
        if IN_MEMORY in self.data:
            return f"{saved}; {FROM_PYTHON}"
        is_whole = self.stage == "all" or self.config.model.few_steps  # a distillation has one stage alone
        stage = "" if is_whole else f" --stage {self.stage}"
        return f"{saved}; go on with {TRAIN} --resume {self.quoted}{stage}{self.places}"

    def log(self, **row) -> dict:
        r"""Note a row of metrics; it reaches the file with the next checkpoint."""
        self.rows.append({name: row.get(name, "") for name in COLUMNS})
        return self.rows[-1]

    def row(self, stage: str, step: int) -> dict:
        r"""The last row, which is this step's, or a new one."""
        if self.rows and (self.rows[-1]["stage"], int(self.rows[-1]["step"])) == (stage, step):
            return self.rows[-1]
        return self.log(stage=stage, step=step, seconds=f"{self.clock():.1f}")

    def save(self, stage: str, optimization, **more):
        r"""Write the metrics, then their checkpoint, then their plot. The checkpoint before stays."""
        if not self.writes:
            self.saved = (stage, optimization.step)
            return
        self.keep_lock()
        write_atomically(self.folder / "metrics.csv", csv_of(self.rows))
        if self.saved != (stage, optimization.step) or not self.newest_is_whole:
            self.save_state(stage, optimization, **more)
        write_atomically(self.folder / "loss.png", partial(plot_losses, rows=self.rows))

    def save_state(self, stage: str, optimization, **more):
        r"""Write the checkpoint alone."""
        state = {
            "format": FORMAT,
            "stage": stage,
            "step": optimization.step,
            "elapsed": self.clock(),
            "config": self.config.settings(),
            "data": self.data,
            stage: optimization.state_dict(),
            **more,
        }
        state["sha256"] = digest_of(state)
        # a damaged state must not replace the whole one before it
        keep = self.folder / PREVIOUS if self.newest_is_whole else None
        write_atomically(self.folder / STATE, partial(save_state, state=state), size_of(state), keep)
        self.newest_is_whole = True
        self.newest = written_at(self.folder / STATE)
        self.saved = (stage, optimization.step)

    def restore(self, stage: str, optimization):
        r"""Load the stage's optimization from the state, if the state is of this stage; then free the state."""
        state = self.state
        self.state = None
        if state and state["stage"] == stage:
            with self.fitting():
                optimization.load_state_dict(state[stage])

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        r"""Within this context the state is used; UserError if it is whole but not of this model."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"expected the state of this configuration in {self.folder}: {str(error)[:300]}"
            ) from None


def written_at(path: Path) -> int | None:
    r"""When a file was written, in nanoseconds; None without a file."""
    return path.stat().st_mtime_ns if path.exists() else None


def position(row: dict) -> tuple[int, int]:
    r"""Stage and step of a row of metrics or of a state, to compare."""
    return STAGES.index(row["stage"]), int(row["step"])


def save_state(path: Path, state: dict):
    with open(path, "wb") as file:  # given a path instead, torch does not say why it could not write
        torch.save(state, file)


def trained_on(folder: Path) -> dict[str, str]:
    r"""Digests of the data that a run's checkpoint was trained on; none where it has no whole checkpoint."""
    with contextlib.suppress(Damaged, OSError, UserError):
        return read_state(folder / STATE).get("data", {})
    return {}


def read_state(path: Path) -> dict:
    r"""The state in a file; raises Damaged, or UserError where a newer version wrote it."""
    try:
        with warnings.catch_warnings():  # torch warns of some damaged files before it fails
            warnings.simplefilter("ignore")
            check_not_packed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        if size_of(state) > path.stat().st_size:
            raise ValueError("it claims more numbers than it holds")
        if state.pop("sha256") != digest_of(state):
            raise ValueError("its checksum does not fit")
        if state["format"] != FORMAT:
            raise UserError(
                f"expected a state of format {FORMAT} in {path}, got {state['format']}, "
                "a newer version of ddpm made it; use that"
            )
        position(state)  # each field that is read here is there, and of its kind
        float(state["elapsed"])
        state["config"].items()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a cut or foreign file fails in many ways
        if isinstance(error, PermissionError):  # it may be whole
            raise
        is_foreign = isinstance(error, pickle.UnpicklingError)  # whose text advises to load it without care
        reason = "it cannot be read" if is_foreign else " ".join(str(error).split())[:100]
        raise Damaged(reason) from None
    return state


def size_of(value) -> int:
    r"""Bytes of the tensors in nested dictionaries and lists."""
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def csv_of(rows: list[dict]) -> bytes:
    r"""The content of metrics.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_metrics(path: Path) -> list[dict]:
    r"""The rows of metrics.csv, also as a spreadsheet saves it. A file with other lines is set aside, and named."""
    if not path.is_file():
        warnings.warn(f"{path} is not there; its history begins anew", stacklevel=3)
        return []
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "")
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = ";" if ";" in "".join(lines[:1]) else ","
    whole = []
    with contextlib.suppress(csv.Error):
        for row in csv.DictReader(lines, delimiter=delimiter):
            row = {name: (row.get(name) or "").replace(",", ".") for name in COLUMNS}
            with contextlib.suppress(ValueError):
                [float(row[name] or 0) for name in COLUMNS[2:]]
                if position(row)[1] >= 0:
                    whole.append(row)
    if len(whole) < len(lines) - 1:
        names = (path.with_name(f"metrics.kept.{n}.csv") for n in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        write_atomically(kept, path.read_bytes())
        warnings.warn(
            f"{path} has {len(lines) - 1 - len(whole)} lines that are no metrics; kept as {kept}",
            stacklevel=2,
        )
    return whole


def plot_losses(path: Path, rows: list[dict]):
    r"""Loss and held-out figures over the steps of both stages, as a PNG."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, stage, held_out in zip(figure.subplots(1, 2), STAGES, ("psnr", "val_loss"), strict=True):
        of_stage = [row for row in rows if row["stage"] == stage]
        axis.set(title=f"{stage} stage", xlabel="step", ylabel="loss")
        steps, losses = points(of_stage, "loss")
        if steps:
            axis.plot(steps, losses, lw=0.7, color="#4477aa", label="train")
            axis.set_yscale("log")
        steps, values = points(of_stage, held_out)
        if steps:
            other = axis.twinx() if held_out == "psnr" else axis
            other.plot(steps, values, "o-", ms=3, color="#cc6677", label="held out")
            other.set_ylabel("PSNR in dB, held out" if held_out == "psnr" else "loss")
            other.legend(loc="center right")
    figure.savefig(path, format="png", dpi=110)


def points(rows: list[dict], column: str) -> tuple[list[int], list[float]]:
    r"""The steps that have a value in a column, and the values."""
    filled = [row for row in rows if row[column] != ""]
    return [int(row["step"]) for row in filled], [float(row[column]) for row in filled]
