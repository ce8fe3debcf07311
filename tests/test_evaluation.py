import json
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, without_zeros
from PIL import Image
from torch import nn

import train
from ddpm.celeba.dataset import drawn_pictures
from ddpm.celeba.lists import TEST, TRAIN
from ddpm.evaluation import classifier, metrics
from ddpm.evaluation import parts as evaluation
from ddpm.evaluation.classifier import attribute_classifier, truths
from ddpm.evaluation.parts import (
    MIN_EACH,
    PARTS,
    SCOPES,
    Evaluation,
    Setting,
    adherence,
    attributes_apart,
    choose_rows,
    enough,
    rounded,
    subset,
)
from ddpm.model import TextToImage
from ddpm.tools import command as cli
from ddpm.tools import text_weights
from ddpm.tools.seeding import generator

COUNT = 400  # drawn faces, of which 20 are test
TRAINING = [
    "--preset",
    "tiny",
    "--image-size",
    "16",
    "--channels",
    "32,32",
    "--timesteps",
    "30",
    "--device",
    "cpu",
]
TRAINING += ["--drawn-images", COUNT, "--max-steps", 2, "--precision", "fp32", "--warmup", 1]
SHORT = {  # of the curves of each scope
    "normal": SCOPES["normal"]._replace(guidances=(1.0, 3.0), steps=(2, 4, 50)),
    "full": SCOPES["full"]._replace(guidances=(1.0, 3.0), steps=(2,)),
}
COMMON = ["--device", "cpu", "--precision", "fp32", "--steps", 2]


class CheapTower(nn.Module):
    r"""Random states of the text tower's shape for each prompt."""

    def forward(self, prompts):
        return torch.stack([torch.randn(77, 512, generator=generator(prompt)) for prompt in prompts])

    def fingerprint(self):
        return "cheap"


@pytest.fixture(autouse=True, scope="module")
def cheap():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_weights, "random_tower", (lambda: CheapTower()))
        patch.setattr(classifier, "STEPS", 3)
        for name, scope in SHORT.items():
            patch.setitem(evaluation.SCOPES, name, scope)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.exit_code(train.main, [str(v) for v in [*TRAINING, "--out", folder]]) == 0
    return folder


def evaluate(*arguments) -> int:
    return cli.exit_code(evaluation.main, [str(a) for a in [*COMMON, *arguments]])


@pytest.fixture(scope="module")
def result(run):
    assert evaluate(run) == 0
    return json.loads((run / "evaluation" / "result.json").read_text())


def refused(capsys, *arguments) -> str:
    try:
        code = evaluate(*arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("error: ") and "\n" not in error, error
    return error


# -------------------------------------------------------------------------------------------- adherence


def truth_of(n: int):
    attributes = torch.rand(n, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [0.5, 0.2, 0.1, 0.9]
    )
    return (
        attributes,
        ("Male", "Bald", "Eyeglasses", "Young"),
        torch.arange(n),
        torch.ones(4, dtype=torch.bool),
    )


def test_pictures_that_show_their_prompts_score_one_and_shuffled_prompts_one_half():
    wanted, names, groups, countable = truth_of(4000)
    perfect = adherence(wanted, wanted, names, groups, countable)
    assert perfect["mean"] == 1 and perfect["interval"] == (1, 1) and perfect["counted"] == 4
    shuffled = adherence(wanted, wanted[torch.randperm(4000)], names, groups, countable)
    assert shuffled["mean"] == pytest.approx(0.5, abs=0.03)
    assert shuffled["interval"][0] < shuffled["mean"] < shuffled["interval"][1]


def test_a_classifier_of_known_errors_gives_its_own_accuracy():
    wanted, names, groups, countable = truth_of(20_000)
    seen = wanted ^ (torch.rand(wanted.shape) < 0.1)
    found = adherence(wanted, seen, names, groups, countable)
    assert found["mean"] == pytest.approx(0.9, abs=0.01)
    assert found["attributes"]["Bald"]["balanced_accuracy"] == pytest.approx(0.9, abs=0.02)


def test_what_few_pictures_want_or_the_classifier_cannot_read_does_not_count():
    wanted = torch.zeros(40, 4, dtype=torch.bool)
    for column, positive in enumerate((MIN_EACH, MIN_EACH - 1, 40 - MIN_EACH + 1, 20)):
        wanted[:positive, column] = True
    assert enough(wanted).tolist() == [True, False, False, True]
    seen = wanted.clone()
    seen[:, 1:] = ~wanted[:, 1:]
    countable = enough(wanted) & torch.tensor([True, True, True, False])
    names = ("Male", "Bald", "Eyeglasses", "Young")
    found = adherence(wanted, seen, names, torch.arange(40), countable)
    assert [a["counted"] for a in found["attributes"].values()] == [True, False, False, False]
    assert found["mean"] == 1 and found["attributes"]["Young"] == {
        "wanted": 20,
        "balanced_accuracy": 0,
        "interval": found["attributes"]["Young"]["interval"],
        "counted": False,
    }
    assert adherence(wanted, seen, names, torch.arange(40), countable & False)["mean"] is None


def test_a_part_of_the_pictures_counts_what_all_count_where_it_has_both_values():
    wanted, names, groups, _ = truth_of(40)
    some = wanted[:6].clone()
    some[:, 1] = False
    found = adherence(some, some, names, groups[:6], torch.tensor([True, True, False, True]))
    counted = [a["counted"] for a in found["attributes"].values()]
    assert counted == [True, False, False, bool((~some[:, 3]).any())] and found["mean"] == 1


def test_pictures_of_one_prompt_are_one_piece_of_evidence():
    wanted, names, _, countable = truth_of(400)
    four, groups = wanted[:100].repeat_interleave(4, 0), torch.arange(100).repeat_interleave(4)
    alone, together = (
        adherence(w, w, names, g, countable) for w, g in ((wanted[:100], groups[::4]), (four, groups))
    )
    assert (together["n"], together["prompts"], alone["prompts"]) == (400, 100, 100)
    for name in names:
        assert together["attributes"][name]["interval"] == pytest.approx(
            alone["attributes"][name]["interval"]
        )
    apart = adherence(four, four, names, torch.arange(400), countable)["attributes"]["Male"]["interval"]
    assert apart[0] > together["attributes"]["Male"]["interval"][0]


def test_a_row_is_as_far_as_the_nearest_training_row(tmp_path):
    pictures = drawn_pictures(tmp_path, COUNT, seed=0, size=16)
    train_rows, test = pictures.rows(TRAIN), pictures.rows(TEST)
    pictures.attributes[test[3]] = pictures.attributes[train_rows[7]]
    known = truths(pictures, train_rows)
    expected = [(row != known).sum(1).min().item() for row in truths(pictures, test)]
    found = attributes_apart(pictures, subset(pictures, test))
    assert found.tolist() == expected and found[3] == 0 and found.max() > 1


# ------------------------------------------------------------------------------------------ the command


def test_the_result_names_what_it_measured_and_every_part(run, result):
    settings = result["settings"]
    assert {
        "split": "test",
        "n": 20,
        "extractor": "classifier",
        "sampler": "dpm++",
        "steps": 2,
        "guidance": 3.0,
        "eta": 0.0,
        "weights": "ema",
        "seed": 0,
    }.items() <= settings.items()
    assert {"crop", "ddpm", "torch", "precision", "device", "machine"} <= set(settings)
    assert set(settings["digests"]) == {"vae", "unet", "data"}
    assert set(PARTS) <= set(result) | set(result["left_out"]) and not set(result) & set(result["left_out"])
    assert set(result["seconds"]) == {"prepare", *PARTS}
    names = {p.name for p in (run / "evaluation").iterdir()}
    assert names == set(evaluation.FILES)
    with Image.open(run / "evaluation" / "pictures.png") as grid:
        assert len(json.loads(grid.text["prompt"])) == 5  # of 20 prompts four at a time are one


def test_the_figures_are_those_of_the_library_called_by_hand(run, result):
    model = TextToImage.load(run)
    pictures = drawn_pictures(run.parent / "cache", COUNT, seed=0, size=16)
    rows = choose_rows(pictures, evaluation.parser().parse_args([str(run)]))
    assert set(rows) == set(pictures.rows(TEST))
    x, prompts = pictures.batch(rows), [pictures.full_caption(i) for i in rows]
    generated = model.sample(prompts, "dpm++", 2, 3.0, seed=0)
    network = attribute_classifier(run.parent / "cache", pictures, torch.device("cpu"))
    with torch.no_grad():
        x_hat = model.vae.decode(model.vae.encode(x).mode())
        features, real = network.features(generated), network.features(x)
        seen = {"generated": network(generated) > 0, "real": network(x) > 0}
    wanted = truths(pictures, rows)[:, network.columns]
    distance = metrics.frechet_distance(*metrics.gaussian_of(real), *metrics.gaussian_of(features))
    assert result["frechet"]["generated"]["distance"] == pytest.approx(distance, rel=1e-3)
    shares = metrics.precision_recall(real, features)
    assert (result["frechet"]["generated"]["precision"], result["frechet"]["generated"]["recall"]) == shares
    with torch.no_grad():
        mean = network.features(pictures.batch(train_rows_of(pictures, 20)).mean(0, keepdim=True)).expand(
            20, -1
        )
    distance = metrics.frechet_distance(*metrics.gaussian_of(real), *metrics.gaussian_of(mean))
    assert result["frechet"]["their mean"]["distance"] == pytest.approx(distance, rel=1e-3)
    assert result["vae"]["psnr"] == pytest.approx(metrics.psnr(x, x_hat).mean().item(), rel=1e-4)
    for source in seen:
        told = result["adherence"]["held_out"][source]["attributes"]
        expected = metrics.balanced_accuracy(wanted, seen[source])
        for name, value in zip(network.names, expected.tolist(), strict=True):
            assert told[name]["balanced_accuracy"] == rounded(value), (source, name)


def train_rows_of(pictures, n: int) -> np.ndarray:
    r"""The training pictures that stand as the baseline."""
    rows = pictures.rows(TRAIN)
    return np.sort(
        rows[torch.randperm(len(rows), generator=generator(0, "evaluation", "others"))[:n].numpy()]
    )


def test_copies_of_training_pictures_are_found_mirrored_ones_too(run, tmp_path, monkeypatch):
    pictures = drawn_pictures(run.parent / "cache", COUNT, seed=0, size=16)
    copies = pictures.batch(pictures.rows(TRAIN)[:20], torch.arange(20) % 2 == 0)
    monkeypatch.setattr(
        TextToImage, "sample", lambda self, prompts, *_, first=0, **__: copies[first:][: len(prompts)]
    )
    assert evaluate(run, "--only", "neighbours", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "result.json").read_text())["neighbours"]
    assert set(found) == {"pixels", "features"}
    for space in found.values():
        assert space["ratio_to_held_out"] < 1e-3 and space["nearer_than_1_percent_of_held_out"] == 1
        assert space["held_out_median"] > 0 and space["n_train"] == len(pictures.rows(TRAIN))


def test_baselines_have_as_many_pictures_and_the_curves_their_settings(result):
    assert {row["n"] for row in result["frechet"].values()} == {20}
    assert [p["guidance"] for p in result["guidance"]] == [1, 3]
    points = {(p["sampler"], p["eta"], p["steps"]) for p in result["steps"]}
    ways = (("ddpm", 0), ("ddim", 0), ("dpm++", 0), ("dpm++", 1))
    assert points == {(*way, n) for way in ways for n in (2, 4)}  # the chain has 30
    main = next(p for p in result["guidance"] if p["guidance"] == 3)
    assert main["frechet"] == result["frechet"]["generated"]["distance"]


def test_the_same_seed_gives_the_same_json_but_for_times(run, result, tmp_path):
    parts = ("adherence", "frechet", "neighbours", "latents", "loss", "guidance")
    assert evaluate(run, "--out", tmp_path, "--only", ",".join(parts)) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    assert {part: again[part] for part in parts} == {part: result[part] for part in parts}
    assert evaluate(run, "--out", tmp_path, "--only", "frechet", "--seed", 1) == 0
    other = json.loads((tmp_path / "result.json").read_text())
    assert other["frechet"]["generated"] != result["frechet"]["generated"]


def test_some_parts_of_some_rows_of_another_split(run, tmp_path, capsys):
    arguments = [run, "--n", 12, "--split", "valid", "--only", "vae,bits,steps", "--full", "--out", tmp_path]
    assert evaluate(*arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"format", "settings", "vae", "bits", "steps", "left_out", "seconds"}
    assert result["vae"]["n"] == 12
    assert {"sampler": "ddpm", "steps": 30, "n": 12}.items() <= result["steps"][-1].items()
    assert {p.name for p in tmp_path.iterdir()} == {"result.json", "steps.png"}
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("about ") and any(line.startswith("VAE, n 12") for line in told)
    own = result["bits"]["latent"][result["bits"]["variance"]]
    assert any(f"bits a dimension, n 12: latents {own['total']:.2f} +- " in line for line in told)


def test_pictures_drawn_for_a_short_curve_are_the_first_of_a_long_one(tmp_path):
    class Arguments:
        scope, sampler, steps, guidance, eta, seed, extractor = (
            "quick",
            "dpm++",
            2,
            3.0,
            0.0,
            5,
            "classifier",
        )

    torch.manual_seed(0)
    model = TextToImage(TINY, CheapTower()).eval()
    for network in (model.unet, model.vae):
        without_zeros(network)  # it listens to its prompt
    pictures, setting = drawn_pictures(tmp_path, COUNT, seed=0, size=16), Setting("ddpm", 2, 3.0)
    e = Evaluation(model, pictures, pictures.rows(TEST), tmp_path, Arguments, "fp32")
    whole = model.sample(e.prompts[:6], "ddpm", 2, 3.0, seed=5)
    assert torch.allclose(e.draw(setting, 3), whole[:3], atol=1e-5)
    assert torch.allclose(e.draw(setting, 6), whole, atol=1e-5)
    assert not torch.allclose(
        model.sample(e.prompts[:3], "ddpm", 2, 3.0, seed=5, first=3), whole[3:], atol=1e-4
    )


def test_pictures_with_captions_are_measured_without_a_classifier(tmp_path, run):
    data = tmp_path / "mine"
    data.mkdir()
    g = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(g.integers(0, 255, (20, 20, 3), np.uint8)).save(data / f"{i}.png")
    lines = [f"{i}.png,picture {i},{'test' if i < 10 else 'train'}\n" for i in range(40)]
    (data / "captions.csv").write_text("file,caption,split\n" + "".join(lines))
    assert (
        evaluate(run, "--data", data, "--out", tmp_path / "out", "--only", "adherence,frechet,vae,neighbours")
        == 0
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (
        set(result["left_out"]) == {"adherence", "frechet"} and "attribute" in result["left_out"]["adherence"]
    )
    assert result["vae"]["n"] == 10 and set(result["neighbours"]) == {"pixels"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_evaluation_that_stops_leaves_the_old_one_as_it_was(stop, run, result, tmp_path, monkeypatch):
    def fail(self):
        raise stop("out of memory")

    before = {p.name: p.stat().st_mtime_ns for p in (run / "evaluation").iterdir()}
    monkeypatch.setitem(evaluation.METHODS, "vae", fail)
    assert evaluate(run, "--only", "loss,vae") in (2, 130)
    assert evaluate(run, "--only", "loss,vae", "--out", tmp_path / "new") in (2, 130)
    assert {p.name: p.stat().st_mtime_ns for p in (run / "evaluation").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_new_evaluation_takes_the_plots_of_the_old_one_away_and_keeps_its_figures(run, tmp_path):
    for name in ("guidance.png", "result.json"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "mine.txt").write_text("mine")
    assert evaluate(run, "--only", "vae", "--out", tmp_path) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"result.json", "result.previous.json", "mine.txt"}
    assert (tmp_path / "result.previous.json").read_bytes() == b"old"


def test_a_plot_that_fails_leaves_the_old_evaluation_as_it_was(run, result, monkeypatch):
    def fail(*_):
        raise OSError("no room")

    before = {p.name: p.read_bytes() for p in (run / "evaluation").iterdir()}
    monkeypatch.setattr(evaluation, "plot_loss", fail)
    assert evaluate(run, "--only", "loss,vae") == 2
    assert {p.name: p.read_bytes() for p in (run / "evaluation").iterdir()} == before


def test_what_ships_is_measured_without_a_file_in_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = evaluation.parser().parse_args([str(evaluation.SHIPPED)])
    evaluation.check(arguments)
    assert str(arguments.out) == "runs/shipped-evaluation" and str(arguments.cache) == "runs/cache"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--n", "21"], "to 20"),
        (["--n", "3"], "--n from 8"),
        (["--steps", "0"], "--steps"),
        (["--steps", "31"], "1 to 30"),
        (["--guidance", "nan"], "--guidance"),
        (["--only", "vae,fid"], "'fid'"),
        (["--extractor", "resnet"], "resnet"),
        (["--extractor", "efficientnet-lite0"], "pip install"),
        (["--sampler", "euler"], "euler"),
        (["--eta", "1.5"], "--eta in [0, 1], got 1.5"),
        (["--eta", "nan"], "--eta in [0, 1], got nan"),
        (["--data", "/no/such/folder"], "--data"),
        (["--out", "/proc/evaluation"], "--out"),
        (["--quick", "--full"], "--full"),
    ],
)
def test_a_wrong_command_is_told_in_one_line_and_writes_nothing(
    arguments, told, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    out = [] if "--out" in arguments else ["--out", "out"]
    assert told in refused(capsys, run, *out, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_or_half_a_run_is_told(run, tmp_path, capsys):
    assert "none" in refused(capsys, tmp_path / "none")
    assert "config.json" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "--resume" in refused(capsys, tmp_path)


def test_a_split_that_is_empty_is_told(run, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    for name in ("vae.safetensors", "ema.safetensors"):
        (tmp_path / "few" / name).write_bytes((run / name).read_bytes())
    config = json.loads((run / "config.json").read_text())
    config["training"]["drawn_images"] = 40
    (tmp_path / "few" / "config.json").write_text(json.dumps(config))
    assert "--split" in refused(capsys, tmp_path / "few")


def test_numbers_are_rounded_and_what_is_none_becomes_null():
    assert rounded({"a": (1.23456789, float("nan")), "b": 3, "c": True}) == {
        "a": [1.23457, None],
        "b": 3,
        "c": True,
    }
