r"""Several processes train one model: torchrun starts them, torch's DistributedDataParallel averages their gradients.

Every process draws the random numbers of the whole batch, which come from counters, and computes its own share of the
batch. So a step does not depend on how many processes take it, but for the order in which sums are rounded."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ddpm.tools.errors import UserError

PATIENCE = datetime.timedelta(hours=6)  # the others wait while the first one makes the caches
OF_A_STEP = datetime.timedelta(minutes=10)  # how long a GPU waits for the gradients of the others


class Group:
    r"""The processes that train together; one process alone is a group, too.

    Attributes:
        rank: number of this process, from 0; the first one alone writes and speaks.
        size: how many there are.
        device: where this process computes.

    Args: words: torch's group over which single numbers go, always gloo's; None: the default one, which is gloo's.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, words=None):
        self.device, self.rank, self.size, self.words = device, rank, size, words

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: torch.device) -> Iterator["Group"]:
        r"""The group that torchrun's environment names, gloo on the CPU and nccl on GPUs; without one, this process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(device)
            return
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"expected a GPU for each process of a machine, got process {local} and "
                    f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node, or use --device cpu"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise UserError(
                f"expected cuda or cpu for several processes, got {device.type}; give --device cpu"
            )
        words = None
        try:
            if device.type == "cuda":
                dist.init_process_group("nccl", timeout=OF_A_STEP)
                words = dist.new_group(backend="gloo", timeout=PATIENCE)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"could not join the other processes ({error}); start them with torchrun"
            ) from None
        try:
            yield cls(device, dist.get_rank(), size, words)
        finally:
            dist.destroy_process_group()

    def share(self, batch):
        r"""This process's part of a batch, a tensor, an array or a list with B a multiple of `size`."""
        per = len(batch) // self.size
        return batch[self.rank * per : (self.rank + 1) * per]

    def wrapped(self, network: nn.Module) -> nn.Module:
        r"""`network` with the first process's weights, whose backward pass averages gradients over the processes."""
        if self.size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def mean(self, value: float) -> float:
        r"""The mean over the processes."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.size if self.size > 1 else value

    def largest(self, value: float) -> float:
        r"""The largest of the processes' values."""
        return self._reduced(value, dist.ReduceOp.MAX) if self.size > 1 else value

    def of_first(self, value: float) -> float:
        r"""The first process's value, such as what its clock says."""
        if self.size == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64)
        dist.broadcast(tensor, src=0, group=self.words)
        return tensor.item()

    def _reduced(self, value: float, operation) -> float:
        tensor = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.words)
        return tensor.item()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        r"""The first process runs the block while the others wait, then they run it: what it made is there for them.

        Raises: UserError in the others when the first one could not end it.
        """
        if self.rank:
            if not self.of_first(0.0):
                raise UserError("the first process could not go on; it says why")
            yield
            return
        done = False
        try:
            yield
            done = True
        finally:
            with (
                contextlib.nullcontext() if done else contextlib.suppress(RuntimeError)
            ):  # the others may be gone
                self.of_first(float(done))


def is_lost(error: Exception) -> bool:
    r"""Whether an error says that another process of the group is gone: gloo's are told by their text alone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


ALONE = Group(torch.device("cpu"))
