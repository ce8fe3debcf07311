import math

import numpy as np
import pytest
import torch

from ddpm.evaluation.metrics import (
    balanced_accuracy,
    balanced_interval,
    bootstrap_interval,
    frechet_distance,
    gaussian_of,
    latent_health,
    nearest,
    precision_recall,
    wilson_interval,
)
from ddpm.vae import DiagonalGaussian


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def covariance(D, seed):
    root = normal(D, D, seed=seed)
    return root @ root.T / D


@pytest.mark.equation("frechet-distance")
def test_frechet_distance_of_gaussians_with_diagonal_covariances_is_that_of_their_deviations():
    mu_1, mu_2, sigma_1, sigma_2 = normal(4, 6).abs() + 0.1
    expected = ((mu_1 - mu_2) ** 2 + (sigma_1 - sigma_2) ** 2).sum().item()
    assert frechet_distance(mu_1, (sigma_1**2).diag(), mu_2, (sigma_2**2).diag()) == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.equation("frechet-distance")
def test_frechet_distance_of_any_gaussians_has_the_trace_of_the_products_root():
    S_1, S_2, mu = covariance(5, seed=1), covariance(5, seed=2), torch.zeros(5)
    root_trace = (
        torch.linalg.eigvals(S_1 @ S_2).real.sqrt().sum()
    )  # S_1 S_2 has the eigenvalues of its symmetric twin
    expected = (S_1.trace() + S_2.trace() - 2 * root_trace).item()
    assert frechet_distance(mu, S_1, mu, S_2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mu, S_2, mu, S_1) == pytest.approx(expected, rel=1e-10)


@pytest.mark.equation("frechet-distance")
def test_frechet_distance_is_zero_from_itself_and_a_point_is_at_its_trace():
    mu, S = normal(5), covariance(5, seed=3)
    S[0], S[:, 0] = 0, 0  # singular, as with fewer pictures than features
    assert frechet_distance(mu, S, mu, S) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(mu, S, mu, torch.zeros(5, 5)) == pytest.approx(S.trace().item(), rel=1e-10)


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
def test_frechet_distance_of_two_samples_falls_to_the_truth_as_they_grow():
    shift = torch.tensor([2.0, 0, 0])
    small, large = (
        frechet_distance(*gaussian_of(normal(n, 3, seed=4)), *gaussian_of(normal(n, 3, seed=5) + shift))
        for n in (20, 20_000)
    )
    assert large == pytest.approx(4.0, abs=0.1) and abs(large - 4) < abs(small - 4)


@pytest.mark.equation("frechet-distance")
def test_the_gaussian_is_numpys_mean_and_covariance():
    x = normal(30, 4)
    mu, S = gaussian_of(x.float())
    assert mu.dtype == S.dtype == torch.float64
    np.testing.assert_allclose(mu, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(S, np.cov(x.numpy().T), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_of(x[:1])


@pytest.mark.equation("precision-recall")
def test_equal_clouds_cover_each_other_and_separate_ones_do_not():
    x = normal(50, 3)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


@pytest.mark.equation("precision-recall")
def test_a_cloud_that_is_half_of_the_other_is_precise_and_recalls_half():
    left, right = normal(60, 2, seed=1), normal(60, 2, seed=2) + 100
    precision, recall = precision_recall(torch.cat([left, right]), left)
    assert precision == 1.0 and recall == 0.5
    assert precision_recall(left, torch.cat([left, right])) == (0.5, 1.0)


@pytest.mark.equation("precision-recall")
def test_balls_reach_to_the_kth_fellow():
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-1.5], [-3.5]])
    assert precision_recall(real, generated, k=1) == (0.0, pytest.approx(1 / 3))  # balls 1, 1, 2; 2, 2
    assert precision_recall(torch.cat([real, real + 0.1]), torch.cat([generated, generated]), k=3)[0] == 0.0
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall(real, generated)


@pytest.mark.equation("balanced-accuracy")
def test_balanced_accuracy_by_hand():
    wanted = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1]]).bool()
    seen = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 0, 1]]).bool()
    found = balanced_accuracy(wanted, seen)
    assert found[:2].tolist() == pytest.approx([(3 / 4 + 0 / 1) / 2, (1 / 1 + 3 / 4) / 2])
    assert found[2].isnan()


@pytest.mark.equation("balanced-accuracy")
def test_guessing_scores_one_half_however_rare_the_attribute():
    wanted = torch.zeros(100, 2, dtype=torch.bool)
    wanted[:3] = True
    seen = torch.tensor([[False, True]]).expand(100, 2)
    assert balanced_accuracy(wanted, seen).tolist() == [0.5, 0.5]


@pytest.mark.equation("wilson-interval")
def test_wilsons_interval_has_its_published_values():
    low, high = wilson_interval(torch.tensor([8.0, 0.0]), torch.tensor([10.0, 10.0]))
    assert low.tolist() == pytest.approx([0.4902, 0.0], abs=1e-4)
    assert high.tolist() == pytest.approx([0.9433, 0.2775], abs=1e-4)


@pytest.mark.equation("balanced-interval")
def test_the_interval_of_balanced_accuracy_by_hand():
    wanted = (torch.arange(40) < 10)[:, None]
    right = torch.ones(40, 1, dtype=torch.bool)
    low, high = balanced_interval(
        wanted, right == wanted
    )  # Wilson: 10 of 10 is above 0.7225, 30 of 30 above 0.8865
    assert low.item() == pytest.approx(1 - math.hypot(0.2775, 0.1135) / 2, abs=1e-4) and high.item() == 1.0
    right[8:10] = False  # 8 of 10 lies between 0.4902 and 0.9433
    low, high = balanced_interval(wanted, right == wanted)
    assert low.item() == pytest.approx(0.9 - math.hypot(0.3098, 0.1135) / 2, abs=1e-4)
    assert high.item() == pytest.approx(0.9 + 0.1433 / 2, abs=1e-4)


@pytest.mark.equation("balanced-interval")
def test_the_interval_of_balanced_accuracy_holds_the_truth_in_95_of_100_trials():
    trials, wanted = 4000, torch.arange(90) < 30
    right = torch.rand(90, trials, generator=torch.Generator().manual_seed(0))
    right = torch.where(wanted[:, None], right < 0.9, right < 0.7)
    wanted = wanted[:, None].expand(90, trials)
    low, high = balanced_interval(wanted, right == wanted)
    above, below = (low > 0.8).double().mean().item(), (high < 0.8).double().mean().item()
    assert 0.005 < above < 0.04 and 0.005 < below < 0.04


def test_an_interval_of_weighted_pictures_holds_the_accuracy_and_no_more_than_can_be():
    r"""Of three prompts that want it one is drawn four times, always right; of two pictures drawn once one is."""
    wanted = torch.tensor([True] * 6 + [False] * 6)[:, None]
    seen = torch.tensor([True] * 4 + [True, False] + [False] * 6)[:, None]
    weight = torch.tensor([0.25] * 4 + [1.0, 1.0] + [1.0] * 6)
    accuracy = balanced_accuracy(wanted, seen).item()
    low, high = (bound.item() for bound in balanced_interval(wanted, seen, weight))
    assert accuracy == pytest.approx((5 / 6 + 1) / 2) and 0 < low < accuracy < high <= 1
    wide = [bound.item() for bound in balanced_interval(wanted, seen)]
    assert low < wide[0] and high > wide[1]  # 3 pieces of evidence say less than 6


def test_the_interval_of_the_mean_holds_it_and_counts_prompts_not_pictures():
    wanted, seen = normal(60, 5, seed=1) > 0, normal(60, 5, seed=2) > -0.5
    mean, prompts = balanced_accuracy(wanted, seen).mean().item(), torch.arange(60)
    low, high = bootstrap_interval(wanted, seen, prompts)
    assert low < mean < high
    twice = bootstrap_interval(wanted.repeat(4, 1), seen.repeat(4, 1), prompts.repeat(4))
    assert twice == pytest.approx((low, high))
    alone = bootstrap_interval(wanted.repeat(4, 1), seen.repeat(4, 1), torch.arange(240))
    assert alone[1] - alone[0] < 0.6 * (high - low)


def test_the_interval_of_the_mean_is_as_wide_as_the_means_of_many_samples():
    wanted = (torch.arange(100) % 2 == 0)[:, None].expand(100, 3)

    def sample(seed):
        right = torch.rand(100, 3, generator=torch.Generator().manual_seed(seed)) < 0.8
        return right == wanted

    means = torch.stack([balanced_accuracy(wanted, sample(s)).mean() for s in range(500)])
    low, high = bootstrap_interval(wanted, sample(1000), torch.arange(100))
    assert high - low == pytest.approx(2 * 1.96 * means.std().item(), rel=0.25)


def test_nearest_neighbours_over_parts_are_those_of_the_whole():
    queries, pool = normal(7, 3, seed=1), normal(50, 3, seed=2)
    distances, places = nearest(queries, pool.split(8), k=3)
    whole = (queries[:, None] - pool).norm(dim=2)
    assert torch.equal(places, whole.argsort(dim=1)[:, :3])
    assert torch.allclose(distances, whole.sort(dim=1).values[:, :3])


def test_a_copy_is_at_no_distance():
    pool = normal(20, 1000, dtype=torch.float32)
    distances, places = nearest(pool[3:5], pool.split(6), k=1)
    assert places.flatten().tolist() == [3, 4] and distances.max() < 1e-4


@pytest.mark.equation("latent-moments")
def test_latent_moments_are_those_of_many_scaled_samples():
    q = DiagonalGaussian(
        normal(6, 3, 4, 4, seed=1) * torch.tensor([1.0, 2, 3]).view(3, 1, 1) + 0.5, normal(6, 3, 4, 4, seed=2)
    )
    q.mu[:, 1] += q.mu[:, 0]
    health = latent_health(q, scale=0.5)
    g = torch.Generator().manual_seed(0)
    z = torch.cat([0.5 * q.sample(g) for _ in range(4000)]).transpose(0, 1).flatten(1)
    assert health["mean"] == pytest.approx(z.mean(1).tolist(), abs=0.01)
    assert health["variance"] == pytest.approx(z.var(1).tolist(), rel=0.02)
    assert torch.allclose(torch.tensor(health["correlation"]).double(), z.corrcoef(), atol=0.02)
    assert sum(health["kl"]) * 16 == pytest.approx(q.kl().mean().item(), rel=1e-6)
