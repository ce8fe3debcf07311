import pytest
import torch
from torch import nn

from ddpm.training import muon
from ddpm.training.dry_run import LiveBytes
from ddpm.training.muon import Muon, muon_groups, orthogonalized
from ddpm.unet import UNet
from ddpm.vae import KLVAE


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values: torch.Tensor, m: int, n: int) -> tuple[torch.Tensor, ...]:
    U, V = (torch.linalg.qr(normal(size, len(values), seed=size))[0] for size in (m, n))
    return U @ values.diag() @ V.T, U, V


@pytest.mark.equation("newton-schulz")
@pytest.mark.parametrize(("m", "n"), [(32, 32), (32, 100), (100, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_direction_gets_a_singular_value_near_one_and_stays_where_it_is(m, n, dtype):
    values = torch.logspace(0, -2, 32)
    G, U, V = with_singular_values(values, m, n)
    X = orthogonalized(G, dtype=dtype)
    seen = U.T @ X @ V
    assert seen.diag().min() > 0.65 and seen.diag().max() < 1.25
    assert (seen - seen.diag().diag()).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.equation("newton-schulz")
def test_one_round_is_the_polynomial_of_the_singular_values():
    values = torch.tensor([3.0, 1.0, 0.2])
    G, U, V = with_singular_values(values, 3, 5)
    s = values / values.norm()
    expected = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close((U.T @ orthogonalized(G, rounds=1) @ V).diag(), expected, rtol=1e-4, atol=1e-5)


def test_many_matrices_at_once_are_each_as_alone_and_zero_stays_zero():
    G = torch.stack([normal(4, 6, seed=1), torch.zeros(4, 6), 1e-6 * normal(4, 6, seed=2)])
    X = orthogonalized(G)
    for one, alone in zip(X, G, strict=True):
        torch.testing.assert_close(one, orthogonalized(alone), rtol=1e-4, atol=1e-5)
    assert not X[1].any()


@pytest.mark.equation("muon")
def test_its_steps_are_those_of_torchs_own_for_matrices():
    ours, theirs = (nn.Parameter(normal(24, 40)) for _ in range(2))
    one = Muon([ours], lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for p, optimizer in ((ours, one), (theirs, other)):
            p.grad = normal(24, 40, seed=step + 1)
            optimizer.step()
    moved = (theirs - normal(24, 40)).norm()  # five rounds in bf16, in another order of sums
    assert moved > 0.3 and (ours - theirs).norm() < 0.1 * moved


@pytest.mark.equation("muon")
def test_two_steps_of_a_convolution_by_hand():
    p = nn.Parameter(normal(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = Muon([p], lr=0.1, weight_decay=0.5)
    expected = p.detach().clone()
    M = torch.zeros(4, 3, 3, 3)
    for step in (1, 2):
        G = normal(4, 3, 3, 3, seed=step)
        p.grad = G.contiguous(memory_format=torch.channels_last)
        optimizer.step()
        M = 0.95 * M + 0.05 * G
        U = orthogonalized((0.95 * M + 0.05 * G).reshape(4, 27)).reshape(4, 3, 3, 3)
        expected = (1 - 0.1 * 0.5) * expected - 0.2 * 0.1 * 27**0.5 * U
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_parameter_without_a_gradient_stays_and_shapes_may_mix():
    still, wide, tall = (nn.Parameter(normal(*shape)) for shape in ((3, 5), (3, 5), (5, 3)))
    optimizer = Muon([still, wide, tall], lr=0.1)
    wide.grad, tall.grad = normal(3, 5, seed=1), normal(5, 3, seed=2)
    optimizer.step()
    assert torch.equal(still, normal(3, 5)) and still not in optimizer.state
    assert not torch.equal(wide, normal(3, 5)) and not torch.equal(tall, normal(5, 3))


def test_a_step_takes_the_memory_of_a_few_matrices_and_not_of_all(monkeypatch):
    matrices = [nn.Parameter(normal(64, 64)) for _ in range(16)]
    alone = nn.Parameter(normal(64, 64))
    for p in [*matrices, alone]:
        p.grad = normal(64, 64, seed=1)
    Muon([alone], lr=0.1).step()
    monkeypatch.setattr(muon, "TOGETHER", 2 * alone.numel())
    optimizer = Muon(matrices, lr=0.1)
    with LiveBytes() as live:
        optimizer.step()
    assert live.now == 16 * alone.nbytes  # the momentum
    assert live.peak - live.now < 14 * alone.nbytes
    for p in matrices:
        torch.testing.assert_close(p, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [UNet(4, 4, (32, 64), (1,), 1), KLVAE((32, 32), 1)])
def test_every_parameter_has_one_optimizer_and_the_edges_are_not_muons(network):
    groups, outer = muon_groups(network)
    inner = [p for group in groups for p in group["params"]]
    assert {id(p) for p in inner + outer} == {id(p) for p in network.parameters()}
    assert len(inner) + len(outer) == len(list(network.parameters()))
    assert all(p.ndim in (2, 4) for p in inner)
    assert sum(p.numel() for p in inner) > sum(p.numel() for p in outer)
    edges = [m for name, m in network.named_modules() if name.split(".")[-1] in ("conv_in", "conv_out")]
    assert edges and all(id(edge.weight) in {id(p) for p in outer} for edge in edges)


def test_queries_and_keys_decay_more_than_the_rest():
    network = UNet(4, 4, (32, 64), (1,), 1)
    (rest, queries_keys), _ = muon_groups(network)
    named = {id(p) for name, p in network.named_parameters() if name.endswith(("to_q.weight", "to_k.weight"))}
    assert named and named == {id(p) for p in queries_keys["params"]}
    q, v = queries_keys["params"][0], rest["params"][0]
    q_before, v_before = q.norm().item(), v.norm().item()
    optimizer = Muon([rest, queries_keys], lr=0.1, weight_decay=0.01)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert q.norm().item() == pytest.approx(0.95 * q_before)
    assert v.norm().item() == pytest.approx(0.999 * v_before)
