r"""What training would need: parameters, FLOPs, memory, time a step; on made-up pictures, and nothing is written."""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ddpm.config import Config
from ddpm.model import TextToImage
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.tools.devices import autocast, wait_for
from ddpm.training.caches import AT_ONCE
from ddpm.training.optimization import Bound, Optimization

MIB = 2**20
ATTENTION_ON_CPU = {  # torch's counter knows the fused attention of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *gqkv, **_: (
        sdpa_backward_flop_count(*gqkv[:4])
    ),
}


@dataclass(frozen=True)
class Need:
    r"""What one stage of training takes; memory in bytes.

    Attributes:
        parameters: of the network that learns. flops: of a step's matrix products and convolutions. seconds: of a step.
        weights: of all three networks, which are on the device together. gradients, optimizer (the moments it keeps),
            average (EMA): of the network that learns.
        kept: what autograd keeps of one part of the batch for the backward pass, weights not counted.
        peak: the most at once. Gradients and what is kept are not always there together; what an operation makes for
            a moment comes on top.
    """

    parameters: int
    flops: int
    seconds: float
    weights: int
    gradients: int
    optimizer: int
    average: int
    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    r"""Counts the bytes of tensors that are made within it and are still there, and the most there were at once.

    What a kernel takes for itself alone is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages([args, kwargs])}
        for storage in storages(result):
            if storage._cdata not in given:  # else it is a view, or was written in place
                given.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, number: int):
        self.now += number
        self.peak = max(self.peak, self.now)


def storages(values) -> list[torch.UntypedStorage]:
    r"""The memory behind every tensor in nested lists, tuples and dictionaries."""
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def bytes_kept(loss: Callable[[], Tensor], network: nn.Module) -> int:
    r"""What autograd keeps of `loss` for the backward pass, by its saved-tensor hooks; no storage is counted twice."""
    weights, kept = {storage._cdata for storage in storages(list(network.parameters()))}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    value.backward()
    network.zero_grad()
    return sum(kept.values())


def estimate(config: Config, device: torch.device, precision: str, steps: int = 4) -> Iterator[str]:
    r"""Lines of text: the model, and for each stage what `measure` finds."""
    m, t = config.model, config.training
    text = TextTower()  # no weights are read: none are needed to know what they take
    model = TextToImage(m, text).to(device)
    model.unet.set_gradient_checkpointing(t.gradient_checkpointing)
    yield (
        f"preset {config.preset}: pictures {m.image_size} x {m.image_size} x 3, latents "
        f"{m.latent_size} x {m.latent_size} x {m.latent_channels}, text 77 x 512, {precision} on {device}"
    )
    for stage, batch in (("vae", t.vae_batch_size), ("unet", t.batch_size)):
        need = measure(stage, model, config, precision, steps)
        yield (
            f"{stage}: {need.parameters:,} parameters; {need.flops / 1e9:,.0f} GFLOP and {need.seconds:.2f} s a step "
            f"of {batch} in {t.accumulation} part{'s' * (t.accumulation > 1)}"
        )
        average = f"average {need.average / MIB:.0f}, " if need.average else ""
        yield (
            f"{stage}, memory in MiB: weights of all networks {need.weights / MIB:.0f}, gradients "
            f"{need.gradients / MIB:.0f}, optimizer {need.optimizer / MIB:.0f}, {average}"
            f"kept for the backward pass {need.kept / MIB:.0f}; predicted peak {need.peak / MIB:.0f}"
        )
    latents, captions = measure_caches(model, precision)
    yield (
        f"between the stages, MiB beside the weights: {latents / MIB:.0f} for the latents of {AT_ONCE} pictures, "
        f"{captions / MIB:.0f} for {AT_ONCE} captions"
    )


def measure(stage: str, model: TextToImage, config: Config, precision: str, steps: int = 4) -> Need:
    r"""Take `steps` steps (3 or more) of a stage, vae or unet, on random numbers: two are counted, the others timed."""
    t, device = config.training, model.device
    network, lr, batch = (
        (model.vae, t.vae_lr, t.vae_batch_size) if stage == "vae" else (model.unet, t.lr, t.batch_size)
    )
    network.train()
    opt = Optimization(network, config, lr, Bound(steps), stage == "unet", precision)

    def loss() -> Tensor:
        with autocast(device, precision):
            return _made_up_loss(stage, model, batch // t.accumulation) / t.accumulation

    def step() -> float:
        start = time.monotonic()
        opt.update(stage, (loss() for _ in range(t.accumulation)))
        wait_for(device)
        return time.monotonic() - start

    kept = bytes_kept(loss, network)
    seconds = [step()]  # the optimizers' moments are there from now on
    states = tree_leaves([optimizer.state for optimizer in opt.optimizers])
    moments = sum(state.nbytes for state in states if isinstance(state, Tensor) and state.ndim)
    with LiveBytes() as live:
        step()
    with FlopCounterMode(
        display=False, custom_mapping=ATTENTION_ON_CPU
    ) as counter:  # it holds on to tensors itself
        step()
    seconds += [step() for _ in range(steps - 3)]
    parameters = sum(p.numel() for p in network.parameters())
    gradients, average = 4 * parameters, 4 * parameters * (stage == "unet")
    weights = sum(tensor.nbytes for part in model.children() for tensor in part.state_dict().values())
    return Need(
        parameters,
        counter.get_total_flops(),
        min(seconds),
        weights,
        gradients,
        moments,
        average,
        kept,
        weights + moments + average + live.peak,
    )


@torch.no_grad()
def measure_caches(model: TextToImage, precision: str) -> tuple[int, int]:
    r"""The most bytes at once, weights not counted, while pictures become latents and captions states (cache.py)."""
    x = torch.zeros(AT_ONCE, 3, *[model.config.image_size] * 2, device=model.device)
    most = []
    for work in (
        lambda: model.vae.encode(x.contiguous(memory_format=torch.channels_last)),
        lambda: model.text(["a man"] * AT_ONCE),
    ):
        with autocast(model.device, precision), LiveBytes() as live:
            work()
        most.append(live.peak)
    return most[0], most[1]


def _made_up_loss(stage: str, model: TextToImage, batch: int) -> Tensor:
    r"""A mean square in place of the stage's loss, of one part of a batch that is drawn here; no VGG16 is in it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=model.device)

    if stage == "vae":
        x = normal(3, model.config.image_size, model.config.image_size).contiguous(
            memory_format=torch.channels_last
        )
        return (model.vae.decode(model.vae.encode(x).mode()).float() - x).square().mean()
    z = normal(*model.latent_shape).contiguous(memory_format=torch.channels_last)
    t = torch.zeros(batch, dtype=torch.long, device=model.device)
    return model.unet(z, t, normal(TOKENS, WIDTH)).float().square().mean()
