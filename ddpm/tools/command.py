r"""What the commands share: refusals in one line with exit code 2, signals, lines and bars on the screen.

No torch, so that `--help` answers at once.
"""

import argparse
import contextlib
import ctypes
import io
import math
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from ddpm.tools.errors import UserError, escaped, printable

DEVICES = ("auto", "cpu", "cuda", "mps")
NOISE_SCALE = "factor on the noise of all steps together, above 0 to 1 [the model's own, mostly 1]"
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SCRIPTS = Path(__file__).parents[2]  # of a checkout; a wheel has modules alone
TRAIN = "python train.py" if (SCRIPTS / "train.py").is_file() else "python -m ddpm.training"
SAMPLE = "python sample.py" if (SCRIPTS / "sample.py").is_file() else "python -m ddpm"
OUT_OF_MEMORY = (
    "out of memory; lower --batch-size and --vae-batch-size, raise --accumulation, or use --gradient-checkpointing or "
    f"--preset lowvram ({TRAIN} --dry-run --device cpu prints what is needed); to draw or to evaluate, "
    "ask for fewer pictures"
)
TOGETHER = 3.0  # seconds within which signals are one request; a handler may wait for a whole backward pass
QUIET_SECONDS = 10  # after which a command that draws no bar prints how far it is
_quiet = False  # by `be_quiet`
_newest = time.monotonic()  # when a line was printed last


def check_writable(folder: Path):
    r"""UserError where nothing can be written to `folder`, which may be new."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        raise UserError(
            f"expected a folder that can be written to, {existing} cannot; choose another --out"
        ) from None


class Parser(argparse.ArgumentParser):
    r"""An argument parser whose refusal is one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")


class Stopped(KeyboardInterrupt):
    r"""SIGINT (Ctrl-C), SIGTERM or SIGHUP (a closed terminal) ended the command; `signum` is the signal's number."""

    def __init__(self, signum: int, message: str = "stopped"):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    r"""A signal handler that only notes the first signal, in `signum`; a later one ends the process at once.

    What follows within `TOGETHER` is the same request: torchrun passes on a signal that its whole group got as well.
    """

    signum = 0

    def __call__(self, signum: int, frame):
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()
            with contextlib.suppress(OSError):  # print is not for handlers
                os.write(2, b"\nfinishing the step and saving; again after three seconds leaves at once\n")
        elif time.monotonic() - self.since > TOGETHER:
            _next_ends()
            signal.raise_signal(signum)  # which a hangup, sent twice by some terminals, does not end


@contextlib.contextmanager
def on_signals(handler: Callable) -> Iterator:
    r"""Within this context `SIGNALS` call `handler`, except those that are ignored, as under nohup."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set them
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {signum: old for signum, old in before.items() if old not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield handler
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _leave(signum: int, frame):
    _next_ends()
    raise Stopped(signum)


def _next_ends():
    for signum in SIGNALS:  # a terminal that closes may send SIGHUP twice
        is_hangup = signum not in (signal.SIGINT, signal.SIGTERM)
        signal.signal(signum, signal.SIG_IGN if is_hangup else signal.SIG_DFL)


class Output:
    r"""Standard output or error for a command that goes on when nobody reads it any more.

    What the encoding lacks is escaped. After a write that fails (a closed pipe, a full device) all goes nowhere.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, call: Callable, *arguments):
        try:
            call(*arguments)
        except OSError as error:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if self.stream is sys.__stdout__:
                reason = error.strerror or error
                print(f"warning: standard output ended ({reason}); going on without it", file=sys.stderr)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    r"""Within this context standard output and error are an `Output`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


def exit_code(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    r"""Call `main`; print a UserError or an OSError as one line and return 2, a signal as 128 and its number."""
    keep_freed_memory()
    with lasting_output():
        return _exit_code(main, argv)


def _exit_code(main: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    try:
        with on_signals(_leave), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            main(argv)
        return 0
    except UserError as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _refused(OUT_OF_MEMORY)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)


def _refused(reason: str) -> int:
    # said while the error is alive: with it ends torch's process group, which takes long enough for torchrun to kill
    print(f"error: {printable(reason)}", file=sys.stderr)
    return 2


def _show_warning(message, *_, **__):
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    r"""Whether the memory of the machine or of its card did not suffice."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)


def keep_freed_memory():
    r"""Let this process keep what it frees for what it takes next, where the C library is glibc; elsewhere nothing.

    Left alone, glibc gives every large tensor back to the system and takes the next one from it page by page. That
    costs a quarter of a training step on the CPU. The numbers are the same.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL("libc.so.6").mallopt
        set_option(mmap_max, 0)
        set_option(trim_threshold, 2**31 - 1)


def check_drawing(a: argparse.Namespace):
    r"""Refuse settings by which nothing can be drawn; UserError says what was expected."""
    if a.steps < 1:
        raise UserError(f"expected --steps of at least 1, got {a.steps}")
    if not math.isfinite(a.guidance):
        raise UserError(f"expected a finite --guidance, such as 3, got {a.guidance}")
    if not 0 <= a.eta <= 1:
        raise UserError(f"expected --eta in [0, 1], got {a.eta}")
    if a.eta and a.sampler == "ddpm":
        raise UserError(
            f"expected --eta with the samplers ddim and dpm++, got {a.eta} with ddpm; leave it out"
        )
    if not 0 < a.noise_scale <= 1:
        raise UserError(f"expected --noise-scale above 0 and at most 1, got {a.noise_scale}")


def path(text: str) -> Path:
    r"""A path on the command line, with ~ for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(os.path.expanduser(text))


def be_quiet():
    r"""From now on this process prints nothing but its own end, because another one of its group speaks."""
    global _quiet
    _quiet = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    warnings.simplefilter("ignore")


class Lines(tqdm):
    r"""A bar for a log or a notebook: now and then a line, so that nothing is silent for long."""

    def __init__(self, *things, **options):
        form = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}{postfix}]"
        super().__init__(*things, file=io.StringIO(), bar_format=form, mininterval=0, miniters=1, **options)

    def display(self, msg=None, pos=None):
        if msg is None and time.monotonic() - _newest >= QUIET_SECONDS:
            say(str(self))


def bar(things: Iterable | None = None, **options) -> tqdm:
    r"""A tqdm bar on a terminal, `Lines` elsewhere, and nothing in a process that is quiet."""
    kind = tqdm if sys.stderr and sys.stderr.isatty() else Lines
    return kind(things, disable=_quiet, **options)


def progress_bar(things: Iterable, total: int, label: str) -> Iterable:
    r"""`things` with a bar while they pass."""
    return bar(things, desc=label, total=total, leave=False)


def say(text: str):
    r"""Print a line above a bar that is being drawn."""
    global _newest
    _newest = time.monotonic()
    tqdm.write(escaped(text))  # file names may be in it
