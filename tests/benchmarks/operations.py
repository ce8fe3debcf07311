r"""The operations that take most of a training step, each beside what arithmetic or memory would allow it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ddpm.config import TrainConfig
from ddpm.tools.command import keep_freed_memory
from ddpm.tools.devices import choose_precision
from ddpm.training.dry_run import ATTENTION_ON_CPU

from .measure import Row, alternate, spread
from .networks import BATCH, CPU, spec_networks, unet_step

COSTLIEST = 5
COUNTS = flop_registry | {packet: shape_wrapper(count) for packet, count in ATTENTION_ON_CPU.items()}


@dataclass
class Spent:
    r"""Seconds that the calls of one operation took, and the least that arithmetic and memory allow them."""

    seconds: float = 0.0
    arithmetic: float = 0.0
    memory: float = 0.0
    least: float = 0.0  # call by call the larger of the two


class Clock(TorchDispatchMode):
    r"""Times every operation within it, by name.

    Args: flops: a second, by type of numbers. bandwidth: bytes a second of a copy, read and written.
    """

    def __init__(self, flops: dict[torch.dtype, float], bandwidth: float):
        super().__init__()
        self.flops = flops
        self.bandwidth = bandwidth
        self.spent: dict[str, Spent] = defaultdict(Spent)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        begun = perf_counter()
        result = function(*args, **kwargs)
        seconds = perf_counter() - begun
        if function.is_view:
            return result
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        dtype = torch.bfloat16 if any(x.dtype == torch.bfloat16 for x in tensors) else torch.float32
        count = COUNTS.get(function.overloadpacket)
        arithmetic = count(*args, **kwargs, out_val=result) / self.flops[dtype] if count else 0.0
        memory = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors) / self.bandwidth
        spent = self.spent[function.overloadpacket.__name__]
        spent.seconds += seconds
        spent.arithmetic += arithmetic
        spent.memory += memory
        spent.least += max(arithmetic, memory)
        return result


def copy_bandwidth(quick: bool) -> float:
    r"""Bytes a second, read and written, of a copy that no cache holds."""
    a, b = torch.empty(2, 2**26)
    (times,) = alternate([lambda: b.copy_(a)], rounds=5 if quick else 15, warm=2)
    return 2 * a.nbytes / min(times)


def operations(quick: bool, machine: dict, **_) -> Iterator[Row]:
    r"""A training step of the spec's UNet, operation by operation."""
    keep_freed_memory()
    _, unet = spec_networks()
    precision = choose_precision(TrainConfig().precision, CPU)
    step = unet_step(unet, True, precision, channels_last=True)
    step()
    peaks = machine["matmul_gflops"]
    flops = {torch.float32: 1e9 * peaks["fp32"], torch.bfloat16: 1e9 * peaks["bf16"]}
    bandwidth = copy_bandwidth(quick)
    rounds = []
    for _ in range(3 if quick else 9):
        with Clock(flops, bandwidth) as clock:
            step()
        rounds.append(clock.spent)
    whole = median(sum(spent.seconds for spent in r.values()) for r in rounds)
    names = sorted(rounds[0], key=lambda name: -median(r[name].seconds for r in rounds))
    for name in names[:COSTLIEST]:
        all_of_it = [r[name] for r in rounds]
        took = median(spent.seconds for spent in all_of_it)
        least = all_of_it[0]
        bound = "arithmetic" if least.arithmetic > least.memory else f"memory at {bandwidth / 1e9:.0f} GB/s"
        what = (
            f"`{name}`, {100 * took / whole:.0f} % of a {precision} UNet step, batch {BATCH}, against {bound}"
        )
        ratios = [spent.seconds / spent.least for spent in all_of_it]
        yield spread("operations", what, (f"{took:.3f} s", f"{least.least:.3f} s"), ratios)
