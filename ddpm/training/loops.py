r"""The two training stages as generators: they compute, their caller logs, samples and saves.

Every random number of step n comes from a stream named (seed, stage, n), and the data order of an epoch from (seed,
stage, epoch). So a run that goes on from a checkpoint takes the steps it would have taken."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.config import Config
from ddpm.losses import diffusion_loss
from ddpm.model import TextToImage
from ddpm.tools.devices import autocast
from ddpm.tools.seeding import generator
from ddpm.training.batches import batch_rows, parts, timestep_batch, to_device
from ddpm.training.caches import Latents, Texts
from ddpm.training.optimization import Optimization, Report
from ddpm.training.perceptual import perceptual_loss
from ddpm.vae import vae_loss


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
    model: TextToImage,
    latents: Latents,
    texts: Texts,
    pictures: Pictures,
    config: Config,
    opt: Optimization,
    precision: str,
) -> Iterator[Report]:
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
                    loss = diffusion_loss(
                        model.schedule, denoise, z, at, noise, model.config.prediction, t.vlb_weight
                    )
                    yield loss.mean() / t.accumulation

        yield opt.update("unet", losses(), chosen, times)
