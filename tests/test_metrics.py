import math

import numpy as np
import pytest
import torch

from ddpm.evaluation.metrics import (
    MIN_EACH,
    adherence,
    balanced_accuracy,
    balanced_interval,
    bootstrap_interval,
    enough,
    frechet_distance,
    gaussian_of,
    latent_health,
    nearest,
    precision_recall,
    wilson_interval,
)
from ddpm.vae import DiagonalGaussian

NAMES = ("Male", "Bald", "Eyeglasses", "Young")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(D, seed):
    root = normal(D, D, seed=seed)
    return root @ root.T / D


# ------------------------------------------------------------------------------------ two sets of pictures


@pytest.mark.equation("frechet-distance")
def test_frechet_distance_has_the_trace_of_the_products_root():
    S_1, S_2, mu = covariance(5, seed=1), covariance(5, seed=2), normal(5)
    S_1[0], S_1[:, 0] = 0, 0  # singular, as with fewer pictures than features
    eigenvalues = torch.linalg.eigvals(S_1 @ S_2).real  # those of the symmetric product of roots
    expected = mu @ mu + S_1.trace() + S_2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    for found in (frechet_distance(mu, S_1, mu * 0, S_2), frechet_distance(mu, S_2, mu * 0, S_1)):
        assert found == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(mu, S_1, mu, S_1) == pytest.approx(0, abs=1e-10)


@pytest.mark.equation("frechet-distance")
def test_frechet_distance_of_fewer_pictures_than_features_is_that_of_their_singular_values():
    r"""tr (S_1 S_2)^1/2 is the sum of the singular values of A B^T for centred features A, B over sqrt((n-1)(m-1))."""
    a, b = normal(30, 200, seed=1).abs(), 1.5 * normal(40, 200, seed=2)
    A, B = (x - x.mean(0) for x in (a, b))
    trace = torch.linalg.svdvals(A @ B.T).sum() / (29 * 39) ** 0.5
    apart = (a.mean(0) - b.mean(0)).square().sum()
    expected = (apart + A.square().sum() / 29 + B.square().sum() / 39 - 2 * trace).item()
    assert frechet_distance(*gaussian_of(a), *gaussian_of(b)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.equation("frechet-distance")
def test_the_gaussian_is_numpys_mean_and_covariance():
    x = normal(30, 4)
    mu, S = gaussian_of(x.float())
    assert mu.dtype == S.dtype == torch.float64
    np.testing.assert_allclose(mu, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(S, np.cov(x.numpy().T), atol=1e-6)


@pytest.mark.equation("precision-recall")
def test_equal_clouds_cover_each_other_and_half_of_a_cloud_is_precise_and_recalls_half():
    left, right = normal(60, 2, seed=1), normal(60, 2, seed=2) + 100
    assert precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall(left, right) == (0.0, 0.0)
    assert precision_recall(torch.cat([left, right]), left) == (1.0, 0.5)
    assert precision_recall(left, torch.cat([left, right])) == (0.5, 1.0)


@pytest.mark.equation("precision-recall")
def test_balls_reach_to_the_kth_fellow():
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-1.5], [-3.5]])
    many = torch.arange(1100.0)[:, None]  # more than are compared at once
    assert precision_recall(many, torch.cat([many, many + 5000])) == (0.5, 1.0)
    assert precision_recall(real, generated, k=1) == (0.0, pytest.approx(1 / 3))  # balls 1, 1, 2; 2, 2
    twice = torch.cat([real, real + 0.1])
    assert precision_recall(twice, torch.cat([generated, generated]))[0] == 0.0  # k is 3; at 4 it were 0.5


def test_nearest_neighbours_over_parts_are_those_of_the_whole_and_a_copy_is_at_no_distance():
    queries, pool = normal(7, 3, seed=1), normal(50, 3, seed=2)
    distances, places = nearest(queries, pool.split(8), k=3)
    whole = (queries[:, None] - pool).norm(dim=2)
    assert torch.equal(places, whole.argsort(dim=1)[:, :3])
    assert torch.allclose(distances, whole.sort(dim=1).values[:, :3])
    pool = normal(20, 1000, dtype=torch.float32)
    distances, places = nearest(pool[3:5], pool.split(6), k=1)
    assert places.flatten().tolist() == [3, 4] and distances.max() < 1e-4


# ------------------------------------------------------------------------------------------------ adherence


@pytest.mark.equation("balanced-accuracy")
def test_balanced_accuracy_by_hand():
    wanted = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1]]).bool()
    seen = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 0, 1]]).bool()
    found = balanced_accuracy(wanted, seen)
    assert balanced_accuracy(wanted, wanted | True)[:2].tolist() == [0.5, 0.5]  # as guessing
    assert found[:2].tolist() == pytest.approx([(3 / 4 + 0 / 1) / 2, (1 / 1 + 3 / 4) / 2])
    assert found[2].isnan()


@pytest.mark.equation("wilson-interval")
def test_wilsons_interval_has_its_published_values():
    low, high = wilson_interval(torch.tensor([8.0, 0.0]), torch.tensor([10.0, 10.0]))
    assert low.tolist() == pytest.approx([0.4902, 0.0], abs=1e-4)
    assert high.tolist() == pytest.approx([0.9433, 0.2775], abs=1e-4)


@pytest.mark.equation("balanced-interval")
def test_the_interval_of_balanced_accuracy_by_hand():
    wanted = (torch.arange(40) < 10)[:, None]
    right = torch.ones(40, 1, dtype=torch.bool)
    low, high = balanced_interval(wanted, right == wanted, torch.ones(40))
    expected = 1 - math.hypot(0.2775, 0.1135) / 2  # Wilson: 10 of 10 is above 0.7225, 30 of 30 above 0.8865
    assert low.item() == pytest.approx(expected, abs=1e-4) and high.item() == 1.0
    right[8:10] = False  # 8 of 10 lies between 0.4902 and 0.9433
    low, high = balanced_interval(wanted, right == wanted, torch.ones(40))
    assert low.item() == pytest.approx(0.9 - math.hypot(0.3098, 0.1135) / 2, abs=1e-4)
    assert high.item() == pytest.approx(0.9 + 0.1433 / 2, abs=1e-4)


@pytest.mark.equation("balanced-interval")
def test_the_interval_of_balanced_accuracy_holds_the_truth_in_95_of_100_trials():
    wanted = (torch.arange(90) < 30)[:, None].expand(90, 4000)
    right = uniform(90, 4000) < torch.where(wanted, 0.9, 0.7)
    low, high = balanced_interval(wanted, right == wanted, torch.ones(90))
    assert 0.005 < (low > 0.8).double().mean() < 0.04 and 0.005 < (high < 0.8).double().mean() < 0.04


def test_an_interval_of_weighted_pictures_holds_the_accuracy_and_no_more_than_can_be():
    r"""Of three prompts that want it one is drawn four times, always right; of two pictures drawn once one is."""
    wanted = torch.tensor([True] * 6 + [False] * 6)[:, None]
    seen = torch.tensor([True] * 4 + [True, False] + [False] * 6)[:, None]
    weight = torch.tensor([0.25] * 4 + [1.0, 1.0] + [1.0] * 6)
    accuracy = balanced_accuracy(wanted, seen).item()
    low, high = (bound.item() for bound in balanced_interval(wanted, seen, weight))
    assert accuracy == pytest.approx((5 / 6 + 1) / 2) and 0 < low < accuracy < high <= 1
    unweighted = [bound.item() for bound in balanced_interval(wanted, seen, torch.ones(12))]
    assert low < unweighted[0] and high > unweighted[1]  # 3 pieces of evidence say less than 6


def test_the_interval_of_the_mean_is_as_wide_as_the_means_of_many_samples():
    wanted = (torch.arange(100) % 2 == 0)[:, None].expand(100, 3)
    samples = [(uniform(100, 3, seed=s) < 0.8) == wanted for s in range(500)]
    means = torch.stack([balanced_accuracy(wanted, seen).mean() for seen in samples])
    low, high = bootstrap_interval(wanted, samples[0], torch.arange(100))
    assert high - low == pytest.approx(2 * 1.96 * means.std().item(), rel=0.25)


def test_the_interval_of_three_prompts_is_made_of_numbers():
    wanted = torch.tensor([[True], [False], [True]])
    low, high = bootstrap_interval(wanted, ~wanted, torch.arange(3))
    assert (low, high) == (0, 0)  # some of the resamples have one value of the attribute alone


@pytest.mark.parametrize("errors, score", [("none", 1.0), ("a tenth", 0.9), ("shuffled", 0.5)])
def test_adherence_of_a_classifier_of_known_errors_is_its_own_accuracy(errors, score):
    wanted = uniform(4_000, 4) < torch.tensor([0.5, 0.2, 0.1, 0.9])
    seen = wanted.clone()
    if errors == "a tenth":
        seen ^= uniform(4_000, 4, seed=1) < 0.1
    elif errors == "shuffled":
        seen = wanted[torch.randperm(4_000, generator=torch.Generator().manual_seed(0))]
    found = adherence(wanted, seen, NAMES, torch.arange(4_000), enough(wanted))
    assert found["counted"] == 4 and found["mean"] == pytest.approx(score, abs=0.015)
    assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    for attribute in found["attributes"].values():
        assert attribute["balanced_accuracy"] == pytest.approx(score, abs=0.04)


def test_what_few_pictures_want_or_the_classifier_cannot_read_does_not_count():
    wanted = torch.zeros(40, 4, dtype=torch.bool)
    for column, positive in enumerate((MIN_EACH, MIN_EACH - 1, 40 - MIN_EACH + 1, 20)):
        wanted[:positive, column] = True
    assert enough(wanted).tolist() == [True, False, False, True]
    seen = wanted.clone()
    seen[:, 1:] = ~wanted[:, 1:]
    countable = enough(wanted) & torch.tensor([True, True, True, False])
    found = adherence(wanted, seen, NAMES, torch.arange(40), countable)
    young = found["attributes"]["Young"]
    assert [a["counted"] for a in found["attributes"].values()] == [True, False, False, False]
    assert (found["mean"], young["wanted"], young["balanced_accuracy"]) == (1, 20, 0)
    assert adherence(wanted, seen, NAMES, torch.arange(40), countable & False)["mean"] is None
    some = wanted[:9]  # all of them want the third and the last
    counted = adherence(some, some, NAMES, torch.arange(9), torch.tensor([True, False, True, True]))
    assert [a["counted"] for a in counted["attributes"].values()] == [True, False, False, False]


def test_pictures_of_one_prompt_are_one_piece_of_evidence():
    wanted = uniform(100, 4) < 0.5
    seen = wanted ^ (uniform(100, 4, seed=1) < 0.2)
    of_four = (wanted.repeat(4, 1), seen.repeat(4, 1), NAMES)
    once = adherence(wanted, seen, NAMES, torch.arange(100), enough(wanted))
    together = adherence(*of_four, torch.arange(100).repeat(4), enough(wanted))
    apart = adherence(*of_four, torch.arange(400), enough(wanted))
    assert (together["n"], together["prompts"], apart["prompts"]) == (400, 100, 400)
    for score in (
        lambda found: found,
        *(lambda found, name=name: found["attributes"][name] for name in NAMES),
    ):
        low, high = score(once)["interval"]
        assert score(together)["interval"] == pytest.approx((low, high))
        narrow = score(apart)["interval"]
        assert narrow[1] - narrow[0] < 0.6 * (high - low)


# ------------------------------------------------------------------------------------------------- latents


@pytest.mark.equation("latent-moments")
def test_latent_moments_are_those_of_many_scaled_samples():
    mu = normal(6, 3, 4, 4, seed=1) * torch.tensor([1.0, 2, 3]).view(3, 1, 1) + 0.5
    mu[:, 1] += mu[:, 0]
    q = DiagonalGaussian(mu, normal(6, 3, 4, 4, seed=2))
    health = latent_health(q, scale=0.5)
    g = torch.Generator().manual_seed(0)
    z = torch.cat([0.5 * q.sample(g) for _ in range(4000)]).transpose(0, 1).flatten(1)
    assert health["mean"] == pytest.approx(z.mean(1).tolist(), abs=0.01)
    assert health["variance"] == pytest.approx(z.var(1).tolist(), rel=0.02)
    assert torch.allclose(torch.tensor(health["correlation"]).double(), z.corrcoef(), atol=0.02)
    assert sum(health["kl"]) * 16 == pytest.approx(q.kl().mean().item(), rel=1e-6)
