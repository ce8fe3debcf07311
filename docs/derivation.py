r"""Makes what derivation.md and questions.md show: figures, and what was measured with the weights that ship.

    python docs/derivation.py figures     # docs/images/derivation-*.png, and the numbers in them; seconds
    python docs/derivation.py weightings  # the weight of an error over time, and the loss by tenth of t; a minute
    python docs/derivation.py skips       # the UNet with one skip connection at zero, or all
    python docs/derivation.py blur        # how sharp the predicted picture is at each time
    python docs/derivation.py samplers    # how far each sampler's pictures are from those of a fine solution
    python docs/derivation.py kl          # a small VAE trained with KL weights of 0, 1e-5, 1 and 100

Seed 0 throughout. Nothing is downloaded.
"""

import argparse
import math
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ddpm import TextToImage
from ddpm.celeba.dataset import Pictures, drawn_pictures
from ddpm.config import Config
from ddpm.diffusion import q_posterior, q_sample, reverse_variance, x_0_and_eps
from ddpm.losses import WEIGHTINGS, loss_weight, training_target
from ddpm.sampling import ddim_step, guided, sample_loop
from ddpm.schedule import SCHEDULES, Schedule
from ddpm.tools.seeding import generator
from ddpm.training.caches import Latents
from ddpm.training.loops import train_vae
from ddpm.training.optimization import Bound, Optimization
from ddpm.training.validation import loss_by_timestep, psnr

IMAGES = Path(__file__).parent / "images"
GREY = "#8a8a8a"  # readable on white and on black, because the figures have no background
STYLE = {
    name: GREY for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
}


def save(figure: plt.Figure, name: str):
    figure.tight_layout()
    figure.savefig(IMAGES / f"derivation-{name}.png", dpi=150, transparent=True)
    plt.close(figure)


def pair(t: int, s: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([t, t]), torch.tensor([s, s])


# ------------------------------------------------------------------------------------------- figures


def figures():
    shape = {"figure.figsize": (7.5, 3.0), "axes.grid": True, "grid.alpha": 0.25, "legend.framealpha": 0}
    with plt.rc_context(STYLE | shape):
        weights()
        reverse_steps()
        guidance()
        times()


def weights():
    r"""beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) of each schedule, for both fixed variances."""
    figure, axes = plt.subplots(1, 2, sharey=True)
    for axis, variance in zip(axes, ("posterior", "beta"), strict=True):
        for name in SCHEDULES:
            schedule = Schedule.named(name)
            t = torch.arange(schedule.timesteps)
            sigma_2 = reverse_variance(schedule, torch.zeros(len(t), 1), t, variance=variance).flatten()
            weight = schedule.beta**2 / (2 * sigma_2 * schedule.alpha * (1 - schedule.alpha_bar))
            axis.semilogy(weight, label=name)
            at = {k: f"{weight[k]:.3g}" for k in (0, 1, 10, 100, 500, 999)}
            print(f"weight of the bound, {name}, sigma^2 {variance}: {at}")
        axis.axhline(1, color=GREY, linestyle="--", label="simplified loss")
        axis.set(xlabel="t", title=rf"$\sigma^2$: {variance}")
    axes[0].set_ylabel("weight of the error of eps")
    axes[1].legend()
    save(figure, "weights")


def reverse_steps():
    r"""q(x_s | x_t = 0) for data -1 and 1, beside the normal density of the same mean and variance."""
    schedule, t = Schedule.named("linear"), 250
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.6))
    for axis, s in zip(axes, (249, 200, 100), strict=True):
        x_0 = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        mean, variance = q_posterior(schedule, x_0, torch.zeros(2, dtype=torch.float64), *pair(t, s))
        exact = MixtureSameFamily(Categorical(torch.ones(2).double()), Normal(mean, variance.sqrt()))
        normal = Normal(exact.mean, exact.stddev)
        x = torch.linspace(-8, 8, 40_001, dtype=torch.float64) * exact.stddev
        p = exact.log_prob(x)
        divergence = torch.trapezoid(p.exp() * (p - normal.log_prob(x)), x)
        print(f"from t = {t} to s = {s}: {divergence:.2g} nats from a normal density")
        axis.plot(x, p.exp(), label="exact")
        axis.plot(x, normal.log_prob(x).exp(), "--", label="normal")
        axis.set(xlabel="$x_s$", title=f"{t - s} step{'s' * (t - s > 1)}", yticks=[])
        axis.set_xlim(-3.5 * normal.stddev.item(), 3.5 * normal.stddev.item())
    axes[0].set_ylabel("density")
    axes[0].legend()
    save(figure, "reverse")


def guidance():
    r"""Data N(1, 0.25) under the caption, N(0, 1) without: p(x) p(c | x)^s, and what guided DDIM draws."""
    schedule = Schedule.named("linear")

    def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        ab = schedule.alpha_bar_at(t, x_t)
        with_caption = (x_t - ab.sqrt()) / (ab * 0.25 + 1 - ab)
        return (1 - ab).sqrt() * torch.where(context[:, 0] == 1, with_caption, x_t)

    figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.6), sharex=True)
    x = torch.linspace(-1.5, 3.5, 501, dtype=torch.float64)
    start = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    context = torch.ones(2, 1, 1)
    for axis, scale in zip(axes, (1.0, 2.0, 3.0), strict=True):
        precision = 1 - scale + scale / 0.25
        named = Normal(scale / 0.25 / precision, precision**-0.5)
        denoise = guided(network, context, 0 * context, scale)
        *_, last = sample_loop(schedule, denoise, start, lambda: None, "ddim", 1000)
        low, high = last.x.flatten().tolist()
        drawn = Normal((low + high) / 2, (high - low) / 2)
        ends = [f"N({density.mean:.2f}, {density.stddev:.2f}^2)" for density in (named, drawn)]
        print(f"guidance {scale:.0f}: named {ends[0]}, drawn {ends[1]}")
        axis.plot(x, named.log_prob(x).exp(), label="$p(z)\\, p(c|z)^s$")
        axis.plot(x, drawn.log_prob(x).exp(), "--", label="drawn")
        axis.set(xlabel="$z_0$", title=f"s = {scale:.0f}", yticks=[])
    axes[0].set_ylabel("density")
    axes[1].legend(fontsize=8, loc="upper left")
    save(figure, "guidance")


def times():
    r"""How often training visits each noise level: the density of lambda, half the log of SNR."""
    figure, axis = plt.subplots()
    lam = torch.linspace(-6, 6, 601, dtype=torch.float64)
    curves = {}
    for name in ("linear", "cosine"):
        ab = Schedule.named(name).alpha_bar
        of_t = 0.5 * (ab / (1 - ab)).log()
        density = -1 / (of_t[2:] - of_t[:-2]) * 2 / len(ab)
        curves[name] = (of_t[1:-1], density)
        inside = (of_t.abs() < 1).double().mean()
        print(f"{name}, t uniform: {inside:.2f} of the steps have lambda between -1 and 1")
    curves[r"rectified flow, $\tau$ uniform"] = (lam, torch.sigmoid(lam) * torch.sigmoid(-lam))
    curves[r"rectified flow, $\tau$ logit-normal"] = (lam, Normal(0.0, 1.0).log_prob(lam).exp())
    print(f"rectified flow, tau uniform: {math.tanh(0.5):.2f}; logit-normal: {math.erf(0.5**0.5):.2f}")
    for (name, (x, y)), line in zip(curves.items(), ("-", "-", "--", "--"), strict=True):
        axis.plot(x, y, line, label=name)
    axis.set(xlim=(-6, 6), ylim=(0, 0.45), xlabel=r"$\lambda$: noise at the left, picture at the right")
    axis.set_ylabel("share of training")
    axis.legend(fontsize=8)
    save(figure, "times")


# ------------------------------------------------------------------------------------------- measured


@torch.no_grad()
def weightings(count: int = 64):
    r"""How each weighting weighs an error of v over time, and the loss of the weights that ship by tenth of t."""
    model = TextToImage.load()
    pictures, x, _, context = held_out(model, count)
    q = model.vae.encode(x)
    moments = torch.stack([q.mu, q.logvar], dim=1)
    latents = Latents(torch.stack([moments, moments], dim=1).numpy())  # no picture is mirrored
    shape = {"figure.figsize": (7.5, 2.8), "axes.grid": True, "grid.alpha": 0.25, "legend.framealpha": 0}
    with plt.rc_context(STYLE | shape):
        figure, axes = plt.subplots(1, 3)
        for weighting in WEIGHTINGS[1:]:
            style = ":" if weighting == "min_snr" else "-"  # partly on the curve of eps
            for axis, name in zip(axes, ("linear", "cosine"), strict=False):
                schedule = Schedule.named(name)
                t = torch.arange(schedule.timesteps)
                weight = loss_weight(schedule, torch.zeros(len(t), 1), t, "v", weighting).flatten()
                axis.plot(t, weight, style, label=weighting)
                axis.set(xlabel="t", title=name)
                at = {k: f"{weight[k]:.2g}" for k in (0, 100, 500, 999)}
                print(f"weight of the error of v, {name}, {weighting}: {at}")
            how = {"seed": 0, "weighting": weighting}
            losses = loss_by_timestep(model, latents, lambda _: context, pictures, np.arange(count), **how)
            axes[2].plot(torch.arange(50, 1000, 100), losses, f".{style}")
            print(f"loss by tenths of t, {weighting}: {', '.join(f'{loss:.3f}' for loss in losses)}")
        axes[0].set_ylabel("weight of the error of v")
        axes[0].legend(fontsize=8)
        axes[2].set(xlabel="t", ylabel="loss", title="measured", xticks=(0, 500, 1000))
        save(figure, "weightings")


def held_out(model: TextToImage, count: int) -> tuple[Pictures, Tensor, Tensor, Tensor]:
    r"""Drawn faces that no training saw, as pixels, their latents at the UNet's scale, and their captions' states."""
    pictures = drawn_pictures(Path(tempfile.mkdtemp()), count, seed=12345, size=model.config.image_size)
    x = pictures.batch(list(range(count)))
    context = model.embed([pictures.caption(i, 0) for i in range(count)])
    return pictures, x, model.vae.encode(x).mode() * model.latent_scale, context


def noised(model: TextToImage, z_0: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    times = torch.full((len(z_0),), t)
    eps = torch.randn(z_0.shape, generator=generator("derivation", t))
    return q_sample(model.schedule, z_0, times, eps), times, eps


@torch.no_grad()
def skips():
    r"""The squared error of v where the part of an up block's input that is a skip is set to zero."""
    model = TextToImage.load()
    _, _, z_0, context = held_out(model, 64)
    blocks = [block for level in model.unet.up_blocks for block in level.resnets]
    skip = {  # width of each skip, in the order in which the way up takes them
        "128 x 8 x 8, of the lower level": 128,
        "64 x 8 x 8, of the downsampling": 64,
        "64 x 16 x 16, of the upper level": 64,
        "64 x 16 x 16, of conv_in": 64,
    }
    cases = {"none": (), **{name: (k,) for k, name in enumerate(skip)}, "all": (0, 1, 2, 3)}
    widths = list(skip.values())
    print("skip at zero | squared error of v at t = 100, 300, 500, 700, 900 | mean")
    for name, zeroed in cases.items():
        hooks = []
        for k in zeroed:

            def without(block, inputs, width=widths[k]):
                h, *rest = inputs
                h = h.clone()
                h[:, -width:] = 0
                return h, *rest

            hooks.append(blocks[k].register_forward_pre_hook(without))
        errors = []
        for t in (100, 300, 500, 700, 900):
            z_t, times, eps = noised(model, z_0, t)
            v = training_target(model.schedule, z_0, times, eps, "v")
            errors.append((model.unet(z_t, times, context) - v).square().mean().item())
        for hook in hooks:
            hook.remove()
        print(f"{name} | {', '.join(f'{e:.3f}' for e in errors)} | {sum(errors) / len(errors):.3f}")


def sharpness(x: Tensor) -> float:
    r"""The root mean square difference of neighbouring pixels."""
    across = (x[..., 1:] - x[..., :-1]).square().mean()
    down = (x[..., 1:, :] - x[..., :-1, :]).square().mean()
    return ((across + down) / 2).sqrt().item()


@torch.no_grad()
def blur():
    r"""What the network predicts from z_t, with the caption and without: spread, sharpness, distance."""
    model = TextToImage.load()
    _, x, z_0, context = held_out(model, 64)
    edges = sharpness(model.decode(z_0))
    spread = z_0.var(dim=0).mean()
    print("t, caption | share of the latents' variance | share of the pictures' sharpness | PSNR")
    for caption, states in (("given", context), ("empty", model.embed([""] * 64))):
        for t in (999, 900, 700, 500, 300, 100):
            z_t, times, _ = noised(model, z_0, t)
            z_hat, _ = x_0_and_eps(model.schedule, z_t, times, model.unet(z_t, times, states), "v")
            seen = model.decode(z_hat)
            shares = (z_hat.var(dim=0).mean() / spread).item(), sharpness(seen) / edges
            print(f"{t}, {caption} | {shares[0]:.2f} | {shares[1]:.2f} | {psnr(x, seen).mean():.1f} dB")


@torch.no_grad()
def samplers():
    r"""Median root mean square distance of latents from those of 200 steps of dpm++; same noise, guidance 1."""
    model = TextToImage.load()
    *_, context = held_out(model, 8)
    start = model.draw_noise([generator(0, i) for i in range(8)])
    denoise = guided(model.unet, context, context, 1.0)
    schedule = model.schedule
    *_, last = sample_loop(schedule, denoise, start, lambda: None, "dpm++", 200, "v")
    goal = last.x
    signal_to_noise = (schedule.alpha_bar / (1 - schedule.alpha_bar)).sqrt()

    def by_flow(steps: int) -> Tensor:
        r"""Euler along rectified flow: t from 1 to 0 in equal steps, each at the time of the nearest SNR."""
        flow = torch.arange(steps, 0, -1).double() / steps
        now = [(signal_to_noise - (1 - t) / t).abs().argmin().item() for t in flow]
        z = start
        for t, s in zip(now, [*now[1:], -1], strict=True):
            t, s = (torch.full((len(z),), k) for k in (t, s))
            z_0, eps = x_0_and_eps(schedule, z, t, denoise(z, t), "v")
            z = ddim_step(schedule, z, t, s, z_0, eps, torch.zeros_like(z))
        return z

    print("steps | ddim | Euler at rectified flow's times | dpm++")
    for steps in (5, 10, 20, 50):
        found = []
        for sampler in ("ddim", "flow", "dpm++"):
            if sampler == "flow":
                z = by_flow(steps)
            else:
                *_, last = sample_loop(schedule, denoise, start, lambda: None, sampler, steps, "v")
                z = last.x
            found.append((z - goal).square().flatten(1).mean(dim=1).sqrt().median().item())
        print(f"{steps} | " + " | ".join(f"{distance:.3f}" for distance in found))


def kl():
    r"""The preset tiny's VAE, 300 steps at each KL weight, on the same pictures in the same order."""
    pictures = drawn_pictures(Path(tempfile.mkdtemp()), 400, seed=1, size=32)
    x = pictures.batch(list(range(64)))
    text = TextToImage.load().text
    for weight in (0.0, 1e-5, 1.0, 100.0):
        config = Config.from_preset("tiny", latent_channels=8, vae_lr=2e-3, kl_weight=weight)
        torch.manual_seed(0)
        model = TextToImage(config.model, text)
        opt = Optimization(model.vae, config, config.training.vae_lr, Bound(300), ema=False, precision="fp32")
        for _ in train_vae(model, pictures, config, opt):
            pass
        with torch.no_grad():
            q = model.vae.eval().encode(x)
            decoded = model.vae.decode(q.sample(generator("kl")))
        sizes = [part.square().mean().sqrt().item() for part in (q.mu, (q.logvar / 2).exp())]
        nats = q.kl().mean() / q.mu[0].numel()
        print(f"KL weight {weight:g}: {psnr(x, decoded).mean():.1f} dB, {nats:.2f} nats a number,", end=" ")
        print(f"root mean square of mu {sizes[0]:.3f}, of sigma {sizes[1]:.3f}")


PARTS = {part.__name__: part for part in (figures, weightings, skips, blur, samplers, kl)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    PARTS[parser.parse_args().part]()
