r"""To and from the folder that diffusers' `StableDiffusionPipeline` opens; needs neither diffusers nor transformers.

python -m ddpm.export runs/drawn64 exported             # a run becomes a diffusers folder
python -m ddpm.export --reverse exported runs/again     # and back
python -m ddpm.export --half runs/drawn64 small         # a run's configuration and weights alone, in float16

Our modules already have diffusers' names, so a table of renames is all that lies between the two. Sampling there by
default is sampling here by default: the folder names DPM-Solver++ 2M with trailing steps as its scheduler.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

from ddpm.tools import command as cli


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(__doc__)
    p.prog = "python -m ddpm.export"
    p.add_argument("source", metavar="RUN", help="a run folder; with --reverse a diffusers folder")
    p.add_argument("target", metavar="DIR", help="the folder to write; with --reverse a run folder")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--reverse", action="store_true", help="from diffusers to a run")
    how.add_argument(
        "--half", action="store_true", help="a run of weights in float16 alone, to hand on, not to resume"
    )
    p.add_argument(
        "--weights", choices=("ema", "unet"), default="ema", help="averaged weights or the last ones [ema]"
    )
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and a mistyped flag are answered without what follows

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ddpm.config import TEXT_FILE, Config, ModelConfig, TrainConfig
from ddpm.model import TextToImage, networks
from ddpm.schedule import Schedule
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.tools.errors import UserError, printable
from ddpm.tools.files import new_folder, write_atomically
from ddpm.tools.strict_json import read_json
from ddpm.tools.weights import save_weights
from ddpm.unet import UNet

RENAMES = (  # UNet and VAE: ours, diffusers'
    (".to_out.", ".to_out.0."),
    (".ff.proj.", ".ff.net.0.proj."),
    (".ff.out.", ".ff.net.2."),
)
TEXT_RENAMES = (  # text tower: OpenCLIP's, transformers'; one matrix for q, k and v becomes three
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "encoder.layers."),
    ("ln_final.", "final_layer_norm."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.in_proj_", ".self_attn.{qkv}_proj."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}

# What our networks always are, in diffusers' words. Each value is also the default there, so a folder may leave it out.
UNET_ALWAYS = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "time_embedding_act_fn": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
}
VAE_ALWAYS = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
TEXT_ALWAYS = {
    "vocab_size": 49408,
    "max_position_embeddings": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "layer_norm_eps": 1e-5,
}
SCHEDULE_ALWAYS = {"trained_betas": None, "rescale_betas_zero_snr": False}
SAMPLER = {  # our dpm++; clip_sample and set_alpha_to_one are for who changes to DDIM or DDPM
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "thresholding": False,
    "clip_sample": False,
    "set_alpha_to_one": True,
}

VERSION = {
    "_diffusers_version": "0.42.1"
}  # the version tests/compat ran with; below 0.9.0 sample_size is overwritten
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    **VERSION,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREFIX = "text_model."  # of the text tower's tensors; transformers 5 reads them with and without


def unet_config(c: ModelConfig) -> dict:
    r"""The settings of `UNet2DConditionModel`; its attention_head_dim is, by an old mistake, the number of heads."""
    attends = [k in c.attention_levels for k in range(len(c.channels))]
    return UNET_ALWAYS | {
        "sample_size": c.latent_size,
        "in_channels": c.latent_channels,
        "out_channels": c.latent_channels,
        "block_out_channels": list(c.channels),
        "layers_per_block": c.res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": WIDTH,
        "attention_head_dim": [width // c.head_width for width in c.channels],
    }


def vae_config(c: ModelConfig) -> dict:
    r"""The settings of `AutoencoderKL`, but for its sample_size and scaling_factor."""
    return VAE_ALWAYS | {
        "latent_channels": c.latent_channels,
        "block_out_channels": list(c.vae_channels),
        "layers_per_block": c.vae_layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(c.vae_channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(c.vae_channels),
    }


def text_config(quick_gelu: bool) -> dict:
    r"""The settings of transformers' `CLIPTextModel`."""
    return TEXT_ALWAYS | {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}


def schedule_config(c: ModelConfig) -> dict:
    r"""The settings that make a diffusers scheduler's beta and prediction ours."""
    beta = Schedule.named(c.schedule, c.timesteps).beta
    ends = {} if c.schedule == "cosine" else {"beta_start": beta[0].item(), "beta_end": beta[-1].item()}
    return (
        SCHEDULE_ALWAYS
        | ends
        | {
            "num_train_timesteps": c.timesteps,
            "beta_schedule": SCHEDULES[c.schedule],
            "prediction_type": PREDICTIONS[c.prediction],
        }
    )


def export(model: TextToImage, folder: str | Path):
    r"""Write `folder` for `StableDiffusionPipeline.from_pretrained(folder)`.

    It appears whole or not at all. Raises UserError when something is there already.
    """
    c = model.config
    vae = {"sample_size": c.image_size, "scaling_factor": model.latent_scale}
    bos, eos = model.text.tokenizer.all_special_ids
    text = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": WIDTH,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }
    with new_folder(folder) as to:
        for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
            (to / part).mkdir()
        _write_json(to / "model_index.json", INDEX)
        _write_json(to / "unet/config.json", {"_class_name": INDEX["unet"][1], **VERSION, **unet_config(c)})
        _write_json(
            to / "vae/config.json", {"_class_name": INDEX["vae"][1], **VERSION, **vae_config(c), **vae}
        )
        _write_json(to / "text_encoder/config.json", text | text_config(model.text.quick_gelu))
        _write_json(
            to / "scheduler/scheduler_config.json",
            {"_class_name": INDEX["scheduler"][1], **VERSION, **schedule_config(c), **SAMPLER},
        )
        write_tokenizer(to / "tokenizer", model.text)
        write_weights(to / "unet" / WEIGHTS, without_variance(model.unet), RENAMES)
        write_weights(to / "vae" / WEIGHTS, model.vae, RENAMES)
        write_weights(to / "text_encoder/model.safetensors", model.text.tower, TEXT_RENAMES, PREFIX)


def without_variance(unet: UNet) -> UNet:
    r"""The UNet without the half of its output that is a learned variance: diffusers' pipeline would guide it too."""
    if unet.conv_out.out_channels == unet.in_channels:
        return unet
    unet = copy.deepcopy(unet)
    weight, bias = (parameter[: unet.in_channels] for parameter in (unet.conv_out.weight, unet.conv_out.bias))
    unet.conv_out = nn.Conv2d(unet.conv_out.in_channels, unet.in_channels, 3, padding=1)
    unet.conv_out.load_state_dict({"weight": weight, "bias": bias})
    return unet


def write_tokenizer(folder: Path, text: TextTower):
    r"""OpenCLIP's byte-pair vocabulary as the files of transformers' `CLIPTokenizer`.

    OpenCLIP pads with id 0, which is also the letter "!". Were "!" the padding token, every "!" of a prompt would be
    read as padding; so id 0 has a second name. transformers 5 does not mend text as OpenCLIP does (ftfy): curly quotes,
    ligatures and HTML entities become other tokens there.
    """
    names = dict(zip(text.tokenizer.all_special_ids, (START, END), strict=True))
    vocabulary = {names.get(i, token): i for token, i in text.tokenizer.encoder.items()} | {PAD: 0}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    merges = [" ".join(pair) for pair in text.tokenizer.bpe_ranks]
    _write_json(folder / "vocab.json", vocabulary, indent=None)
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8", newline="\n"
    )
    _write_json(folder / "tokenizer_config.json", settings | special)
    _write_json(folder / "special_tokens_map.json", special)


def their_names(name: str, renames: tuple) -> list[str]:
    r"""What the others call our tensor `name`: one name, or three where they split it in equal parts.

    >>> their_names("transformer.resblocks.0.attn.in_proj_bias", TEXT_RENAMES)[1]
    'encoder.layers.0.self_attn.k_proj.bias'
    """
    for ours, theirs in renames:
        name = name.replace(ours, theirs)
    return [name.replace("{qkv}", part) for part in "qkv"] if "{qkv}" in name else [name]


def write_weights(path: Path, module: nn.Module, renames: tuple, prefix: str = ""):
    r"""Write the weights of `module` under their names."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        theirs = their_names(name, renames)
        for n, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            tensors[prefix + n] = part.clone()  # parts of one tensor cannot be saved as several
    save_weights(path, tensors)


@torch.no_grad()
def read_weights(path: Path, module: nn.Module, renames: tuple):
    r"""Read weights under their names into `module`, strictly; raises UserError naming the tensor that does not fit."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"expected the weights of a diffusers folder at {path}, could not read them: {error}"
        ) from None
    tensors.pop("embeddings.position_ids", None)  # 0..76, which transformers kept before 4.31
    for name, ours in module.state_dict().items():
        theirs = their_names(name, renames)
        shape = ours.chunk(len(theirs))[0].shape
        for n in theirs:
            if n not in tensors or tensors[n].shape != shape:
                came = tuple(tensors[n].shape) if n in tensors else "nothing"
                raise UserError(f"expected {n} of shape {tuple(shape)} in {path}, got {came}")
        ours.copy_(torch.cat([tensors.pop(n) for n in theirs]))
    if tensors:
        raise UserError(f"expected the tensors of our model in {path} and no others, got {min(tensors)}")


class Settings(dict):
    r"""The settings in one JSON file of a diffusers folder; raises UserError when it is not there or no such file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            values = read_json(path, constants=True)  # diffusers writes "lambda_min_clipped": -Infinity
        except (OSError, ValueError) as error:
            raise UserError(f"expected a diffusers folder with {path}, could not read it: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"expected settings by name in {path}, got something else")
        super().__init__(values)

    def number(self, key: str) -> int | float:
        r"""A number above 0."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"expected {key} as a number above 0 in {self.path}, got {value!r}")
        return value

    def widths(self, key: str) -> tuple[int, ...]:
        r"""Whole numbers above 0, one to six."""
        values = self.get(key) if isinstance(self.get(key), list) else [self.get(key)]
        if not 1 <= len(values) <= 6 or not all(type(v) is int and v > 0 for v in values):
            raise UserError(
                f"expected {key} as one to six whole numbers above 0 in {self.path}, got {self.get(key)!r}"
            )
        return tuple(values)

    def ours(self, key: str, names: dict[str, str]) -> str:
        r"""Our word for their setting."""
        for mine, theirs in names.items():
            if self.get(key) == theirs:
                return mine
        raise UserError(
            f"expected {key} out of {', '.join(names.values())} in {self.path}, got {self.get(key)!r}"
        )

    def check(self, expected: dict, defaults: dict):
        r"""Raise UserError at the first setting that is not as expected."""
        for key, mine in expected.items():
            theirs = self.get(key, defaults.get(key))
            same = theirs == mine or (isinstance(mine, list) and [theirs] * len(mine) == mine)
            if isinstance(mine, float) and type(theirs) in (int, float):
                same = math.isclose(theirs, mine, rel_tol=1e-6)
            if not same:
                raise UserError(
                    f"expected {key} {mine!r} in {self.path}, as our networks have it, got {theirs!r}"
                )


def import_diffusers(folder: str | Path) -> TextToImage:
    r"""The model in a diffusers folder of our shape, the text tower included.

    Raises UserError naming what is missing, or what our networks are not. The sampler's settings are not read, and
    caption_drop is not there to be read: the model is taken for one that knows the empty prompt.
    """
    folder = Path(folder)
    c = model_config(folder)
    with torch.device("meta"):  # files that do not fit are refused before memory is taken
        vae, unet = networks(c)
    read_weights(folder / "unet" / WEIGHTS, unet, RENAMES)
    read_weights(folder / "vae" / WEIGHTS, vae, RENAMES)
    model = TextToImage(c, TextTower(c.text_quick_gelu))
    model.latent_scale = float(Settings(folder / "vae/config.json").number("scaling_factor"))
    read_weights(folder / "unet" / WEIGHTS, model.unet, RENAMES)
    read_weights(folder / "vae" / WEIGHTS, model.vae, RENAMES)
    read_weights(folder / "text_encoder" / "model.safetensors", model.text.tower, TEXT_RENAMES)
    return model.eval()


def model_config(folder: Path) -> ModelConfig:
    r"""The configuration that a diffusers folder describes; raises UserError naming the setting that ours never has."""
    unet, vae, text = (Settings(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    scheduler = Settings(folder / "scheduler/scheduler_config.json")
    channels, vae_channels = unet.widths("block_out_channels"), vae.widths("block_out_channels")
    kinds = unet.get("down_block_types") if isinstance(unet.get("down_block_types"), list) else []
    c = ModelConfig(
        image_size=unet.number("sample_size") * 2 ** (len(vae_channels) - 1),
        schedule=scheduler.ours("beta_schedule", SCHEDULES),
        timesteps=scheduler.number("num_train_timesteps"),
        prediction=scheduler.ours("prediction_type", PREDICTIONS),
        vae_channels=vae_channels,
        vae_layers=vae.number("layers_per_block"),
        latent_channels=vae.number("latent_channels"),
        channels=channels,
        attention_levels=tuple(k for k, kind in enumerate(kinds) if kind == "CrossAttnDownBlock2D"),
        res_blocks=unet.number("layers_per_block"),
        head_width=max(1, channels[-1] // unet.widths("attention_head_dim")[-1]),
        text_weights=TEXT_FILE,
        text_quick_gelu=text.get("hidden_act", "quick_gelu") == "quick_gelu",  # their default
    )
    Config(c, TrainConfig(), "").checked()
    unet.check(unet_config(c), UNET_ALWAYS)
    vae.check(vae_config(c), VAE_ALWAYS)
    text.check(text_config(c.text_quick_gelu), text_config(quick_gelu=True))
    scheduler.check(schedule_config(c), SCHEDULE_ALWAYS)
    _check_padding(Settings(folder / "tokenizer/tokenizer_config.json"))
    return c


def _check_padding(tokenizer: Settings):
    pad = tokenizer.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad not in (PAD, "!"):
        raise UserError(
            f"expected padding with id 0, {PAD} or !, as OpenCLIP's, in {tokenizer.path}, got {pad!r}"
        )


def _write_json(path: Path, values: dict, indent: int | None = 2):
    path.write_text(
        json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )


def main(argv: list[str] | None = None):
    r"""The command `python -m ddpm.export`."""
    a = parser().parse_args(argv)
    if a.reverse:
        model = import_diffusers(a.source)
        with new_folder(a.target) as folder:
            model.save(folder)  # with its text tower, which no name would bring back
    elif a.half:
        model = TextToImage.load(a.source, a.weights).half()
        with new_folder(a.target) as folder:
            model.save(folder)
            write_atomically(folder / "config.json", (Path(a.source) / "config.json").read_bytes())
    else:
        export(TextToImage.load(a.source, a.weights), a.target)
    print(printable(f"wrote {a.target}"))


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
