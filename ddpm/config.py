r"""Every number that shapes a run: dataclass field -> flag of the same name -> config.json -> rebuilt model.

`ModelConfig` is what a checkpoint needs to be built again; `TrainConfig` is how it is trained. `PRESETS` is the
table of named settings. This file imports neither torch nor the rest of the package, so `--help` answers at once."""

import argparse
import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ddpm.tools.errors import UserError, is_name
from ddpm.tools.strict_json import _fits, read_json


def option(default, help: str, choices: tuple = ()):
    r"""A dataclass field with the help text, and perhaps the choices, of its flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    r"""The model: the spec's numbers are the defaults."""

    image_size: int = option(64, "side of the square pictures, in pixels")
    schedule: str = option("linear", "beta over time", ("linear", "scaled_linear", "cosine"))
    timesteps: int = option(1000, "length T of the noise chain")
    prediction: str = option("eps", "what the UNet predicts", ("eps", "v", "x_0"))
    variance: str = option(
        "posterior",
        "Sigma of a DDPM step: the posterior's, beta_t, or learned between them with twice the output channels",
        ("posterior", "beta", "learned"),
    )
    vae_channels: tuple[int, ...] = option((64, 128), "VAE widths; each after the first halves the side")
    vae_layers: int = option(2, "ResBlocks a level of the VAE's encoder")
    latent_channels: int = option(4, "channels of a latent")
    channels: tuple[int, ...] = option((64, 128, 256), "UNet widths; each after the first halves the side")
    attention_levels: tuple[int, ...] = option((0, 1), "UNet levels with cross-attention, 0 the largest")
    res_blocks: int = option(2, "ResBlocks a level of the UNet")
    head_width: int = option(32, "width of one attention head")
    text_weights: str = option(
        "laion2b_s34b_b79k", "text tower: an OpenCLIP ViT-B-32 tag, `random`, or a file of weights, ./FILE"
    )
    text_quick_gelu: bool = option(
        False, "for a file of text weights: it was trained with quick GELU (OpenAI's were)"
    )
    caption_drop: float = option(0.1, "share of captions replaced by the empty one, which guidance needs")

    @property
    def latent_size(self) -> int:
        r"""Side of a latent: the image's side halved once for every VAE width after the first."""
        return self.image_size // 2 ** (len(self.vae_channels) - 1)


@dataclass(frozen=True)
class TrainConfig:
    r"""The training: data, budgets, optimizer."""

    data: str = option(
        "drawn", "`drawn` for drawn faces, or a folder: CelebA in any layout, or images with a csv"
    )
    drawn_images: int = option(8_000, "how many faces to draw for --data drawn")
    crop: int = option(
        0, "side of the centre crop in pixels; 0: 148 for aligned CelebA, else the largest square"
    )
    seed: int = option(0, "names every random number of the run")
    batch_size: int = option(16, "pictures a step of the UNet")
    vae_batch_size: int = option(16, "pictures a step of the VAE")
    accumulation: int = option(1, "parts a batch is computed in, to save memory")
    vae_steps: int = option(30_000, "steps of the VAE stage")
    unet_steps: int = option(200_000, "steps of the UNet stage")
    steps_per_epoch: int = option(0, "steps that count as one epoch; 0: once through the data")
    epochs: int = option(0, "bound each stage by epochs instead of steps; 0: not")
    max_minutes: float = option(
        0.0,
        "bound the whole command, caches and both stages, in minutes; 0: not. The learning rate then follows "
        "the clock, so the run is not reproducible bit for bit; bounded by steps it is",
    )
    vae_share: float = option(0.35, "share of --max-minutes after which the VAE stage ends")
    vae_lr: float = option(1e-3, "peak learning rate of what is under AdamW in the VAE")
    lr: float = option(3e-4, "peak learning rate of what is under AdamW in the UNet")
    muon_lr: float = option(
        0.0,
        "peak learning rate of both networks' inner matrices and convolutions, under Muon; 0: all is under AdamW",
    )
    warmup: int = option(200, "steps in which the learning rate rises")
    weight_decay: float = option(0.01, "weight decay")
    clip: float = option(1.0, "largest norm of the gradient; 0: any")
    ema_decay: float = option(0.9995, "decay of the averaged weights, reached by warm-up")
    vlb_weight: float = option(0.001, "weight of the variational bound that teaches --variance learned")
    reconstruction: str = option("l1", "the VAE's reconstruction norm", ("l1", "l2"))
    kl_weight: float = option(1e-5, "weight of the VAE's KL term")
    perceptual_weight: float = option(
        0.0, "weight of a VGG16 feature loss; above 0 downloads torchvision's weights"
    )
    precision: str = option(
        "auto",
        "arithmetic of the networks; auto: bf16 where the device has it",
        ("auto", "fp32", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = option(False, "compute activations twice, keep fewer")
    caption_variants: int = option(1, "wordings a picture's attributes are told in")
    text_cache_gb: float = option(8.0, "embed captions once up to this size on disk; beyond, at every step")
    max_bad_images: float = option(
        0.01, "share of unreadable pictures that are skipped before the run refuses"
    )
    save_every: int = option(500, "steps between checkpoints")
    sample_every: int = option(1000, "steps between validation and sample grids")


LAPTOP = {
    "text_weights": "random",
    "prediction": "v",
    "schedule": "cosine",
    "vae_channels": (32, 64, 64),
    "vae_layers": 1,
    "latent_channels": 8,
    "channels": (64, 128, 192),
    "attention_levels": (1, 2),
    "res_blocks": 1,
    "batch_size": 32,
    "lr": 1e-3,
    "ema_decay": 0.998,
    "vae_lr": 2e-3,
    "muon_lr": 7e-3,
}
LAPTOP_STEPS = {"vae_steps": 1_000_000, "unet_steps": 1_000_000}  # the minutes end it first

PRESETS = {
    "drawn64": LAPTOP
    | LAPTOP_STEPS
    | {
        "channels": (64, 128),
        "attention_levels": (1,),
        "max_minutes": 10.0,
        "vae_share": 0.28,
        "save_every": 200,
        "sample_every": 400,
    },
    "celeba64": {},
    "celeba64-laptop": LAPTOP | LAPTOP_STEPS | {"max_minutes": 60.0, "vae_share": 0.25, "muon_lr": 4e-3},
    "lowvram": {
        "batch_size": 16,
        "accumulation": 8,
        "gradient_checkpointing": True,
        "steps_per_epoch": 100,
        "epochs": 3,
    },
    "tiny": {
        "text_weights": "random",
        "prediction": "v",
        "schedule": "cosine",
        "image_size": 32,
        "vae_channels": (32, 32),
        "vae_layers": 1,
        "channels": (32, 64),
        "attention_levels": (1,),
        "res_blocks": 1,
        "batch_size": 8,
        "vae_batch_size": 8,
        "vae_steps": 20,
        "unet_steps": 20,
        "drawn_images": 128,
        "warmup": 5,
        "save_every": 10,
        "sample_every": 20,
    },
}


TEXT_FILE = "text.safetensors"  # of a run folder, where its text tower is one that no name brings back
MOST_WIDTH, MOST_PARAMETERS = 4096, 10**9  # the UNet of Stable Diffusion 1 has 0.86 of them
AT_MOST = {"drawn_images": 10**7, "batch_size": 2**16, "vae_batch_size": 2**16, "caption_variants": 1000}
AT_LEAST_ONE = (
    "batch_size",
    "vae_batch_size",
    "accumulation",
    "vae_steps",
    "unet_steps",
    "drawn_images",
    "caption_variants",
    "save_every",
    "sample_every",
)
NOT_NEGATIVE = (
    "crop",
    "seed",
    "steps_per_epoch",
    "epochs",
    "max_minutes",
    "vae_lr",
    "lr",
    "muon_lr",
    "warmup",
    "weight_decay",
    "clip",
    "vlb_weight",
    "kl_weight",
    "perceptual_weight",
    "text_cache_gb",
    "max_bad_images",
)
MOVABLE = {
    "max_minutes",
    "vae_steps",
    "unet_steps",
    "epochs",
    "save_every",
    "sample_every",
    "precision",
}  # by --resume


@dataclass(frozen=True)
class Config:
    r"""A whole run: the model, its training, and the preset they began from."""

    model: ModelConfig
    training: TrainConfig
    preset: str

    @classmethod
    def from_preset(cls, preset: str, **changes) -> "Config":
        r"""The preset's numbers with `changes` by field name over them; raises UserError where they make no sense."""
        if preset not in PRESETS:
            raise UserError(f"expected a preset out of {', '.join(PRESETS)}, got {preset!r}")
        values = PRESETS[preset] | changes
        unknown = set(values) - set(fields_of(ModelConfig)) - set(fields_of(TrainConfig))
        if unknown:
            raise UserError(
                f"expected names of settings, got {', '.join(sorted(unknown))}; see train.py --help"
            )
        return cls(_build(ModelConfig, values), _build(TrainConfig, values), preset).checked()

    def checked(self) -> "Config":
        r"""This configuration, or UserError with the first thing in it that cannot be."""
        for section in (self.model, self.training):
            _check_types(section)
        m, t = self.model, self.training
        halvings = len(m.vae_channels) + len(m.channels) - 2
        _require(
            1 <= len(m.vae_channels) <= 6 and 1 <= len(m.channels) <= 6,
            "1 to 6 widths in vae_channels and channels",
        )
        widths = m.vae_channels + m.channels
        _require(
            all(0 < c <= MOST_WIDTH and c % 32 == 0 for c in widths),
            f"widths up to {MOST_WIDTH} that 32 divides",
            widths,
        )
        _require(
            m.image_size > 0 and m.image_size % 2**halvings == 0,
            f"an image_size that {2**halvings} divides",
            m.image_size,
        )
        _require(m.image_size <= 1024, "an image_size of at most 1024", m.image_size)
        _require(
            m.head_width > 0 and all(c % m.head_width == 0 for c in m.channels),
            f"a head_width that divides the UNet's widths {m.channels}",
            m.head_width,
        )
        _require(
            set(m.attention_levels) <= set(range(len(m.channels))),
            f"attention_levels out of 0..{len(m.channels) - 1}",
            m.attention_levels,
        )
        _require(30 <= m.timesteps <= 100_000, "timesteps from 30 to 100000", m.timesteps)
        for name in ("vae_layers", "latent_channels", "res_blocks"):
            _require(1 <= getattr(m, name) <= 64, f"{name} from 1 to 64", getattr(m, name))
        size = parameters(m)
        _require(
            size <= MOST_PARAMETERS, f"a model of at most {MOST_PARAMETERS:,} parameters", f"about {size:,}"
        )
        _require(0 <= m.caption_drop < 1, "caption_drop in [0, 1)", m.caption_drop)
        for name in AT_LEAST_ONE:
            _require(getattr(t, name) >= 1, f"{name} of at least 1", getattr(t, name))
        for name, most in AT_MOST.items():
            _require(getattr(t, name) <= most, f"{name} of at most {most}", getattr(t, name))
        for name in NOT_NEGATIVE:
            _require(getattr(t, name) >= 0, f"{name} not below 0", getattr(t, name))
        for batch in (t.batch_size, t.vae_batch_size):
            _require(
                batch % t.accumulation == 0,
                f"an accumulation that divides the batch of {batch}",
                t.accumulation,
            )
        _require(0 <= t.ema_decay < 1, "ema_decay in [0, 1)", t.ema_decay)
        _require(0 < t.vae_share < 1, "vae_share in (0, 1)", t.vae_share)
        return self

    def with_training(self, **changes) -> "Config":
        r"""A copy with other training numbers."""
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **changes)).checked()

    def to_json(self) -> str:
        r"""The text of config.json."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Config":
        r"""The configuration in the config.json at `path`; raises UserError when it is none of ours.

        It may be a stranger's, so it names no file to be read for the model: its text weights are `random`, a tag, or
        text.safetensors beside it. (`data` is a folder of the person who trains; only --resume opens it.)
        """
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"expected the config.json of a run at {path}, could not read it: {error}"
            ) from None
        if not isinstance(values, dict) or not all(
            isinstance(values.get(k), dict) for k in ("model", "training")
        ):
            raise UserError(
                f"expected config.json with the sections model and training, got something else in {path}"
            )
        if values.get("format") != 1:
            raise UserError(
                f"expected config.json of format 1, got {values.get('format')!r} in {path}; another version made it"
            )
        sections = {}
        for name, section in (("model", ModelConfig), ("training", TrainConfig)):
            unknown = set(values[name]) - set(fields_of(section))
            if unknown:
                raise UserError(
                    f"unknown settings in {path}: {', '.join(sorted(unknown))}; another version made it"
                )
            sections[name] = _build(section, values[name])
        preset = values.get("preset", "")
        _require(preset == "" or isinstance(preset, str) and is_name(preset), "preset as a name", preset)
        config = cls(**sections, preset=preset).checked()
        weights = config.model.text_weights
        if not is_name(weights) and not (Path(path).parent / TEXT_FILE).is_file():
            raise UserError(
                f"expected text_weights `random`, a tag, or a file {TEXT_FILE} beside {path}, got {weights!r} alone; "
                f"a run reads no file outside its folder: copy the weights there as {TEXT_FILE}"
            )
        return config


def parameters(m: ModelConfig) -> int:
    r"""About how many numbers the VAE and the UNet hold, within a factor of two.

    A convolution from c to c channels has 9 c^2. Each of the 2 R + 1 ResBlocks of a level has two (those on the way up
    read a skip as well); attention to the caption has about 22 c^2.
    """
    vae = sum((2 * m.vae_layers + 1) * 20 * c**2 for c in m.vae_channels) + 80 * m.vae_channels[-1] ** 2
    levels = (
        (2 * m.res_blocks + 1) * (26 + 22 * (k in m.attention_levels)) * c**2
        for k, c in enumerate(m.channels)
    )
    return vae + sum(levels) + 60 * m.channels[-1] ** 2


def fields_of(section) -> dict:
    r"""Field name -> (type, field) of a section."""
    types = typing.get_type_hints(section)
    return {f.name: (types[f.name], f) for f in dataclasses.fields(section)}


def add_flags(parser: argparse.ArgumentParser):
    r"""One flag for every field of both sections; a flag that is not given stays None."""
    for section, title in ((TrainConfig, "training"), (ModelConfig, "model")):
        group = parser.add_argument_group(f"{title} (each preset sets its own; the spec's value in brackets)")
        for name, (kind, f) in fields_of(section).items():
            flag = "--" + name.replace("_", "-")
            shown = ",".join(map(str, f.default)) if kind == tuple[int, ...] else f.default
            help_text = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
            else:
                choices = f.metadata["choices"] or None
                shown_as = None if choices else name.split("_")[-1].upper()
                parse = PARSERS.get(kind, kind)
                group.add_argument(flag, type=parse, choices=choices, metavar=shown_as, help=help_text)


def given_flags(arguments: argparse.Namespace) -> dict:
    r"""The settings that the command line named, by field name."""
    names = [*fields_of(ModelConfig), *fields_of(TrainConfig)]
    return {n: getattr(arguments, n) for n in names if getattr(arguments, n, None) is not None}


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas such as 64,128,256, got {text!r}"
        ) from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


PARSERS = {tuple[int, ...]: _widths, float: _number}


def _build(section, values: dict):
    known = {n: values[n] for n in fields_of(section) if n in values}
    return section(**{n: tuple(v) if isinstance(v, list) else v for n, v in known.items()})


def _check_types(section):
    for name, (kind, f) in fields_of(type(section)).items():
        value = getattr(section, name)
        if kind == tuple[int, ...]:
            good = isinstance(value, tuple) and all(type(v) is int for v in value)
        elif kind is float:
            good = type(value) in (int, float) and math.isfinite(value)
        else:
            good = type(value) is kind and (kind is not int or _fits(value))
        _require(good, f"{name} of type {getattr(kind, '__name__', kind)}, finite", value)
        choices = f.metadata["choices"]
        _require(not choices or value in choices, f"{name} out of {', '.join(choices)}", value)


def _require(condition: bool, expected: str, got=None):
    if not condition:
        raise UserError(f"expected {expected}" + ("" if got is None else f", got {got!r}"))
