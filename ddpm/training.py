r"""The two training stages as generators: they compute, their caller logs, samples and saves.

Every random number of step n comes from a stream named (seed, stage, n), and the data order of an epoch from (seed,
stage, epoch). So a run that goes on from a checkpoint takes the steps it would have taken.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.cache import Latents, Pictures, Texts
from ddpm.classifier import IMAGENET_DEVIATION, IMAGENET_MEAN
from ddpm.config import Config, UserError
from ddpm.data import TRAIN
from ddpm.diffusion import diffusion_loss
from ddpm.model import TextToImage, autocast
from ddpm.muon import Muon, muon_groups
from ddpm.parallel import ALONE, Group
from ddpm.seeding import generator, seed_of
from ddpm.vae import vae_loss

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
        by_time = 0.0 if self.until is None else (self.clock() - self.since) / max(self.until - self.since, 1e-9)
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
        self, network: nn.Module, config: Config, lr: float, bound: Bound, ema: bool, precision: str,
        group: Group = ALONE,
    ):  # fmt: skip
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
        self, stage: str, losses: Iterator[Tensor], rows: np.ndarray | None = None, times: Tensor | None = None
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
        saved = state.get("optimizers") or [state["optimizer"]]  # one alone, in states from before there was Muon
        for optimizer, its in zip(self.optimizers, saved, strict=True):
            if len(its["param_groups"]) != len(optimizer.param_groups):
                raise ValueError("another version's optimizer made it; go on with that version, or start anew")
            optimizer.load_state_dict(its)
        if self.scaler.is_enabled() and state["scaler"]:  # another precision may have come with --resume
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            for name, tensor in self.ema.shadow.items():
                tensor.copy_(state["ema"][name])


def batch_rows(rows: np.ndarray, batch: int, step: int, *name) -> tuple[np.ndarray, int]:
    r"""Which pictures step number `step` (from 0) sees, and the epoch it is in.

    Every epoch is a permutation of `rows` of its own; an incomplete last batch is left out. Data smaller than a
    batch is repeated.
    """
    if len(rows) < batch:
        rows = np.resize(rows, batch)
    per_epoch = len(rows) // batch
    epoch, place = divmod(step, per_epoch)
    order = permutation(len(rows), seed_of(*name, "order", epoch))
    return rows[order[place * batch : (place + 1) * batch]], epoch


@lru_cache(maxsize=1)
def permutation(n: int, seed: int) -> np.ndarray:
    r"""0..n-1 in a random order; the last one is kept, for all steps of an epoch ask for the same."""
    return np.random.default_rng(seed).permutation(n)


def stage_steps(config: Config, stage: str, pictures: Pictures) -> int:
    r"""The bound of a stage, vae or unet, in steps; epochs count where the configuration sets them."""
    t = config.training
    if not t.epochs:
        return t.vae_steps if stage == "vae" else t.unet_steps
    batch = t.vae_batch_size if stage == "vae" else t.batch_size
    return t.epochs * (t.steps_per_epoch or max(1, len(pictures.rows(TRAIN)) // batch))


def timestep_batch(batch: int, T: int, g: torch.Generator) -> Tensor:
    r"""(B,) times, each uniform on 0..T-1, together spread evenly (Variational Diffusion Models, appendix I.1)."""
    u = (torch.rand(1, generator=g) + torch.arange(batch) / batch) % 1
    return (u * T).long()[torch.randperm(batch, generator=g)]


def train_vae(
    model: TextToImage, pictures: Pictures, config: Config, opt: Optimization, precision: str
) -> Iterator[Report]:
    r"""First stage: the VAE learns to give pictures back; yields a `Report` a step until its bound."""
    t, share = config.training, opt.group.share
    rows = pictures.rows(TRAIN)
    perceptual = perceptual_loss(model.device) if t.perceptual_weight else None
    while opt.bound.progress(opt.step) < 1:
        model.vae.train()
        g = generator(t.seed, "vae", opt.step)
        chosen, _ = batch_rows(rows, t.vae_batch_size, opt.step, t.seed, "vae")
        flip = torch.rand(len(chosen), generator=g) < 0.5
        eps = torch.randn(len(chosen), *model.latent_shape, generator=g)
        x, eps = pictures.batch(share(chosen), share(flip)), share(eps)

        def losses(batch=(x, eps)) -> Iterator[Tensor]:
            for k, (part, noise) in enumerate(parts(batch, t.accumulation)):
                part, noise = to_device(part, model.device), to_device(noise, model.device)
                part = part.contiguous(memory_format=torch.channels_last)
                with opt.part(k == t.accumulation - 1):
                    with autocast(model.device, precision):
                        x_hat, posterior = opt.parallel(part, noise)
                    _, loss = vae_loss(part, x_hat, posterior, t.kl_weight, t.reconstruction)
                    if perceptual is not None:
                        loss = loss + t.perceptual_weight * perceptual(part, x_hat.float())
                    yield loss / t.accumulation

        yield opt.update("vae", losses(), chosen)


def train_unet(
    model: TextToImage, latents: Latents, texts: Texts, pictures: Pictures,
    config: Config, opt: Optimization, precision: str,
) -> Iterator[Report]:  # fmt: skip
    r"""Second stage: the UNet learns to denoise latents (DDPM, algorithm 1); yields a `Report` a step."""
    t, share = config.training, opt.group.share
    rows = pictures.rows(TRAIN)
    while opt.bound.progress(opt.step) < 1:
        model.unet.train()
        g = generator(t.seed, "unet", opt.step)
        chosen, epoch = batch_rows(rows, t.batch_size, opt.step, t.seed, "unet")
        flip = torch.rand(len(chosen), generator=g) < 0.5
        eps_vae, eps = torch.randn(2, len(chosen), *model.latent_shape, generator=g)
        times = timestep_batch(len(chosen), model.schedule.timesteps, g)
        dropped = torch.rand(len(chosen), generator=g) < model.config.caption_drop
        captions = [
            "" if drop else pictures.caption(i, t.seed, epoch % t.caption_variants)
            for i, drop in zip(share(chosen), share(dropped), strict=True)
        ]
        z_0 = latents.gaussian(share(chosen), share(flip)).sample(eps=share(eps_vae)) * model.latent_scale

        context = texts(captions)
        mine = (z_0, share(times), share(eps), context)

        def losses(batch=mine) -> Iterator[Tensor]:
            for k, part in enumerate(parts(batch, t.accumulation)):
                z, at, noise, c = (to_device(tensor, model.device) for tensor in part)

                def denoise(z_t: Tensor, t: Tensor, c=c) -> Tensor:
                    with autocast(model.device, precision):
                        return opt.parallel(z_t.contiguous(memory_format=torch.channels_last), t, c)

                with opt.part(k == t.accumulation - 1):
                    loss = diffusion_loss(model.schedule, denoise, z, at, noise, model.config.prediction, t.vlb_weight)
                    yield loss.mean() / t.accumulation

        yield opt.update("unet", losses(), chosen, times)


def parts(batch: tuple[Tensor, ...], number: int) -> Iterator[tuple[Tensor, ...]]:
    r"""A batch of several tensors in `number` parts of equal length."""
    return zip(*(tensor.chunk(number) for tensor in batch), strict=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    r"""`tensor` on `device`; from the CPU to a GPU by pinned memory, so that this copy is not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def perceptual_loss(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    r"""Distance between VGG16 features of two batches of pictures in [-1, 1] (Johnson et al. 2016).

    The features after the first three groups of convolutions, each normalised over its channels.

    Raises: UserError when torchvision cannot get the network's weights.
    """
    from torchvision.models import VGG16_Weights, vgg16

    try:
        features = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features
    except Exception as error:  # the network, the host, the checksum
        raise UserError(f"could not get VGG16's weights ({error}); leave --perceptual-weight at 0") from None
    features = features.to(device).eval().requires_grad_(False)
    groups = [features[:4], features[4:9], features[9:16]]
    mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
    std = torch.tensor(IMAGENET_DEVIATION, device=device)[:, None, None]

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = (((picture + 1) / 2 - mean) / std for picture in (x, y))
        total = x.new_zeros(())
        for group in groups:
            x, y = group(x), group(y)
            total = total + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
        return total

    return distance
