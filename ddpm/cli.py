r"""What the commands share: one line for what a person can mend, exit code 2, lines and bars, a device."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable

DEVICES = ("auto", "cpu", "cuda", "mps")


class Parser(argparse.ArgumentParser):
    r"""An argument parser whose complaint is one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    r"""Call `main`; print a UserError or an OSError as one line and return 2, Ctrl-C as 130."""
    from ddpm.config import UserError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            main(argv)
        return 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)):
            raise
        print("error: out of memory; lower --batch-size, raise --accumulation, or use --gradient-checkpointing or "
              "--preset lowvram; --dry-run tells what is needed", file=sys.stderr)  # fmt: skip
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 2


def choose_device(name: str):
    r"""The torch device called `name`; auto takes cuda (ROCm too), then mps, then the CPU; raises UserError."""
    import torch

    from ddpm.config import UserError

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, is_there in there.items() if is_there)
    if not there.get(name, False):
        raise UserError(
            f"expected a device out of {', '.join(n for n, ok in there.items() if ok)} on this machine, got {name!r}"
        )
    return torch.device(name)


def choose_precision(name: str, device) -> str:
    r"""`auto` becomes bf16 where the device computes in it natively, fp32 elsewhere."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp32"


def progress_bar(things: Iterable, total: int, label: str) -> Iterable:
    r"""`things` with a bar on the terminal while they pass."""
    from tqdm import tqdm

    return tqdm(things, label, total, leave=False, disable=None)


def say(text: str):
    r"""A line on the screen, above a bar that is being drawn."""
    from tqdm import tqdm

    tqdm.write(text)
