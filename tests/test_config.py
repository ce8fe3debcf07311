import argparse
import json

import pytest

from ddpm.config import PRESETS, Config, ModelConfig, TrainConfig, add_flags, fields_of, given_flags
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
    model = Config.from_preset("celeba64").model
    assert (model.image_size, model.latent_size, model.latent_channels) == (64, 32, 4)
    assert model.channels == (64, 128, 256)
    assert (model.timesteps, model.schedule, model.prediction) == (1000, "linear", "eps")


@pytest.mark.equation("small-machine")
def test_lowvram_is_the_specs_plan_for_a_small_card():
    config = Config.from_preset("lowvram")
    t = config.training
    assert config.model == ModelConfig()
    assert t.batch_size // t.accumulation in (1, 2)
    assert t.gradient_checkpointing
    assert 50 <= t.steps_per_epoch <= 100 and 2 <= t.epochs <= 3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_through_json_unchanged(preset, tmp_path):
    config = Config.from_preset(preset)
    (tmp_path / "config.json").write_text(config.to_json())
    assert Config.read(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"image_size": 50}, "image_size"),
        ({"channels": (48, 64)}, "32 divides"),
        ({"channels": ()}, "widths"),
        ({"head_width": 48}, "head_width"),
        ({"attention_levels": (7,)}, "attention_levels"),
        ({"timesteps": 1}, "timesteps"),
        ({"caption_drop": 1.0}, "caption_drop"),
        ({"lr": float("nan")}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 7, "accumulation": 2}, "accumulation"),
        ({"prediction": "score"}, "prediction"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"colour": 1}, "colour"),
        ({"batch_size": 2.5}, "batch_size"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, told):
    with pytest.raises(UserError, match=told):
        Config.from_preset("celeba64", **changes)


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="celeba64.*'imagenet'"):
        Config.from_preset("imagenet")


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "could not read"),
        ("[1, 2]", "sections"),
        ('{"model": 1, "training": {}}', "sections"),
        (b"\xff\xfe\x00garbage", "could not read"),
        ("[" * 100_000, "could not read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(content, told, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told) as error:
        Config.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda v: v.update(format=2), "format 1"),
        (lambda v: v["model"].update(colour=1), "colour"),
        (lambda v: v["model"].update(channels="64"), "channels"),
        (lambda v: v["training"].update(lr=float("inf")), "Infinity is not finite"),
        (lambda v: v["model"].update(timesteps=True), "timesteps"),
    ],
)
def test_a_configuration_changed_by_hand_is_checked(change, told, tmp_path):
    values = json.loads(Config.from_preset("tiny").to_json())
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=told):
        Config.read(tmp_path / "config.json")
