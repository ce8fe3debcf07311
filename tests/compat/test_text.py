r"""The text tower gives the numbers of transformers' CLIPTextModel, and its tokens those of CLIPTokenizer.

Single precision on both sides, 12 layers, normalised states of size 1: differences of about 1e-6, hence 1e-5.
"""

import json

import pytest
import torch
from conftest import far

from compat.conftest import randomised
from ddpm.export.diffusers_folder import (
    PREFIX,
    TEXT_ALWAYS,
    TEXT_RENAMES,
    read_weights,
    text_config,
    write_weights,
)
from ddpm.text import TextTower
from ddpm.tools import text_weights

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
PROMPTS = [
    "a smiling woman with blond hair and eyeglasses",
    "a bald man",
    "",
    "A MAN, with a Hat.",
    " two  spaces\tand\ttab ",
    "it's a woman's smile; they're 25 and she'll say: 'I've won'!",
    "wow! such a !bang !! ?! !?!",
    "!",
    "! !",
    "Héllo wörld, naïve café",
    "e\u0301 combines",
    "猫の写真",
    "😀 a face ~^_^~",
    "hello_world foo-bar 3.14 #tag @home",
    "a photo " * 60,
    "x" * 300,
    "1234567890",
    "line\nbreak",
]


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick-gelu"])
def pair(request, tower, tmp_path_factory):
    r"""Our tower, no bias zero and no gain one, and theirs from the files that we write."""
    ours = TextTower(quick_gelu=request.param)
    ours.load_state_dict(tower.state_dict())
    randomised(ours, "text")
    folder = tmp_path_factory.mktemp("text")
    write_weights(folder / "model.safetensors", ours.tower, TEXT_RENAMES, PREFIX)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip_text_model", **text_config(request.param)})
    )
    theirs, report = transformers.CLIPTextModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    yield ours, theirs.eval(), folder
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def tokenizer(exported):
    return transformers.CLIPTokenizer.from_pretrained(exported / "tokenizer", local_files_only=True)


@pytest.mark.equation("text-shapes")
@torch.no_grad()
def test_states_are_equal(pair):
    ours, theirs, _ = pair
    tokens = ours.tokenize(PROMPTS[:8])
    states, expected = ours.tower(tokens)[1], theirs(tokens).last_hidden_state
    assert states.shape == (8, 77, 512)
    assert far(expected, states) < TOLERANCE


def test_weights_come_back_bit_for_bit_with_and_without_the_prefix(pair, tmp_path):
    ours, _, folder = pair
    write_weights(tmp_path / "model.safetensors", ours.tower, TEXT_RENAMES)
    for part in (folder, tmp_path):
        back = TextTower(ours.quick_gelu)
        back.tower.load_state_dict(read_weights(part, back.tower, TEXT_RENAMES))
        assert text_weights.fingerprint(back) == text_weights.fingerprint(ours)


@pytest.mark.filterwarnings("ignore:a prompt of")
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: repr(p[:12]))
def test_tokens_are_equal(tower, tokenizer, prompt):
    theirs = tokenizer(
        [prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(theirs, tower.tokenize([prompt]))


def test_padding_is_id_zero_and_an_exclamation_mark_is_none(tokenizer):
    r"""With pad_token "!" they would read the mark of "a man!" as padding, id 0, where OpenCLIP has 256."""
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 77
    assert tokenizer("a man!").input_ids == [49406, 320, 786, 256, 49407]


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 mends text as OpenCLIP does")
@pytest.mark.parametrize("prompt", ["“curly”", "ﬁne", "salt &amp; pepper"])
def test_text_that_open_clip_mends_is_not_mended_there(tower, tokenizer, prompt):
    r"""Known difference: OpenCLIP runs ftfy over a prompt, transformers 5 does not. Told in `write_tokenizer`."""
    ours = tower.tokenize([prompt])[0]
    assert tokenizer(prompt).input_ids != ours[: int(ours.argmax()) + 1].tolist()


def test_what_our_tower_always_is_is_transformers_default():
    r"""transformers leaves out of its config.json what has the default."""
    defaults = transformers.CLIPTextConfig()
    assert {key: getattr(defaults, key) for key in TEXT_ALWAYS} == TEXT_ALWAYS
    assert defaults.hidden_act == "quick_gelu"
