r"""The whole model: pictures that belong to their names, folders that open again, and one line for what cannot be."""

import contextlib
import dataclasses
import warnings
from functools import partial

import pytest
import torch
from conftest import TINY, far, refusal_of
from safetensors.torch import load_file, save_file

import ddpm
from ddpm import model as model_file
from ddpm.model import TextToImage
from ddpm.sampling import SAMPLERS, Start, guided, sample_loop
from ddpm.tools import text_weights
from ddpm.tools.devices import autocast, choose_precision
from ddpm.tools.seeding import generator
from ddpm.tools.weights import load_weights, save_weights

PROMPTS = ["a bald man", "a smiling woman with blond hair", ""]


@pytest.fixture
def one_tower(tower, monkeypatch):
    r"""Models that are loaded have the random text tower of the session instead of drawing it again."""
    monkeypatch.setattr(text_weights, "random_tower", lambda: tower)


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save(tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder, dtype):
    state = load_file(folder / "ema.safetensors")
    save_file(state | {"conv_in.bias": state["conv_in.bias"].to(dtype)}, folder / "ema.safetensors")
    assert f"got conv_in.bias of {dtype}" in refusal_of(TextToImage.load, folder)


def test_pictures_that_are_no_numbers_are_a_warning_and_half_weights_are_refused(tiny):
    with pytest.warns(UserWarning, match="not finite"):
        tiny.sample(["a man"], steps=2, guidance_scale=1e30)
    with pytest.raises(ValueError, match="float32, got torch.float16; call float"):
        tiny.unet.half()
        tiny.sample(["a man"])


@pytest.mark.equation("sampling-path")
@pytest.mark.parametrize(
    "sampler, settings", [("dpm++", {}), ("ddim", {}), ("ddim", {"eta": 0.5}), ("ddpm", {})]
)
def test_pictures_have_the_configurations_size_stay_in_range_and_the_callback_sees_every_step(
    tiny, sampler, settings
):
    seen = []
    x = tiny.sample(PROMPTS, sampler, steps=4, callback=seen.append, **settings)
    assert x.shape == (3, 3, 16, 16)
    assert x.dtype == torch.float32
    assert x.abs().max().item() <= 1
    assert not x.requires_grad
    assert [(state.i, state.t) for state in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert all(state.x.shape == state.x_0.shape == (3, 4, 8, 8) for state in seen)
    with torch.no_grad():
        assert far(tiny.decode(seen[-1].x).clamp(-1, 1), x) < 1e-5


@pytest.mark.parametrize("sampler, settings", [("dpm++", {}), ("ddim", {"eta": 0.5}), ("ddpm", {})])
def test_picture_i_depends_on_seed_i_and_prompt_i_alone(tiny, sampler, settings):
    r"""Not on the prompts beside it, nor on how many are computed at once. 1e-4: float32 in batches of another size."""
    sample = partial(tiny.sample, sampler=sampler, steps=3, **settings)
    pictures = sample(PROMPTS, seed=5)
    assert far(sample(PROMPTS, seed=5, batch_size=1), pictures) < 1e-4
    assert far(sample(PROMPTS, seed=5, batch_size=2), pictures) < 1e-4
    assert far(sample(["another", PROMPTS[1], "prompt", "more"], seed=5)[1], pictures[1]) < 1e-4
    assert far(sample((prompt for prompt in PROMPTS[1:]), seed=5, first=1), pictures[1:]) < 1e-4
    for other in (
        sample(PROMPTS, seed=6),
        sample(PROMPTS, seed=5, first=1),
        sample([PROMPTS[1], PROMPTS[2], PROMPTS[0]], seed=5),
    ):
        assert (other - pictures).abs().amax(dim=(1, 2, 3)).min().item() > 1e-2


@pytest.mark.equation("sampling-path")
def test_sampling_is_the_loop_over_the_unet_with_noise_of_the_pictures_own_stream(tiny):
    r"""Written once more in its parts, for picture 7: noise, guidance, loop, latent scale, decoder."""
    stream = generator(5, 7)

    def draw():
        return torch.randn(tiny.latent_shape, generator=stream)[None]

    with torch.no_grad():
        denoise = guided(tiny.unet, tiny.text(["a bald man"]), tiny.text(["eyeglasses"]), 2.0)
        *_, last = sample_loop(tiny.schedule, denoise, draw(), draw, "ddpm", 3, "eps")
        by_hand = tiny.vae.decode(last.x / 1.25).clamp(-1, 1)
    picture = tiny.sample(
        ["a bald man"], "ddpm", 3, guidance_scale=2.0, seed=5, negative="eyeglasses", first=7
    )
    assert far(picture, by_hand) < 1e-4


def test_a_model_draws_with_its_own_noise_scale_unless_it_is_told_another(tiny, monkeypatch):
    sample = partial(tiny.sample, PROMPTS, steps=3)
    plain, less = sample(noise_scale=1.0), sample(noise_scale=0.5)
    assert torch.equal(sample(), plain) and far(less, plain) > 1e-2
    monkeypatch.setattr(tiny, "config", dataclasses.replace(tiny.config, noise_scale=0.5))
    assert torch.equal(sample(), less) and torch.equal(sample(noise_scale=1.0), plain)


GIVEN = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8)) * 2 - 1
RIGHT = (torch.arange(16) > 8).expand(1, 1, 16, 16)  # from column 9 on, in the middle of a latent


@pytest.mark.equation("sampling-path", "start", "inpainting")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_given_picture_is_encoded_and_drawn_over_and_where_the_mask_keeps_it_has_its_own_pixels(
    tiny, sampler
):
    r"""Written once more in its parts, for picture 7. A latent is drawn anew with any of its pixels: from column 4."""
    stream = generator(5, 7)

    def draw():
        return torch.randn(tiny.latent_shape, generator=stream)[None]

    with torch.no_grad():
        z_0 = tiny.vae.encode(GIVEN).mode() * 1.25
        start = Start(z_0, 0.5, (torch.arange(8) >= 4).expand(1, 1, 8, 8))
        denoise = guided(tiny.unet, tiny.text(["a bald man"]), tiny.text([""]), 2.0)
        *_, last = sample_loop(tiny.schedule, denoise, draw(), draw, sampler, 4, start=start)
        by_hand = tiny.vae.decode(last.x / 1.25).clamp(-1, 1)
    seen = []
    sample = partial(tiny.sample, sampler=sampler, steps=4, guidance_scale=2.0, seed=5)
    x = sample(["a bald man"], first=7, start=Start(GIVEN, 0.5, RIGHT), callback=seen.append)
    assert [state.t for state in seen] == [499, 249]
    assert torch.equal(x[..., :9], GIVEN[..., :9])
    assert far(x[..., 9:], by_hand[..., 9:]) < 1e-4
    everywhere = torch.ones_like(RIGHT)
    assert torch.equal(sample([""], start=Start(GIVEN, 0.5, ~everywhere)), GIVEN)
    plain = sample(PROMPTS, start=Start(GIVEN, 0.5))
    assert torch.equal(sample(PROMPTS, start=Start(GIVEN, 0.5, everywhere)), plain)
    each = torch.cat([GIVEN, -GIVEN, GIVEN.flip(2)])
    alone = sample(PROMPTS[1:2], first=1, start=Start(-GIVEN, 0.5))
    assert far(sample(PROMPTS, start=Start(each, 0.5), batch_size=2)[1:2], alone) < 1e-4
    assert far(plain[1:2], alone) > 1e-2


def test_a_given_picture_is_drawn_over_in_float32_also_where_the_networks_compute_in_bf16(tiny):
    seen = []
    x = tiny.sample(["a"], steps=2, precision="bf16", start=Start(GIVEN, 1.0, RIGHT), callback=seen.append)
    assert x.dtype == seen[0].x.dtype == torch.float32
    assert torch.equal(x[..., :9], GIVEN[..., :9])


@pytest.mark.parametrize("precision, scale", [("fp32", 3.0), ("fp32", 1.0), ("bf16", 3.0)])
def test_a_call_of_sample_reads_the_captions_once_and_draws_the_same_pictures(
    tiny, precision, scale, monkeypatch
):
    reads = []
    own = torch.nn.Linear.forward

    def forward(self, x):
        reads.extend(
            [self] if self.in_features == 512 else []
        )  # of the UNet's, to_k and to_v of captions alone
        return own(self, x)

    def sample():
        reads.clear()
        x = tiny.sample(["a bald man", "a woman"], steps=3, guidance_scale=scale, precision=precision)
        return x, len(reads)

    tiny.sample(["a bald man", "a woman", ""], steps=1)  # the text tower has computed them by now
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    x, once = sample()
    monkeypatch.setattr(model_file, "context_read_once", contextlib.nullcontext)
    again, every_time = sample()
    assert torch.equal(x, again)
    assert every_time == 3 * once > 0


@pytest.mark.equation("sampling-path")
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_the_configurations_prediction_is_what_the_sampler_reads(remembering, prediction):
    r"""A UNet that predicts 0.3 everywhere means the picture 0.3 where it predicts x_0, and no other."""
    torch.manual_seed(0)
    model = TextToImage(dataclasses.replace(TINY, prediction=prediction), remembering)
    torch.nn.init.constant_(model.unet.conv_out.bias, 0.3)
    seen = []
    model.sample(["a"], steps=2, callback=seen.append)
    assert {bool((state.x_0 - 0.3).abs().max() < 1e-6) for state in seen} == {prediction == "x_0"}


@pytest.mark.equation("sampling-path")
def test_the_prompt_and_the_negative_change_the_picture_and_guidance_zero_ignores_the_prompt(tiny):
    def sample(prompt, scale, negative=None):
        return tiny.sample([prompt], steps=2, guidance_scale=scale, negative=negative)

    assert far(sample("a bald man", 3.0), sample("a woman", 3.0)) > 1e-3
    assert far(sample("a bald man", 3.0), sample("a bald man", 3.0, "a woman")) > 1e-3
    assert torch.equal(sample("a bald man", 3.0), sample("a bald man", 3.0, ""))
    assert torch.equal(sample("a bald man", 0), sample("a woman", 0))
    assert torch.equal(sample("a bald man", 1), sample("a bald man", 1, "a woman"))
    assert far(sample("a bald man", 0, "a woman"), sample("a woman", 1)) < 1e-4


def test_negatives_are_one_for_all_or_one_each(tiny):
    sample = partial(tiny.sample, PROMPTS, steps=2)
    one_for_all = sample(negative="eyeglasses")
    assert torch.equal(sample(negative=["eyeglasses"] * 3), one_for_all)
    each_its_own = sample(negative=["eyeglasses", "a hat", "a beard"], batch_size=2)
    alone = tiny.sample(PROMPTS[2:], steps=2, negative="a beard", first=2)
    assert far(each_its_own[2:], alone) < 1e-4  # float32 in batches of another size
    assert far(each_its_own[2:], one_for_all[2:]) > 1e-3
    with pytest.raises(ValueError, match="one negative prompt or 3, got 2"):
        sample(negative=["", ""])


def test_eta_and_variance_reach_the_samplers(tiny):
    sample = partial(tiny.sample, ["a bald man"], steps=3)
    assert far(sample("ddim"), sample("ddim", eta=0.5)) > 1e-3
    assert far(sample("ddpm"), sample("ddpm", variance="beta")) > 1e-3
    assert far(sample("ddim", eta=1.0), sample("ddpm")) < 1e-3  # eta 1 is ddpm, up to float32


def test_no_prompts_give_no_pictures(tiny):
    assert tiny.sample([], steps=2).shape == (0, 3, 16, 16)


def test_bf16_gives_nearly_the_same_pictures_in_float32(tiny):
    r"""bf16 rounds by 0.4 %, through some twenty layers and three steps; the pictures reach from -1 to 1."""
    exact, low = (tiny.sample(PROMPTS[:1], steps=3, guidance_scale=1, precision=p) for p in ("fp32", "bf16"))
    assert low.dtype == torch.float32
    assert 0 < far(exact, low) < 0.25


def test_a_model_of_few_steps_warns_that_it_is_guided_twice(remembering):
    model = TextToImage(dataclasses.replace(TINY, few_steps=2), remembering)
    with pytest.warns(UserWarning, match="guided twice"):
        model.sample(["a"], guidance_scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(["a"])


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
        ({"prompts": "a bald man"}, "prompts as a list of strings, got 'a bald man'"),
        ({"prompts": ["a", 3]}, r"prompts as a list of strings, got \['a', 3\]"),
        ({"negative": [None]}, r"negative as a list of strings, got \[None\]"),
        ({"sampler": "euler"}, "got 'euler'"),
        ({"steps": 1001}, "1 to 1000 sampling steps, got 1001"),
        ({"eta": 2.0}, r"eta in \[0, 1\], got 2.0"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta with ddim or dpm"),
        ({"variance": "beta"}, "variance with ddpm, got dpm"),
        ({"guidance_scale": float("nan")}, "finite guidance scale, got nan"),
        ({"precision": "fp8"}, "fp32, bf16, fp16, got 'fp8'"),
        ({"batch_size": -1}, "batch_size of at least 1, got -1"),
        ({"start": Start(GIVEN, 0.0)}, "strength from 1 / steps, 1, to 1, got 0.0"),
        ({"start": Start(GIVEN[0], 1.0)}, r"x_0 of shape \(1 or 1, 3, 16, 16\), got \(3, 16, 16\)"),
        ({"start": Start(GIVEN * 255, 1.0)}, r"x_0 in \[-1, 1\], got torch.float32 up to 25"),
        ({"start": Start(GIVEN * float("nan"), 1.0)}, r"x_0 in \[-1, 1\], got torch.float32 up to nan"),
        (
            {"start": Start(GIVEN, 1.0, RIGHT[..., :8])},
            r"mask of shape \(1 or 1, 1, 16, 16\), got \(1, 1, 16, 8\)",
        ),
        (
            {"start": Start(GIVEN, 1.0, RIGHT * 1.0)},
            "mask of booleans, True is drawn anew, got torch.float32",
        ),
        (
            {"variance": "learned", "sampler": "ddpm"},
            "variance posterior or beta, got learned: this model learned none",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny, settings, told):
    with pytest.raises(ValueError, match=told):
        tiny.sample(**{"prompts": ["a"], "steps": 1} | settings)


@pytest.mark.parametrize(
    ("cpu", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": True, "sse4a": False}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False, "sse4a": True}, "bf16"),  # AMD
        ({"avx512_bf16": True, "amx_bf16": False, "sse4a": False}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False, "sse4a": True}, "fp32"),
        ({"bf16": True}, "fp32"),  # of ARM, where neither was measured
    ],
)
def test_auto_is_bf16_on_the_cpus_that_are_faster_in_it(monkeypatch, cpu, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert choose_precision("auto", torch.device("cpu")) == precision


@pytest.mark.parametrize("around", [False, True])
def test_each_precision_is_its_own_also_within_a_callers_autocast(around):
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=around), autocast(torch.device("cpu"), precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


def test_fp32_is_single_precision_also_where_the_caller_allows_less():
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    expected = a @ a
    torch.set_float32_matmul_precision("medium")
    try:
        with autocast(torch.device("cpu"), "fp32"):
            assert torch.equal(a @ a, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_schedule_goes_where_the_networks_go(tiny):
    assert tiny.schedule.alpha_bar.device.type == "cpu"
    tiny.text = torch.nn.Identity()
    assert tiny.to("meta").schedule.alpha_bar.is_meta


# ------------------------------------------------------------------------------------------- folders


def test_a_saved_model_comes_back_and_gives_the_same_pictures_bit_for_bit(tiny, folder, tower):
    r"""Text tower included, which is drawn again here."""
    assert {path.name for path in folder.iterdir()} == {"config.json", "ema.safetensors", "vae.safetensors"}
    tiny.text = tower
    loaded = TextToImage.load(folder)
    assert loaded.config == tiny.config
    assert not loaded.training
    assert torch.equal(loaded.sample(PROMPTS[:2], steps=3, seed=4), tiny.sample(PROMPTS[:2], steps=3, seed=4))


def test_a_latent_scale_keeps_every_bit(tiny, tmp_path, one_tower):
    tiny.latent_scale = 1 / 3 + 1e-16
    tiny.save(tmp_path / "run")
    assert TextToImage.load(tmp_path / "run").latent_scale == tiny.latent_scale


def test_ema_weights_are_loaded_unless_the_last_ones_are_asked_for(tiny, folder, one_tower):
    last = {name: tensor + 1 for name, tensor in tiny.unet.state_dict().items()}
    assert "expected unet.safetensors" in refusal_of(TextToImage.load, folder, "unet")
    save_weights(folder / "unet.safetensors", last)
    for weights, expected in (("ema", tiny.unet.state_dict()), ("unet", last)):
        loaded = TextToImage.load(str(folder), weights).unet.state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="weights ema or unet, got 'best'"):
        TextToImage.load(folder, "best")


def test_text_weights_in_the_folder_go_before_those_of_the_configuration(folder, monkeypatch):
    marked = torch.nn.Identity()
    monkeypatch.setattr(text_weights, "tower_from_file", lambda path: marked)
    (folder / "text.safetensors").write_bytes(b"")
    assert TextToImage.load(folder).text is marked


def test_the_package_hands_out_the_model_by_name():
    assert ddpm.TextToImage is TextToImage
    with pytest.raises(AttributeError, match="no attribute 'ImageToText'"):
        _ = ddpm.ImageToText


def test_load_without_a_folder_takes_the_shipped_weights_or_says_which_command_comes_first(
    folder, tmp_path, monkeypatch, one_tower
):
    monkeypatch.setattr(model_file, "SHIPPED", folder)
    assert TextToImage.load().latent_scale == 1.25
    monkeypatch.setattr(model_file, "SHIPPED", tmp_path / "weights")
    told = refusal_of(TextToImage.load)
    assert "python train.py" in told and "--model runs/" in told


def gone(name):
    return lambda folder: (folder / name).unlink()


def content(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def tensors(name, change):
    def rewrite(folder):
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name)

    return rewrite


VAE, UNET = "vae.safetensors", "ema.safetensors"
CONFIG = "config.json"


@pytest.mark.parametrize(
    "change, words",
    [
        (gone(CONFIG), [CONFIG, "found none", "train.py --out"]),
        (content(CONFIG, lambda old: old[:50]), [CONFIG, "could not read"]),
        (content(CONFIG, lambda old: old.replace(b"32", b"33")), ["33"]),
        (content(CONFIG, lambda old: old.replace(b"64", b"96")), [UNET, "shape"]),  # another model's weights
        (gone(VAE), ["no vae.safetensors", "train.py --resume"]),
        (gone(UNET), ["no ema.safetensors", "train.py --resume"]),
        (content(VAE, lambda old: old[:200]), [VAE, "damaged"]),
        (content(UNET, lambda old: old[:-10]), [UNET, "damaged"]),
        (content(UNET, lambda old: b"\x89PNG" * 99), [UNET, "damaged"]),
        (tensors(VAE, lambda state: None), [VAE, "latent scale", "none"]),
        (tensors(UNET, lambda state: state.pop("conv_in.bias")), ["conv_in.bias is missing"]),
        (tensors(UNET, lambda state: state.update(more=torch.zeros(1))), ["more is too much"]),
        (
            tensors(UNET, lambda state: state.update({"conv_in.bias": torch.zeros(7)})),
            ["conv_in.bias", "(32,)", "(7,)"],
        ),
    ],
)
def test_a_run_that_cannot_be_opened_is_refused_in_one_line(folder, change, words, one_tower):
    change(folder)
    told = refusal_of(TextToImage.load, folder)
    for word in words:
        assert word in told


def test_a_folder_that_is_not_there_or_is_a_file_is_refused_in_one_line(folder):
    assert "is not there" in refusal_of(TextToImage.load, folder / "none")
    assert "is a file" in refusal_of(TextToImage.load, folder / CONFIG)


# ------------------------------------------------------------------------------------------- weights


def test_weights_come_back_bit_for_bit_whatever_their_layout(tmp_path):
    layer = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    save_weights(tmp_path / "layer.safetensors", layer.state_dict(), {"note": "x"})
    other = torch.nn.Conv2d(3, 8, 3)
    assert load_weights(tmp_path / "layer.safetensors", other)["note"] == "x"
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)


@pytest.mark.parametrize("scale", ["nan", "0", "-1", "inf", "wide"])
def test_a_latent_scale_that_cannot_be_is_refused(scale, tiny, tmp_path):
    save_weights(tmp_path / VAE, tiny.vae.state_dict(), {"latent_scale": scale})
    assert "latent scale" in refusal_of(tiny.load_vae, tmp_path)


def test_weights_with_a_flipped_bit_or_another_scale_are_damaged(tiny, tmp_path):
    tiny.save_vae(tmp_path)
    path = tmp_path / VAE
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    for damaged in (flipped, data.replace(b'"latent_scale":"1.25"', b'"latent_scale":"1.26"')):
        assert damaged != data
        path.write_bytes(damaged)
        assert "checksum does not fit" in refusal_of(tiny.load_vae, tmp_path)
    state = {name: tensor.contiguous() for name, tensor in tiny.vae.state_dict().items()}
    save_file(state, path, {"latent_scale": "2.0"})  # of a program that writes no checksum
    tiny.load_vae(tmp_path)
    assert tiny.latent_scale == 2.0
