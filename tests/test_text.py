r"""The text tower: OpenCLIP's numbers, causality, prompts of every length, and weights from tags and files."""

import functools
import json
import logging
import math
import pickle
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import refusal_of
from huggingface_hub import constants
from open_clip import pretrained
from open_clip import transformer as open_clip_transformer
from safetensors.torch import save_file

from ddpm import text as text_file
from ddpm.text import TextTower
from ddpm.tools import text_weights

FINGERPRINT = "68ae6f99df6f14024a2dcaf75495fcf0a2f5f72deaf2dadfcb5122d317140d5c"
PROMPTS = ["a smiling woman with blond hair and eyeglasses", "a bald man"]
START, END = 49406, 49407


@pytest.fixture(scope="module")
def states(tower):
    return tower(PROMPTS)


# ------------------------------------------------------------------------------------------- states


@pytest.mark.equation("text-shapes")
def test_every_prompt_becomes_77_vectors_of_width_512(states):
    assert states.shape == (2, 77, 512)
    assert states.dtype == torch.float32
    assert not states.requires_grad
    assert bool(states.isfinite().all())


@pytest.mark.equation("text-shapes")
def test_the_states_are_those_of_open_clips_own_text_tower(tower, states):
    r"""Built by open_clip from its own description of ViT-B-32, projection and all, with the same weights."""
    settings = json.loads((Path(open_clip.__file__).parent / "model_configs" / "ViT-B-32.json").read_text())
    theirs = open_clip.model._build_text_tower(
        settings["embed_dim"], settings["text_cfg"] | {"output_tokens": True}
    )
    missing, unexpected = theirs.load_state_dict(tower.tower.state_dict(), strict=False)
    assert (missing, unexpected) == (["text_projection"], [])
    with torch.no_grad():
        pooled, tokens = theirs.eval()(open_clip.get_tokenizer("ViT-B-32")(PROMPTS))
    assert pooled.shape == (2, 512)
    assert (states - tokens).abs().max().item() < 1e-5


def by_hand(weights, tokens, quick_gelu):
    r"""CLIP's text tower up to and with its last layer norm, one sequence, written from the paper."""

    def norm(h, name):
        return F.layer_norm(h, (512,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(h, name):
        return h @ weights[f"{name}weight"].T + weights[f"{name}bias"]

    h = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    later = torch.ones(77, 77, dtype=torch.bool).triu(1)
    for i in range(12):
        block = f"transformer.resblocks.{i}"
        qkv = linear(norm(h, f"{block}.ln_1"), f"{block}.attn.in_proj_")
        q, k, v = (part.reshape(77, 8, 64).transpose(0, 1) for part in qkv.chunk(3, dim=1))
        score = (q @ k.transpose(1, 2) / math.sqrt(64)).masked_fill(later, -math.inf).softmax(dim=2)
        attended = (score @ v).transpose(0, 1).reshape(77, 512)
        h = h + linear(attended, f"{block}.attn.out_proj.")
        inner = linear(norm(h, f"{block}.ln_2"), f"{block}.mlp.c_fc.")
        gate = torch.sigmoid(1.702 * inner) if quick_gelu else 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        h = h + linear(inner * gate, f"{block}.mlp.c_proj.")
    return norm(h, "ln_final")


@pytest.mark.equation("text-shapes")
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_states_are_those_of_a_text_tower_written_by_hand(tower, quick_gelu):
    asked = tower
    if quick_gelu:
        asked = TextTower(quick_gelu=True)
        asked.tower.load_state_dict(tower.tower.state_dict())
    tokens = tower.tokenize(PROMPTS[:1])[0]
    # 1e-4: float32 through twelve layers, states about 1
    assert (
        asked(PROMPTS[:1])[0] - by_hand(tower.tower.state_dict(), tokens, quick_gelu)
    ).abs().max().item() < 1e-4


def test_the_two_activations_give_different_states(tower):
    weights, tokens = tower.tower.state_dict(), tower.tokenize(PROMPTS[:1])[0]
    assert (by_hand(weights, tokens, True) - by_hand(weights, tokens, False)).abs().max().item() > 1e-3


@pytest.mark.equation("causal-text")
def test_a_later_word_changes_no_earlier_state(tower):
    r"""start, a, smiling, woman: four tokens before the two prompts part. 1e-5: float32 in batches of another shape."""
    one, other = tower(["a smiling woman with blond hair", "a smiling woman in a hat"])
    assert (one[:4] - other[:4]).abs().max().item() < 1e-5
    assert (one[4:] - other[4:]).abs().amax(dim=1).min().item() > 1e-2


@pytest.mark.equation("causal-text")
def test_padding_changes_no_earlier_state(tower):
    r"""open_clip pads with 0; the tower runs without any mask for it, since it is causal."""
    tokens = tower.tokenize(PROMPTS[1:])
    length = int((tokens[0] == END).nonzero()) + 1
    padded_otherwise = tokens.clone()
    padded_otherwise[0, length:] = 5
    with torch.no_grad():
        one, other = (tower.tower(t)[1][0] for t in (tokens, padded_otherwise))
    assert (one[:length] - other[:length]).abs().max().item() < 1e-5
    assert (one[length:] - other[length:]).abs().max().item() > 1e-2


def test_a_prompts_states_do_not_depend_on_the_prompts_beside_it(tower, states):
    assert (tower(PROMPTS[1:])[0] - states[1]).abs().max().item() < 1e-5


def test_prompts_of_one_word_apart_are_told_apart(states, tower):
    one, other = tower(["a bald man", "a bald woman"])
    assert (one - other).abs().mean().item() > 0.01


# ------------------------------------------------------------------------------------------- tokens


def test_a_prompt_becomes_start_words_end_zeros(tower):
    tokens = tower.tokenize(["a bald man"])[0].tolist()
    assert tokens[0] == START
    assert tokens[4] == END
    assert tokens[5:] == [0] * 72
    assert tower.tokenizer.decode(tokens[1:4]).strip() == "a bald man"


def test_the_empty_prompt_is_start_and_end(tower):
    assert tower.tokenize([""])[0].tolist() == [START, END] + [0] * 75
    assert bool(tower([""]).isfinite().all())


def test_a_prompt_of_75_tokens_fits_without_a_warning(tower):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tower.tokenize(["man " * 75])[0].tolist()
    assert tokens[0] == START and tokens[-1] == END and 0 not in tokens


def test_a_prompt_too_long_warns_and_names_the_words_left_out(tower):
    prompt = "man " * 75 + "with eyeglasses"
    with pytest.warns(UserWarning, match=r"a prompt of 78 tokens is cut to 75; left out: 'with eyeglasses'"):
        tokens = tower.tokenize([prompt])[0].tolist()
    assert tokens == tower.tokenize(["man " * 75])[0].tolist()


def test_a_very_long_prompt_does_not_flood_the_screen(tower):
    with pytest.warns(UserWarning, match=r"left out: '.*\.\.\.'") as warned:
        tower.tokenize(["eyeglasses " * 5000])
    assert len(str(warned[0].message)) < 300


@pytest.mark.parametrize("prompts", ["a bald man", ["a bald man", 3], [None]])
def test_prompts_that_are_no_list_of_strings_are_refused(tower, prompts):
    with pytest.raises(ValueError, match="expected prompts as a list of strings, got"):
        tower(prompts)


# ------------------------------------------------------------------------------------------- weights


def test_the_random_weights_are_the_same_bits_on_every_machine(tower):
    assert text_weights.fingerprint(tower) == FINGERPRINT


def test_the_fingerprint_tells_weights_and_activation_apart():
    first, second, quick = (small_tower(seed, q) for seed, q in ((0, False), (1, False), (0, True)))
    assert text_weights.fingerprint(first) == text_weights.fingerprint(small_tower(0, False))
    assert (
        len(
            {
                text_weights.fingerprint(first),
                text_weights.fingerprint(second),
                text_weights.fingerprint(quick),
            }
        )
        == 3
    )


def test_random_weights_have_the_spread_that_is_said(tower):
    r"""A uniform number's sample variance is off by sqrt(0.8 / n), here below 1 % for every matrix."""
    weights = tower.tower.state_dict()
    block = "transformer.resblocks.3"
    for name, std in {
        "token_embedding.weight": 0.5,
        "positional_embedding": 0.1,
        f"{block}.attn.in_proj_weight": 512**-0.5,
        f"{block}.attn.out_proj.weight": 512**-0.5 * 24**-0.5,
        f"{block}.mlp.c_fc.weight": 1024**-0.5,
        f"{block}.mlp.c_proj.weight": 512**-0.5 * 24**-0.5,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.02), name
    assert set(weights[f"{block}.ln_1.weight"].tolist()) == {1.0}
    assert set(weights[f"{block}.mlp.c_fc.bias"].tolist()) == {0.0}


def test_the_tower_is_frozen(tower):
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower.tower.training


def test_no_image_tower_is_ever_built(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image tower was built")

    for name in ("VisionTransformer", "AttentionalPooler"):
        monkeypatch.setattr(open_clip_transformer, name, refuse)
    monkeypatch.setattr(open_clip.model, "_build_vision_tower", refuse)
    tower = TextTower()
    names = [name for name, _ in tower.named_modules()] + list(tower.state_dict())
    assert not [name for name in names if "visual" in name or "image" in name or "conv" in name]
    # tokens, positions, twelve blocks of 12 D^2 + 13 D, the last norm: no projection, nothing else
    expected = 49_408 * 512 + 77 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512
    assert sum(parameter.numel() for parameter in tower.parameters()) == expected


def test_building_a_tower_draws_no_global_random_numbers():
    before = torch.get_rng_state()
    TextTower()
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- tags


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    r"""No test reaches out: behind a proxy the hub's host is not tried, and opening a connection fails."""

    def refuse(*_, **__):
        raise ConnectionError("a test reached out")

    monkeypatch.setattr(text_file, "getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr(text_weights.socket, "create_connection", refuse)


def fail_with(error, seen=None):
    def download(settings):
        if seen is not None:
            seen.append(constants.HF_HUB_OFFLINE)
        raise error

    return download


def test_a_tag_that_cannot_be_downloaded_is_one_line_that_says_what_to_do(monkeypatch):
    error = OSError("403 from 'https://huggingface.co'\nfor these files\nand more lines")
    monkeypatch.setattr(pretrained, "download_pretrained", fail_with(error))
    told = refusal_of(lambda: text_weights.named_tower("laion2b_s34b_b79k"))
    assert "laion2b_s34b_b79k" in told
    assert "403 from 'https://huggingface.co'" in told
    assert "--text-weights random" in told
    assert "--text-weights FILE" in told


def test_a_download_that_fails_without_a_word_is_still_explained(monkeypatch):
    monkeypatch.setattr(pretrained, "download_pretrained", fail_with(TimeoutError()))
    assert "TimeoutError" in refusal_of(lambda: text_weights.named_tower("openai"))


def test_without_a_connection_the_hub_is_asked_for_its_cache_alone_and_left_as_it_was(monkeypatch):
    logger, seen = logging.getLogger("huggingface_hub"), []
    before = logger.level, constants.HF_HUB_OFFLINE
    monkeypatch.setattr(text_file, "getproxies", dict)
    monkeypatch.setattr(
        pretrained, "download_pretrained", fail_with(OSError("offline mode is enabled"), seen)
    )
    told = refusal_of(lambda: text_weights.named_tower("laion2b_s34b_b79k"))
    assert "no connection, and not in the cache" in told
    assert "--text-weights random" in told
    assert seen == [True]
    assert (logger.level, constants.HF_HUB_OFFLINE) == before


def test_weights_in_the_cache_need_no_connection(small_towers, tmp_path, monkeypatch):
    path = tmp_path / "open_clip_model.safetensors"
    save_file(both_towers(small_tower(3), "plain"), path)
    monkeypatch.setattr(text_file, "getproxies", dict)
    monkeypatch.setattr(pretrained, "download_pretrained", lambda settings: str(path))
    assert same_weights(text_weights.named_tower("laion2b_s34b_b79k"), small_tower(3))


@pytest.mark.parametrize("weights", ["laion9b", "", "no/such/file.safetensors"])
def test_an_unknown_tag_is_refused_and_some_known_ones_are_named(weights):
    told = refusal_of(lambda: text_weights.named_tower(weights))
    assert "random" in told and "file" in told and "openai" in told
    assert repr(weights) in told


# ------------------------------------------------------------------------------------------- files

# Loading is the same for a small tower, whose files are a thousand times smaller: width 64, two layers, 300 tokens.
SMALL = {"vocab_size": 300, "width": 64, "heads": 2, "layers": 2}


@pytest.fixture
def small_towers(monkeypatch):
    whole = open_clip_transformer.TextTransformer
    monkeypatch.setattr(open_clip_transformer, "TextTransformer", functools.partial(whole, **SMALL))


def small_tower(seed, quick_gelu=False):
    with pytest.MonkeyPatch.context() as patch:
        whole = open_clip_transformer.TextTransformer
        patch.setattr(open_clip_transformer, "TextTransformer", functools.partial(whole, **SMALL))
        tower = TextTower(quick_gelu)
    generator = torch.Generator().manual_seed(seed)
    for parameter in tower.tower.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tower


def same_weights(one, other):
    one, other = one.tower.state_dict(), other.tower.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def both_towers(tower, form):
    r"""A state dict as OpenCLIP publishes it: image tower, projection, temperature, and the text tower among them."""
    text = tower.tower.state_dict() | {"text_projection": torch.randn(64, 64)}
    text = {("text." if form == "custom" else "") + name: tensor for name, tensor in text.items()}
    image = {"visual.conv1.weight": torch.randn(8, 3, 4, 4), "visual.ln_post.weight": torch.ones(8)}
    image |= {"visual.transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    state = image | {"logit_scale": torch.tensor(4.6)} | text
    return {"module." + k: v for k, v in state.items()} if form == "module" else state


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("form", ["plain", "custom", "module"])
def test_the_text_tower_is_picked_out_of_a_file_with_both_towers(small_towers, tmp_path, form, suffix):
    tower, path = small_tower(3), tmp_path / f"open_clip{suffix}"
    state = both_towers(tower, form)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same_weights(text_weights.named_tower(str(path)), tower)


def test_a_training_checkpoint_with_a_state_dict_inside_is_understood(small_towers, tmp_path):
    tower, path = small_tower(3), tmp_path / "epoch_32.pt"
    torch.save({"epoch": 32, "name": "run", "state_dict": both_towers(tower, "module")}, path)
    assert same_weights(text_weights.named_tower(str(path)), tower)


def test_half_precision_files_become_float32(small_towers, tmp_path):
    tower, path = small_tower(3), tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in both_towers(tower, "plain").items()}, path)
    loaded = text_weights.tower_from_file(path).tower.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert all(
        torch.equal(loaded[name], tensor.half().float()) for name, tensor in tower.tower.state_dict().items()
    )


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_saved_tower_comes_back_with_its_activation(small_towers, tmp_path, quick_gelu):
    tower, path = small_tower(3, quick_gelu), tmp_path / "text.safetensors"
    text_weights.save_tower(tower, path)
    for told_otherwise in (False, True):  # what the file says holds
        loaded = text_weights.tower_from_file(path, told_otherwise)
        assert loaded.quick_gelu == quick_gelu
        assert same_weights(loaded, tower)
        assert text_weights.fingerprint(loaded) == text_weights.fingerprint(tower)


def activation(tower):
    return type(tower.tower.transformer.resblocks[0].mlp.gelu).__name__


@pytest.mark.parametrize(
    "tag, quick", [("laion2b_s34b_b79k", False), ("openai", True), ("laion400m_e32", True)]
)
def test_a_tag_brings_the_activation_it_was_trained_with(small_towers, tmp_path, monkeypatch, tag, quick):
    path = tmp_path / "open_clip_model.safetensors"
    save_file(both_towers(small_tower(3), "plain"), path)
    monkeypatch.setattr(pretrained, "download_pretrained", lambda settings: str(path))
    tower = text_weights.named_tower(tag)
    assert tower.quick_gelu == quick
    assert activation(tower) == ("QuickGELU" if quick else "GELU")
    assert same_weights(tower, small_tower(3))


@pytest.mark.parametrize("quick", [False, True])
def test_a_file_that_does_not_say_is_read_with_the_activation_that_was_asked_for(
    small_towers, tmp_path, quick
):
    path = tmp_path / "open_clip.bin"
    torch.save(both_towers(small_tower(3), "plain"), path)
    assert activation(text_weights.named_tower(str(path), quick)) == ("QuickGELU" if quick else "GELU")


def test_tensors_of_the_wrong_shape_are_refused_with_both_shapes(small_towers, tmp_path):
    path = tmp_path / "other.safetensors"
    state = both_towers(small_tower(3), "plain")
    state["ln_final.weight"] = torch.ones(128)
    save_file(state, path)
    told = refusal_of(lambda: text_weights.named_tower(str(path)))
    assert str(path) in told
    assert "ln_final.weight should have shape (64,), got (128,)" in told


def test_a_file_of_another_model_is_refused(small_towers, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file({"encoder.conv_in.weight": torch.zeros(3)}, path)
    told = refusal_of(lambda: text_weights.named_tower(str(path)))
    assert "ViT-B-32 text tower" in told
    assert "encoder" not in told and "is missing" in told


@pytest.mark.parametrize("name", ["garbage.safetensors", "garbage.bin", "garbage.pt", "garbage"])
def test_a_file_that_holds_no_tensors_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"this is not a file of tensors\n" * 10)
    assert f"could not read the weights in {path}" in refusal_of(lambda: text_weights.named_tower(str(path)))


def test_a_file_cut_short_is_refused(small_towers, tmp_path):
    for name, write in (("a.safetensors", save_file), ("a.bin", torch.save)):
        path = tmp_path / name
        write(both_towers(small_tower(3), "plain"), path)
        path.write_bytes(path.read_bytes()[:-1000])
        assert "could not read the weights in" in refusal_of(lambda path=path: text_weights.named_tower(str(path)))


@pytest.mark.parametrize("content", [[torch.ones(3)], {"state_dict": [1, 2]}, {"a": 1}, torch.ones(3)])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert "expected a dictionary of tensors" in refusal_of(lambda: text_weights.named_tower(str(path)))


class Dropper:
    r"""Unpickling this by the ordinary reader writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_code_in_a_pickle_is_not_executed(tmp_path, write):
    mark, path = tmp_path / "executed", tmp_path / "open_clip.bin"
    write({"token_embedding.weight": Dropper(mark)}, path)
    told = refusal_of(lambda: text_weights.named_tower(str(path)))
    assert "could not read the weights in" in told
    assert not mark.exists()
    pickle.loads(pickle.dumps(Dropper(mark)))  # the trap does work
    assert mark.exists()
