r"""The diffusers folder: what is in it, that it comes back bit for bit, what is refused; without diffusers.

That diffusers and transformers open it and compute the same is in tests/compat.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
from conftest import TINY, refusal_of, without_zeros
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm.config import PRESETS, Config, ModelConfig
from ddpm.export import diffusers_folder
from ddpm.export.__main__ import main
from ddpm.export.diffusers_folder import export, import_diffusers, model_config
from ddpm.model import TextToImage
from ddpm.tools.command import exit_code

UNET_WEIGHTS = diffusers_folder.UNET_WEIGHTS
CONFIG_FILES = dict(
    zip(("unet", "vae", "text", "scheduler", "tokenizer"), diffusers_folder.SETTINGS, strict=True)
)


@pytest.fixture(scope="module")
def model(tower) -> TextToImage:
    torch.manual_seed(0)
    model = TextToImage(TINY, tower).eval()
    without_zeros(model.vae, seed=1)
    without_zeros(model.unet, seed=2)
    model.latent_scale = 1.25
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    r"""The model's folder, written where diffusers and transformers cannot be imported."""
    folder = tmp_path_factory.mktemp("export") / "new" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        patch.setitem(sys.modules, "transformers", None)
        export(model, folder)
    yield folder
    shutil.rmtree(folder)  # a quarter of a gigabyte


@pytest.fixture
def copy(folder, tmp_path):
    r"""A copy of the folder whose settings a test may change; the weights are linked."""
    return shutil.copytree(folder, tmp_path / "copy", copy_function=os.link)


def settings(folder, part: str) -> dict:
    return json.loads((folder / CONFIG_FILES[part]).read_text(encoding="utf-8"))


def change(folder, part: str, **changes):
    r"""Set keys of a settings file; one set to `...` is left out."""
    path = folder / CONFIG_FILES[part]
    values = {key: value for key, value in (settings(folder, part) | changes).items() if value is not ...}
    path.unlink()  # the link, not the file that other tests read
    path.write_text(json.dumps(values))


def assert_same_weights(model, expected):
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(weights[name], tensor), name


# ------------------------------------------------------------------------------------------- what is written


def test_the_folder_holds_what_the_pipeline_looks_for(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = {UNET_WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    tokenizer = {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"}
    assert files == {"model_index.json", *CONFIG_FILES.values()} | weights | tokenizer
    index = json.loads((folder / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == index["image_encoder"] == [None, None]
    assert index["requires_safety_checker"] is False
    for file in weights:
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"


@pytest.mark.slow
def test_a_learned_variance_stays_behind_and_the_mean_is_exported(model, tmp_path):
    torch.manual_seed(0)
    config = dataclasses.replace(model.config, variance="learned")
    learned = TextToImage(config, model.text).eval()
    without_zeros(learned.unet)
    export(learned, tmp_path / "exported")
    assert settings(tmp_path / "exported", "unet")["out_channels"] == config.latent_channels
    back = import_diffusers(tmp_path / "exported")
    z, t, context = torch.randn(1, *model.latent_shape), torch.tensor([7]), torch.randn(1, 77, 512)
    with torch.no_grad():
        mean = learned.unet(z, t, context)[:, : config.latent_channels]
        assert torch.equal(back.unet(z, t, context), mean)
    assert learned.unet.conv_out.out_channels == 2 * config.latent_channels


@pytest.mark.equation("network-configuration")
def test_the_specs_model_is_described_in_diffusers_words():
    r"""attention_head_dim is the number of heads: 2, 4 and 8 make every head 32 wide."""
    unet = diffusers_folder.unet_config(ModelConfig())
    vae = diffusers_folder.vae_config(ModelConfig())
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    assert (unet["block_out_channels"], unet["attention_head_dim"]) == ([64, 128, 256], [2, 4, 8])
    assert (unet["sample_size"], unet["cross_attention_dim"], unet["layers_per_block"]) == (32, 512, 2)
    assert (vae["block_out_channels"], vae["layers_per_block"], vae["latent_channels"]) == ([64, 128], 2, 4)


@pytest.mark.parametrize("prediction, word", diffusers_folder.PREDICTIONS.items())
@pytest.mark.parametrize("timesteps", [1000, 50])
def test_the_schedules_ends_are_written_for_any_length(prediction, word, timesteps):
    config = ModelConfig(schedule="linear", prediction=prediction, timesteps=timesteps)
    written = diffusers_folder.schedule_config(config)
    assert written["prediction_type"] == word
    assert written["beta_start"] == pytest.approx(1e-4 * 1000 / timesteps)
    assert written["beta_end"] == pytest.approx(0.02 * 1000 / timesteps)


def test_the_vocabulary_is_open_clips_with_a_second_name_for_id_0(folder, model):
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    encoder = model.text.tokenizer.encoder
    assert vocabulary.pop("<|pad|>") == 0 == vocabulary["!"]
    assert (vocabulary.pop("<|startoftext|>"), vocabulary.pop("<|endoftext|>")) == (49406, 49407)
    assert vocabulary == {token: i for token, i in encoder.items() if i < 49406}
    merges = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0].startswith("#version") and len(merges) == 1 + 48894
    assert [tuple(line.split(" ")) for line in merges[1:]] == list(model.text.tokenizer.bpe_ranks)


# ------------------------------------------------------------------------------------------- there and back


def test_the_model_comes_back_bit_for_bit(folder, model):
    back = import_diffusers(folder)
    assert_same_weights(back, model)
    assert back.latent_scale == model.latent_scale
    assert torch.equal(back.schedule.alpha_bar, model.schedule.alpha_bar)
    assert not back.training


ODD = {"schedule": "scaled_linear", "timesteps": 250, "prediction": "x_0", "text_quick_gelu": True}
ODD |= {"channels": (32, 64, 96, 96), "res_blocks": 3, "attention_levels": (0, 3), "head_width": 16}
ONE_LEVEL = {"channels": (64,), "attention_levels": (), "vae_channels": (32,), "image_size": 16}
CONFIGURATIONS = {name: Config.from_preset(name).model for name in PRESETS}
CONFIGURATIONS["few steps"] = ModelConfig(few_steps=4)
CONFIGURATIONS["less noise"] = ModelConfig(noise_scale=0.9)
CONFIGURATIONS |= {"odd": ModelConfig(**ODD, latent_channels=5), "one level": ModelConfig(**ONE_LEVEL)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_comes_back(copy, name):
    c = CONFIGURATIONS[name]
    change(copy, "unet", **diffusers_folder.unet_config(c))
    change(copy, "vae", **diffusers_folder.vae_config(c))
    change(copy, "text", **diffusers_folder.text_config(c.text_quick_gelu))
    change(copy, "scheduler", **({"beta_start": ..., "beta_end": ...} | diffusers_folder.schedule_config(c)))
    assert dataclasses.replace(model_config(copy), text_weights=c.text_weights) == c


STEM = "diffusion_pytorch_model"
LAYOUTS = [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin", f"{STEM}.fp16.bin"]
LAYOUTS += [f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"]
LAYOUTS += [f"{STEM}.bin.index.json", "model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_read_as_diffusers_and_transformers_write_them(model, tmp_path, layout):
    r"""The VAE of a tiny model; a .bin has the names that its attention had before diffusers 0.17."""
    is_half, is_bin = "fp16" in layout, ".bin" in layout
    tensors = diffusers_folder.split(model.vae.state_dict(), diffusers_folder.RENAMES)
    if is_bin:
        olds = diffusers_folder.OLD_NAMES.items()
        tensors = {reduce(lambda n, x: n.replace(x[1], x[0]), olds, name): t for name, t in tensors.items()}
        assert any(".query." in name for name in tensors)
    file_of = dict.fromkeys(tensors, layout)
    if "index" in layout:
        file_of = {n: f"part-{i % 2}.{'bin' if is_bin else 'safetensors'}" for i, n in enumerate(tensors)}
        (tmp_path / layout).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": file_of}))
    for file in set(file_of.values()):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if file_of[name] == file}
        part = {name: tensor.half() for name, tensor in part.items()} if is_half else part
        (torch.save if is_bin else save_file)(part, tmp_path / file)
    with pytest.warns(UserWarning, match="variant fp16 alone") if is_half else contextlib.nullcontext():
        state = diffusers_folder.read_weights(tmp_path, model.vae, diffusers_folder.RENAMES)
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(state[name].float(), tensor.half().float() if is_half else tensor), name


def test_without_a_variant_goes_before_fp16_and_safetensors_before_bin(tmp_path):
    names = [*LAYOUTS[:3], f"{STEM}-00001-of-00002.safetensors", f"{STEM}.fp16-00001-of-00002.safetensors"]
    for name in [*names, "diffusion_flax_model.msgpack", "openvino_model.bin"]:
        (tmp_path / name).touch()
    for name in (LAYOUTS[0], LAYOUTS[2]):
        assert diffusers_folder.weights_file(tmp_path) == tmp_path / name
        (tmp_path / name).unlink()
    with pytest.warns(UserWarning, match="variant fp16 alone"):
        assert diffusers_folder.weights_file(tmp_path) == tmp_path / LAYOUTS[1]
    (tmp_path / LAYOUTS[1]).unlink()
    refusal = refusal_of(diffusers_folder.weights_file, tmp_path)
    assert refusal.startswith(f"expected weights in {tmp_path} (model.safetensors")


@pytest.mark.parametrize(
    "weight_map, expected",
    [
        (None, "expected a weight_map"),
        ({"a": "../secret.bin"}, "expected a weight_map"),
        ({"a": "part.bin"}, "a is too much"),
        ({}, "is missing"),
    ],
)
def test_an_index_names_its_shards_and_every_tensor(model, tmp_path, weight_map, expected):
    path = tmp_path / f"{STEM}.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    refusal = refusal_of(diffusers_folder.read_weights, tmp_path, model.vae, diffusers_folder.RENAMES)
    assert expected in refusal and str(path) in refusal


def test_settings_that_diffusers_leaves_to_their_default_may_be_missing(copy):
    change(copy, "unet", **dict.fromkeys(diffusers_folder.UNET_ALWAYS, ...))
    change(copy, "vae", **dict.fromkeys(diffusers_folder.VAE_ALWAYS, ...))
    change(copy, "text", **dict.fromkeys(diffusers_folder.TEXT_ALWAYS, ...), hidden_act=...)
    change(copy, "scheduler", lambda_min_clipped=-float("inf"))  # which diffusers writes
    assert model_config(copy) == dataclasses.replace(
        TINY, text_weights="text.safetensors", text_quick_gelu=True
    )


SAME = [("tokenizer", "pad_token", pad) for pad in ("!", "<|pad|>", {"content": "!", "special": True})]
SAME += [("unet", key, [value] * 2) for key, value in (("layers_per_block", 1), ("cross_attention_dim", 512))]
SAME += [("unet", "transformer_layers_per_block", [1, 1]), ("unet", "only_cross_attention", [False, False])]
SAME += [("unet", "sample_size", [8, 8]), ("unet", "mid_block_only_cross_attention", False)]
SAME += [("unet", "upcast_attention", True), ("unet", "optimization_step", 7000)]  # of an average
SAME += [("scheduler", "prediction_type", ...), ("vae", "shift_factor", 0.0)]


@pytest.mark.parametrize("part, key, value", SAME, ids=str)
def test_what_says_the_same_otherwise_is_read(copy, model, part, key, value):
    change(copy, part, **{key: value})
    assert dataclasses.replace(model_config(copy), text_weights="random") == model.config


# ------------------------------------------------------------------------------------------- what is refused


REFUSED = {  # setting, its value, what the refusal names where it is not the setting
    "unet": [
        ("act_fn", "gelu"),
        ("norm_eps", 1e-6),
        ("flip_sin_to_cos", False),
        ("cross_attention_dim", 768),
        ("cross_attention_dim", ...),
        ("attention_head_dim", 8),
        ("attention_head_dim", 0),
        ("attention_head_dim", "2"),
        ("attention_head_dim", 5),
        ("sample_size", ...),
        ("sample_size", [8, 16]),
        ("sample_size", 7),
        ("sample_size", 8.5),
        ("block_out_channels", [48, 96], "channels that 32 divides"),
        ("block_out_channels", []),
        ("block_out_channels", None),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("down_block_types", 3),
        ("up_block_types", ["UpBlock2D"] * 2),
        ("layers_per_block", [1, 2]),
        ("in_channels", 9),
    ],
    "vae": [
        ("down_block_types", ["DownEncoderBlock2D"]),
        ("shift_factor", 0.1),
        ("latent_channels", 16, "in_channels"),
        ("use_quant_conv", False),
        *[("scaling_factor", value) for value in (0, -1.0, float("nan"), float("inf"), "1.25", None, ...)],
    ],
    "text": [("hidden_act", "relu"), ("hidden_size", 768)],
    "scheduler": [
        ("beta_schedule", "sigmoid"),
        ("beta_start", ...),
        ("beta_end", 1),
        ("prediction_type", "flow_prediction"),
        ("num_train_timesteps", True),
        ("num_train_timesteps", 1000.5),
        ("trained_betas", [0.1]),
        ("rescale_betas_zero_snr", True),
    ],
    "tokenizer": [("pad_token", "<|endoftext|>", "padding"), ("pad_token", ..., "padding")],
}
CASES = [(part, *case) for part, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
def test_what_our_networks_are_not_is_refused_by_name(copy, case):
    part, key, value, *named = case
    change(copy, part, **{key: value})
    assert (named or [key])[0] in refusal_of(import_diffusers, copy)


SD = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
SD |= {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768}
SD |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "sample_size": 64}
SD |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
SD2 = SD | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
XL = SD2 | {"block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10]}
XL |= {"down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, "addition_embed_type": "text_time"}
SIMPLE = ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3
PUBLIC = {  # what published UNets have that ours never has, and the setting that their refusal names
    "Stable Diffusion 1": (SD, "cross_attention_dim"),
    "ours with 8 heads on all levels": (SD | {"cross_attention_dim": 512}, "attention_head_dim"),
    "inpainting": (SD | {"in_channels": 9}, "in_channels"),
    "Stable Diffusion 2": (SD2, "use_linear_projection"),
    "upscaler": (SD | {"num_class_embeds": 1000, "only_cross_attention": [True] * 3 + [False]}, "only_cross"),
    "unCLIP": (SD | {"class_embed_type": "projection"}, "class_embed_type"),
    "XL": (XL, "transformer_layers_per_block"),
    "distilled XL": (XL | {"transformer_layers_per_block": 1}, "use_linear_projection"),
    "tiny": (SD | {"mid_block_type": None}, "mid_block_type"),
    "consistency": (SD | {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
    "gated": (SD | {"attention_type": "gated"}, "attention_type"),
    "image prompts": (SD | {"encoder_hid_dim": 1280}, "encoder_hid_dim"),
    "heads by number": (SD | {"num_attention_heads": 8}, "num_attention_heads"),
    "DeepFloyd": (SD | {"act_fn": "gelu", "down_block_types": SIMPLE}, "act_fn"),
    "Kandinsky": (SD | {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "audio": (SD | {"cross_attention_dim": [128, 256, 384, 640]}, "cross_attention_dim"),
    "another program's": ({"in_channels": 4, "base_filters": 32, "epochs": 300}, "block_out_channels"),
} | {
    name: (SD | {"_class_name": name}, "_class_name")
    for name in ("UNet2DModel", "UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel")
    + ("ControlNetModel", "PriorTransformer")
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_unet_is_refused_by_the_setting_that_ours_never_has(copy, name):
    values, named = PUBLIC[name]
    path = copy / CONFIG_FILES["unet"]
    path.unlink()
    path.write_text(json.dumps(values))
    assert re.match(
        f"expected {named}.* in {re.escape(str(path))}, got .*; only a", refusal_of(model_config, copy)
    )


@pytest.mark.parametrize("part", CONFIG_FILES)
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_settings_file_is_named(copy, part, content):
    path = copy / CONFIG_FILES[part]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal_of(import_diffusers, copy)


NAME = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
FAULTS = {
    "missing": ({NAME: None}, f"{NAME} is missing"),
    "too many": ({"class_embedding.weight": torch.zeros(2)}, "class_embedding.weight is too much"),
    "other shape": ({NAME: torch.zeros(3)}, "got (3,)"),
    "integers": ({NAME: torch.zeros(64, 256, dtype=torch.int32)}, "plain floating-point numbers in"),
    "gone": (None, "found none"),
    "damaged": (b"not a file of tensors", "could not read the weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(copy, model, fault):
    content, expected = FAULTS[fault]
    path = copy / UNET_WEIGHTS
    tensors = load_file(path)
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        tensors |= content
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    refusal = refusal_of(diffusers_folder.read_weights, copy / "unet", model.unet, diffusers_folder.RENAMES)
    assert str(path.parent) in refusal and expected in refusal


def test_an_export_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_folder, "save_weights", full)
    with pytest.raises(OSError):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_goes_there_and_back(model, tmp_path, capsys):
    run, out, back = (str(tmp_path / name) for name in ("run", "out", "back"))
    model.save(run)
    of_data = "; it does not say what it was trained on, so give an evaluation --data"
    for arguments, more in (([run, out], ""), (["--reverse", out, back], of_data)):
        assert exit_code(main, arguments) == 0
        assert capsys.readouterr() == (f"wrote {arguments[-1]}{more}\n", "")
    again = TextToImage.load(back)
    assert_same_weights(again, model)
    assert again.latent_scale == model.latent_scale
    for folder in (run, out, back):
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_in_float16_is_half_as_large_loads_and_keeps_its_configuration(model, tmp_path):
    run, small = tmp_path / "run", tmp_path / "small"
    model.save(run, preset="tiny")
    assert exit_code(main, ["--half", str(run), str(small)]) == 0
    assert (small / "config.json").read_bytes() == (run / "config.json").read_bytes()
    again = TextToImage.load(small)
    for name in ("vae", "ema"):
        whole, half = ((folder / f"{name}.safetensors").stat().st_size for folder in (run, small))
        assert 0.4 < half / whole < 0.75  # the header stays
    for part, rounded in ((model.vae, again.vae), (model.unet, again.unet)):
        for name, tensor in part.state_dict().items():
            assert torch.equal(rounded.state_dict()[name], tensor.half().float()), name
    for folder in (run, small):
        shutil.rmtree(folder)


def test_weights_are_not_chosen_from_a_folder_that_has_one_unet(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--reverse", "--weights", "unet", str(tmp_path), str(tmp_path / "out")])
    assert "expected --weights without --reverse" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--reverse"], ["--half"]], ids=["there", "back", "half"])
def test_a_source_that_is_not_there_is_one_line_and_exit_code_2(way, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, [*way, "nowhere", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: expected") and err.count("\n") == 1 and "nowhere" in err
    assert not any(Path().iterdir())
