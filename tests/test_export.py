r"""The diffusers folder: what is in it, that it comes back bit for bit, what is refused; without diffusers.

That diffusers and transformers open it and compute the same is in tests/compat.
"""

import dataclasses
import json
import os
import shutil
import sys
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
from ddpm.model import TextToImage, networks
from ddpm.text import TextTower
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


def test_the_settings_are_the_models_and_nothing_is_clipped(folder, model):
    unet, vae, scheduler = (settings(folder, part) for part in ("unet", "vae", "scheduler"))
    assert unet["sample_size"] == 8
    major, minor, _ = map(int, unet["_diffusers_version"].split("."))
    assert (major, minor) >= (0, 9)  # below, diffusers changes a sample_size under 64
    assert vae["scaling_factor"] == model.latent_scale == 1.25
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert (scheduler["clip_sample"], scheduler["thresholding"]) == (False, False)
    assert (scheduler["timestep_spacing"], scheduler["steps_offset"]) == ("trailing", 1)
    assert (scheduler["final_sigmas_type"], scheduler["solver_order"]) == ("zero", 2)


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


def test_no_two_tensors_get_one_name():
    with torch.device("meta"):
        vae, unet = networks(ModelConfig())
    renames, text_renames = diffusers_folder.RENAMES, diffusers_folder.TEXT_RENAMES
    text = TextTower().tower
    for module, table, count in ((unet, renames, 496), (vae, renames, 156), (text, text_renames, 196)):
        assert len(diffusers_folder.split(module.state_dict(), table)) == count


def test_the_text_towers_one_matrix_becomes_three(folder, model):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    q, k, v = (tensors[f"text_model.encoder.layers.3.self_attn.{part}_proj.weight"] for part in "qkv")
    whole = model.text.tower.transformer.resblocks[3].attn.in_proj_weight
    assert torch.equal(torch.cat([q, k, v]), whole)
    assert q.shape == (512, 512)


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
CONFIGURATIONS |= {"odd": ModelConfig(**ODD, latent_channels=5), "one level": ModelConfig(**ONE_LEVEL)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_comes_back(copy, name):
    c = CONFIGURATIONS[name]
    change(copy, "unet", **diffusers_folder.unet_config(c))
    change(copy, "vae", **diffusers_folder.vae_config(c))
    change(copy, "text", **diffusers_folder.text_config(c.text_quick_gelu))
    change(copy, "scheduler", **({"beta_start": ..., "beta_end": ...} | diffusers_folder.schedule_config(c)))
    assert dataclasses.replace(model_config(copy), text_weights=c.text_weights) == c


def test_half_precision_weights_are_read(copy, model):
    tensors = {name: tensor.half() for name, tensor in load_file(copy / UNET_WEIGHTS).items()}
    (copy / UNET_WEIGHTS).unlink()
    save_file(tensors, copy / UNET_WEIGHTS)
    for name, tensor in import_diffusers(copy).unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.unet.state_dict()[name].half().float())


def test_settings_that_diffusers_leaves_to_their_default_may_be_missing(copy):
    change(copy, "unet", **dict.fromkeys(diffusers_folder.UNET_ALWAYS, ...))
    change(copy, "vae", **dict.fromkeys(diffusers_folder.VAE_ALWAYS, ...))
    change(copy, "text", **dict.fromkeys(diffusers_folder.TEXT_ALWAYS, ...), hidden_act=...)
    change(copy, "scheduler", lambda_min_clipped=-float("inf"))  # which diffusers writes
    assert model_config(copy) == dataclasses.replace(
        TINY, text_weights="text.safetensors", text_quick_gelu=True
    )


@pytest.mark.parametrize("pad", ["!", "<|pad|>", {"content": "!", "special": True}], ids=str)
def test_padding_with_id_0_has_several_names(copy, pad):
    change(copy, "tokenizer", pad_token=pad)
    assert model_config(copy).image_size == 16


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
        ("attention_head_dim", 5, "head_width"),
        ("sample_size", ...),
        ("sample_size", [8, 16]),
        ("sample_size", 7, "image_size"),
        ("sample_size", 8.5, "image_size"),
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
        ("num_train_timesteps", 1000.5, "timesteps"),
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
    "gone": (None, "could not read the weights"),
    "damaged": (b"not a file of tensors", "could not read the weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(copy, fault):
    content, expected = FAULTS[fault]
    path = copy / UNET_WEIGHTS
    tensors = load_file(path)
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        tensors |= content
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    refusal = refusal_of(import_diffusers, copy)
    assert str(path) in refusal and expected in refusal


def test_something_that_is_there_is_not_overwritten(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        assert str(taken) in refusal_of(export, model, taken)
    assert [(path.name, path.read_text()) for path in tmp_path.rglob("*")] == [("mine.txt", "mine")]


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
    for arguments in ([run, out], ["--reverse", out, back]):
        assert exit_code(main, arguments) == 0
        assert capsys.readouterr() == (f"wrote {arguments[-1]}\n", "")
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


@pytest.mark.parametrize("way", [[], ["--reverse"], ["--half"]], ids=["there", "back", "half"])
def test_a_source_that_is_not_there_is_one_line_and_exit_code_2(way, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, [*way, "nowhere", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: expected") and err.count("\n") == 1 and "nowhere" in err
    assert not any(Path().iterdir())


def test_wrong_arguments_are_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["only-one"])
    assert stop.value.code == 2
    expected = "error: the following arguments are required: DIR; see python -m ddpm.export --help\n"
    assert capsys.readouterr().err == expected
