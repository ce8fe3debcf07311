r"""What training would need: parameters, FLOPs, memory, time a step; on made-up pictures, and nothing is written."""

import contextlib
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ddpm.celeba.faces import draw_many, drawn_rows, drawn_split
from ddpm.celeba.images import BadImage, read_image
from ddpm.celeba.lists import TRAIN, VALID, ImageTable
from ddpm.config import GUIDED, Config, size_warning
from ddpm.model import TextToImage
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.tools.arrays import TOGETHER
from ddpm.tools.command import bar
from ddpm.tools.devices import autocast, wait_for
from ddpm.tools.kernels import context_read_once
from ddpm.training.batches import check_counts, seconds_of_training, stage_steps
from ddpm.training.distillation import HELD_OUT
from ddpm.training.optimization import Bound, Optimization

MIB = 2**20
MANY_EPOCHS = 50  # of the UNet; a rule of thumb
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_ON_CPU = {  # torch's counter knows only the fused attention of GPUs; the arguments are shapes
    ON_CPU: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ON_CPU_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


class LiveBytes(TorchDispatchMode):
    r"""Counts the bytes of the tensors made within it: those still there, and the most at once.

    Buffers inside a kernel are not counted.
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
    r"""Bytes that autograd keeps of `loss` for the backward pass, each storage counted once."""
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


def report(
    config: Config, table: ImageTable | None, device: torch.device, precision: str, stage: str = "all"
) -> Iterator[str]:
    r"""Lines of text: the model, what `measure` finds for each stage, `measure_caches` beside them, and `minutes`."""
    settings = config.training
    split = drawn_split(settings.drawn_images) if table is None else table.split
    check_counts(*((split == part).sum() for part in (TRAIN, VALID)))
    side = config.model.image_size
    latent_side = config.model.latent_size
    model = TextToImage(config.model, TextTower()).to(device)  # weights need not be read to be measured
    model.unet.set_gradient_checkpointing(settings.gradient_checkpointing)
    yield (
        f"preset {config.preset}: pictures {side} x {side} x 3, latents {latent_side} x {latent_side} x "
        f"{config.model.latent_channels}, text {TOKENS} x {WIDTH}, {precision} on {device}"
    )
    yield from size_warning(config)
    seconds = {}
    batch_sizes = {"vae": settings.vae_batch_size, "unet": settings.batch_size}
    if config.model.few_steps:  # the VAE is the teacher's
        del batch_sizes["vae"]
    for name, batch_size in batch_sizes.items():
        need = measure(name, model, config, precision)
        seconds[name] = need["seconds"]
        mib = {kind: f"{value / MIB:.0f}" for kind, value in need.items()}
        yield (
            f"{name}: {need['parameters']:,} parameters; {need['flops'] / 1e9:,.0f} GFLOP and {need['seconds']:.2f} s "
            f"a step of {batch_size} in {settings.accumulation} part{'s' * (settings.accumulation > 1)}"
        )
        average = f"average {mib['average']}, " if need["average"] else ""
        yield (
            f"{name}, memory in MiB: weights of all networks {mib['weights']}, gradients {mib['gradients']}, "
            f"optimizer {mib['optimizer']}, {average}kept for the backward pass {mib['kept']}; "
            f"predicted peak {mib['peak']}"
        )
    memory, seconds["latent"], seconds["caption"] = measure_caches(model, precision)
    yield (
        f"beside a step, MiB: {memory[0] / MIB:.0f} to encode {TOGETHER} pictures, {memory[1] / MIB:.0f} to embed "
        f"{TOGETHER} captions, each once"
    )
    if config.model.few_steps:
        count = int((split == TRAIN).sum())
        yield minutes_of_distillation(config, count, seconds["unet"], seconds_of_a_call(model, precision))
        return
    yield from minutes(config, split, seconds_of_a_picture(config, table), seconds, stage)


def minutes(
    config: Config, split: np.ndarray, to_read: float, seconds: dict[str, float], stage: str = "all"
) -> Iterator[str]:
    r"""How long each part of the run will take on the data that is there, and what to change for few pictures.

    Args:
        split: of the pictures. to_read: seconds for one of them.
        seconds: of a step of `vae` and `unet`, and of one `latent` and one `caption`. stage: vae, unet or all.
    """
    settings = config.training
    count = int((split == TRAIN).sum())
    reading = len(split) * to_read
    scale = 0 if stage == "unet" else min(count, 2048) * seconds["latent"]

    def new(steps: float) -> tuple[float, float]:
        r"""Seconds for the latents and the captions that so many steps of the UNet need first, if all rows differ."""
        epochs = steps * settings.batch_size / count
        latents = count * distinct(2 if settings.flip else 1, epochs) * seconds["latent"]
        captions = count * min(epochs, settings.caption_variants)  # which take turns
        return latents, captions * seconds["caption"]

    steps = {name: stage_steps(config, name, count) * (stage in ("all", name)) for name in ("vae", "unet")}
    if settings.max_minutes:
        whole = 60 * settings.max_minutes
        allowed = max(0.0, whole * settings.vae_share - reading) / seconds["vae"]
        steps["vae"] = min(allowed, steps["vae"])
        left = seconds_of_training(settings) - reading - steps["vae"] * seconds["vae"] - scale
        low, high = 0.0, max(0.0, min(left / seconds["unet"], steps["unet"]))
        for _ in range(50):  # steps that the time allows, by halving
            middle = (low + high) / 2
            fits = middle * seconds["unet"] + sum(new(middle)) < left
            low, high = (middle, high) if fits else (low, middle)
        steps["unet"] = low
    vae = steps["vae"] * seconds["vae"]
    latents, captions = new(steps["unet"])
    unet = steps["unet"] * seconds["unet"] + latents + captions
    epochs = steps["unet"] * settings.batch_size / count
    parts = {
        f"for {len(split):,} pictures": reading,
        f"for {steps['vae']:,.0f} steps of the VAE": vae,
        "for the latents' scale": scale,
        f"for {steps['unet']:,.0f} steps of the UNet, {epochs:,.1f} epochs": unet,
        "of these for new latents": latents,
        "and at most for new captions": captions,
    }
    yield "about, in minutes: " + ", ".join(f"{value / 60:,.1f} {name}" for name, value in parts.items())
    if epochs > MANY_EPOCHS:
        fewer = max(1, MANY_EPOCHS * count // settings.batch_size)
        flags = f"--unet-steps {fewer} --sample-every {max(1, min(settings.sample_every, fewer // 10))}"
        if settings.epochs:  # they bound the VAE too
            flags = f"--epochs 0 --vae-steps {stage_steps(config, 'vae', count)} {flags}"
        yield (
            f"warning: the UNet may learn {count:,} pictures by heart in {epochs:,.0f} epochs; for {MANY_EPOCHS} of "
            f"them take {flags}, and fewer if the validation loss rises"
        )


def distinct(variants: int, epochs: float) -> float:
    r"""How many of a picture's n variants are seen by epochs that each draw one at random: n (1 - (1 - 1/n)^epochs)."""
    whole = math.floor(epochs)
    seen, then = (variants * (1 - (1 - 1 / variants) ** k) for k in (whole, whole + 1))
    return seen + (epochs - whole) * (then - seen)


def minutes_of_distillation(config: Config, count: int, step: float, call: float) -> str:
    r"""How long the teacher draws, and how many steps the student then has.

    Args: count: of the training pictures. step, call: seconds of a step, and of a call of the teacher for a picture.
    """
    settings = config.training
    calls = 2 * GUIDED[1]
    steps = stage_steps(config, "unet", count)
    pictures = min(settings.trajectories, steps * settings.batch_size)
    drawing = (pictures + HELD_OUT) * calls * call
    if settings.max_minutes:
        steps = min(steps, max(0.0, seconds_of_training(settings) - drawing) / step)
    return (
        f"about, in minutes: {drawing / 60:,.1f} for {pictures:,} pictures of the teacher, {calls} calls "
        f"each, and {steps * step / 60:,.1f} for {steps:,.0f} steps of the student"
    )


@torch.no_grad()
def seconds_of_a_call(model: TextToImage, precision: str) -> float:
    r"""Of the UNet, for one of the latents that the teacher draws together."""
    count = 2 * TOGETHER  # with and without the prompt
    x = torch.zeros(count, *model.latent_shape, device=model.device)
    context = torch.zeros(count, TOKENS, WIDTH, device=model.device)
    t = torch.zeros(count, dtype=torch.long, device=model.device)
    with autocast(model.device, precision), context_read_once(model.unet):
        model.unet(x, t, context)
        wait_for(model.device)
        begun = time.perf_counter()
        model.unet(x, t, context)
        wait_for(model.device)
        return (time.perf_counter() - begun) / count


def seconds_of_a_picture(config: Config, table: ImageTable | None, some: int = 32) -> float:
    r"""To draw or, with all processors, to read a picture, measured on a few."""
    size = config.model.image_size
    begun = time.perf_counter()
    if table is None:
        for _ in draw_many(drawn_rows(some, 0), 0, size):
            pass
        return (time.perf_counter() - begun) / some
    pictures = next(filter(None, table.batches(some)))  # of a file of parquet there may be none
    for _, source in pictures:
        with contextlib.suppress(BadImage):
            read_image(source, size, config.training.crop)
    return (time.perf_counter() - begun) / len(pictures) / os.cpu_count()


def measure(stage: str, model: TextToImage, config: Config, precision: str, steps: int = 4) -> dict:
    r"""Take `steps` steps (3 or more) of a stage, vae or unet, on random numbers: two are counted, the others timed.

    Returns:
        parameters: of the network that learns. flops: of a step's matrix products and convolutions. seconds: of a step.
        And in bytes: weights of all three networks, which are on the device together. gradients, optimizer (the
        moments it keeps), average (EMA): of the network that learns. kept: what autograd keeps of one micro-batch for
        the backward pass, weights not counted. peak: the most at once. Gradients and what is kept are not always there
        together; an operation's own buffers come on top.
    """
    settings = config.training
    if stage == "vae":
        opt = Optimization(model.vae, config, settings.vae_lr, Bound(steps), False, precision)
    else:
        opt = Optimization(model.unet, config, settings.lr, Bound(steps), True, precision)

    def loss() -> Tensor:
        with autocast(model.device, precision):
            return made_up_loss(stage, model, config)

    def step() -> float:
        start = time.monotonic()
        opt.begin_step()
        for _ in range(settings.accumulation):
            opt.backward(loss())
        opt.end_step()
        wait_for(model.device)
        shown.update()
        return time.monotonic() - start

    shown = bar(total=steps, desc=f"measuring steps, {stage}", leave=False)
    opt.network.train()
    kept = bytes_kept(loss, opt.network)
    seconds = [step()]  # the optimizers' moments are there from now on
    states = tree_leaves([optimizer.state for optimizer in opt.optimizers])
    moments = sum(state.nbytes for state in states if isinstance(state, Tensor) and state.ndim)
    with LiveBytes() as live:
        step()
    # not together with LiveBytes, because this one keeps tensors itself
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        step()
    seconds += [step() for _ in range(steps - 3)]
    shown.close()
    parameters = sum(p.numel() for p in opt.network.parameters())
    average = 4 * parameters if opt.ema else 0
    weights = sum(tensor.nbytes for part in model.children() for tensor in part.state_dict().values())
    weights += 4 * parameters if model.config.few_steps else 0  # the teacher
    return {
        "parameters": parameters,
        "flops": counter.get_total_flops(),
        "seconds": min(seconds),
        "weights": weights,
        "gradients": 4 * parameters,
        "optimizer": moments,
        "average": average,
        "kept": kept,
        "peak": weights + moments + average + live.peak,
    }


def made_up_loss(stage: str, model: TextToImage, config: Config) -> Tensor:
    r"""Mean square of what a network makes of random numbers, in place of its loss; no VGG16 is in it."""
    settings = config.training
    batch_size = (settings.vae_batch_size if stage == "vae" else settings.batch_size) // settings.accumulation
    shape = (3, config.model.image_size, config.model.image_size) if stage == "vae" else model.latent_shape
    x = torch.randn(batch_size, *shape, device=model.device).contiguous(memory_format=torch.channels_last)
    if stage == "vae":
        return (model.vae.decode(model.vae.encode(x).mode()).float() - x).square().mean()
    t = torch.zeros(batch_size, dtype=torch.long, device=model.device)
    context = torch.randn(batch_size, TOKENS, WIDTH, device=model.device)
    return model.unet(x, t, context).float().square().mean()


@torch.no_grad()
def measure_caches(model: TextToImage, precision: str) -> tuple[tuple[int, int], float, float]:
    r"""The most bytes at once, weights not counted, while TOGETHER pictures are encoded and captions embedded.

    And the seconds for one picture and one caption.
    """
    side = model.config.image_size
    x = torch.zeros(TOGETHER, 3, side, side, device=model.device).contiguous(
        memory_format=torch.channels_last
    )
    peaks, seconds = [], []
    for work in (lambda: model.vae.encode(x), lambda: model.text(["a man"] * TOGETHER)):
        with autocast(model.device, precision):
            with LiveBytes() as live:
                work()
            wait_for(model.device)
            begun = time.perf_counter()
            work()
            wait_for(model.device)
        peaks.append(live.peak)
        seconds.append((time.perf_counter() - begun) / TOGETHER)
    return tuple(peaks), *seconds
