r"""Devices, precisions and memory."""

import contextlib
import ctypes

import torch

from ddpm.tools.errors import UserError


def is_out_of_memory(error: Exception) -> bool:
    r"""Whether the memory of the machine or of its card did not suffice."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)


def choose_device(name: str):
    r"""The torch device called `name`; auto takes cuda (ROCm too), then mps, then the CPU; raises UserError."""
    import torch

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


def keep_freed_memory():
    r"""Let this process keep what it frees for what it takes next, where the C library is glibc; elsewhere nothing.

    Left alone, glibc gives every large tensor back to the system and takes the next one from it page by page: a
    quarter of a training step on the CPU. The numbers are the same.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL("libc.so.6").mallopt
        set_option(mmap_max, 0)
        set_option(trim_threshold, 2**31 - 1)


def autocast(device: torch.device, precision: str):
    r"""The context in which networks compute in `precision`: fp32, bf16 or fp16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        raise ValueError(f"expected a precision out of fp32, bf16, fp16, got {precision!r}")
    return torch.autocast(device.type, kinds[precision])


def wait_for(device: torch.device):
    r"""Return once the device has done what it was asked for; a GPU is asked without waiting, so clocks need this."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
