import argparse
import json
import re

import pytest

from ddpm.config import (
    LATER,
    PRESETS,
    Config,
    ModelConfig,
    TrainConfig,
    Widths,
    add_flags,
    fields_of,
    given_flags,
    size_warning,
)
from ddpm.tools.errors import UserError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return given_flags(parser.parse_args(arguments))


def test_every_field_has_a_flag_of_the_same_name():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    for name in [*fields_of(ModelConfig), *fields_of(TrainConfig)]:
        assert "--" + name.replace("_", "-") in flags


def test_flags_come_back_as_the_types_of_their_fields():
    given = parse("--channels", "32,64", "--lr", "1e-4", "--gradient-checkpointing", "--batch-size", "3")
    assert given == {"channels": (32, 64), "lr": 1e-4, "gradient_checkpointing": True, "batch_size": 3}
    assert parse("--no-gradient-checkpointing") == {"gradient_checkpointing": False}
    assert parse() == {}


@pytest.mark.equation("network-configuration")
def test_the_spec_is_the_preset_celeba64():
    config = Config.from_preset("celeba64")
    model = config.model
    assert (model.image_size, model.latent_size, model.latent_channels) == (64, 32, 4)
    assert model.channels == (64, 128, 256)
    assert (model.timesteps, model.schedule) == (1000, "linear")
    assert config.training.weighting == "eps"  # its objective, for a network that predicts v


@pytest.mark.equation("small-machine")
def test_lowvram_is_the_specs_plan_for_a_small_card():
    config = Config.from_preset("lowvram")
    settings = config.training
    assert config.model == Config.from_preset("celeba64").model
    assert settings.batch_size // settings.accumulation in (1, 2)
    assert settings.gradient_checkpointing
    assert 50 <= settings.steps_per_epoch <= 100 and 2 <= settings.epochs <= 3


@pytest.mark.parametrize(
    ("preset", "changes", "named"),
    [
        ("celeba64", {"image_size": 128}, "latents of 64 x 64 .* 4,096 .* --preset celeba128,"),
        ("drawn64", {"image_size": 256}, "--preset drawn128,"),
        ("drawn64", {"image_size": 128}, ""),
        *((preset, {}, "") for preset in PRESETS),
    ],
)
def test_latents_larger_than_the_specs_are_warned_of_with_the_preset_to_take(preset, changes, named):
    lines = size_warning(Config.from_preset(preset, **changes))
    assert bool(lines) == bool(named)
    assert all(re.search(named, line) for line in lines)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_through_json_unchanged(preset, tmp_path):
    config = Config.from_preset(preset)
    (tmp_path / "config.json").write_text(config.to_json())
    assert Config.read(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"image_size": 50}, "image_size that 8 divides, got 50"),
        ({"channels": (48, 64)}, "channels that 32 divides"),
        ({"channels": ()}, "1 to 6 widths in channels"),
        ({"head_width": 48}, "head_width that divides"),
        ({"attention_levels": (7,)}, r"attention_levels out of 0..2, got \(7,\)"),
        ({"lr": float("nan")}, "lr of type float, finite"),
        ({"batch_size": 2.5}, "batch_size of type int"),
        ({"batch_size": 7, "accumulation": 2}, "accumulation that divides the batch of 7, got 2"),
        ({"prediction": "score"}, "prediction out of eps, v, x_0, got 'score'"),
        ({"colour": 1}, "names of settings.*got 'colour'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, expected):
    with pytest.raises(UserError, match=expected):
        Config.from_preset("celeba64", **changes)


BOUNDED = [
    (name, word, bound)
    for section in (ModelConfig, TrainConfig)
    for name, (_, f) in fields_of(section).items()
    for word, bound in f.metadata["bounds"].items()
]


@pytest.mark.parametrize("name, word, bound", BOUNDED)
def test_a_number_outside_the_range_at_its_field_is_refused(name, word, bound):
    outside = {"low": bound - 1, "high": bound + 1, "above": bound, "below": bound}[word]
    kind = fields_of(ModelConfig).get(name, fields_of(TrainConfig).get(name))[0]
    value = (outside,) if kind == Widths else outside
    with pytest.raises(
        UserError, match=f"^expected {name} (of at least|of at most|above|below) {bound}, got"
    ):
        Config.from_preset("celeba64", **{name: value})


def test_a_number_without_a_range_is_one_of_the_levels():
    numbers = [
        n for s in (ModelConfig, TrainConfig) for n, (kind, _) in fields_of(s).items() if kind is not str
    ]
    assert set(numbers) - {name for name, _, _ in BOUNDED} == {
        "attention_levels",  # held against the widths
        "text_quick_gelu",
        "gradient_checkpointing",
        "flip",
    }


def test_pictures_are_at_least_as_large_as_the_window_of_ssim_and_a_drawn_face():
    assert Config.from_preset("tiny", image_size=16).model.image_size == 16
    with pytest.raises(UserError, match="expected image_size of at least 16, got 8"):
        Config.from_preset("tiny", image_size=8)


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="celeba64.*'imagenet'"):
        Config.from_preset("imagenet")


def test_a_run_of_an_earlier_version_opens_and_its_new_settings_have_their_defaults(tmp_path):
    config = Config.from_preset("tiny", weighting="v", few_steps=4, max_pictures=9, drawn_images=77)
    values = json.loads(config.to_json())
    for name in LATER:
        assert values["model"].pop(name, None) is not None or values["training"].pop(name) is not None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Config.read(tmp_path / "config.json") == Config.from_preset("tiny", drawn_images=77)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "could not read"),
        ("[1, 2]", "sections"),
        ('{"model": 1, "training": {}}', "sections"),
        (b"\xff\xfe\x00garbage", "could not read"),
        ("[" * 100_000, "could not read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(content, expected, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=expected) as error:
        Config.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda v: v.update(format=2), "format 1"),
        (lambda v: v["model"].update(colour=1), "unknown settings in .*: colour; .* remove them"),
        (lambda v: v.update(colour=1), "format, preset, model and training in .*, got 'colour'"),
        (lambda v: v["model"].pop("schedule"), "missing settings in .*: schedule; .* add them"),
        (lambda v: v["training"].pop("seed"), "missing settings in .*: seed"),
        (lambda v: v["model"].update(channels="64"), "channels"),
        (lambda v: v["training"].update(lr=float("inf")), "Infinity is not finite"),
        (lambda v: v["model"].update(timesteps=True), "timesteps"),
    ],
)
def test_a_configuration_changed_by_hand_is_checked(change, expected, tmp_path):
    values = json.loads(Config.from_preset("tiny").to_json())
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=expected):
        Config.read(tmp_path / "config.json")
