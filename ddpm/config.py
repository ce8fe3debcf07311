r"""Every number that shapes a run: dataclass field -> flag of the same name -> config.json -> rebuilt model.

`ModelConfig` is what a checkpoint needs to be built again; `TrainConfig` is how it is trained. `PRESETS` is the
table of named settings. This file imports no torch, and of the package only what is as light, because `--help`
must answer at once.
"""

import argparse
import dataclasses
import json
import math
import operator
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ddpm.tools.command import TRAIN
from ddpm.tools.errors import UserError, is_name
from ddpm.tools.strict_json import fits_in_64_bits, read_json

SHIPPED = Path(__file__).parent / "weights"
LARGEST_LATENT = 32  # side of the spec's; larger ones are warned of
TEXT_FILE = "text.safetensors"  # of a run folder: its text tower, unless that is the random one
WORDS_FILE = "words.txt"  # of a run folder: what its training captions say, where the text tower is random
MOST_PARAMETERS = 10**9  # the UNet of Stable Diffusion 1 has 0.86 of them
# what --resume may change
MOVABLE = {"data", "precision", "max_minutes", "accumulation", "gradient_checkpointing", "max_bad_images"}
MOVABLE |= {"vae_steps", "unet_steps", "epochs", "save_every", "sample_every", "noise_scale"}
# settings that older config.json files lack; their defaults are what those runs did
LATER = {"few_steps", "trajectories", "max_pictures", "init", "flip", "weighting", "noise_scale"}
# the default sampler, steps and guidance of a model, by which a teacher draws too
GUIDED = ("dpm++", 20, 3.0)
Widths = tuple[int, ...]
WIDTHS = {"low": 32, "high": 4096}
BOUNDS = {
    "low": (operator.ge, "of at least"),
    "high": (operator.le, "of at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}


def option(default, help: str, choices: tuple = (), **bounds):
    r"""A dataclass field with the help text of its flag, and its choices or the `BOUNDS` of its value."""
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class ModelConfig:
    r"""The model: the spec's numbers are the defaults."""

    image_size: int = option(64, "side of the square pictures, in pixels", low=16, high=1024)
    schedule: str = option("linear", "beta over time", ("linear", "scaled_linear", "cosine"))
    timesteps: int = option(1000, "length T of the noise chain", low=30, high=100_000)
    prediction: str = option("eps", "what the UNet predicts", ("eps", "v", "x_0"))
    variance: str = option(
        "posterior",
        "Sigma of a DDPM step: the posterior's, beta_t, or learned between them with twice the output channels",
        ("posterior", "beta", "learned"),
    )
    vae_channels: Widths = option((64, 128), "VAE widths; each after the first halves the side", **WIDTHS)
    vae_layers: int = option(2, "ResBlocks a level of the VAE's encoder", low=1, high=64)
    latent_channels: int = option(4, "channels of a latent", low=1, high=64)
    channels: Widths = option((64, 128, 256), "UNet widths; each after the first halves the side", **WIDTHS)
    attention_levels: Widths = option((0, 1), "UNet levels with cross-attention, 0 the largest")
    res_blocks: int = option(2, "ResBlocks a level of the UNet", low=1, high=64)
    head_width: int = option(32, "width of one attention head", low=1)
    text_weights: str = option(
        "laion2b_s34b_b79k", "text tower: an OpenCLIP ViT-B-32 tag, `random`, or a file of weights, ./FILE"
    )
    text_quick_gelu: bool = option(
        False, "for a file of text weights: it was trained with quick GELU (OpenAI's were)"
    )
    caption_drop: float = option(
        0.1, "share of captions replaced by the empty one, which guidance needs", low=0, below=1
    )
    few_steps: int = option(
        0, "UNet calls for one picture, learned from the run --init; divides 20; 0: an ordinary model", low=0
    )
    noise_scale: float = option(
        1.0,
        "factor on the noise of a sampler over its whole chain, by which this model draws",
        above=0,
        high=1,
    )

    @property
    def latent_size(self) -> int:
        r"""Side of a latent: the image's side halved once for every VAE width after the first."""
        return self.image_size // 2 ** (len(self.vae_channels) - 1)

    @property
    def drawing(self) -> tuple[str, int, float, float]:
        r"""The default sampler, steps, guidance and noise scale of this model."""
        return ("ddim", self.few_steps, 1.0, 1.0) if self.few_steps else (*GUIDED, self.noise_scale)


@dataclass(frozen=True)
class TrainConfig:
    r"""The training: data, budgets, optimizer."""

    data: str = option(
        "drawn", "`drawn` for drawn faces, or a folder: CelebA in any layout, or images with a csv"
    )
    drawn_images: int = option(8_000, "how many faces to draw for --data drawn", low=1, high=10**7)
    max_pictures: int = option(
        0, "train on at most so many pictures of a folder, chosen by the seed; 0: all", low=0
    )
    crop: int = option(
        0, "side of the centre crop in pixels; 0: 148 for aligned CelebA, else the largest square", low=0
    )
    flip: bool = option(True, "mirror half of the pictures; not, where left and right matter")
    init: str = option(
        "", "run folder whose VAE and UNet, where their shapes fit, this run begins with, or `shipped`"
    )
    seed: int = option(0, "names every random number of the run", low=0)
    batch_size: int = option(16, "pictures a step of the UNet", low=1, high=2**16)
    vae_batch_size: int = option(16, "pictures a step of the VAE", low=1, high=2**16)
    accumulation: int = option(1, "parts a batch is computed in, to save memory", low=1)
    vae_steps: int = option(30_000, "steps of the VAE stage", low=1)
    unet_steps: int = option(200_000, "steps of the UNet stage", low=1)
    steps_per_epoch: int = option(0, "steps that count as one epoch; 0: once through the data", low=0)
    epochs: int = option(0, "bound each stage by epochs instead of steps; 0: not", low=0)
    max_minutes: float = option(
        0.0,
        "bound the whole command, caches and both stages, in minutes; 0: not. The learning rate then follows "
        "the clock, so the run is not reproducible bit for bit; bounded by steps it is",
        low=0,
    )
    vae_share: float = option(0.35, "share of --max-minutes after which the VAE stage ends", above=0, below=1)
    vae_lr: float = option(1e-3, "peak learning rate of what is under AdamW in the VAE", low=0)
    lr: float = option(3e-4, "peak learning rate of what is under AdamW in the UNet", low=0)
    muon_lr: float = option(
        0.0,
        "peak learning rate of both networks' inner matrices and convolutions, under Muon; 0: all is under AdamW",
        low=0,
    )
    warmup: int = option(200, "steps in which the learning rate rises", low=0)
    weight_decay: float = option(0.01, "weight decay", low=0)
    clip: float = option(1.0, "largest norm of the gradient; 0: any", low=0)
    ema_decay: float = option(0.9995, "decay of the averaged weights, reached by warm-up", low=0, below=1)
    weighting: str = option(
        "prediction",
        "which squared error the loss is: of what the UNet predicts, of eps, v or x_0, or of x_0 times min(SNR, 5)",
        ("prediction", "eps", "v", "x_0", "min_snr"),
    )
    vlb_weight: float = option(
        0.001, "weight of the variational bound that teaches --variance learned", low=0
    )
    reconstruction: str = option("l1", "the VAE's reconstruction norm", ("l1", "l2"))
    kl_weight: float = option(1e-5, "weight of the VAE's KL term", low=0)
    perceptual_weight: float = option(
        0.0, "weight of a VGG16 feature loss; above 0 downloads torchvision's weights", low=0
    )
    precision: str = option(
        "auto",
        "arithmetic of the networks; auto: bf16 on a GPU that has it, and on CPUs that are faster in it",
        ("auto", "fp32", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = option(False, "compute activations twice, keep fewer")
    caption_variants: int = option(
        1, "captions of a picture: made of its attributes, or of its own", low=1, high=1000
    )
    text_cache_gb: float = option(
        8.0,
        "GB on disk for embedded captions, of which new ones then replace old ones; 0: none",
        low=0,
        high=4096,
    )
    trajectories: int = option(
        2048, "pictures that the teacher draws for a distillation (--distill)", low=1, high=10**7
    )
    max_bad_images: float = option(
        0.01, "share of unreadable pictures that are skipped before the run refuses", low=0
    )
    save_every: int = option(500, "steps between checkpoints", low=1)
    sample_every: int = option(1000, "steps between validation and sample grids", low=1)


SECTIONS = {"training": TrainConfig, "model": ModelConfig}  # of config.json, and of the flags

SPEC = {"prediction": "v", "weighting": "eps", "muon_lr": 4e-3, "lr": 1e-3, "vae_lr": 2e-3, "vae_share": 0.1}
SMALL = {"text_weights": "random", "prediction": "v", "schedule": "cosine", "vae_layers": 1, "res_blocks": 1}
LAPTOP_VAE = {"vae_channels": (32, 64, 64), "latent_channels": 8, "vae_lr": 2e-3, "vae_steps": 1_000_000}
LAPTOP_UNET = {"channels": (64, 128, 192), "attention_levels": (1, 2), "lr": 1e-3, "unet_steps": 1_000_000}
LAPTOP = SMALL | LAPTOP_VAE | LAPTOP_UNET | {"batch_size": 32, "ema_decay": 0.998}  # its minutes end first
DRAWN = LAPTOP | {"channels": (64, 128), "attention_levels": (1,), "muon_lr": 7e-3}
DRAWN |= {"max_minutes": 10.0, "vae_share": 0.28, "save_every": 200, "sample_every": 400}
PRESETS = {
    "drawn64": DRAWN,
    "drawn128": DRAWN  # one more width, so latents of 16 x 16 again; its VAE takes twice the time a step
    | {"image_size": 128, "vae_channels": (32, 32, 64, 64), "max_minutes": 20.0, "vae_share": 0.4},
    "celeba64": SPEC,  # the rest of the spec's numbers are the defaults
    "celeba128": SPEC | {"image_size": 128, "vae_channels": (32, 64, 128)},
    "celeba64-laptop": LAPTOP  # an hour sees 16,000 pictures several times, and reads each caption once
    | {"muon_lr": 4e-3, "max_minutes": 60.0, "vae_share": 0.25, "max_pictures": 16_000}
    | {"weighting": "min_snr", "noise_scale": 0.9},
    "lowvram": SPEC
    | {"batch_size": 16, "accumulation": 8, "gradient_checkpointing": True}
    | {"steps_per_epoch": 100, "epochs": 3, "save_every": 50},  # its steps are slow where memory is small
    "tiny": SMALL
    | {"image_size": 32, "vae_channels": (32, 32), "channels": (32, 64), "attention_levels": (1,)}
    | {"batch_size": 8, "vae_batch_size": 8, "vae_steps": 20, "unet_steps": 20, "drawn_images": 128}
    | {"warmup": 5, "save_every": 10, "sample_every": 20},
}
DISTILL = {  # what --distill changes in the settings of its teacher's run
    "few_steps": 4,
    **{"max_minutes": 12.0, "unet_steps": 1_000_000, "epochs": 0, "warmup": 50},
    **{"muon_lr": 2e-3, "lr": 3e-4, "ema_decay": 0.99, "weighting": "prediction"},
}


@dataclass(frozen=True)
class Config:
    r"""A whole run: the model, its training, and the preset they began from."""

    model: ModelConfig
    training: TrainConfig
    preset: str = ""

    @classmethod
    def from_preset(cls, preset: str, **changes) -> "Config":
        r"""The preset's numbers with `changes` by field name over them; raises UserError where they make no sense."""
        _require(preset in PRESETS, f"a preset out of {', '.join(PRESETS)}", preset)
        values = PRESETS[preset] | changes
        unknown = set(values) - {name for section in SECTIONS.values() for name in fields_of(section)}
        _require(not unknown, f"names of settings, as {TRAIN} --help lists them", ", ".join(sorted(unknown)))
        return cls(_build(ModelConfig, values), _build(TrainConfig, values), preset).checked()

    def checked(self) -> "Config":
        r"""This configuration, or UserError with the first thing in it that cannot be."""
        for section in (self.model, self.training):
            _check_fields(section)
        _check_model(self.model)
        _require(self.training.data, "a folder after --data, or `drawn`", "an empty name")
        parts = self.training.accumulation
        for batch in (self.training.batch_size, self.training.vae_batch_size):
            _require(batch % parts == 0, f"an accumulation that divides the batch of {batch}", parts)
        return self

    def changed(self, **changes) -> "Config":
        r"""A copy with `changes` by field name, of either part."""
        values = self.settings() | changes
        assert len(values) == len(self.settings()), f"unknown settings among {', '.join(changes)}"
        return Config(_build(ModelConfig, values), _build(TrainConfig, values), self.preset).checked()

    def settings(self) -> dict:
        r"""Every field of both parts by its name."""
        return {**vars(self.model), **vars(self.training)}

    def to_json(self) -> str:
        r"""The text of config.json."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Config":
        r"""The configuration in the config.json at `path`; raises UserError when it is none of ours.

        It may be a stranger's, so it names no file to be read for the model: its text weights are `random`, a tag, or
        text.safetensors beside it. (`data` is a folder of the person who trains; loading a model does not open it.)
        """
        path = Path(path)
        values = _read_sections(path)
        sections = {}
        for name, section in SECTIONS.items():
            given, known = set(values[name]), set(fields_of(section))
            for kind, names, advice in (
                ("unknown", given - known, "remove"),
                ("missing", known - given - LATER, "add"),
            ):
                if names:
                    listed = ", ".join(sorted(names))
                    made = f"another version of ddpm made it; {advice} them ({TRAIN} --help lists all)"
                    raise UserError(f"{kind} settings in {path}: {listed}; {made}")
            sections[name] = _build(section, values[name])
        preset = values.get("preset", "")
        _require(preset == "" or isinstance(preset, str) and is_name(preset), "preset as a name", preset)
        config = cls(**sections, preset=preset).checked()
        weights = config.model.text_weights
        if not is_name(weights) and not (path.parent / TEXT_FILE).is_file():
            raise UserError(
                f"expected text_weights `random`, a tag, or a file {TEXT_FILE} beside {path}, got {weights!r} alone; "
                f"a run reads no file outside its folder: copy the weights there as {TEXT_FILE}"
            )
        return config


def size_warning(config: Config) -> list[str]:
    r"""A line, where latents are larger than the spec's, that names what keeps them small; else none."""
    side = config.model.latent_size
    if side <= LARGEST_LATENT:
        return []
    preset = "drawn128" if config.preset == "drawn64" else "celeba128"
    return [
        f"warning: latents of {side} x {side} are slow, because the VAE and the UNet attend over {side**2:,} places; "
        f"for 128 x 128 take --preset {preset}, beyond it another width in --vae-channels, which halves their side"
    ]


def parameters(model: ModelConfig) -> int:
    r"""About how many numbers the VAE and the UNet hold, within a factor of two.

    A convolution from c to c channels has 9 c^2. Each of the 2 R + 1 ResBlocks of a level has two, and those on the
    way up read a skip as well. Attention to the caption has about 22 c^2.
    """
    vae = 80 * model.vae_channels[-1] ** 2
    for c in model.vae_channels:
        vae += (2 * model.vae_layers + 1) * 20 * c**2
    unet = 60 * model.channels[-1] ** 2
    for level, c in enumerate(model.channels):
        attention = 22 if level in model.attention_levels else 0
        unet += (2 * model.res_blocks + 1) * (26 + attention) * c**2
    return vae + unet


def fill_in_drawing(a: argparse.Namespace, run: Path):
    r"""Give the flags that say how to draw, where they are left out, the values by which the run's model draws."""
    file = run / "config.json"
    own = (Config.read(file).model if file.is_file() else ModelConfig()).drawing
    for name, value in zip(("sampler", "steps", "guidance", "noise_scale"), own, strict=True):
        if getattr(a, name) is None:
            setattr(a, name, value)


def fields_of(section) -> dict:
    r"""Field name -> (type, field) of a section."""
    types = typing.get_type_hints(section)
    return {f.name: (types[f.name], f) for f in dataclasses.fields(section)}


def add_flags(parser: argparse.ArgumentParser):
    r"""One flag for every field of both sections; a flag that is not given stays None."""
    for title, section in SECTIONS.items():
        group = parser.add_argument_group(f"{title} (each preset sets its own; the spec's value in brackets)")
        for name, (kind, f) in fields_of(section).items():
            flag = "--" + name.replace("_", "-")
            shown = ",".join(map(str, f.default)) if kind == Widths else f.default
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
    names = [name for section in SECTIONS.values() for name in fields_of(section)]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}


def _widths(text: str) -> Widths:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        expected = "expected whole numbers with commas such as 64,128,256"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


PARSERS = {Widths: _widths, float: _number}


def _build(section, values: dict):
    r"""A section with `values` by field name; lists, as JSON has them, become tuples."""
    known = {name: values[name] for name in fields_of(section) if name in values}
    return section(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})


def _read_sections(path: Path) -> dict:
    r"""The JSON of a config.json of this format, which has both sections."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"expected the config.json of a run at {path}, could not read it: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(values.get(name), dict) for name in SECTIONS):
        raise UserError(f"expected the sections model and training in {path}, got something else")
    _require(values.get("format") == 1, f"{path} of format 1", values.get("format"))
    unknown = values.keys() - {"format", "preset", *SECTIONS}
    _require(not unknown, f"format, preset, model and training in {path}", ", ".join(sorted(unknown)))
    return values


def _check_fields(section):
    r"""Hold each field of a section against its type, its choices and its bounds."""
    for name, (kind, f) in fields_of(type(section)).items():
        value = getattr(section, name)
        _require(_is_of_type(value, kind), f"{name} of type {getattr(kind, '__name__', kind)}, finite", value)
        choices = f.metadata["choices"]
        _require(not choices or value in choices, f"{name} out of {', '.join(choices)}", value)
        for word, bound in f.metadata["bounds"].items():
            holds, phrase = BOUNDS[word]
            parts = value if isinstance(value, tuple) else (value,)
            _require(all(holds(part, bound) for part in parts), f"{name} {phrase} {bound}", value)


def _is_of_type(value, kind) -> bool:
    if kind == Widths:
        return isinstance(value, tuple) and all(type(part) is int for part in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and (kind is not int or fits_in_64_bits(value))


def _check_model(model: ModelConfig):
    r"""The rules between the fields of a model."""
    for name in ("vae_channels", "channels"):
        widths = getattr(model, name)
        _require(1 <= len(widths) <= 6, f"1 to 6 widths in {name}", widths)
        _require(all(c % 32 == 0 for c in widths), f"{name} that 32 divides", widths)
    divisor = 2 ** (len(model.vae_channels) + len(model.channels) - 2)
    _require(model.image_size % divisor == 0, f"an image_size that {divisor} divides", model.image_size)
    whole = all(c % model.head_width == 0 for c in model.channels)
    _require(whole, f"a head_width that divides the UNet's widths {model.channels}", model.head_width)
    levels = model.attention_levels
    last = len(model.channels) - 1
    _require(all(0 <= k <= last for k in levels), f"attention_levels out of 0..{last}", levels)
    few = model.few_steps
    _require(not few or GUIDED[1] % few == 0, f"few_steps that divide the teacher's {GUIDED[1]}, or 0", few)
    size = parameters(model)
    _require(size <= MOST_PARAMETERS, f"a model of at most {MOST_PARAMETERS:,} parameters", f"about {size:,}")


def _require(condition: bool, expected: str, got):
    if not condition:
        raise UserError(f"expected {expected}, got {got!r}")
