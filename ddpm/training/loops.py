r"""The two training stages, each one loop that yields a `Report` after every step; the caller logs, draws and saves.

Every random number of step n comes from a stream named (seed, stage, n), and the data order of an epoch from (seed,
stage, epoch). So a run that goes on from a checkpoint takes the steps it would have taken. Each process draws the
numbers of the whole batch and computes its own shard, so the steps do not depend on the number of processes.
"""

from collections.abc import Iterator
from functools import partial

import torch

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.config import Config
from ddpm.losses import diffusion_loss
from ddpm.model import TextToImage
from ddpm.tools.seeding import generator
from ddpm.training.batches import batch_rows, mirrored, timestep_batch
from ddpm.training.caches import Latents, Texts
from ddpm.training.optimization import Optimization, Report
from ddpm.training.perceptual import perceptual_loss
from ddpm.vae import vae_loss


def train_vae(model: TextToImage, pictures: Pictures, config: Config, opt: Optimization) -> Iterator[Report]:
    r"""First stage: the VAE learns to reconstruct pictures."""
    settings = config.training
    shard = opt.group.shard
    train_rows = pictures.rows(TRAIN)
    perceptual = perceptual_loss(model.device) if settings.perceptual_weight else None
    while opt.progress() < 1:
        opt.begin_step()
        g = generator(settings.seed, "vae", opt.step)
        rows, _ = batch_rows(train_rows, settings.vae_batch_size, opt.step, settings.seed, "vae")
        flip = mirrored(len(rows), g, settings)
        eps = torch.randn(len(rows), *model.latent_shape, generator=g)
        x = pictures.batch(shard(rows), shard(flip))  # (B, 3, H, W)
        for x_k, eps_k in opt.micro_batches(x, shard(eps)):
            x_k = x_k.contiguous(memory_format=torch.channels_last)
            x_hat, posterior = opt.forward(x_k, eps_k)
            _, loss = vae_loss(x_k, x_hat, posterior, settings.kl_weight, settings.reconstruction)
            if perceptual is not None:
                loss = loss + settings.perceptual_weight * perceptual(x_k, x_hat.float())
            opt.backward(loss)
        yield opt.end_step(rows)


def train_unet(
    model: TextToImage, latents: Latents, texts: Texts, pictures: Pictures, config: Config, opt: Optimization
) -> Iterator[Report]:
    r"""Second stage: the UNet learns to denoise latents (DDPM, algorithm 1)."""
    settings = config.training
    shard = opt.group.shard
    train_rows = pictures.rows(TRAIN)
    while opt.progress() < 1:
        opt.begin_step()
        g = generator(settings.seed, "unet", opt.step)
        rows, epoch = batch_rows(train_rows, settings.batch_size, opt.step, settings.seed, "unet")
        flip = mirrored(len(rows), g, settings)
        eps_vae, eps = torch.randn(2, len(rows), *model.latent_shape, generator=g)
        t = timestep_batch(len(rows), model.schedule.timesteps, g)
        dropped = torch.rand(len(rows), generator=g) < model.config.caption_drop
        captions = [
            pictures.caption(i, settings.seed, epoch % settings.caption_variants) for i in shard(rows)
        ]
        captions = ["" if drop else c for c, drop in zip(captions, shard(dropped), strict=True)]
        context = texts(captions)  # (B, 77, 512)
        posterior = latents.gaussian(shard(rows), shard(flip))
        z_0 = posterior.sample(eps=shard(eps_vae)) * model.latent_scale  # (B, c, h, w)
        for z_k, t_k, eps_k, context_k in opt.micro_batches(z_0, shard(t), shard(eps), context):
            denoise_k = partial(opt.forward, context=context_k)
            how = (model.config.prediction, settings.vlb_weight, settings.weighting)
            loss = diffusion_loss(model.schedule, denoise_k, z_k, t_k, eps_k, *how)
            opt.backward(loss.mean())
        yield opt.end_step(rows, t)
