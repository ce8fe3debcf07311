r"""What training would need: parameters, memory, time a step; measured on made-up pictures, nothing is written."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm.config import Config
from ddpm.model import TextToImage, autocast
from ddpm.text import TextTower

MIB = 2**20


def estimate(config: Config, device: torch.device, precision: str, steps: int = 3) -> Iterator[str]:
    r"""Take a few steps of both stages on random numbers; yields a line of text for the model and one for each stage.

    The peak is at least weights, gradients, AdamW's two moments, the average (UNet), and what the backward pass
    keeps of one part of a batch, counted by autograd's saved-tensor hooks; what a step holds for a moment comes
    on top.
    """
    m, t = config.model, config.training
    text = TextTower()  # no weights are read: none are needed to know what they take
    model = TextToImage(m, text).to(device, memory_format=torch.channels_last)
    model.unet.train().set_gradient_checkpointing(t.gradient_checkpointing)
    yield (
        f"preset {config.preset}: pictures {m.image_size} x {m.image_size} x 3, latents "
        f"{m.latent_size} x {m.latent_size} x {m.latent_channels}, text 77 x 512, {precision} on {device}"
    )
    for stage, network, batch in (("vae", model.vae, t.vae_batch_size), ("unet", model.unet, t.batch_size)):
        loss = _made_up_loss(stage, model, batch // t.accumulation, device)
        kept, seconds = {}, []

        def keep(tensor: Tensor, kept=kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        for _ in range(steps):
            start = time.monotonic()
            for _ in range(t.accumulation):
                kept.clear()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    with autocast(device, precision):
                        value = loss()
                    bytes_kept = sum(kept.values())
                value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - start)
            network.zero_grad()
        parameters = sum(p.numel() for p in network.parameters())
        fixed = 4 * parameters * (5 if stage == "unet" else 4)
        yield (
            f"{stage}: {parameters:,} parameters; weights, gradients and optimizer {fixed / MIB:.0f} MiB, kept for the "
            f"backward pass {bytes_kept / MIB:.0f} MiB, peak at least {(fixed + bytes_kept) / MIB:.0f} MiB; "
            f"{min(seconds):.2f} s a step of {batch} in {t.accumulation} part{'s' * (t.accumulation > 1)}"
        )


def _made_up_loss(stage: str, model: TextToImage, batch: int, device: torch.device):
    side = model.config.image_size
    if stage == "vae":
        x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        return lambda: (model.vae.decode(model.vae.encode(x).mode()).float() - x).square().mean()
    z = torch.randn(batch, *model.latent_shape, device=device).contiguous(memory_format=torch.channels_last)
    t = torch.zeros(batch, dtype=torch.long, device=device)
    context = torch.randn(batch, 77, 512, device=device)
    return lambda: model.unet(z, t, context).float().square().mean()
