r"""The text tower: OpenCLIP's numbers, causality, prompts of every length, and weights from tags and files."""

import functools
import json
import logging
import math
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import far, refusal_of
from huggingface_hub import constants
from open_clip import transformer as open_clip_transformer
from safetensors.torch import save_file

from ddpm import text as text_file
from ddpm.text import TextTower
from ddpm.tools import text_weights

FINGERPRINT = "e0d9a5c55e139f10ff839a6321bd7f6cd6b4905c4537e55ed09851dd4d46b358"
PROMPTS = ["a smiling woman with blond hair and eyeglasses", "a bald man"]
START, END = 49406, 49407


@pytest.fixture(scope="module")
def states(tower):
    return tower(PROMPTS)


# ------------------------------------------------------------------------------------------- states


@pytest.mark.equation("text-shapes")
def test_every_prompt_becomes_77_vectors_of_width_512_by_itself(tower, states):
    assert states.shape == (2, 77, 512)
    assert states.dtype == torch.float32
    assert not states.requires_grad
    assert bool(states.isfinite().all())
    assert far(tower(PROMPTS[1:]), states[1:]) < 1e-5


@pytest.mark.equation("text-shapes")
def test_the_states_are_those_of_open_clips_own_text_tower(tower, states):
    r"""Built by open_clip from its own description of ViT-B-32, projection and all, with the same weights."""
    settings = json.loads((Path(open_clip.__file__).parent / "model_configs" / "ViT-B-32.json").read_text())
    text_settings = settings["text_cfg"] | {"output_tokens": True}
    with torch.device("meta"):
        theirs = open_clip.model._build_text_tower(settings["embed_dim"], text_settings)
    missing, unexpected = theirs.load_state_dict(tower.tower.state_dict(), strict=False, assign=True)
    assert (missing, unexpected) == (["text_projection"], [])
    theirs.text_projection = torch.nn.Parameter(torch.zeros(512, 512))
    theirs.attn_mask = theirs.build_causal_mask()
    with torch.no_grad():
        _, tokens = theirs.eval()(open_clip.get_tokenizer("ViT-B-32")(PROMPTS))
    assert far(states, tokens) < 1e-5


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


@pytest.mark.equation("text-shapes", "causal-text")
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_states_are_those_of_a_text_tower_written_by_hand_with_either_activation(tower, quick_gelu):
    weights = tower.tower.state_dict()
    ours = tower
    if quick_gelu:
        ours = TextTower(quick_gelu=True)
        ours.tower.load_state_dict(weights, assign=True)
    tokens = tower.tokenize(PROMPTS[:1])[0]
    # 1e-4: float32 through twelve layers, states about 1
    assert far(ours(PROMPTS[:1])[0], by_hand(weights, tokens, quick_gelu)) < 1e-4
    assert far(ours(PROMPTS[:1])[0], by_hand(weights, tokens, not quick_gelu)) > 1e-3


@pytest.mark.equation("causal-text")
def test_a_later_word_changes_no_earlier_state(tower):
    r"""start, a, smiling, woman: four tokens before the two prompts part. 1e-5: float32 in batches of another shape."""
    one, other = tower(["a smiling woman with blond hair", "a smiling woman in a hat"])
    assert far(one[:4], other[:4]) < 1e-5
    assert (one[4:] - other[4:]).abs().amax(dim=1).min().item() > 1e-2


@pytest.mark.equation("causal-text")
@torch.no_grad()
def test_padding_changes_no_earlier_state(tower):
    r"""open_clip pads with 0; the tower runs without any mask for it, since it is causal."""
    tokens = tower.tokenize(PROMPTS[1:])
    length = int((tokens[0] == END).nonzero()) + 1
    padded_otherwise = tokens.clone()
    padded_otherwise[0, length:] = 5
    one, other = (tower.tower(t)[1][0] for t in (tokens, padded_otherwise))
    assert far(one[:length], other[:length]) < 1e-5
    assert far(one[length:], other[length:]) > 1e-2


def test_the_tower_is_frozen_is_drawn_from_no_global_numbers_and_has_no_image_tower(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image tower was built")

    for name in ("VisionTransformer", "AttentionalPooler"):
        monkeypatch.setattr(open_clip_transformer, name, refuse)
    monkeypatch.setattr(open_clip.model, "_build_vision_tower", refuse)
    before = torch.get_rng_state()
    tower = TextTower()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower.tower.training
    # tokens, positions, twelve blocks of 12 D^2 + 13 D, the last norm: no projection, nothing else
    expected = 49_408 * 512 + 77 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512
    assert sum(parameter.numel() for parameter in tower.parameters()) == expected


# ------------------------------------------------------------------------------------------- tokens


@pytest.mark.equation("text-shapes")
def test_a_prompt_becomes_start_words_end_zeros(tower):
    tokens = tower.tokenize(["a bald man", ""]).tolist()
    assert tokens[0] == [START, 320, 14875, 786, END] + [0] * 72
    assert tokens[1] == [START, END] + [0] * 75


def test_a_prompt_of_75_tokens_fits_and_a_longer_one_warns_and_names_the_words_left_out(tower):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tower.tokenize(["man " * 75])
    assert tokens[0, 0] == START and tokens[0, -1] == END and bool((tokens != 0).all())
    with pytest.warns(UserWarning, match=r"a prompt of 78 tokens is cut to 75; left out: 'with eyeglasses'"):
        assert torch.equal(tower.tokenize(["man " * 75 + "with eyeglasses"]), tokens)
    with pytest.warns(UserWarning, match=r"left out: '.*\.\.\.'") as warned:
        tower.tokenize(["eyeglasses " * 5000])
    assert len(str(warned[0].message)) < 300


@pytest.mark.parametrize("prompts", ["a bald man", ["a bald man", 3], [None]])
def test_prompts_that_are_no_list_of_strings_are_refused(tower, prompts):
    with pytest.raises(ValueError, match="expected prompts as a list of strings, got"):
        tower(prompts)


# ------------------------------------------------------------------------------------------- random weights


def test_the_random_weights_are_the_same_bits_on_every_machine(tower):
    assert text_weights.fingerprint(tower) == FINGERPRINT


def test_random_weights_have_the_spread_that_is_said_and_tell_prompts_apart(tower):
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
    one, other = tower(["a bald man", "a bald woman"])
    assert (one - other).abs().mean().item() > 0.01


# ------------------------------------------------------------------------------------------- files

# Loading is the same for a small tower, whose files are a thousand times smaller: width 64, two layers, 300 tokens.
SMALL = functools.partial(open_clip_transformer.TextTransformer, vocab_size=300, width=64, heads=2, layers=2)


@pytest.fixture
def small_tower(tower, monkeypatch):
    r"""Towers are small here and share a tokenizer; a function that makes one with weights of seed 3."""
    monkeypatch.setattr(text_file, "SimpleTokenizer", lambda: tower.tokenizer)
    monkeypatch.setattr(text_file, "TextTransformer", SMALL)

    def build(quick_gelu=False):
        tower = TextTower(quick_gelu)
        generator = torch.Generator().manual_seed(3)
        for parameter in tower.tower.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return tower

    return build


def same_weights(one, other):
    one, other = one.tower.state_dict(), other.tower.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def activation(tower):
    return type(tower.tower.transformer.resblocks[0].mlp.gelu).__name__


def both_towers(tower, form="plain"):
    r"""A state dict as OpenCLIP publishes it: image tower, projection, temperature, and the text tower among them."""
    text = tower.tower.state_dict() | {"text_projection": torch.randn(64, 64)}
    text = {("text." if form == "custom" else "") + name: tensor for name, tensor in text.items()}
    image = {"visual.conv1.weight": torch.randn(8, 3, 4, 4), "visual.ln_post.weight": torch.ones(8)}
    image |= {"visual.transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    state = image | {"logit_scale": torch.tensor(4.6)} | text
    return {"module." + k: v for k, v in state.items()} if form == "module" else state


@pytest.mark.parametrize("name", ["open_clip.safetensors", "open_clip.bin", "epoch_32.pt"])
@pytest.mark.parametrize("form, quick", [("plain", False), ("custom", True), ("module", False)])
def test_the_text_tower_is_picked_out_of_a_file_with_both_towers(small_tower, tmp_path, form, name, quick):
    r"""With the activation that was asked for, since such a file says none."""
    path = tmp_path / name
    state = both_towers(small_tower(), form)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:  # of a training, with the state dict inside
        torch.save({"epoch": 32, "name": "run", "state_dict": state} if path.suffix == ".pt" else state, path)
    tower = text_weights.named_tower(str(path), quick)
    assert same_weights(tower, small_tower())
    assert activation(tower) == ("QuickGELU" if quick else "GELU")


def test_half_precision_files_become_float32(small_tower, tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in both_towers(small_tower()).items()}, path)
    loaded = text_weights.tower_from_file(path).tower.state_dict()
    for name, tensor in small_tower().tower.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.half().float())


def test_a_saved_tower_comes_back_with_its_activation_and_the_fingerprint_sees_both(small_tower, tmp_path):
    path = tmp_path / "text.safetensors"
    fingerprints = set()
    for quick_gelu in (False, True):
        tower = small_tower(quick_gelu)
        text_weights.save_tower(tower, path)
        for asked in (False, True):  # the file goes before
            loaded = text_weights.tower_from_file(path, asked)
            assert loaded.quick_gelu == quick_gelu
            assert same_weights(loaded, tower)
            assert text_weights.fingerprint(loaded) == text_weights.fingerprint(tower)
        fingerprints.add(text_weights.fingerprint(tower))
    tower.tower.ln_final.weight += 1
    assert len(fingerprints | {text_weights.fingerprint(tower)}) == 3


def wrong_shape(state):
    return state | {"ln_final.weight": torch.ones(128)}


@pytest.mark.parametrize(
    "change, told",
    [
        (wrong_shape, "ln_final.weight should have shape (64,), got (128,)"),
        (lambda state: {"encoder.conv_in.weight": torch.zeros(3)}, "is missing"),
    ],
)
def test_a_file_of_another_model_is_refused_with_both_shapes(small_tower, tmp_path, change, told):
    path = tmp_path / "other.safetensors"
    save_file(change(both_towers(small_tower())), path)
    refusal = refusal_of(text_weights.named_tower, str(path))
    assert f"expected the weights of OpenCLIP's ViT-B-32 text tower in {path}; " in refusal
    assert told in refusal


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a"])
def test_a_file_that_holds_no_tensors_or_is_cut_short_is_refused(small_tower, tmp_path, name):
    path = tmp_path / name
    write = save_file if path.suffix == ".safetensors" else torch.save
    write(both_towers(small_tower()), path)
    for content in (path.read_bytes()[:-1000], b"this is not a file of tensors\n" * 10):
        path.write_bytes(content)
        assert f"could not read the weights in {path}: " in refusal_of(text_weights.named_tower, str(path))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive_is_named_with_the_way_to_convert_it(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    refusal = refusal_of(text_weights.tower_from_file, tmp_path / "ViT-B-32.pt")
    assert "TorchScript archive" in refusal and "state_dict()" in refusal and "--text-quick-gelu" in refusal


@pytest.mark.parametrize("kind", ["int", "bool", "cfloat", "to_sparse", "meta"])
def test_weights_that_are_no_plain_numbers_are_refused_by_name(small_tower, tmp_path, kind):
    state = small_tower().tower.state_dict()
    weight = state["ln_final.weight"]
    state["ln_final.weight"] = weight.to("meta") if kind == "meta" else getattr(weight, kind)()
    torch.save(state, tmp_path / "w.pt")
    refusal = refusal_of(text_weights.named_tower, str(tmp_path / "w.pt"))
    assert "expected weights as plain floating-point numbers in" in refusal and "ln_final.weight" in refusal


@pytest.mark.parametrize("content", [[torch.ones(3)], {"state_dict": [1, 2]}, {"a": 1}, torch.ones(3)])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert "expected a dictionary of tensors" in refusal_of(text_weights.named_tower, str(path))


# ------------------------------------------------------------------------------------------- tags


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    r"""No test reaches out: behind a proxy the hub's host is not tried, and opening a connection fails."""

    def refuse(*_, **__):
        raise ConnectionError("a test reached out")

    monkeypatch.setattr(text_weights, "getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr(text_weights.socket, "create_connection", refuse)


@pytest.mark.parametrize(
    "tag, quick", [("laion2b_s34b_b79k", False), ("openai", True), ("laion400m_e32", True)]
)
@pytest.mark.parametrize("proxies", [{}, {"https": "http://proxy"}])
def test_a_tag_in_the_cache_needs_no_connection_and_brings_its_activation(
    small_tower, tmp_path, monkeypatch, tag, quick, proxies
):
    path = tmp_path / "open_clip_model.safetensors"
    save_file(both_towers(small_tower()), path)
    monkeypatch.setattr(text_weights, "getproxies", lambda: proxies)
    monkeypatch.setattr(text_weights, "download_pretrained", lambda settings: str(path))
    tower = text_weights.named_tower(tag)
    assert tower.quick_gelu == quick
    assert activation(tower) == ("QuickGELU" if quick else "GELU")
    assert same_weights(tower, small_tower())


@pytest.mark.parametrize(
    "error, proxies, reason",
    [
        (
            OSError("403 from 'https://x'\nand more lines"),
            {"https": "http://proxy"},
            "403 from 'https://x' and",
        ),
        (TimeoutError(), {"https": "http://proxy"}, "TimeoutError"),
        (OSError("offline mode is enabled"), {}, "no connection, and not in the cache"),
    ],
)
def test_a_tag_that_cannot_be_downloaded_is_one_line_and_the_hub_is_left_as_it_was(
    error, proxies, reason, monkeypatch
):
    r"""Without a connection the hub reads its cache alone."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level, constants.HF_HUB_OFFLINE
    offline = []

    def download(settings):
        offline.append(constants.HF_HUB_OFFLINE)
        raise error

    monkeypatch.setattr(text_weights, "getproxies", lambda: proxies)
    monkeypatch.setattr(text_weights, "download_pretrained", download)
    told = refusal_of(text_weights.named_tower, "laion2b_s34b_b79k")
    for word in ("laion2b_s34b_b79k", reason, "--text-weights random", "--text-weights FILE"):
        assert word in told
    assert offline == [not proxies]
    assert (logger.level, constants.HF_HUB_OFFLINE) == before


@pytest.mark.parametrize("weights", ["laion9b", "", "no/such/file.safetensors"])
def test_an_unknown_tag_is_refused_and_some_known_ones_are_named(weights):
    told = refusal_of(text_weights.named_tower, weights)
    for word in ("`random`", "a file", "openai", repr(weights)):
        assert word in told
