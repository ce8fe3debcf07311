r"""One network that learns: optimizers, learning rate, bound, average."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.config import Config
from ddpm.tools.errors import UserError
from ddpm.training.muon import Muon, muon_groups
from ddpm.training.parallel import ALONE, Group

BAD_STEPS = 5  # non-finite steps in a row after which a run stops


class NotFinite(UserError):
    r"""The loss or its gradient was not finite for several steps in a row; the weights are those before them."""


@dataclass(frozen=True)
class Report:
    r"""One step: its number from 1, means over the batch, AdamW's learning rate, and how far the stage is, 0..1.

    `rows` are the pictures it saw, `times` (B,) the UNet's t.
    """

    stage: str
    step: int
    loss: float
    lr: float
    grad_norm: float
    progress: float
    finite: bool
    rows: np.ndarray | None = None
    times: Tensor | None = None


@dataclass
class Bound:
    r"""When a stage ends: after `steps`, or when `clock` passes `until` seconds, whichever comes first.

    Args:
        clock: seconds that the whole command has taken, earlier sessions included.
        since, until: the stage's share of the clock; until None: no bound on time.
    """

    steps: int
    clock: Callable[[], float] = time.monotonic
    since: float = 0.0
    until: float | None = None

    def progress(self, step: int) -> float:
        r"""How much of the stage is over after `step` steps, 0..1."""
        by_steps = step / self.steps
        by_time = (
            0.0 if self.until is None else (self.clock() - self.since) / max(self.until - self.since, 1e-9)
        )
        return min(1.0, max(by_steps, by_time))


class EMA:
    r"""Running average of a network's parameters, whose decay warms up so that the start is soon forgotten.

    $$\bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta, \qquad
    d = \min\left(d_{\max},\ \frac{1 + n}{10 + n}\right)$$
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, n: int):
        r"""Take in the parameters after step number n, from 1; steps that were skipped count."""
        d = min(self.decay, (1 + n) / (10 + n))
        parameters = [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - d)

    @contextmanager
    def applied(self, network: nn.Module):
        r"""Within this context the network has the averaged parameters."""
        own = {name: p.detach().clone() for name, p in network.named_parameters()}
        network.load_state_dict(self.shadow)
        try:
            yield
        finally:
            network.load_state_dict(own)


def check_batches(config: Config, group: Group):
    r"""Raise UserError where the processes and their parts do not divide a batch."""
    t = config.training
    for batch in (t.batch_size, t.vae_batch_size):
        if batch % (t.accumulation * group.size):
            raise UserError(
                f"expected a batch that {group.size} processes x {t.accumulation} parts divide, got {batch}; "
                "change --nproc_per_node, or start anew with another --batch-size and --vae-batch-size"
            )


class Optimization:
    r"""One network that learns: optimizers, learning rate, gradient clipping, loss scaling, EMA, the count of steps.

    With a `muon_lr` the inner matrices are under `Muon`; all else is under AdamW. `state_dict` holds all that a resumed
    run needs, weights included.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        lr: float,
        bound: Bound,
        ema: bool,
        precision: str,
        group: Group = ALONE,
    ):
        t = config.training
        check_batches(config, group)
        self.group, self.parallel = group, group.wrapped(network)
        self.network, self.warmup, self.clip, self.bound = network, t.warmup, t.clip, bound
        device = next(network.parameters()).device
        groups, outer = muon_groups(network) if t.muon_lr else ([], list(network.parameters()))
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(outer, lr, weight_decay=t.weight_decay, fused=device.type in ("cuda", "cpu"))
        ]
        if groups:
            products = torch.bfloat16 if precision == "bf16" else torch.float32
            self.optimizers.append(Muon(groups, t.muon_lr, weight_decay=t.weight_decay, dtype=products))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.ema = EMA(network, t.ema_decay) if ema else None
        self.step = 0
        self.bad = 0

    def set_learning_rate(self, progress: float) -> float:
        r"""Linear warm-up over the first steps, times a cosine that falls to 1 % as progress goes to 1.

        Returns: AdamW's rate.
        """
        warm = min(1.0, (self.step + 1) / max(1, self.warmup))
        of_peak = warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = of_peak * optimizer.defaults["lr"]
        return self.optimizers[0].param_groups[0]["lr"]

    def update(
        self,
        stage: str,
        losses: Iterator[Tensor],
        rows: np.ndarray | None = None,
        times: Tensor | None = None,
    ) -> Report:
        r"""One step from the losses of the parts of a batch, each already divided by their number.

        A loss or gradient that is not finite changes nothing but the count of steps.

        Raises: NotFinite in place of a further step after `BAD_STEPS` of these in a row.
        """
        if self.bad >= BAD_STEPS:
            raise NotFinite(
                f"the {stage} loss was not finite for {BAD_STEPS} steps in a row, up to step {self.step}; look at the "
                "pictures named above, resume with --precision fp32, or start anew with a lower --lr, --vae-lr or "
                "--muon-lr"
            )
        progress = self.bound.progress(self.step)
        lr = self.set_learning_rate(progress)
        total = 0.0
        for loss in losses:
            self.scaler.scale(loss).backward()
            total += loss.item()
        total = self.group.mean(total)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip or math.inf).item()
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.network.zero_grad(set_to_none=True)
        self.step += 1
        if finite and self.ema is not None:
            self.ema.update(self.network, self.step)
        overflow = not finite and math.isfinite(total) and self.scaler.get_scale() > 1
        if not overflow:  # fp16's scaler still comes down, which is no failure
            self.bad = 0 if finite else self.bad + 1
        return Report(stage, self.step, total, lr, norm, progress, finite, rows, times)

    def part(self, last: bool):
        r"""The context of one part of a batch, forward and backward: processes average gradients in the last alone."""
        return nullcontext() if last or self.group.size == 1 else self.parallel.no_sync()

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
        self.step, self.bound.since = state["step"], state["since"]
        self.network.load_state_dict(state["network"])
        saved = state.get("optimizers") or [
            state["optimizer"]
        ]  # one alone, in states from before there was Muon
        for optimizer, its in zip(self.optimizers, saved, strict=True):
            if len(its["param_groups"]) != len(optimizer.param_groups):
                raise ValueError(
                    "another version's optimizer made it; go on with that version, or start anew"
                )
            optimizer.load_state_dict(its)
        if self.scaler.is_enabled() and state["scaler"]:  # another precision may have come with --resume
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            for name, tensor in self.ema.shadow.items():
                tensor.copy_(state["ema"][name])
