r"""Several processes train one model: torchrun starts them, torch's DistributedDataParallel averages their gradients.

Every process draws the random numbers of the whole batch, which come from counters, and computes its own shard of the
batch. So a step does not depend on the number of processes, except for the order in which sums are rounded.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ddpm.tools.errors import UserError

PATIENCE = datetime.timedelta(hours=6)  # the others wait while the main process makes the caches
OF_A_STEP = datetime.timedelta(minutes=10)  # how long a GPU waits for the gradients of the others


class LostGroup(UserError):
    r"""Another process of the group ended or failed, as torch's `error` says."""

    def __init__(self, error: Exception, place: str = ""):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        super().__init__(f"lost the other processes{place} ({lines[0][:120]})")


@dataclass(frozen=True)
class Group:
    r"""The process group that trains one model; one process alone is a group, too.

    Attributes:
        device: where this process computes.
        rank: number of this process, from 0; the main process, 0, alone writes and prints.
        size: how many there are.
        gloo: torch's process group for single numbers on the CPU; None: the default one.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    gloo: dist.ProcessGroup | None = None

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: torch.device) -> Iterator["Group"]:
        r"""The group that torchrun's environment names, gloo on the CPU and nccl on GPUs; without one, this process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(device)
            return
        device = _device_of_process(device)
        gloo = None
        try:
            if device.type == "cuda":
                dist.init_process_group("nccl", timeout=OF_A_STEP)
                gloo = dist.new_group(backend="gloo", timeout=PATIENCE)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"could not join the other processes ({error}); start them with torchrun"
            ) from None
        try:
            yield cls(device, dist.get_rank(), size, gloo)
        finally:
            dist.destroy_process_group()

    def shard(self, batch):
        r"""This process's part of a batch: a tensor, an array or a list with B a multiple of `size`."""
        length = len(batch) // self.size
        return batch[self.rank * length : (self.rank + 1) * length]

    def parallel(self, network: nn.Module) -> nn.Module:
        r"""`network` with the main process's weights. Its backward pass averages gradients over the group."""
        if self.size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def mean(self, value: float) -> float:
        r"""The mean over the processes."""
        return self._exchanged(dist.all_reduce, value, dist.ReduceOp.SUM) / self.size

    def max(self, value: float) -> float:
        r"""The largest of the processes' values."""
        return self._exchanged(dist.all_reduce, value, dist.ReduceOp.MAX)

    def broadcast(self, value: float) -> float:
        r"""The main process's value, for example the time on its clock."""
        return self._exchanged(dist.broadcast, value, 0)

    def _exchanged(self, collective, value: float, how) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        collective(tensor, how, group=self.gloo)
        return tensor.item()

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        r"""The main process runs the block while the others wait, then they run it and find what it made.

        Raises: UserError in the others when the main process could not end it.
        """
        if self.rank:
            if not self.broadcast(0.0):
                raise UserError("the first process could not go on; it says why")
            yield
            return
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the others may be gone
                self.broadcast(0.0)
            raise
        self.broadcast(1.0)


def is_lost(error: Exception) -> bool:
    r"""Whether an error means that another process of the group is gone; gloo's errors differ only in their text."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _device_of_process(device: torch.device) -> torch.device:
    r"""The device of this process among those of its machine."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"expected cuda or cpu for several processes, got {device.type}; give --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"expected a GPU for each process of a machine, got process {local_rank} and "
            f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


ALONE = Group(torch.device("cpu"))
