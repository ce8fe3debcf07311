r"""Which pictures and which timesteps a step sees."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ddpm.config import Config, TrainConfig
from ddpm.tools.errors import UserError
from ddpm.tools.seeding import seed_of


def batch_rows(rows: np.ndarray, batch: int, step: int, *name) -> tuple[np.ndarray, int]:
    r"""Which pictures step number `step` (from 0) sees, and the epoch it is in.

    Every epoch has its own permutation of `rows`. An incomplete last batch is left out. Data smaller than a batch is
    repeated.
    """
    if len(rows) < batch:
        rows = np.resize(rows, batch)
    per_epoch = len(rows) // batch
    epoch, place = divmod(step, per_epoch)
    order = permutation(len(rows), seed_of(*name, "order", epoch))
    return rows[order[place * batch : (place + 1) * batch]], epoch


@lru_cache(maxsize=1)
def permutation(n: int, seed: int) -> np.ndarray:
    r"""0..n-1 in a random order. The last order is kept, because all steps of an epoch share it."""
    return np.random.default_rng(seed).permutation(n)


def seconds_of_training(settings: TrainConfig) -> float:
    r"""When --max-minutes ends the steps; what is left is for saving and drawing."""
    whole = 60 * settings.max_minutes
    return whole - max(10, 0.02 * whole)


def check_counts(train: int, valid: int):
    r"""UserError unless there are pictures to train on and others to validate."""
    if not train or not valid:
        raise UserError(
            f"expected pictures to train on and others to validate, got {train} and {valid}; "
            "give more, or see the split or partition file"
        )


def stage_steps(config: Config, stage: str, count: int) -> int:
    r"""How many steps bound a stage, vae or unet, with `count` pictures: the settings count steps or epochs."""
    settings = config.training
    if not settings.epochs:
        return settings.vae_steps if stage == "vae" else settings.unet_steps
    batch_size = settings.vae_batch_size if stage == "vae" else settings.batch_size
    return settings.epochs * (settings.steps_per_epoch or max(1, count // batch_size))


def mirrored(batch: int, g: torch.Generator, settings: TrainConfig) -> Tensor:
    r"""(B,) booleans: which pictures are mirrored. Each is with probability 1/2, and none without `flip`."""
    return torch.rand(batch, generator=g) < (0.5 if settings.flip else 0.0)


def timestep_batch(batch: int, T: int, g: torch.Generator) -> Tensor:
    r"""(B,) timesteps, each uniform on 0..T-1 and all spread evenly (Variational Diffusion Models, appendix I.1)."""
    u = (torch.rand(1, generator=g) + torch.arange(batch) / batch) % 1
    return (u * T).long()[torch.randperm(batch, generator=g)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    r"""`tensor` on `device`; from the CPU to a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
