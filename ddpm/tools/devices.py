r"""Devices and precisions."""

import contextlib
from collections.abc import Iterator

import torch
from torch.backends import mkldnn

from ddpm.tools.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    r"""The torch device called `name`; auto takes cuda (ROCm too), then mps, then the CPU; raises UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    devices = [device for device, is_available in available.items() if is_available]
    if name == "auto":
        name = devices[0]
    if name not in devices:
        raise UserError(f"expected a device out of {', '.join(devices)} on this machine, got {name!r}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    r"""`auto` becomes bf16 where the device multiplies matrices faster in it, fp32 elsewhere.

    Of CPUs these are the ones with AMX, and those of AMD with AVX-512's instructions for bf16. On a Xeon that has the
    latter alone, torch's steps in bf16 took 1.2 to 1.7 times as long as in fp32 (docs/benchmarks.md).
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        cpu = torch.cpu.get_capabilities()
        is_amd = cpu.get("sse4a")  # an extension that no other maker's CPUs have
        return "bf16" if cpu.get("amx_bf16") or (is_amd and cpu.get("avx512_bf16")) else "fp32"
    return "fp32"


def allow_tf32(device: torch.device):
    r"""Let a GPU that has TF32 multiply in it what stays in fp32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    r"""The context in which networks compute in `precision`: fp32, bf16 or fp16, whatever context is around it.

    On the CPU fp32 is single precision, also where the caller has allowed less.
    """
    if precision not in DTYPES:
        raise ValueError(f"expected a precision out of {', '.join(DTYPES)}, got {precision!r}")
    kernels = (mkldnn.matmul, mkldnn.conv) if precision == "fp32" and device.type == "cpu" else ()
    before = [kernel.fp32_precision for kernel in kernels]
    for kernel in kernels:
        kernel.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            yield
    finally:
        for kernel, value in zip(kernels, before, strict=True):
            kernel.fp32_precision = value


def wait_for(device: torch.device):
    r"""Return once the device has finished; a GPU works while Python goes on, so every clock needs this."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
