r"""Muon, for the inner matrices of every preset but `tiny`: every direction learns at the same speed.

A smile changes a latent by a twentieth of the difference between faces, a hat by half of it. AdamW learns the small
change late, because its gradient is small. Under Muon no direction is small. docs/experiments.md measures it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steep at 0, so that five rounds are enough
QUERY_KEY_DECAY = 0.5
QUERIES_KEYS = {"to_q", "to_k"}
TOGETHER = 2**20
EDGES = {"conv_in", "conv_out", "quant_conv", "post_quant_conv"}


def orthogonalized(G: Tensor, rounds: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""About the nearest matrix to G with orthonormal rows or columns (Jordan et al. 2024, Newton-Schulz).

    For G = U diag(s) V^T the result is about U V^T: the same directions, each with a singular value of 0.7 to 1.2, or
    less where it was below a thousandth of the norm of G. Each round is

    $$X \leftarrow a X + \left(b\, X X^\top + c\, (X X^\top)^2\right) X, \qquad X_0 = G / \lVert G \rVert_F$$

    Args:
        G: (m, n) or (k, m, n), any number of matrices at once.
        dtype: of the products; bfloat16 is enough, where the device multiplies it faster.
    """
    if G.ndim == 2:
        return orthogonalized(G[None], rounds, dtype)[0]
    if G.shape[-2] > G.shape[-1]:
        return orthogonalized(G.mT, rounds, dtype).mT
    a, b, c = QUINTIC
    X = (G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-12)).to(dtype)
    for _ in range(rounds):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)
    return X.to(G.dtype)


class Muon(torch.optim.Optimizer):
    r"""Momentum, made orthogonal (Jordan et al. 2024); the size of a step as in Liu et al. 2025, equation 4.

    $$M \leftarrow \mu M + (1 - \mu)\, G, \qquad
    W \leftarrow (1 - \eta \lambda)\, W - 0.2\, \eta \sqrt{\max(m, n)}\
    \mathrm{orth}\left(\mu M + (1 - \mu)\, G\right)$$

    where W is (m, n), G its gradient and M the momentum. A convolution is a matrix of its output channels by all the
    rest. Matrices of one shape go through `orthogonalized` together, about `TOGETHER` numbers, because its products
    take several times their memory.

    Args:
        parameters: or groups of them, as any optimizer of torch takes them.
        lr: eta; the factor beside it gives a step the size of AdamW's at the same rate.
        momentum: mu. weight_decay: lambda. dtype: of the products.
    """

    def __init__(self, parameters: Iterable, lr: float, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        r"""One step from the gradients."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[len(p), p[0].numel()].append(p)
            for (m, n), parameters in by_shape.items():
                count = -(-TOGETHER // (m * n))  # rounded up
                for first in range(0, len(parameters), count):
                    self._step_together(parameters[first : first + count], group)

    def _step_together(self, parameters: list[nn.Parameter], group: dict):
        r"""One step of matrices of one shape."""
        G = torch.stack([self._direction(p, group["momentum"]) for p in parameters])
        size = 0.2 * group["lr"] * math.sqrt(max(G.shape[1:]))
        for p, update in zip(parameters, orthogonalized(G, dtype=self.dtype), strict=True):
            W = as_rows(p)
            W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view(W.shape), alpha=size)

    def _direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        r"""mu M + (1 - mu) G as a matrix, after the update of M."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        M = state["momentum"].lerp_(p.grad, 1 - momentum)
        return as_rows(p.grad.lerp(M, momentum)).flatten(1)


def as_rows(p: Tensor) -> Tensor:
    r"""A convolution's (out, in, h, w) as (out, h, w, in), as channels-last stores it. The order of columns is free."""
    return p.movedim(1, -1)


def muon_groups(network: nn.Module) -> tuple[list[dict], list[nn.Parameter]]:
    r"""Groups for `Muon`, the matrices and convolutions between the first layer and the last; and all other parameters.

    The first and the last layer read and write pictures or latents, whose directions should differ in size. Queries and
    keys have a group with a stronger decay. Without it they grow until each softmax selects a single token, and its
    gradient vanishes.
    """
    inner = []
    queries_keys = []
    outer = []
    for name, p in network.named_parameters():
        parts = name.split(".")
        if p.ndim not in (2, 4) or not EDGES.isdisjoint(parts):
            outer.append(p)
        elif not QUERIES_KEYS.isdisjoint(parts):
            queries_keys.append(p)
        else:
            inner.append(p)
    return [{"params": inner}, {"params": queries_keys, "weight_decay": QUERY_KEY_DECAY}], outer
