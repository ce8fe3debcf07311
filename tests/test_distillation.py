r"""Few steps: the target and the loss by hand, the teacher's trajectories, and a whole small distillation."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, far, normal, refusal_of, without_zeros
from safetensors.torch import load_file
from small_runs import FP32, QUICK, PlainTower, assert_same_run, make_runs_cheap, metrics, run_train

from ddpm.config import GUIDED, TEXT_FILE, Config
from ddpm.diffusion import PREDICTIONS, v_from, x_0_and_eps
from ddpm.model import TextToImage
from ddpm.sampling import ddim_step, timesteps
from ddpm.schedule import SCHEDULES, Schedule
from ddpm.tools import text_weights
from ddpm.tools.files import digest_of
from ddpm.training import __main__ as train
from ddpm.training import distillation
from ddpm.training.caches import Texts
from ddpm.training.distillation import Trajectories, distillation_loss, x_0_between

PLACES = torch.tensor([999, 749, 499, 249, 10]), torch.tensor([749, 499, 249, -1, 9])


@pytest.mark.equation("distillation-target")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_of_ddim_with_the_target_ends_where_the_teacher_did(name):
    schedule = Schedule.named(name)
    t, s = PLACES
    z_t, z_s = normal(5, 3, seed=1), normal(5, 3, seed=2)
    x_0 = x_0_between(schedule, z_t, t, z_s, s)
    _, eps = x_0_and_eps(schedule, z_t, t, x_0, "x_0")
    arrived = ddim_step(schedule, z_t, t, s, x_0, eps, torch.zeros_like(z_t))
    assert far(arrived, z_s) < 1e-9  # neighbours in time lose digits
    assert far(x_0[3], z_s[3]) < 1e-12  # to the clean picture the target is that picture


@pytest.mark.equation("distillation-loss")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_squared_error_of_v_whatever_the_network_predicts(prediction):
    schedule = Schedule.named("linear")
    t, s = PLACES
    z_t, z_s, output = (normal(5, 3, seed=k) for k in range(3))
    x_0 = x_0_between(schedule, z_t, t, z_s, s)
    x_0_hat, eps_hat = x_0_and_eps(schedule, z_t, t, output, prediction)
    snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    expected = (snr + 1) * ((x_0 - x_0_hat) ** 2).mean(dim=1)
    loss = distillation_loss(schedule, lambda *_: output, z_t, t, z_s, s, prediction)
    assert (loss / expected - 1).abs().max() < 1e-4  # float32

    v = v_from(schedule, x_0, t, x_0_and_eps(schedule, z_t, t, x_0, "x_0")[1])
    assert ((v - v_from(schedule, x_0_hat, t, eps_hat)) ** 2).mean(dim=1).allclose(expected)


def trajectories_of(model: TextToImage, folder, captions, seed=0, few_steps=4):
    texts = Texts(folder, model.text)
    config = replace(model.config, few_steps=few_steps)
    return Trajectories(folder, model.unet, model.schedule, texts, captions, config, seed, "fp32")


@pytest.fixture(scope="module")
def teacher():
    return without_zeros(TextToImage(replace(TINY, noise_scale=0.8))).eval()


@pytest.mark.parametrize("few_steps", [1, 2, 4, 5])
def test_a_trajectory_is_what_the_teacher_passes_when_it_draws(teacher, tmp_path, few_steps):
    captions = ["a man", "", "a bald woman"]
    trajectories = trajectories_of(teacher, tmp_path, captions, few_steps=few_steps)
    z = trajectories(np.array([2, 0]))
    times = timesteps(teacher.schedule, few_steps)
    assert trajectories.times.tolist() == [*times, -1] and z.shape == (
        2,
        few_steps + 1,
        *teacher.latent_shape,
    )

    states = []
    noise = z[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "draw_noise", lambda generators: noise)
        teacher.sample([captions[2], captions[0]], callback=states.append)
    assert len(states) == GUIDED[1]
    passed = torch.stack([state.x for state in states if state.s in [*times[1:], -1]], dim=1)
    assert (
        far(z[:, 1:], passed) < 0.02 * passed.abs().max()
    )  # float16, also of the noise that the teacher began with


def test_a_trajectory_is_drawn_once_and_has_noise_of_its_own(teacher, tmp_path, monkeypatch):
    captions = ["a man"] * 3
    first = trajectories_of(teacher, tmp_path, captions)
    z = first(np.arange(3))
    assert far(z[0, 0], z[1, 0]) > 1 and abs(z[:, 0].std().item() - 1) < 0.2
    other = trajectories_of(teacher, tmp_path, captions, seed=1)(np.arange(3))
    assert far(z[:, 0], other[:, 0]) > 1

    again = trajectories_of(teacher, tmp_path, captions)
    monkeypatch.setattr(again.records, "make", None)  # the file has them
    assert torch.equal(again(np.array([1])), z[1:2])


FEW = [*FP32, "--few-steps", "2", "--trajectories", "12"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    r"""A small run, and another one distilled from it."""
    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        make_runs_cheap(patch)
        patch.setattr(distillation, "HELD_OUT", 4)
        assert run_train(*QUICK, *FP32, "--out", folder / "teacher") == 0
        assert run_train("--distill", folder / "teacher", "--max-steps", 6, *FEW) == 0
        yield folder


@pytest.mark.slow
def test_a_distilled_run_has_its_teachers_vae_and_draws_with_few_calls(runs, monkeypatch):
    few = runs / "teacher-2-steps"
    models = [TextToImage.load(folder) for folder in (few, runs / "teacher")]
    assert digest_of(models[0].vae.state_dict()) == digest_of(models[1].vae.state_dict())
    assert models[0].latent_scale == models[1].latent_scale
    assert [row[0] for row in metrics(few)] == ["unet"] * 6
    ours, theirs = (load_file(f / "ema.safetensors") for f in (few, runs / "teacher"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)

    model = models[0]
    calls = []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda z, *rest: calls.append(len(z)) or forward(z, *rest))
    x = model.sample(["a man"])
    assert calls == [1, 1]  # two steps, no guidance
    assert torch.equal(x, model.sample(["a man"], "ddim", 2, 1.0))
    assert not torch.equal(x, model.sample(["a man"], steps=4))


@pytest.mark.slow
def test_a_distillation_goes_on_as_if_it_had_never_stopped(runs):
    few = runs / "again"
    assert (
        run_train("--distill", runs / "teacher", "--max-steps", 6, *FEW, "--out", few, "--stop-after", 3) == 0
    )
    assert run_train("--resume", few) == 0
    assert_same_run(few, runs / "teacher-2-steps")


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(runs):
    folder = runs / "longer"
    words = ["--distill", runs / "teacher", *FEW, "--out", folder, "--max-minutes", 0, "--unet-steps", 60]
    assert run_train(*words, "--sample-every", 60, "--muon-lr", 0.01, "--lr", 0.003, "--ema-decay", 0.9) == 0
    losses = [float(row[2]) for row in metrics(folder)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.slow
def test_what_cannot_be_distilled_is_refused(runs, capsys):
    def told(*words) -> str:
        assert run_train(*words) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        return line

    teacher = runs / "teacher"
    new = ("--out", runs / "new")
    assert "settings of this run, got a run that was distilled itself" in told(
        "--distill", runs / "teacher-2-steps", *FEW, *new
    )
    assert "with the settings of this run" in told("--distill", teacher, *FEW, "--channels", "32,64", *new)
    assert "a teacher for --few-steps" in told(*QUICK, *FEW, *new)
    assert "--few-steps of at least 1" in told("--distill", teacher, "--few-steps", "0", *new)
    assert "no --stage vae" in told("--distill", teacher, *FEW, "--stage", "vae", *new)
    assert "few_steps that divide the teacher's 20" in told("--distill", teacher, "--few-steps", "3", *new)
    assert "--distill without --preset" in told("--distill", teacher, "--preset", "tiny")
    assert "config.json" in told("--distill", runs / "none")
    assert not (runs / "new").exists()


@pytest.mark.slow
def test_the_teacher_is_kept_in_the_run(runs):
    few = runs / "alone"
    other = runs / "moved"
    shutil.copytree(runs / "teacher", other)
    assert run_train("--distill", other, "--max-steps", 6, *FEW, "--out", few, "--stop-after", 3) == 0
    shutil.rmtree(other)
    assert run_train("--resume", few) == 0
    assert_same_run(few, runs / "teacher-2-steps")


@pytest.mark.slow
def test_a_teachers_own_text_tower_goes_along(runs, monkeypatch):
    teacher, few = runs / "with-tower", runs / "with-tower-too"
    shutil.copytree(runs / "teacher", teacher)
    (teacher / TEXT_FILE).write_bytes(b"its tower")
    settings = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(settings.replace('"random"', f'"{TEXT_FILE}"'))
    read = []
    monkeypatch.setattr(text_weights, "tower_from_file", lambda path: read.append(path) or PlainTower())
    monkeypatch.setattr(text_weights, "save_tower", lambda tower, path: path.write_bytes(b"its tower"))
    words = ("--distill", teacher, "--max-steps", 4, *FEW, "--out", few, "--stop-after", 2)
    assert run_train(*words) == 0 == run_train("--resume", few)
    assert read == [teacher / TEXT_FILE, few / TEXT_FILE]


def test_the_flags_of_a_distillation(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(Config.from_preset("tiny", drawn_images=99).to_json())
    a = train.parser().parse_args(["--distill", str(run), "--max-minutes", "3"])
    config = train.configuration(a)
    assert (config.model.few_steps, config.training.init, config.training.max_minutes) == (4, str(run), 3.0)
    assert config.training.drawn_images == 99
    assert replace(config.model, noise_scale=0.8).drawing == ("ddim", 4, 1.0, 1.0)
    assert train.default_folder(a.distill, config) == tmp_path / "run-4-steps"
    assert "without --out, --preset" in refusal_of(
        train.configuration, train.parser().parse_args(["--resume", str(run), "--distill", str(run)])
    )
