r"""The whole model: pictures that belong to their names, folders that open again, and one line for what cannot be."""

import dataclasses
import json
import os
import warnings

import pytest
import torch
from conftest import TINY, refusal_of
from safetensors.torch import load_file, save_file

import ddpm
from ddpm import model as model_file
from ddpm.attention import Attention
from ddpm.model import TextToImage, write_atomically
from ddpm.sampling import guided, sample_loop
from ddpm.text import TextTower
from ddpm.tools.devices import autocast
from ddpm.tools.errors import UserError
from ddpm.tools.seeding import generator
from ddpm.tools.weights import load_weights, save_weights
from ddpm.unet import UNet

PROMPTS = ["a bald man", "a smiling woman with blond hair", ""]


@pytest.fixture
def one_tower(tower, monkeypatch):
    r"""Models that are loaded share the random text tower of the session instead of drawing it again."""
    monkeypatch.setattr(TextTower, "named", classmethod(lambda cls, weights, quick_gelu=False: tower))


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save(tmp_path / "run")
    return tmp_path / "run"


def far(x, y):
    return (x - y).abs().max().item()


# ------------------------------------------------------------------------------------------- pictures


@pytest.mark.equation("sampling-path")
@pytest.mark.parametrize(
    "sampler, settings", [("dpm++", {}), ("ddim", {}), ("ddim", {"eta": 0.5}), ("ddpm", {})]
)
def test_pictures_have_the_configurations_size_and_stay_in_range(tiny, sampler, settings):
    x = tiny.sample(PROMPTS, sampler, steps=3, **settings)
    assert x.shape == (3, 3, 16, 16)
    assert x.dtype == torch.float32
    assert x.abs().max().item() <= 1
    assert bool(x.isfinite().all())
    assert not x.requires_grad


@pytest.mark.parametrize("sampler, settings", [("dpm++", {}), ("ddim", {"eta": 0.5}), ("ddpm", {})])
def test_picture_i_depends_on_seed_i_and_prompt_i_alone(tiny, sampler, settings):
    r"""Not on the prompts beside it, nor on how many are computed at once. 1e-4: float32 in batches of another size."""
    settings = {"sampler": sampler, "steps": 3, "seed": 5} | settings
    pictures = tiny.sample(PROMPTS, **settings)
    assert far(tiny.sample(PROMPTS, batch_size=1, **settings), pictures) < 1e-4
    assert far(tiny.sample(PROMPTS, batch_size=2, **settings), pictures) < 1e-4
    assert far(tiny.sample(["another", PROMPTS[1], "prompt", "more"], **settings)[1], pictures[1]) < 1e-4
    assert far(tiny.sample(PROMPTS[:1], **settings), pictures[:1]) < 1e-4
    assert far(tiny.sample(PROMPTS[1:], first=1, **settings), pictures[1:]) < 1e-4
    for other in (
        tiny.sample(PROMPTS, **settings | {"seed": 6}),
        tiny.sample(PROMPTS, first=1, **settings),
        tiny.sample([PROMPTS[1], PROMPTS[2], PROMPTS[0]], **settings),
    ):
        assert (other - pictures).abs().amax(dim=(1, 2, 3)).min().item() > 1e-2


def test_the_same_call_gives_the_same_bits_and_draws_nothing_globally(tiny):
    before = torch.get_rng_state()
    assert torch.equal(tiny.sample(PROMPTS[:1], "ddpm", steps=2), tiny.sample(PROMPTS[:1], "ddpm", steps=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.equation("sampling-path")
def test_sampling_is_the_loop_over_the_unet_with_noise_of_the_pictures_own_stream(tiny):
    r"""Said once more in its parts, for picture 7: noise, guidance, loop, latent scale, decoder."""
    stream = generator(5, 7)

    def draw():
        return torch.randn(tiny.latent_shape, generator=stream)[None]

    with torch.no_grad():
        context, negative = tiny.text(["a bald man"]), tiny.text(["eyeglasses"])
        denoise = guided(tiny.unet, context, negative, 2.0)
        *_, last = sample_loop(tiny.schedule, denoise, draw(), draw, "ddpm", 3, "eps")
        by_hand = tiny.vae.decode(last.x / 1.25).clamp(-1, 1)
    picture = tiny.sample(
        ["a bald man"], "ddpm", 3, guidance_scale=2.0, seed=5, negative="eyeglasses", first=7
    )
    assert far(picture, by_hand) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_call_of_sample_reads_the_captions_once_and_draws_the_same_pictures(
    tiny, precision, scale, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        Attention,
        "keys_values",
        lambda self, context, own=Attention.keys_values: calls.append(self) or own(self, context),
    )

    def sample():
        calls.clear()
        x = tiny.sample(["a bald man", "a woman"], steps=3, guidance_scale=scale, precision=precision)
        return x, sum(layer.to_k.in_features == 512 for layer in calls)

    x, once = sample()
    monkeypatch.setattr(UNet, "keys_values", lambda self, context: context)
    again, every_time = sample()
    assert torch.equal(x, again)
    assert every_time == 3 * once > 0


@pytest.mark.equation("sampling-path")
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_the_configurations_prediction_is_what_the_sampler_reads(remembering, prediction):
    r"""A UNet that says 0.3 everywhere means the picture 0.3 where it predicts x_0, and something else elsewhere."""
    torch.manual_seed(0)
    model = TextToImage(dataclasses.replace(TINY, prediction=prediction), remembering)
    torch.nn.init.constant_(model.unet.conv_out.bias, 0.3)
    seen = []
    model.sample(["a"], steps=2, callback=seen.append)
    same = [bool((state.x_0 - 0.3).abs().max() < 1e-6) for state in seen]
    assert same == ([True, True] if prediction == "x_0" else [False, False])


@pytest.mark.equation("sampling-path")
def test_the_prompt_and_the_negative_change_the_picture_and_guidance_zero_ignores_the_prompt(tiny):
    def sample(prompt, scale, negative=None):
        return tiny.sample([prompt], steps=2, guidance_scale=scale, negative=negative)

    assert far(sample("a bald man", 3.0), sample("a woman", 3.0)) > 1e-3
    assert far(sample("a bald man", 3.0), sample("a bald man", 3.0, "a woman")) > 1e-3
    assert torch.equal(sample("a bald man", 0), sample("a woman", 0))
    assert torch.equal(sample("a bald man", 1), sample("a bald man", 1, "a woman"))
    assert far(sample("a bald man", 0, "a woman"), sample("a woman", 1)) < 1e-4


def test_negatives_are_one_for_all_or_one_each(tiny):
    one_for_all = tiny.sample(PROMPTS, steps=2, negative="eyeglasses")
    one_each = tiny.sample(PROMPTS, steps=2, negative=["eyeglasses"] * 3)
    assert far(one_for_all, one_each) < 1e-6
    each_its_own = tiny.sample(PROMPTS, steps=2, negative=["eyeglasses", "a hat", "a beard"], batch_size=2)
    alone = tiny.sample(PROMPTS[2:], steps=2, negative="a beard", first=2)
    assert far(each_its_own[2:], alone) < 1e-4  # float32 in batches of another size
    assert far(each_its_own[2:], one_for_all[2:]) > 1e-3
    nothing, empty = tiny.sample(PROMPTS, steps=2), tiny.sample(PROMPTS, steps=2, negative="")
    assert torch.equal(nothing, empty)
    with pytest.raises(ValueError, match="one negative prompt or 3, got 2"):
        tiny.sample(PROMPTS, steps=2, negative=["", ""])


@pytest.mark.equation("sampling-path")
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_callback_sees_every_step(tiny, sampler):
    seen = []
    pictures = tiny.sample(PROMPTS[:2], sampler, steps=4, callback=seen.append)
    assert [(state.i, state.t) for state in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert all(state.x.shape == state.x_0.shape == (2, 4, 8, 8) for state in seen)
    with torch.no_grad():
        assert far(tiny.decode(seen[-1].x).clamp(-1, 1), pictures) < 1e-5


def test_eta_reaches_ddim(tiny):
    quiet, half, full = (tiny.sample(["a bald man"], "ddim", steps=3, eta=eta) for eta in (0.0, 0.5, 1.0))
    assert far(quiet, half) > 1e-3
    assert far(full, tiny.sample(["a bald man"], "ddpm", steps=3)) < 1e-3  # eta 1 is ddpm, up to float32


def test_no_prompts_give_no_pictures(tiny):
    assert tiny.sample([], steps=2).shape == (0, 3, 16, 16)


def test_bf16_gives_nearly_the_same_pictures_in_float32(tiny):
    r"""bf16 rounds by 0.4 %, through some twenty layers and three steps; the pictures reach from -1 to 1."""
    exact, low = (tiny.sample(PROMPTS[:1], steps=3, guidance_scale=1, precision=p) for p in ("fp32", "bf16"))
    assert low.dtype == torch.float32
    assert 0 < far(exact, low) < 0.25


def test_a_model_without_caption_drop_warns_that_guidance_has_nothing_to_lead_from(remembering):
    model = TextToImage(dataclasses.replace(TINY, caption_drop=0.0), remembering)
    with pytest.warns(UserWarning, match="caption_drop was 0"):
        model.sample(["a"], steps=1, guidance_scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(["a"], steps=1, guidance_scale=1.0)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"prompts": "a bald man"}, "prompts as a list of strings, got str"),
        ({"prompts": ["a", 3]}, "prompts as a list of strings, got int in it"),
        ({"negative": [None]}, "negative as a list of strings, got NoneType in it"),
        ({"sampler": "euler"}, "got 'euler'"),
        ({"steps": 0}, "1 to 1000 sampling steps, got 0"),
        ({"steps": 1001}, "1 to 1000 sampling steps, got 1001"),
        ({"eta": 2.0}, r"eta in \[0, 1\], got 2.0"),
        ({"guidance_scale": float("nan")}, "finite guidance scale, got nan"),
        ({"precision": "fp8"}, "fp32, bf16, fp16, got 'fp8'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny, settings, told):
    with pytest.raises(ValueError, match=told):
        tiny.sample(**{"prompts": ["a"], "steps": 1} | settings)


def test_fp32_is_no_autocast_and_the_others_are():
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(torch.device("cpu"), precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


# ------------------------------------------------------------------------------------------- folders


def test_a_saved_model_comes_back_and_gives_the_same_pictures_bit_for_bit(tiny, folder, tower):
    r"""Text tower included, which is drawn again here."""
    tiny.text = tower
    loaded = TextToImage.load(folder)
    assert loaded.config == tiny.config
    assert loaded.latent_scale == 1.25
    assert not loaded.training
    assert torch.equal(loaded.sample(PROMPTS[:2], steps=3, seed=4), tiny.sample(PROMPTS[:2], steps=3, seed=4))


def test_a_latent_scale_keeps_every_bit(tiny, tmp_path, one_tower):
    tiny.latent_scale = 1 / 3 + 1e-16
    tiny.save(tmp_path / "run")
    assert TextToImage.load(tmp_path / "run").latent_scale == tiny.latent_scale


def test_ema_weights_are_loaded_unless_the_last_ones_are_asked_for(tiny, folder, one_tower):
    last = {name: tensor + 1 for name, tensor in tiny.unet.state_dict().items()}
    save_weights(folder / "unet.safetensors", last)
    for weights, expected in (("ema", tiny.unet.state_dict()), ("unet", last)):
        loaded = TextToImage.load(str(folder), weights).unet.state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="weights ema or unet, got 'best'"):
        TextToImage.load(folder, "best")


def test_text_weights_in_the_folder_go_before_those_of_the_configuration(tiny, folder, tower, monkeypatch):
    marked = object.__new__(TextTower)
    torch.nn.Module.__init__(marked)
    monkeypatch.setattr(TextTower, "from_file", classmethod(lambda cls, path: marked))
    (folder / "text.safetensors").write_bytes(b"")
    assert TextToImage.load(folder).text is marked


def test_the_package_hands_out_the_model_by_name():
    assert ddpm.TextToImage is TextToImage
    with pytest.raises(AttributeError, match="no attribute 'ImageToText'"):
        _ = ddpm.ImageToText


def test_load_without_shipped_weights_says_which_command_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "SHIPPED", tmp_path / "weights")
    told = refusal_of(TextToImage.load)
    assert "python train.py" in told
    assert "--model runs/" in told


def test_load_without_a_folder_takes_the_shipped_weights(tiny, folder, monkeypatch, one_tower):
    monkeypatch.setattr(model_file, "SHIPPED", folder)
    assert TextToImage.load().latent_scale == 1.25


def gone(name):
    return lambda folder: (folder / name).unlink()


def content(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def config(change):
    def rewrite(old):
        values = json.loads(old)
        change(values)
        return json.dumps(values).encode()

    return content("config.json", rewrite)


def setting(**changes):
    return config(lambda values: values["model"].update(changes))


def tensors(name, change):
    def rewrite(folder):
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name)

    return rewrite


VAE, UNET = "vae.safetensors", "ema.safetensors"
FAULTS = {
    "config.json is missing": (gone("config.json"), ["config.json", "found none", "train.py --out"]),
    "config.json is cut short": (
        content("config.json", lambda old: old[:50]),
        ["config.json", "could not read"],
    ),
    "config.json is no text": (content("config.json", lambda old: b"\xff\xfe\x00" + old), ["could not read"]),
    "config.json is a list": (content("config.json", lambda old: b"[1, 2]"), ["sections model and training"]),
    "config.json has no model": (config(lambda values: values.pop("model")), ["sections model and training"]),
    "another format": (config(lambda values: values.update(format=2)), ["format 1, got 2"]),
    "an unknown setting": (setting(depth=3), ["depth", "another version"]),
    "a setting of the wrong type": (setting(channels="64"), ["channels", "'64'"]),
    "a width that 32 does not divide": (setting(channels=[33]), ["32 divides", "33"]),
    "an unknown schedule": (setting(schedule="sine"), ["schedule", "'sine'"]),
    "another model's weights": (setting(channels=[32, 96]), [UNET, "should have shape"]),
    "the VAE is missing": (gone(VAE), ["no vae.safetensors", "train.py --resume"]),
    "the UNet is missing": (gone(UNET), ["no ema.safetensors", "train.py --resume"]),
    "the VAE is cut short": (content(VAE, lambda old: old[:200]), [VAE, "damaged"]),
    "the UNet is cut short": (content(UNET, lambda old: old[:-10]), [UNET, "damaged"]),
    "the UNet is empty": (content(UNET, lambda old: b""), [UNET, "damaged"]),
    "the UNet is a picture": (content(UNET, lambda old: b"\x89PNG" * 99), [UNET, "damaged"]),
    "the latent scale is missing": (tensors(VAE, lambda state: None), [VAE, "latent scale", "none"]),
    "a tensor is missing": (
        tensors(UNET, lambda state: state.pop("conv_in.bias")),
        ["conv_in.bias is missing"],
    ),
    "a tensor too many": (
        tensors(UNET, lambda state: state.update(more=torch.zeros(1))),
        ["more is too much"],
    ),
    "a tensor of another shape": (
        tensors(UNET, lambda state: state.update({"conv_in.bias": torch.zeros(7)})),
        ["conv_in.bias", "(32,)", "(7,)"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_cannot_be_opened_is_refused_in_one_line(folder, fault, one_tower):
    change, words = FAULTS[fault]
    change(folder)
    told = refusal_of(lambda: TextToImage.load(folder))
    for word in words:
        assert word in told


def test_a_folder_that_is_not_there_or_is_a_file_is_refused_in_one_line(folder):
    assert "is not there" in refusal_of(lambda: TextToImage.load(folder / "none"))
    assert "is a file" in refusal_of(lambda: TextToImage.load(folder / "config.json"))


def test_a_run_without_its_last_weights_says_so(folder, one_tower):
    assert "expected unet.safetensors" in refusal_of(lambda: TextToImage.load(folder, "unet"))


# ------------------------------------------------------------------------------------------- files


def test_saved_folders_hold_three_files_and_no_leftovers(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "ema.safetensors",
        "vae.safetensors",
    ]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "state.pt"
    write_atomically(path, b"old")

    def half(to):
        to.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.pt"]
    write_atomically(path, lambda to: to.write_bytes(b"new"))
    assert path.read_bytes() == b"new"


def test_weights_come_back_bit_for_bit_whatever_their_layout(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    save_weights(tmp_path / "layer.safetensors", layer.state_dict(), {"note": "x"})
    other = torch.nn.Conv2d(3, 8, 3)
    assert load_weights(tmp_path / "layer.safetensors", other) == {"format": "pt", "note": "x"}
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)


def test_prompts_may_come_from_a_generator(tiny):
    assert len(tiny.sample((p for p in ["a man", "a woman"]), steps=1)) == 2


def test_a_batch_of_no_pictures_is_refused(tiny):
    with pytest.raises(ValueError, match="batch_size of at least 1, got -1"):
        tiny.sample(["a man"], steps=1, batch_size=-1)


@pytest.mark.parametrize("scale", ["nan", "0", "-1", "inf", "wide"])
def test_a_latent_scale_that_cannot_be_is_refused(scale, tiny, tmp_path):
    tiny.save_vae(tmp_path)
    save_weights(tmp_path / "vae.safetensors", tiny.vae.state_dict(), {"latent_scale": scale})
    with pytest.raises(UserError, match="latent scale"):
        tiny.load_vae(tmp_path)


def test_weights_with_a_flipped_bit_or_another_scale_are_damaged(tiny, tmp_path):
    tiny.save_vae(tmp_path)
    path = tmp_path / "vae.safetensors"
    data = path.read_bytes()
    last = bytearray(data)
    last[-1] ^= 1
    for damaged in (bytes(last), data.replace(b'"latent_scale":"1.25"', b'"latent_scale":"1.26"')):
        assert damaged != data
        path.write_bytes(damaged)
        assert "checksum does not fit" in refusal_of(lambda: tiny.load_vae(tmp_path))
    state = {name: tensor.contiguous() for name, tensor in tiny.vae.state_dict().items()}
    save_file(state, path, {"latent_scale": "2.0"})  # of a program that writes no checksum
    tiny.load_vae(tmp_path)
    assert tiny.latent_scale == 2.0
