import json
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, without_zeros
from PIL import Image
from torch import nn

from ddpm.celeba.captions import parse
from ddpm.celeba.dataset import drawn_pictures
from ddpm.celeba.lists import TEST, TRAIN
from ddpm.config import Config, TrainConfig, fill_in_drawing
from ddpm.evaluation import adherence, classifier, command, likeness, metrics, networks, plots, report, shared
from ddpm.evaluation.__main__ import main, parser
from ddpm.evaluation.choices import PARTS, SCOPES
from ddpm.evaluation.classifier import attribute_classifier, gaussian_blur, truths
from ddpm.evaluation.prompts import FREE, SPECIFICATION, prompts_of
from ddpm.model import SHIPPED, TextToImage
from ddpm.tools import text_weights
from ddpm.tools.command import exit_code
from ddpm.tools.seeding import generator
from ddpm.training.validation import psnr

COUNT = 400  # drawn faces, of which 20 are test
COMMON = ["--device", "cpu", "--precision", "fp32", "--steps", 2]
SHORT = {  # of the curves of each scope
    "normal": SCOPES["normal"]._replace(curve_prompts=12, guidances=(1.0, 3.0), steps=(2, 4, 50)),
    "full": SCOPES["full"]._replace(guidances=(1.0, 3.0), steps=(2,)),
}


class CheapTower(nn.Module):
    r"""Random states of the text tower's shape for each prompt."""

    quick_gelu = False

    def tokenize(self, prompts):
        pass

    def forward(self, prompts):
        return torch.stack([torch.randn(77, 512, generator=generator(prompt)) for prompt in prompts])


@pytest.fixture(autouse=True, scope="module")
def cheap():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_weights, "random_tower", lambda: CheapTower())
        patch.setattr(classifier, "STEPS", 3)
        patch.setattr(shared, "MIN_READ", 0)  # a classifier of three steps reads little
        for name, scope in SHORT.items():
            patch.setitem(SCOPES, name, scope)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    r"""The folder of an untrained model whose pictures depend on their prompts."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    model = TextToImage(replace(TINY, timesteps=30), CheapTower())
    without_zeros(model.unet)
    without_zeros(model.vae)
    model.save(folder)
    config = Config(model.config, TrainConfig(drawn_images=COUNT))
    (folder / "config.json").write_text(config.to_json())
    return folder


@pytest.fixture(scope="module")
def pictures(run):
    return drawn_pictures(run.parent / "cache", COUNT, seed=0, size=16)


def evaluate(*arguments) -> int:
    return exit_code(main, [str(a) for a in [*COMMON, *arguments]])


def result_in(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def content(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def result(run):
    assert evaluate(run) == 0
    return result_in(run / "evaluation")


def refused(capsys, *arguments) -> str:
    try:
        code = evaluate(*arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("error: ") and "\n" not in error, error
    return error


def test_the_result_names_what_it_measured_and_every_part(run, result):
    settings = result["settings"]
    expected = {"split": "test", "n": 20, "extractor": "classifier", "sampler": "dpm++", "steps": 2}
    expected |= {"guidance": 3.0, "eta": 0.0, "noise_scale": 1.0, "weights": "ema"}
    expected |= {"seed": 0, "scope": "normal", "run": str(run)}
    assert expected.items() <= settings.items()
    others = {"crop", "ddpm", "torch", "precision", "device", "machine", "preset", "data", "image_size"}
    assert set(settings) == {*expected, *others, "text_weights", "digests"}
    assert set(settings["digests"]) == {"vae", "unet", "data", "text"}
    assert set(result) == {"format", "settings", *PARTS, "left_out", "seconds"} and result["left_out"] == {}
    assert result["adherence"]["held_out"]["generated"]["counted"] > 5
    assert set(result["seconds"]) == {"prepare", *PARTS}
    assert set(content(run / "evaluation")) == {"result.json", *report.PICTURES}
    with Image.open(run / "evaluation" / "pictures.png") as grid:
        assert len(json.loads(grid.text["prompt"])) == 5  # of 20 prompts four at a time are one
        assert (grid.text["sampler"], grid.text["seed"]) == ("dpm++", "0")


def test_the_figures_are_those_of_the_library_called_by_hand(run, result, pictures):
    rows = command.choose_rows(pictures, parser().parse_args([str(run)]))
    assert set(rows) == set(pictures.rows(TEST))
    train = pictures.rows(TRAIN)
    order = torch.randperm(len(train), generator=generator(0, "evaluation", "others"))
    others = pictures.batch(np.sort(train[order[:20].numpy()]))
    x = pictures.batch(rows)
    model = TextToImage.load(run)
    generated = model.sample([pictures.full_caption(i) for i in rows], "dpm++", 2, 3.0, seed=0)
    network = attribute_classifier(run.parent / "cache", pictures, torch.device("cpu"))
    with torch.no_grad():
        x_hat, others_hat = (model.vae.decode(model.vae.encode(x).mode()).clamp(-1, 1) for x in (x, others))
        features = network.features(generated)
        real = network.features(x)
        drawn = {"generated": generated, "real": x, "reconstructed": x_hat}
        seen = {source: network(x) > 0 for source, x in drawn.items()}
        baselines = {
            "train pictures": network.features(others),
            "train pictures through the VAE": network.features(others_hat),
            "train pictures, blurred by 2 pixels of 64": network.features(gaussian_blur(others, 0.5, 6)),
            "their mean": network.features(others.mean(0, keepdim=True)).expand(20, -1),
        }

    def distance(real, others):
        of_real = metrics.gaussian_of(real)
        return pytest.approx(metrics.frechet_distance(*of_real, *metrics.gaussian_of(others)), rel=1e-3)

    row = result["frechet"]["generated"]
    assert row["distance"] == distance(real, features)
    between = (real.double().mean(dim=0) - features.double().mean(dim=0)).square().sum().item()
    assert row["means"] == pytest.approx(between, rel=1e-3)
    assert (row["precision"], row["recall"]) == metrics.precision_recall(real, features)
    for name, of_baseline in baselines.items():
        assert result["frechet"][name]["distance"] == distance(real, of_baseline), name
    assert {row["n"] for row in result["frechet"].values()} == {20}
    point = next(point for point in result["guidance"] if point["guidance"] == 3)
    assert point["frechet"] == distance(real[:12], features[:12])  # the first pictures of the same setting
    assert result["vae"]["psnr"] == pytest.approx(psnr(x, x_hat).mean().item(), rel=1e-4)
    wanted = truths(pictures, rows)[:, network.columns]
    for source, answers in seen.items():
        figures = result["adherence"]["held_out"][source]["attributes"]
        accuracies = metrics.balanced_accuracy(wanted, answers).tolist()
        for name, value in zip(network.names, accuracies, strict=True):
            assert figures[name]["balanced_accuracy"] == report.rounded(value), (source, name)


def test_the_other_wordings_are_of_the_first_held_out_rows_and_state_all_of_them(run, result, pictures):
    rows = command.choose_rows(pictures, parser().parse_args([str(run)]))[:12]
    prompts = prompts_of(pictures.attributes[rows], seed=0)
    network = attribute_classifier(run.parent / "cache", pictures, torch.device("cpu"))
    wanted = truths(pictures, rows)[:, network.columns]
    for kind in ("trained", "kept"):
        for row, prompt in zip(rows, prompts[kind], strict=True):
            assert parse(pictures.full_caption(row)).items() <= parse(prompt).items()
        with torch.no_grad():
            seen = network(TextToImage.load(run).sample(prompts[kind], "dpm++", 2, 3.0, seed=0)) > 0
        figures = result["wordings"][kind]["attributes"]
        accuracies = metrics.balanced_accuracy(wanted, seen).tolist()
        assert [figures[name]["balanced_accuracy"] for name in network.names] == report.rounded(accuracies)
    free = result["wordings"]["free"]["prompts"]
    assert {prompt: row["n"] for prompt, row in free.items()} == {SPECIFICATION: 16} | dict.fromkeys(FREE, 4)


def test_a_prompt_is_followed_where_all_that_it_states_is_seen():
    seen = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 1]]) > 0
    found = adherence.followed(seen, ["Male", "Smiling"], ["smiling man"] * 3 + ["hat"])
    stated = {"Smiling": True, "Male": True}
    expected = {"n": 3, "stated": stated, "right": pytest.approx(1 / 3)}
    assert found["prompts"] == {"smiling man": expected, "hat": {"n": 1, "stated": {}, "right": None}}
    assert found["mean"] == pytest.approx(1 / 3)


def test_a_row_is_as_far_as_the_nearest_training_row(pictures):
    train_rows, test = pictures.rows(TRAIN), pictures.rows(TEST)
    attributes = pictures.attributes.copy()
    attributes[test[3]] = attributes[train_rows[7]]
    copied = replace(pictures, attributes=attributes)
    known = truths(copied, train_rows)
    expected = [(row != known).sum(1).min().item() for row in truths(copied, test)]
    found = adherence.attribute_distance(copied, copied.subset(test))
    assert found.tolist() == expected and found[3] == 0 and found.max() > 1


def test_mirrored_copies_do_not_count_where_training_mirrors_none(run, pictures, tmp_path, monkeypatch):
    r"""Most of the pictures here are mirrored, so their median is near 0 only if those are found."""
    copies = pictures.batch(pictures.rows(TRAIN)[:20], torch.arange(20) % 3 > 0)
    monkeypatch.setattr(TextToImage, "sample", lambda self, prompts, *_, **__: copies[: len(prompts)])
    unmirrored = Config.read(run / "config.json").changed(flip=False)
    monkeypatch.setattr(Config, "read", lambda path: unmirrored)
    assert evaluate(run, "--only", "neighbours", "--out", tmp_path) == 0
    found = result_in(tmp_path)["neighbours"]
    assert all(space["ratio_to_held_out"] > 1e-3 for space in found.values())


def test_copies_of_training_pictures_are_found_mirrored_ones_too(run, pictures, tmp_path, monkeypatch):
    copies = pictures.batch(pictures.rows(TRAIN)[:20], torch.arange(20) % 2 == 0)
    monkeypatch.setattr(TextToImage, "sample", lambda self, prompts, *_, **__: copies[: len(prompts)])
    assert evaluate(run, "--only", "neighbours", "--out", tmp_path) == 0
    found = result_in(tmp_path)["neighbours"]
    assert set(found) == {"pixels", "features"}
    for space in found.values():
        assert space["ratio_to_held_out"] < 1e-3 and space["nearer_than_1_percent_of_held_out"] == 1
        assert space["held_out_median"] > 0 and space["n_train"] == len(pictures.rows(TRAIN))


def test_the_curves_have_their_settings_and_as_many_prompts_as_the_scope_allows(result):
    assert [(p["guidance"], p["n"]) for p in result["guidance"]] == [(1, 12), (3, 12)]
    points = {(p["sampler"], p["eta"], p["steps"], p["n"]) for p in result["steps"]}
    kinds = (("ddpm", 0), ("ddim", 0), ("dpm++", 0), ("dpm++", 1))
    assert points == {(*kind, steps, 12) for kind in kinds for steps in (2, 4)}  # the chain has 30


def test_full_curves_have_all_prompts_and_the_whole_chain_and_some_parts_can_be_chosen(run, tmp_path, capsys):
    arguments = ["--full", "--n", 18, "--split", "valid", "--only", "vae,bits,steps", "--out", tmp_path]
    assert evaluate(run, *arguments) == 0
    result = result_in(tmp_path)
    assert set(result) == {"format", "settings", "vae", "bits", "steps", "left_out", "seconds"}
    assert result["vae"]["n"] == 18 and {p["n"] for p in result["steps"]} == {18}
    assert {"sampler": "ddpm", "steps": 30}.items() <= result["steps"][-1].items()
    assert set(content(tmp_path)) == {"result.json", "steps.png"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("18 valid pictures of drawn")
    assert lines[1].startswith("drawing will take about ")
    assert any(line.startswith("VAE, n 18: ") for line in lines)
    own = result["bits"]["latent"][result["bits"]["variance"]]
    assert any(f"bits/dim, n 18: latents {own['total']:.2f} +- " in line for line in lines)


@pytest.mark.parametrize(
    "scope, calls", [("normal", 20 * 4 + 12 * (2 + 8 + 3 * 12)), ("full", 20 * (4 + 2 + 12 + 60))]
)
def test_the_estimate_is_the_time_of_all_calls_of_the_network(run, pictures, monkeypatch, scope, calls):
    r"""A batch of 20 takes 60 seconds by this clock; a step is one call, or two with guidance."""
    clock = iter(range(0, 6000, 60))
    monkeypatch.setattr(shared, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    options = parser().parse_args([str(run), "--steps", "2", "--only", "frechet,guidance,steps"])
    fill_in_drawing(options, run)
    options.scope, options.precision = scope, "fp32"
    evaluation = shared.Evaluation(TextToImage.load(run), pictures, pictures.rows(TEST), options)
    assert evaluation.minutes_of_drawing() == pytest.approx(calls / 20)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_json_but_for_times(run, result, tmp_path):
    chosen = ("adherence", "frechet", "neighbours", "latents", "loss", "guidance")
    assert evaluate(run, "--out", tmp_path, "--only", ",".join(chosen)) == 0
    again = result_in(tmp_path)
    assert {part: again[part] for part in chosen} == {part: result[part] for part in chosen}
    assert evaluate(run, "--out", tmp_path, "--only", "frechet", "--seed", 1) == 0
    assert result_in(tmp_path)["frechet"]["generated"] != result["frechet"]["generated"]


def test_pictures_with_captions_are_measured_without_a_classifier(tmp_path, run, monkeypatch, capsys):
    data = tmp_path / "mine"
    data.mkdir()
    g = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(g.integers(0, 255, (20, 20, 3), np.uint8)).save(data / f"{i}.png")
    lines = [f"{i}.png,picture {i},{'test' if i < 10 else 'train'}\n" for i in range(40)]
    (data / "captions.csv").write_text("file,caption,split\n" + "".join(lines))
    out = tmp_path / "out"
    assert (
        evaluate(run, "--data", data, "--out", out, "--only", "adherence,wordings,frechet,vae,neighbours")
        == 0
    )
    result = result_in(out)
    assert set(result["left_out"]) == {"adherence", "wordings", "frechet"}
    assert "attribute" in result["left_out"]["wordings"]
    assert result["vae"]["n"] == 10 and set(result["neighbours"]) == {"pixels"}
    capsys.readouterr()
    monkeypatch.setattr(TextToImage, "sample", None)  # nothing is drawn that no part reads
    assert evaluate(run, "--data", data, "--out", out, "--only", "adherence,frechet,spread,guidance") == 0
    assert len(result_in(out)["left_out"]) == 4 and "drawing will take" not in capsys.readouterr().out


def test_data_that_changed_since_the_training_is_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "trained_on", lambda folder: {"pictures": "others", "split": "of then"})
    assert evaluate(run, "--only", "vae", "--out", tmp_path) == 0
    told = f"the pictures and split of drawn changed since {run} was trained, so held-out pictures may"
    assert told in capsys.readouterr().err


def test_the_spread_is_that_of_the_pictures_of_one_prompt():
    centre = torch.randn(3, 1, 5)
    e = types.SimpleNamespace(main=None, real_features=torch.tensor([[0.0], [3.0]]), features=lambda x: x)
    e.draw = lambda setting, kind: centre.expand(-1, shared.SPREAD_EACH, -1).flatten(0, 1)
    found = likeness.spread(e)
    assert (found["prompts"], found["each"], found["within"], found["held_out"]) == (3, 8, 0, 3)
    assert found["between"] == pytest.approx(torch.pdist(centre[:, 0]).mean().item())


def test_a_model_of_few_steps_is_measured_at_its_own_times_alone(run, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(run, student, ignore=shutil.ignore_patterns("evaluation"))
    config = Config.read(run / "config.json")
    config = replace(config, model=replace(config.model, few_steps=2))
    (student / "config.json").write_text(config.to_json())
    assert evaluate(student, "--cache", run.parent / "cache", "--only", "vae,loss,bits,guidance,steps") == 0
    result = result_in(student / "evaluation")
    assert "vae" in result and set(result["left_out"]) == {"loss", "bits", "guidance", "steps"}


def test_fewer_training_pictures_than_prompts_are_compared_too():
    e = types.SimpleNamespace(n=20, main=None, real_features=torch.randn(20, 4), decoded=lambda x: x)
    e.draw = lambda setting: torch.randn(e.n, 3, 16, 16)
    e.train_pictures = torch.randn(12, 3, 16, 16)
    e.features = lambda x: x.flatten(1)[:, :4]
    found = likeness.frechet(e)
    assert [found[name]["n"] for name in ("generated", "train pictures", "their mean")] == [20, 12, 20]


# ----------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "target, error",
    [((networks, "psnr"), KeyboardInterrupt()), ((plots.Figure, "savefig"), OSError("no room"))],
)
def test_an_evaluation_that_fails_leaves_the_old_one_as_it_was(
    target, error, run, result, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise error

    before = content(run / "evaluation")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        for out in (run / "evaluation", tmp_path / "new"):
            assert evaluate(run, "--only", "loss,vae", "--out", out) in (2, 130)
            unfinished = out / "result.unfinished.json"
            assert "mean" in json.loads(unfinished.read_text())["loss"]
    assert unfinished.name in content(tmp_path / "new") and not (tmp_path / "new" / "result.json").exists()
    assert content(run / "evaluation") == before | {
        unfinished.name: content(run / "evaluation")[unfinished.name]
    }
    (run / "evaluation" / unfinished.name).unlink()
    assert evaluate(run, "--only", "vae", "--out", tmp_path / "new") == 0
    assert set(content(tmp_path / "new")) == {"result.json", unfinished.name}  # which has the part loss
    assert evaluate(run, "--only", "loss,vae", "--out", tmp_path / "new") == 0
    assert unfinished.name not in content(tmp_path / "new")


def test_a_first_evaluation_leaves_other_files_of_the_folder_alone(run, tmp_path):
    (tmp_path / "loss.png").write_bytes(b"of a training")
    assert evaluate(run, "--only", "vae", "--out", tmp_path) == 0
    assert content(tmp_path)["loss.png"] == b"of a training"


def test_a_new_evaluation_takes_the_plots_of_the_old_one_away_and_keeps_its_figures(run, tmp_path):
    for name in ("guidance.png", "result.json"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "mine.txt").write_text("mine")
    assert evaluate(run, "--only", "vae", "--out", tmp_path) == 0
    found = content(tmp_path)
    assert set(found) == {"result.json", "result.previous.json", "mine.txt"}
    assert found["result.previous.json"] == b"old"


def test_what_ships_is_measured_without_a_file_in_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = parser().parse_args([str(SHIPPED)])
    command.choose_folders(options)
    assert (str(options.out), str(options.cache)) == ("runs/shipped-evaluation", "runs/cache")


def test_numbers_are_rounded_and_what_is_none_becomes_null():
    rounded = report.rounded({"a": (1.23456789, float("nan")), "b": 3, "c": True})
    assert rounded == {"a": [1.23457, None], "b": 3, "c": True}


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--n", "21"], "to 20"),
        (["--n", "3"], "--n from 8"),
        (["--seed", "-1"], "--seed of at least 0, got -1"),
        (["--steps", "0"], "--steps"),
        (["--steps", "31"], "1 to 30"),
        (["--guidance", "nan"], "--guidance"),
        (["--only", "vae,fid"], "'fid'"),
        (["--extractor", "resnet"], "resnet"),
        (["--extractor", "efficientnet-lite0"], "pip install"),
        (["--sampler", "euler"], "euler"),
        (["--eta", "1.5"], "--eta in [0, 1], got 1.5"),
        (["--eta", "nan"], "--eta in [0, 1], got nan"),
        (["--noise-scale", "1.5"], "--noise-scale above 0 and at most 1, got 1.5"),
        (["--data", "/no/such/folder"], "--data"),
        (["--out", "/proc/evaluation"], "--out"),
        (["--quick", "--full"], "--full"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line_and_writes_nothing(
    arguments, message, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    out = [] if "--out" in arguments else ["--out", "out"]
    assert message in refused(capsys, run, *out, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_or_half_a_run_or_has_no_pictures_to_measure_is_refused(run, tmp_path, capsys):
    assert "none" in refused(capsys, tmp_path / "none")
    assert "config.json" in refused(capsys, tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["training"]["drawn_images"] = 40  # none of them is test
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "--resume" in refused(capsys, tmp_path)
    for name in ("vae.safetensors", "ema.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert "--split" in refused(capsys, tmp_path)
