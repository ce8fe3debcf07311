r"""What training would need: parameters, FLOPs, memory, time a step; on made-up pictures, and nothing is written."""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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


def attention_flops(q_shape, k_shape, v_shape, *_, **__) -> int:
    r"""FLOPs of torch's fused attention on a CPU."""
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def attention_backward_flops(grad_shape, q_shape, k_shape, v_shape, *_, **__) -> int:
    r"""FLOPs of its backward pass."""
    return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


ATTENTION_ON_CPU = {  # torch's counter knows only the fused attention of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@dataclass(frozen=True)
class Need:
    r"""What one stage of training takes; memory in bytes.

    Attributes:
        parameters: of the network that learns. flops: of a step's matrix products and convolutions. seconds: of a step.
        weights: of all three networks, which are on the device together. gradients, optimizer (the moments it keeps),
            average (EMA): of the network that learns.
        kept: what autograd keeps of one micro-batch for the backward pass, weights not counted.
        peak: the most at once. Gradients and what is kept are not always there together; an operation's own buffers
            come on top.
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
    weights = {storage._cdata for storage in storages(list(network.parameters()))}
    kept = {}

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


def report(config: Config, device: torch.device, precision: str, steps: int = 4) -> Iterator[str]:
    r"""Lines of text: the model, and for each stage what `measure` finds."""
    settings = config.training
    side, latent_side = config.model.image_size, config.model.latent_size
    text = TextTower()  # no weights are read: none are needed to measure what they take
    model = TextToImage(config.model, text).to(device)
    model.unet.set_gradient_checkpointing(settings.gradient_checkpointing)
    yield (
        f"preset {config.preset}: pictures {side} x {side} x 3, latents {latent_side} x {latent_side} x "
        f"{config.model.latent_channels}, text {TOKENS} x {WIDTH}, {precision} on {device}"
    )
    for stage, batch_size in (("vae", settings.vae_batch_size), ("unet", settings.batch_size)):
        need = measure(stage, model, config, precision, steps)
        yield (
            f"{stage}: {need.parameters:,} parameters; {need.flops / 1e9:,.0f} GFLOP and {need.seconds:.2f} s a step "
            f"of {batch_size} in {settings.accumulation} part{'s' * (settings.accumulation > 1)}"
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
    opt, loss = learner(stage, model, config, precision, steps)

    def step() -> float:
        start = time.monotonic()
        opt.begin_step()
        for _ in range(config.training.accumulation):
            opt.backward(loss())
        opt.end_step()
        wait_for(model.device)
        return time.monotonic() - start

    opt.network.train()
    kept = bytes_kept(loss, opt.network)
    seconds = [step()]  # the optimizers' moments are there from now on
    states = tree_leaves([optimizer.state for optimizer in opt.optimizers])
    moments = sum(state.nbytes for state in states if isinstance(state, Tensor) and state.ndim)
    with LiveBytes() as live:
        step()
    with FlopCounterMode(
        display=False, custom_mapping=ATTENTION_ON_CPU
    ) as counter:  # it keeps tensors itself
        step()
    seconds += [step() for _ in range(steps - 3)]
    parameters = sum(p.numel() for p in opt.network.parameters())
    average = 4 * parameters if opt.ema else 0
    weights = sum(tensor.nbytes for part in model.children() for tensor in part.state_dict().values())
    return Need(
        parameters=parameters,
        flops=counter.get_total_flops(),
        seconds=min(seconds),
        weights=weights,
        gradients=4 * parameters,
        optimizer=moments,
        average=average,
        kept=kept,
        peak=weights + moments + average + live.peak,
    )


def learner(
    stage: str, model: TextToImage, config: Config, precision: str, steps: int
) -> tuple[Optimization, Callable[[], Tensor]]:
    r"""The stage's optimization, and a function that computes a loss of a made-up micro-batch."""
    settings = config.training
    if stage == "vae":
        opt = Optimization(model.vae, config, settings.vae_lr, Bound(steps), False, precision)
        made_up_loss = partial(made_up_vae_loss, model, settings.vae_batch_size // settings.accumulation)
    else:
        opt = Optimization(model.unet, config, settings.lr, Bound(steps), True, precision)
        made_up_loss = partial(made_up_unet_loss, model, settings.batch_size // settings.accumulation)

    def loss() -> Tensor:
        with autocast(model.device, precision):
            return made_up_loss()

    return opt, loss


@torch.no_grad()
def measure_caches(model: TextToImage, precision: str) -> tuple[int, int]:
    r"""The most bytes at once, weights not counted, while pictures become latents and captions states (caches.py)."""
    side = model.config.image_size
    x = torch.zeros(AT_ONCE, 3, side, side, device=model.device).contiguous(memory_format=torch.channels_last)
    with autocast(model.device, precision), LiveBytes() as latents:
        model.vae.encode(x)
    with autocast(model.device, precision), LiveBytes() as captions:
        model.text(["a man"] * AT_ONCE)
    return latents.peak, captions.peak


def made_up_vae_loss(model: TextToImage, batch_size: int) -> Tensor:
    r"""The mean square error of random pictures, in place of the VAE's loss; no VGG16 is in it."""
    side = model.config.image_size
    x = torch.randn(batch_size, 3, side, side, device=model.device)
    x = x.contiguous(memory_format=torch.channels_last)
    return (model.vae.decode(model.vae.encode(x).mode()).float() - x).square().mean()


def made_up_unet_loss(model: TextToImage, batch_size: int) -> Tensor:
    r"""The mean square of the UNet's output on random latents and states, in place of its loss."""
    z_t = torch.randn(batch_size, *model.latent_shape, device=model.device)
    z_t = z_t.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(batch_size, dtype=torch.long, device=model.device)
    context = torch.randn(batch_size, TOKENS, WIDTH, device=model.device)
    return model.unet(z_t, t, context).float().square().mean()
