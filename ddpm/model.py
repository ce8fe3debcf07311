r"""TextToImage: the VAE, the text tower, the UNet and the schedule together; prompts in, pictures out."""

import math
import shlex
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.config import SHIPPED, TEXT_FILE, Config, ModelConfig, TrainConfig
from ddpm.sampling import Start, State, guided, sample_loop
from ddpm.schedule import Schedule
from ddpm.text import WIDTH, TextTower, list_of_strings
from ddpm.tools import text_weights
from ddpm.tools.command import TRAIN
from ddpm.tools.devices import autocast
from ddpm.tools.errors import UserError
from ddpm.tools.files import write_atomically
from ddpm.tools.kernels import context_read_once, use_fast_kernels
from ddpm.tools.seeding import generator
from ddpm.tools.weights import check_shapes, load_weights, save_weights
from ddpm.unet import UNet
from ddpm.vae import KLVAE


class TextToImage(nn.Module):
    r"""A text-to-image latent diffusion model (Latent Diffusion; DDPM).

    Attributes:
        vae: `KLVAE`. text: `TextTower`. unet: `UNet`. schedule: `Schedule`.
        latent_scale: 1 / root mean square of the latents. The UNet's latents are the VAE's times this.
        config: the `ModelConfig` it was built from.
    """

    def __init__(self, config: ModelConfig, text: TextTower | None = None):
        super().__init__()
        self.config = config
        self.schedule = Schedule.named(config.schedule, config.timesteps)
        self.vae, self.unet = networks(config)
        self.text = text or text_weights.named_tower(config.text_weights, config.text_quick_gelu)
        self.latent_scale = 1.0
        self.to(memory_format=torch.channels_last)  # as convolutions compute and attention reads tokens

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        r"""(c, h, w) of one latent."""
        return self.config.latent_channels, self.config.latent_size, self.config.latent_size

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        self.schedule = self.schedule.to(self.device)  # not a module, but its tables go where the networks go
        return self

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        negative: str | Sequence[str] | None = None,
        callback: Callable[[State], None] | None = None,
        eta: float = 0.0,
        precision: str = "fp32",
        batch_size: int = 32,
        first: int = 0,
        variance: str | None = None,
        start: Start | None = None,
        noise_scale: float | None = None,
    ) -> Tensor:
        r"""Pictures of the prompts, (B, 3, H, W) in [-1, 1].

        Picture i depends on (seed, i, prompt i) alone: its noise has a stream of its own.

        Args:
            sampler: ddpm, ddim or dpm++; steps: 1..T. None: as `ModelConfig.drawing` has it, for most models dpm++, 20
                steps, a guidance_scale of 3 and a noise_scale of 1.
            guidance_scale: 1 is the plain conditional model, 0 the unconditional one; 2 to 5 follow the prompt more.
            negative: the prompt that guidance leads away from, one for all or one each; None: the empty prompt.
            eta: noise of ddim and dpm++, 0 (none) to 1 (that of ddpm).
            callback: called with the `State` after every step, for films and progress bars.
            precision: fp32, bf16 or fp16 for all three networks.
            batch_size: pictures computed at once. first: the number i of the first picture.
            variance: Sigma of the sampler ddpm, posterior, beta or learned; None: as the model was trained.
            start: pictures to draw over, in pixels, one for all or one each. Where its mask is False, their pixels are
                pasted into the result after decoding, because the VAE does not return them exactly.
            noise_scale: factor on the noise of all steps together, above 0 to 1, see `sampling.scale_noise`.

        Raises: ValueError for prompts that are not a list of strings, and for a setting outside its range.
        """
        asked = (sampler, steps, guidance_scale, noise_scale)
        filled = (b if a is None else a for a, b in zip(asked, self.config.drawing, strict=True))
        sampler, steps, guidance_scale, noise_scale = filled
        prompts = list_of_strings(prompts, "prompts")
        if negative is None or isinstance(negative, str):
            negative = [negative or ""] * len(prompts)
        negative = list_of_strings(negative, "negative")
        if len(negative) != len(prompts):
            raise ValueError(f"expected one negative prompt or {len(prompts)}, got {len(negative)}")
        asked = {"sampler": sampler, "guidance_scale": guidance_scale, "eta": eta, "variance": variance}
        self.check_settings(batch_size=batch_size, **asked)
        if start:
            start = self.one_each(start, len(prompts))
        self.eval()
        settings = {"sampler": sampler, "steps": steps, "eta": eta, "prediction": self.config.prediction}
        settings |= {"variance": variance or self.config.variance, "noise_scale": noise_scale}
        pictures = [torch.zeros(0, 3, self.config.image_size, self.config.image_size, device=self.device)]
        for begin in range(0, len(prompts), batch_size):
            part = slice(begin, begin + batch_size)
            generators = [generator(seed, first + i) for i in range(len(prompts))[part]]
            draw = partial(self.draw_noise, generators)
            given = start and Start(start.x_0[part], start.strength, start.mask[part])
            with autocast(self.device, precision), context_read_once(self.unet):
                context = self.embed(prompts[part])
                uncond = context if negative[part] == prompts[part] else self.embed(negative[part])
                denoise = guided(self.unet, context, uncond, guidance_scale)
                settings["start"] = given and self.encode_start(given)
                for state in sample_loop(self.schedule, denoise, draw(), draw, **settings):
                    if callback is not None:
                        callback(state)
                x = self.decode(state.x).float()
            pictures.append(torch.where(given.mask, x, given.x_0) if given else x)
        x = torch.cat(pictures)
        if not x.sum().isfinite():
            message = (
                "some pictures are not finite numbers; take precision fp32 or bf16 in place of fp16, "
                "lower guidance_scale, or look for NaN in the weights"
            )
            warnings.warn(message, stacklevel=2)
        return x.clamp(-1, 1)

    def check_settings(
        self, sampler: str, guidance_scale: float, eta: float, batch_size: int, variance: str | None
    ):
        r"""ValueError for settings by which this model cannot draw, a warning for guidance that does harm."""
        if eta and sampler == "ddpm" or variance and sampler != "ddpm":
            raise ValueError(
                f"expected eta with ddim or dpm++ and variance with ddpm, got {sampler}; leave it out"
            )
        others = {parameter.dtype for parameter in self.parameters()} - {torch.float32}
        if others:
            raise ValueError(
                f"expected weights in float32, got {others.pop()}; call float(), and give precision fp16 or bf16"
            )
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
        if variance == "learned" and self.config.variance != "learned":
            raise ValueError("expected variance posterior or beta, got learned: this model learned none")
        if guidance_scale not in (0, 1) and not self.config.caption_drop:
            message = "guidance has no unconditional model to lead away from, because caption_drop was 0"
            warnings.warn(message, stacklevel=3)
        if guidance_scale not in (0, 1) and self.config.few_steps:
            warnings.warn(
                "this model has learned its teacher's guidance, and is now guided twice", stacklevel=3
            )

    def draw_noise(self, generators: list[torch.Generator]) -> Tensor:
        r"""(B, c, h, w) standard normal, each latent from a generator of its own."""
        noise = [torch.randn(self.latent_shape, generator=g) for g in generators]
        return torch.stack(noise).to(self.device)

    def embed(self, prompts: list[str]) -> Tensor:
        r"""`text(prompts)` with each distinct prompt embedded once."""
        distinct = list(dict.fromkeys(prompts))
        states = self.text(distinct)
        return states[[distinct.index(p) for p in prompts]]

    def one_each(self, start: Start, count: int) -> Start:
        r"""The start with a picture and a mask for each of `count` prompts; ValueError where it does not fit."""
        side = self.config.image_size
        mask = torch.ones(1, 1, side, side, dtype=torch.bool) if start.mask is None else start.mask
        for name, x, channels in (("x_0", start.x_0, 3), ("mask", mask, 1)):
            if tuple(x.shape) not in [(n, channels, side, side) for n in (1, count)]:
                raise ValueError(
                    f"expected a start's {name} of shape (1 or {count}, {channels}, {side}, {side}), "
                    f"got {tuple(x.shape)}; cut it and resize it"
                )
        if mask.dtype != torch.bool:
            raise ValueError(
                f"expected a mask of booleans, True is drawn anew, got {mask.dtype}; give mask > 0.5"
            )
        if not (start.x_0.abs() <= 1).all():
            raise ValueError(
                f"expected a start's x_0 in [-1, 1], got {start.x_0.dtype} up to {start.x_0.max()}"
            )
        x_0 = start.x_0.to(self.device, torch.float32).expand(count, -1, -1, -1)
        return Start(x_0, start.strength, mask.to(self.device).expand(count, -1, -1, -1))

    def encode_start(self, start: Start) -> Start:
        r"""The start in latents at the UNet's scale. A latent is kept where all the pixels under it are."""
        z_0 = self.vae.encode(start.x_0).mode().float() * self.latent_scale
        return Start(z_0, start.strength, F.max_pool2d(start.mask.float(), self.vae.factor).bool())

    def decode(self, z: Tensor) -> Tensor:
        r"""Pictures of latents at the UNet's scale: decode(z / latent_scale)."""
        return self.vae.decode(z / self.latent_scale)

    def save_vae(self, folder: Path):
        r"""Write vae.safetensors, with the latent scale in its metadata."""
        save_weights(
            folder / "vae.safetensors", self.vae.state_dict(), {"latent_scale": repr(self.latent_scale)}
        )

    def load_vae(self, folder: Path):
        r"""Read vae.safetensors and the latent scale."""
        path = folder / "vae.safetensors"
        metadata = load_weights(path, self.vae)
        try:
            self.latent_scale = float(metadata["latent_scale"])
        except (KeyError, ValueError):
            self.latent_scale = math.nan
        if not 0 < self.latent_scale < math.inf:
            raise UserError(f"expected the latent scale in the metadata of {path}, found none")

    def save(self, folder: str | Path, preset: str = ""):
        r"""Write config.json, vae.safetensors and ema.safetensors: a folder that `load` reads.

        The text tower goes to text.safetensors unless it is the random one, because what a name stands for may be out
        of reach later.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / "config.json", Config(self.config, TrainConfig(), preset).to_json().encode()
        )
        self.save_vae(folder)
        if self.config.text_weights != "random":
            text_weights.save_tower(self.text, folder / TEXT_FILE)
        save_weights(folder / "ema.safetensors", self.unet.state_dict())

    @classmethod
    def load(cls, folder: str | Path | None = None, weights: str = "ema") -> "TextToImage":
        r"""The model of a run folder; without one, the weights that ship with the package.

        Args:
            weights: `ema`, the averaged weights, or `unet`, the last ones.

        Raises: UserError when the folder is not a run, or its training has not come far enough.
        """
        if weights not in ("ema", "unet"):
            raise ValueError(f"expected weights ema or unet, got {weights!r}")
        folder = SHIPPED if folder is None else Path(folder)
        check_run(folder, weights)
        config = Config.read(folder / "config.json").model
        with torch.device("meta"):  # shapes alone: files that do not fit are refused before memory is taken
            vae, unet = networks(config)
        check_shapes(folder / "vae.safetensors", vae)
        check_shapes(folder / f"{weights}.safetensors", unet)
        own_text = folder / TEXT_FILE
        text = text_weights.tower_from_file(own_text) if own_text.is_file() else None
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
            model = cls(config, text)
        model.load_vae(folder)
        load_weights(folder / f"{weights}.safetensors", model.unet)
        return model.eval()


def check_run(folder: Path, weights: str):
    r"""Raise UserError unless the folder has the files of a trained run; the line says what to do next."""
    if folder == SHIPPED and not folder.is_dir():
        raise UserError(
            f"expected the weights that ship in {folder}, found none; install anew, or run `{TRAIN}` "
            "and pass --model runs/drawn64"
        )
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise UserError(f"expected the folder of a run, {folder} is {kind}; your runs are in runs/")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"expected a run with config.json in {folder}, found none; "
            f"train one with {TRAIN} --out {shlex.quote(str(folder))}"
        )
    if (
        weights == "unet"
        and not (folder / "unet.safetensors").is_file()
        and (folder / "ema.safetensors").is_file()
    ):
        raise UserError(
            f"expected unet.safetensors in {folder}, found the averaged weights alone; ask for these"
        )
    for part in ("vae", weights):
        if not (folder / f"{part}.safetensors").is_file():
            raise UserError(
                f"{folder} has no {part}.safetensors: its training is not finished; "
                f"go on with {TRAIN} --resume {shlex.quote(str(folder))}"
            )


def networks(c: ModelConfig) -> tuple[KLVAE, UNet]:
    r"""The VAE and the UNet of a configuration, untrained."""
    outputs = c.latent_channels * (2 if c.variance == "learned" else 1)
    vae = KLVAE(c.vae_channels, c.vae_layers, c.latent_channels)
    unet = UNet(c.latent_channels, outputs, c.channels, c.attention_levels, c.res_blocks, WIDTH, c.head_width)
    return use_fast_kernels(vae), use_fast_kernels(unet)
