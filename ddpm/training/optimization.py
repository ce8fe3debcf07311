r"""One network that learns: optimizers, learning rate, bound, average."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.config import Config, TrainConfig
from ddpm.tools.devices import autocast
from ddpm.tools.errors import UserError
from ddpm.training.batches import to_device
from ddpm.training.muon import Muon, muon_groups
from ddpm.training.parallel import ALONE

BAD_STEPS = 5  # non-finite steps in a row after which a run stops


class NotFinite(UserError):
    r"""The loss or its gradient was not finite for several steps in a row. The weights are those before these steps."""


@dataclass(frozen=True)
class Report:
    r"""One step: its number from 1, the mean loss of the batch, AdamW's learning rate, the norm of the gradient.

    Attributes:
        finite: False for a step that was skipped, because its loss or gradient was not finite.
        rows: the pictures it saw. t: (B,) the UNet's timesteps, or None.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    finite: bool
    rows: np.ndarray | None = None
    t: Tensor | None = None


@dataclass
class Bound:
    r"""When a stage ends: after `steps`, or when `clock` passes `until` seconds, whichever comes first.

    Args:
        clock: seconds that the whole command has taken, earlier sessions included.
        since, until: when the stage begins and ends by this clock; until None: no bound on time.
    """

    steps: int
    clock: Callable[[], float] = time.monotonic
    since: float = 0.0
    until: float | None = None

    def progress(self, step: int) -> float:
        r"""How much of the stage is over after `step` steps, 0..1."""
        by_steps = step / self.steps
        if self.until is None:
            return min(1.0, by_steps)
        by_time = (self.clock() - self.since) / max(self.until - self.since, 1e-9)
        return min(1.0, max(by_steps, by_time))


class EMA:
    r"""Running average of a network's parameters, whose decay warms up so that the start is soon forgotten.

    $$\bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta, \qquad
    d = \min\left(d_{\max},\ \frac{1 + n}{10 + n}\right)$$

    where n counts the steps from 1, and $d_{\max}$ is `decay`.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, n: int):
        r"""Move the average towards the parameters after step n; skipped steps count."""
        d = min(self.decay, (1 + n) / (10 + n))
        parameters = [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - d)

    @contextmanager
    def applied(self, network: nn.Module):
        r"""Within this context the network has the averaged parameters."""
        last = {name: p.detach().clone() for name, p in network.named_parameters()}
        network.load_state_dict(self.shadow)
        try:
            yield
        finally:
            network.load_state_dict(last)


class Optimization:
    r"""One network that learns: optimizers, learning rate, gradient clipping, loss scaling, EMA, the count of steps.

    A step is `begin_step`, a `forward` and a `backward` for each of the `micro_batches`, and `end_step`. With a
    `muon_lr` the inner matrices learn by `Muon` and all else by AdamW. `state_dict` holds all that a resumed run needs,
    weights included.

    Attributes: parallel: the network for the forward passes of training, whose gradients are averaged over the group.
    """

    def __init__(
        self, network: nn.Module, config: Config, lr: float, bound: Bound, ema: bool, precision, group=ALONE
    ):
        self.settings = config.training
        self.network = network
        self.group = group
        self.parallel = group.parallel(network)
        self.bound = bound
        self.device = next(network.parameters()).device
        self.precision = precision
        self.optimizers = optimizers(network, config.training, lr, precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.ema = EMA(network, config.training.ema_decay) if ema else None
        self.losses: list[Tensor] = []  # of this step's micro-batches
        self.step = 0
        self.bad = 0  # steps in a row that were not finite

    def progress(self) -> float:
        r"""How much of the stage is over, 0..1."""
        return self.bound.progress(self.step)

    def set_learning_rate(self, progress: float):
        r"""A linear warm-up over the first steps, times a cosine that falls to 1 % as progress rises to 1."""
        warmup = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        factor = warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]

    def begin_step(self):
        r"""Set the learning rates of the next step.

        Raises: NotFinite in place of a further step after `BAD_STEPS` in a row that were not finite.
        """
        if self.bad >= BAD_STEPS:
            raise NotFinite(
                f"the loss was not finite for {BAD_STEPS} steps in a row, up to step {self.step}; look at the pictures "
                "named above, resume with --precision fp32, or start anew with a lower --lr, --vae-lr or --muon-lr"
            )
        self.set_learning_rate(self.progress())
        self.losses = []
        self.network.train()

    def micro_batches(self, *batch: Tensor) -> Iterator[tuple[Tensor, ...]]:
        r"""The tensors of a batch in `accumulation` equal parts, each moved to the network's device in its turn.

        Several processes average their gradients only in the last backward pass.
        """
        count = self.settings.accumulation
        parts = zip(*(tensor.chunk(count) for tensor in batch), strict=True)
        for k, part in enumerate(parts):
            accumulates = self.group.size > 1 and k < count - 1
            with self.parallel.no_sync() if accumulates else nullcontext():
                yield tuple(to_device(tensor, self.device) for tensor in part)

    def forward(self, x: Tensor, *rest: Tensor, **more: Tensor):
        r"""What the network makes of a micro-batch, in the precision of the training."""
        with autocast(self.device, self.precision):
            return self.parallel(x.contiguous(memory_format=torch.channels_last), *rest, **more)

    def backward(self, loss: Tensor):
        r"""Add the gradient of a micro-batch's mean loss, divided by the number of micro-batches."""
        loss = loss / self.settings.accumulation
        self.scaler.scale(loss).backward()
        self.losses.append(loss.detach())

    def end_step(self, rows: np.ndarray | None = None, t: Tensor | None = None) -> Report:
        r"""Clip the gradient, step and update the average.

        A loss or gradient that is not finite changes nothing but the count of steps.

        Args: rows, t: for the report.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        clip = self.settings.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), clip)
        losses = torch.stack(self.losses).tolist()  # Python waits for the device here alone
        loss = self.group.mean(sum(losses))
        grad_norm = norm.item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.network.zero_grad(set_to_none=True)
        self.step += 1
        if finite and self.ema is not None:
            self.ema.update(self.network, self.step)
        overflow = not finite and math.isfinite(loss) and self.scaler.get_scale() > 1
        if not overflow:  # fp16's scaler still comes down, which is no failure
            self.bad = 0 if finite else self.bad + 1
        lr = self.optimizers[0].param_groups[0]["lr"]
        return Report(self.step, loss, lr, grad_norm, finite, rows, t)

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "since": self.bound.since,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.shadow if self.ema else {},
        }

    def load_state_dict(self, state: dict):
        self.step = state["step"]
        self.bound.since = state["since"]
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for group in saved["param_groups"]:
                if "fused" in group:  # of AdamW; the checkpoint may be of another device
                    group["fused"] = optimizer.defaults["fused"]
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled() and state["scaler"]:  # --resume may change the precision
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            for name, tensor in self.ema.shadow.items():
                tensor.copy_(state["ema"][name])


def optimizers(network, settings: TrainConfig, lr: float, precision) -> list[torch.optim.Optimizer]:
    r"""AdamW for all parameters; with a `muon_lr`, AdamW for the outer ones and Muon for the inner matrices."""
    decay = settings.weight_decay
    inner, outer = muon_groups(network) if settings.muon_lr else ([], list(network.parameters()))
    fused = outer[0].device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(outer, lr, weight_decay=decay, fused=fused)
    if not inner:
        return [adamw]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return [adamw, Muon(inner, settings.muon_lr, weight_decay=decay, dtype=dtype)]
