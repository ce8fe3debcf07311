r"""The UNet and the VAE against diffusers' on the same weights: training steps, and their share of the peak."""

import functools
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import ModelConfig, TrainConfig
from ddpm.export.diffusers_folder import RENAMES, diffusers_names, unet_config, vae_config
from ddpm.model import networks
from ddpm.tools.command import keep_freed_memory
from ddpm.tools.devices import autocast, choose_precision, wait_for
from ddpm.vae import vae_loss

from .measure import Row, alternate, by_themselves, compared, seconds, spread

BATCH = 16
CPU = torch.device("cpu")
SPEC = ModelConfig()
LIKE, OWN = "same weights, heads, precision and layout", "as each comes out of the box"


def nowhere_zero(network: nn.Module) -> nn.Module:
    r"""Noise on the parameters that start at zero: a multiplication by zero should not be part of what is timed."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
    return network


def spec_networks() -> tuple[nn.Module, nn.Module]:
    r"""Our VAE and UNet of the spec."""
    torch.manual_seed(0)
    vae, unet = networks(SPEC)
    return nowhere_zero(vae), nowhere_zero(unet)


def theirs(kind: str, config: dict, ours: nn.Module) -> nn.Module:
    r"""The network of diffusers with our weights."""
    import diffusers

    network = getattr(diffusers, kind).from_config(config)
    network.load_state_dict({diffusers_names(name, RENAMES)[0]: w for name, w in ours.state_dict().items()})
    return network


def their_unet(ours: nn.Module, as_ours: bool) -> nn.Module:
    r"""With our heads, or as the spec's own configuration constructs it: 8 heads everywhere."""
    config = unet_config(SPEC)
    if not as_ours:
        del config["attention_head_dim"]
    return theirs("UNet2DConditionModel", config, ours)


def training_step(network: nn.Module, loss: Callable[[], Tensor], precision: str) -> Callable[[], None]:
    r"""Forward pass, loss, backward pass and AdamW in its fused form, as one call."""
    network.train()
    device = next(network.parameters()).device
    lr, decay = TrainConfig().lr, TrainConfig().weight_decay
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=decay, fused=True)

    def step():
        with autocast(device, precision):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(device)

    return step


def laid_out(network: nn.Module, batch: Tensor, channels_last: bool) -> Tensor:
    r"""Put a network's weights, and its input, in one memory format; returns the input."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    return batch.contiguous(memory_format=layout)


def unet_step(
    unet: nn.Module, mine: bool, precision: str, channels_last: bool, batch: int = BATCH
) -> Callable[[], None]:
    r"""One training step of either UNet on made-up latents and captions, on its device."""
    device = next(unet.parameters()).device
    g = torch.Generator().manual_seed(1)
    z_t, eps = torch.randn(2, batch, SPEC.latent_channels, SPEC.latent_size, SPEC.latent_size, generator=g)
    context = torch.randn(batch, 77, 512, generator=g)
    t = torch.randint(0, SPEC.timesteps, (batch,), generator=g)
    z_t, eps, context, t = (tensor.to(device) for tensor in (z_t, eps, context, t))
    z_t = laid_out(unet, z_t, channels_last)

    def loss() -> Tensor:
        out = unet(z_t, t, context)
        return F.mse_loss((out if mine else out.sample).float(), eps)

    return training_step(unet, loss, precision)


def train(quick: bool, **_) -> Iterator[Row]:
    r"""A UNet training step as each comes out of the box."""
    _, unet = spec_networks()
    precision = choose_precision(TrainConfig().precision, CPU)
    ours = unet_step(unet, True, precision, channels_last=True)
    other = unet_step(their_unet(unet, as_ours=False), False, "fp32", channels_last=False)
    what = f"UNet training step, batch {BATCH}, {OWN} (ours {precision}, heads 32 wide"
    rounds = 3 if quick else 9
    a, b = alternate([ours, other], rounds, before=by_themselves(ours, other))
    keep_freed_memory()
    yield compared("train", f"{what}, memory kept; theirs fp32, 8 heads)", a, b, BATCH, "images/s", 3.0)
    a, b = alternate([ours, other], rounds)
    kept = f"{what}; theirs fp32, 8 heads), memory kept on both sides"
    yield compared("train", kept, a, b, BATCH, "images/s", None)


PRODUCTS, SIDE = 3, 4096


def products(dtype: torch.dtype, device: torch.device = CPU) -> Callable[[], None]:
    r"""Some matrix products in a row, each of `SIDE` x `SIDE` numbers."""
    a, b = torch.randn(2, SIDE, SIDE, device=device).to(dtype)
    out = torch.empty(SIDE, SIDE, dtype=dtype, device=device)

    def multiply():
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)
        wait_for(device)

    return multiply


@functools.cache
def like_for_like(precision: str, channels_last: bool, quick: bool) -> tuple[list[list[float]], int]:
    r"""Seconds of our training step, theirs with everything alike, and matrix products; the operations of our step."""
    _, unet = spec_networks()
    pair = (unet, their_unet(unet, as_ours=True))
    steps = [unet_step(network, network is unet, precision, channels_last) for network in pair]
    most = products(torch.bfloat16 if precision == "bf16" else torch.float32)
    return alternate([*steps, most], rounds=3 if quick else 7), flops(steps[0])


def name_of_layout(channels_last: bool) -> str:
    return "channels-last" if channels_last else "plain layout"


def train_like(quick: bool, **_) -> Iterator[Row]:
    r"""The same step with everything alike, in the layouts and precisions that people use."""
    for precision in ("fp32", "bf16"):
        for channels_last in (True,) if quick else (True, False):
            (a, b, _), _ = like_for_like(precision, channels_last, quick)
            what = f"UNet training step, {LIKE}: {precision}, {name_of_layout(channels_last)}"
            yield compared("train-like", what, a, b, BATCH, "images/s", 1.25)


def compiled(quick: bool, **_) -> Iterator[Row]:
    r"""Our training step by torch.compile against the same as it is, and how long it takes until it is compiled."""
    precision = choose_precision(TrainConfig().precision, CPU)
    _, unet = spec_networks()
    pair = (torch.compile(unet, dynamic=False), unet)
    step, plain = (unet_step(network, True, precision, channels_last=True) for network in pair)
    waited = seconds(step)
    a, b = alternate([step, plain], rounds=3 if quick else 7)
    told = f"UNet training step, {precision}, by torch.compile ({waited:.0f} s to begin), against as it is"
    yield compared("compile", told, a, b, BATCH, "images/s", None)


def flops(step: Callable[[], None]) -> int:
    r"""Of the matrix products and convolutions of one call; attention is told apart, for its fused kernel has none."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak(quick: bool, **_) -> Iterator[Row]:
    r"""The share of what matrix products reach beside it that our training step reaches, and theirs with our heads."""
    for precision in ("fp32", "bf16"):
        (a, b, products_alone), work = like_for_like(precision, True, quick)
        best = [PRODUCTS * 2 * SIDE**3 / time for time in products_alone]
        shares = [100 * work / time / limit for time, limit in zip(a, best, strict=True)]
        sides = [f"{work / median(times) / 1e9:.0f} of {median(best) / 1e9:.0f} GFLOP/s" for times in (a, b)]
        step = f"UNet training step of {work / 1e9:.0f} GFLOP, channels-last"
        what = f"share of the {precision} matmul peak, {step}"
        goal = 50.0 if precision == "fp32" else None  # see `operations`
        yield spread("peak", what, sides, shares, goal, at_least=True, unit="%", times=(a, b, products_alone))


def vae_step(vae: nn.Module, mine: bool, precision: str, channels_last: bool) -> Callable[[], None]:
    r"""One training step of either VAE on made-up pictures."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, 3, SPEC.image_size, SPEC.image_size, generator=g).clamp(-1, 1)
    eps = torch.randn(BATCH, SPEC.latent_channels, SPEC.latent_size, SPEC.latent_size, generator=g)
    x = laid_out(vae, x, channels_last)
    kl_weight = TrainConfig().kl_weight

    def loss() -> Tensor:
        if mine:
            x_hat, q = vae(x, eps)
            return vae_loss(x, x_hat, q, kl_weight)[1]
        q = vae.encode(x).latent_dist
        x_hat = vae.decode(q.mean + q.std * eps).sample
        return F.l1_loss(x_hat.float(), x) + kl_weight * q.kl().mean() / eps[0].numel()

    return training_step(vae, loss, precision)


def vae(quick: bool, **_) -> Iterator[Row]:
    r"""A VAE training step with everything alike."""
    ours, _ = spec_networks()
    other = theirs("AutoencoderKL", vae_config(SPEC), ours)
    for precision in ("fp32", "bf16"):
        for channels_last in (True,) if quick else (True, False):
            steps = [vae_step(net, net is ours, precision, channels_last) for net in (ours, other)]
            a, b = alternate(steps, rounds=3 if quick else 7)
            what = f"VAE training step, batch {BATCH}, same weights, precision and layout: {precision}"
            yield compared("vae", f"{what}, {name_of_layout(channels_last)}", a, b, BATCH, "images/s", 1.25)
