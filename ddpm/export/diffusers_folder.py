r"""A model as a diffusers folder, and a diffusers folder as a model.

Weights need only a table of renames, because our modules already have diffusers' names. The export writes the
settings under diffusers' names. The import refuses a setting that our networks do not have, for example another
activation function.
"""

import copy
import json
import math
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.config import TEXT_FILE, Config, ModelConfig, TrainConfig
from ddpm.model import TextToImage, networks
from ddpm.schedule import Schedule
from ddpm.text import TOKENS, WIDTH, TextTower
from ddpm.tools.errors import UserError
from ddpm.tools.files import new_folder
from ddpm.tools.strict_json import read_json
from ddpm.tools.weights import Shapes, match, read_tensors, save_weights
from ddpm.unet import UNet

RENAMES = {  # UNet and VAE: our name -> diffusers'
    ".to_out.": ".to_out.0.",
    ".ff.proj.": ".ff.net.0.proj.",
    ".ff.out.": ".ff.net.2.",
}
TEXT_RENAMES = {  # text tower: OpenCLIP's name -> transformers'; one matrix for q, k and v becomes three
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks.": "encoder.layers.",
    "ln_final.": "final_layer_norm.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.in_proj_": ".self_attn.{qkv}_proj.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}

# What our networks always are, in diffusers' words. Each value is also the default there, so a folder may leave it out.
UNET_ALWAYS = (
    {"flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional"}
    | {"timestep_post_act": None, "time_embedding_act_fn": None, "resnet_time_scale_shift": "default"}
    | {"resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "downsample_padding": 1}
    | {"act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "center_input_sample": False}
    | {"mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1}
    | {"transformer_layers_per_block": 1, "use_linear_projection": False, "only_cross_attention": False}
    | {"dual_cross_attention": False, "cross_attention_norm": None, "class_embed_type": None}
    | {"addition_embed_type": None, "encoder_hid_dim_type": None, "encoder_hid_dim": None}
    | {"num_class_embeds": None, "num_attention_heads": None, "attention_type": "default"}
    | {"mid_block_only_cross_attention": None, "reverse_transformer_layers_per_block": None}
    | {"time_embedding_dim": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3}
)
VAE_ALWAYS = (
    {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_num_groups": 32}
    | {"shift_factor": None, "latents_mean": None, "latents_std": None}
    | {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
)
TEXT_ALWAYS = (
    {"vocab_size": 49408, "max_position_embeddings": TOKENS, "hidden_size": WIDTH}
    | {"intermediate_size": 4 * WIDTH, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"layer_norm_eps": 1e-5}
)
SCHEDULE_ALWAYS = {"trained_betas": None, "rescale_betas_zero_snr": False}
SAMPLER = (  # our dpm++; clip_sample and set_alpha_to_one are for those who change to DDIM or DDPM
    {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    | {"lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero"}
    | {"timestep_spacing": "trailing", "steps_offset": 1}
    | {"thresholding": False, "clip_sample": False, "set_alpha_to_one": True}
)
SETTINGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
ADVICE = "only a model of the kind that python -m ddpm.export writes comes back"
VERSION = "0.42.1"  # of diffusers, which tests/compat ran with; below 0.9.0 sample_size is overwritten
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
NO_CLASSES = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
PREFIX = "text_model."  # of the text tower's tensors; transformers 5 reads them with and without
# of ours, in the scheduler's settings; diffusers passes over names with _
FEW_STEPS, NOISE_SCALE = "_few_steps", "_noise_scale"
POSITIONS = "embeddings.position_ids"  # 0..76, which transformers kept before 4.31
# how a VAE's attention was called before diffusers 0.17
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# model.safetensors, model.fp16.bin, model.safetensors.index.fp16.json, but no single shard
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(?P<variant>\.\w+)?\.(safetensors|(?P<bin>bin))"
    r"(?P<index>\.index(?P<index_variant>\.\w+)?\.json)?"
)
SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")


def unet_config(c: ModelConfig) -> dict:
    r"""The settings of `UNet2DConditionModel`; its attention_head_dim is, by an old mistake, the number of heads."""
    attends = [level in c.attention_levels for level in range(len(c.channels))]
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
    settings = SCHEDULE_ALWAYS | {
        "num_train_timesteps": c.timesteps,
        "beta_schedule": SCHEDULES[c.schedule],
        "prediction_type": PREDICTIONS[c.prediction],
    }
    if c.schedule != "cosine":
        beta = Schedule.named(c.schedule, c.timesteps).beta
        settings |= {"beta_start": beta[0].item(), "beta_end": beta[-1].item()}
    own = {FEW_STEPS: (c.few_steps, 0), NOISE_SCALE: (c.noise_scale, 1)}
    return settings | {name: value for name, (value, usual) in own.items() if value != usual}


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

    def number(self, key: str, kind: type = int) -> int | float:
        r"""A number above 0, given once or for every level alike."""
        value = self.get(key)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            value = value[0]
        if type(value) not in (int, kind) or not 0 < value < math.inf:
            raise self.refusal(f"{key} as one {'whole ' if kind is int else ''}number above 0", self.get(key))
        return value

    def widths(self, key: str) -> tuple[int, ...]:
        r"""Whole numbers above 0, one to six."""
        value = self.get(key)
        widths = value if isinstance(value, list) else [value]
        if not 1 <= len(widths) <= 6 or not all(type(width) is int and width > 0 for width in widths):
            raise self.refusal(f"{key} as one to six whole numbers above 0", value)
        return tuple(widths)

    def word(self, key: str, words: dict[str, str], default: str | None = None) -> str:
        r"""Our word for a setting, where `words` has diffusers' word for each of ours."""
        for ours, word in words.items():
            if self.get(key, default) == word:
                return ours
        raise self.refusal(f"{key} out of {', '.join(words.values())}", self.get(key))

    def check(self, expected: dict, defaults: dict):
        r"""Raise UserError at the first setting that is not as expected; one that is left out has its default."""
        for key, wanted in expected.items():
            value = self.get(key, defaults.get(key))
            here, there = wanted, value
            if isinstance(wanted, list) and not isinstance(value, list):  # one value for all levels
                there = [value] * len(wanted)
            elif isinstance(value, list) and not isinstance(wanted, list):
                here = [wanted] * max(1, len(value))
            is_close = isinstance(wanted, float) and type(value) in (int, float)
            same = math.isclose(value, wanted, rel_tol=1e-6) if is_close else here == there
            if not same and (value or wanted):
                raise self.refusal(f"{key} {wanted!r}, as our networks have it,", value)

    def refusal(self, expected: str, value) -> UserError:
        return UserError(f"expected {expected} in {self.path}, got {value!r}; {ADVICE}")


def model_config(folder: Path) -> ModelConfig:
    r"""The configuration that a diffusers folder describes; raises UserError naming the setting that ours never has."""
    unet, vae, text, scheduler, tokenizer = (Settings(folder / file) for file in SETTINGS)
    for part, settings, always in (("unet", unet, UNET_ALWAYS), ("vae", vae, VAE_ALWAYS)):
        kind = {"_class_name": CLASSES[part][1]}
        settings.check(kind | always, kind | always)
    channels = unet.widths("block_out_channels")
    vae_channels = vae.widths("block_out_channels")
    kinds = unet.get("down_block_types")
    kinds = kinds if isinstance(kinds, list) else []
    c = ModelConfig(
        image_size=unet.number("sample_size") * 2 ** (len(vae_channels) - 1),
        schedule=scheduler.word("beta_schedule", SCHEDULES),
        timesteps=scheduler.number("num_train_timesteps"),
        prediction=scheduler.word("prediction_type", PREDICTIONS, "epsilon"),
        vae_channels=vae_channels,
        vae_layers=vae.number("layers_per_block"),
        latent_channels=vae.number("latent_channels"),
        channels=channels,
        attention_levels=tuple(k for k, kind in enumerate(kinds) if kind == "CrossAttnDownBlock2D"),
        res_blocks=unet.number("layers_per_block"),
        head_width=max(1, channels[-1] // unet.widths("attention_head_dim")[-1]),
        text_weights=TEXT_FILE,
        text_quick_gelu=text.get("hidden_act", "quick_gelu") == "quick_gelu",  # transformers' default
        few_steps=scheduler.get(FEW_STEPS, 0),
        noise_scale=scheduler.get(NOISE_SCALE, 1.0),
    )
    unet.check(unet_config(c), UNET_ALWAYS)
    vae.check(vae_config(c), VAE_ALWAYS)
    text.check(text_config(c.text_quick_gelu), text_config(quick_gelu=True))
    try:
        Config(c, TrainConfig()).checked()
    except UserError as error:
        named = "sample_size, block_out_channels, layers_per_block, num_train_timesteps"
        raise UserError(
            f"{error}, out of {named}, {FEW_STEPS} and {NOISE_SCALE} in {folder}; {ADVICE}"
        ) from None
    scheduler.check(schedule_config(c), SCHEDULE_ALWAYS | {"prediction_type": "epsilon"})
    pad = tokenizer.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad not in (PAD, "!"):
        raise tokenizer.refusal(f"padding with id 0, {PAD} or !, as OpenCLIP's,", pad)
    return c


def diffusers_names(name: str, renames: dict[str, str]) -> list[str]:
    r"""The names of our tensor `name` there: one, or three where it is split in equal parts.

    >>> diffusers_names("transformer.resblocks.0.attn.in_proj_bias", TEXT_RENAMES)[1]
    'encoder.layers.0.self_attn.k_proj.bias'
    """
    for here, there in renames.items():
        name = name.replace(here, there)
    return [name.replace("{qkv}", part) for part in "qkv"] if "{qkv}" in name else [name]


def split(state: dict[str, Tensor], renames: dict[str, str]) -> dict[str, Tensor]:
    r"""The tensors under diffusers' names, as views."""
    parts = {}
    for name, tensor in state.items():
        names = diffusers_names(name, renames)
        parts |= zip(names, tensor.chunk(len(names)), strict=True)
    return parts


def write_weights(path: Path, module: nn.Module, renames: dict[str, str], prefix: str = ""):
    r"""Write the weights of `module` under diffusers' names."""
    parts = split(module.state_dict(), renames)
    save_weights(path, {prefix + name: part.clone() for name, part in parts.items()})


def read_weights(folder: Path, module: nn.Module, renames: dict[str, str]) -> dict[str, Tensor]:
    r"""The state of `module`, which may be on `meta`, out of a folder with diffusers' names; raises UserError."""
    state = module.state_dict()
    shapes = {name: tuple(part.shape) for name, part in split(state, renames).items()}
    path = weights_file(folder)
    parts = {}
    for file, names in shards(path, shapes).items():
        parts |= read_tensors(file, {name: shapes[name] for name in names}, known_as)[0]
    return {name: torch.cat([parts[n] for n in diffusers_names(name, renames)]) for name in state}


def weights_file(folder: Path) -> Path:
    r"""The weights in a folder of diffusers, or the index of their shards.

    As diffusers looks for them: those without a variant such as fp16 go first, and safetensors before .bin.
    """
    found = []
    for path in folder.glob("*"):
        if name := WEIGHTS.fullmatch(path.name):
            variant = name["variant"] or name["index_variant"] or ""
            found.append((variant, bool(name["bin"]), bool(name["index"]), path))
    if not found:
        names = (
            "model.safetensors or diffusion_pytorch_model.safetensors, a variant of it, its index, or .bin"
        )
        raise UserError(f"expected weights in {folder} ({names}), found none; fetch them, or save them anew")
    variant, _, _, path = min(found)
    if variant:
        warnings.warn(
            f"{folder} has weights of the variant {variant[1:]} alone; {path} is read", stacklevel=2
        )
    return path


def shards(path: Path, shapes: Shapes) -> dict[Path, list[str]]:
    r"""The files of an index, or the one that is no index, each with the tensors of `shapes` in it."""
    if path.suffix != ".json":
        return {path: list(shapes)}
    file_of = Settings(path).get("weight_map")
    names = file_of.values() if isinstance(file_of, dict) else [None]
    if not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise UserError(
            f"expected a weight_map from tensors to files beside it in {path}, got something else"
        )
    stored = {place: shapes.get(known_as(place), ()) for place in file_of}
    files = {}
    for name, place in match(path, stored, shapes, known_as).items():
        files.setdefault(path.parent / file_of[place], []).append(name)
    return files


def known_as(name: str) -> str | None:
    r"""A stored name as diffusers and transformers write it today; None for what is no weight."""
    name = name.removeprefix(PREFIX)
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return None if name == POSITIONS else name


def without_variance(unet: UNet) -> UNet:
    r"""The UNet without the half of its output that is a learned variance: diffusers' pipeline would guide it too."""
    channels = unet.in_channels
    if unet.conv_out.out_channels == channels:
        return unet
    unet = copy.deepcopy(unet)
    last = unet.conv_out
    unet.conv_out = nn.Conv2d(last.in_channels, channels, 3, padding=1)
    unet.conv_out.load_state_dict({"weight": last.weight[:channels], "bias": last.bias[:channels]})
    return unet


def export(model: TextToImage, folder: str | Path):
    r"""Write `folder` for `StableDiffusionPipeline.from_pretrained(folder)`.

    It appears whole or not at all. A model of few steps gets DDIM's scheduler; the number of steps, and guidance 1, are
    for the caller to give. Raises UserError when something is there already.
    """
    c = model.config
    bos, eos = model.text.tokenizer.all_special_ids
    text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "projection_dim": WIDTH}
    text |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": 0}
    vae = {"sample_size": c.image_size, "scaling_factor": model.latent_scale}
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": VERSION}
    sampler = named("scheduler") | SAMPLER
    if c.few_steps:
        index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
        sampler |= {"_class_name": "DDIMScheduler"}
    with new_folder(folder) as to:
        write_json(to / "model_index.json", CLASSES | NO_CLASSES | index | {"requires_safety_checker": False})
        write_json(to / "unet/config.json", named("unet") | unet_config(c))
        write_json(to / "vae/config.json", named("vae") | vae_config(c) | vae)
        write_json(to / "text_encoder/config.json", text | text_config(model.text.quick_gelu))
        write_json(to / "scheduler/scheduler_config.json", sampler | schedule_config(c))
        write_tokenizer(to / "tokenizer", model.text)
        write_weights(to / UNET_WEIGHTS, without_variance(model.unet), RENAMES)
        write_weights(to / VAE_WEIGHTS, model.vae, RENAMES)
        write_weights(to / TEXT_WEIGHTS, model.text.tower, TEXT_RENAMES, PREFIX)


def import_diffusers(folder: str | Path) -> TextToImage:
    r"""The model in a diffusers folder of our shape, the text tower included.

    Raises UserError naming what is missing, or what our networks are not. Of the sampler's settings the number of few
    steps alone is read. There is no caption_drop to be read, so the model is taken for one that was trained with the
    empty prompt.
    """
    folder = Path(folder)
    c = model_config(folder)
    latent_scale = float(Settings(folder / "vae/config.json").number("scaling_factor", float))
    with torch.device("meta"):  # a file that does not fit is refused before memory is taken
        vae, unet = networks(c)
    unet_weights = read_weights(folder / "unet", unet, RENAMES)
    vae_weights = read_weights(folder / "vae", vae, RENAMES)
    text = TextTower(c.text_quick_gelu)
    text.tower.load_state_dict(read_weights(folder / "text_encoder", text.tower, TEXT_RENAMES))
    model = TextToImage(c, text)
    model.unet.load_state_dict(unet_weights)
    model.vae.load_state_dict(vae_weights)
    model.latent_scale = latent_scale
    return model.eval()


def named(part: str) -> dict:
    r"""How a settings file of diffusers begins."""
    return {"_class_name": CLASSES[part][1], "_diffusers_version": VERSION}


def write_json(path: Path, values: dict, indent: int | None = 2):
    r"""Write a JSON file, and its folder."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def write_tokenizer(folder: Path, text: TextTower):
    r"""OpenCLIP's byte-pair vocabulary as the files of transformers' `CLIPTokenizer`.

    OpenCLIP pads with id 0, which is also the letter "!". Were "!" the padding token, every "!" of a prompt would be
    read as padding. So id 0 has a second name. transformers 5 does not mend text as OpenCLIP does (ftfy): curly quotes,
    ligatures and HTML entities become other tokens there.
    """
    names = dict(zip(text.tokenizer.all_special_ids, (START, END), strict=True))
    vocabulary = {names.get(i, token): i for token, i in text.tokenizer.encoder.items()} | {PAD: 0}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    merges = [" ".join(pair) for pair in text.tokenizer.bpe_ranks]
    write_json(folder / "vocab.json", vocabulary, indent=None)
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8", newline="\n")
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)
