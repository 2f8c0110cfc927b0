"""Kronecker factors from the pulled-back vectors' outer products alone: the nearest Kronecker product to each block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.kronecker import Kron
from paraboloid.linalg.operand import check_count
from paraboloid.losses import LossFunction
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.quantities.kronecker import fisher_source
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.quantity import Quantity, Source
from paraboloid.reductions.kronecker_factors import EXACT_VECTOR, MAX_FACTOR, check_max_factor


def KFOC(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    fisher: str = "mc",
    samples: int = 1,
    seed: int = 0,
    iterations: int = 100,
    max_factor: int = MAX_FACTOR,
    output: Output | None = None,
    max_memory: int | None = None,
) -> KroneckerFactored:
    """left (x) right nearest to each weight's block a sum_{v,n} g_vn g_vn^T, g_vn = J_n^T v, in Frobenius norm.

    By power iteration, from the identity: left <- a sum_vn G_vn right G_vn^T / |right|^2 and right <- a sum_vn
    G_vn^T left G_vn / |left|^2, with G_vn [p, q] the vector as a matrix: positive semi-definite, and like `pb.KFAC`
    exact for one vector at one position.  What varies together in a layer's inputs and gradients is not taken for
    independent.  Biases have their exact block, their diagonal beyond 4096 elements.

    iterations  at most; they end where `right` no longer moves
    max_factor  a side with more rows is a diagonal

    Keeps all the vectors, V N D numbers.  The other arguments are those of `pb.KFAC`.
    Sources: Van Loan and Pitsianis 1993; Schnaus, Lee and Triebel 2021 (Kronecker-factored optimal curvature).
    """
    check_count("iterations", iterations)
    check_max_factor(max_factor)
    passes = OverData(model, loss_fn, data, seed=seed, output=output, max_memory=max_memory)
    quantity = _Vectors(fisher_source(fisher, samples))
    vectors = passes.sums([quantity]).values[quantity.name]
    krons = {}
    for name, p in passes.values.items():
        g = torch.cat(vectors[name])
        g = g.to(torch.promote_types(g.dtype, torch.float32)) * passes.factor**0.5
        rows = 1 if p.dim() == 0 else len(p)
        krons[name] = _nearest(g.reshape(len(g), rows, -1), iterations, max_factor)
    return KroneckerFactored(passes.values, krons)


class _Vectors(Quantity):
    """All J_n^T v themselves, as a list of [V N, *shape]."""

    name, over_ranks, needs = "vectors", "local", frozenset({"samples"})

    def __init__(self, source: Source):
        self.source = source

    def add(self, value, group):
        return [*(value or []), group.parts["samples"].flatten(0, 1)]

    def merge(self, a, b):
        return a + b


def _nearest(G: Tensor, iterations: int, max_factor: int) -> Kron:
    """The factors of sum_m vec(G_m) vec(G_m)^T, G [M, p, q]."""
    p, q = G.shape[1:]
    if q == 1:
        g = G[:, :, 0]
        left = g.square().sum(0) if p > min(EXACT_VECTOR, max_factor) else g.T @ g
        return Kron(left, G.new_ones(1, 1))
    left, right = G.new_zeros(p), G.new_ones(q) if q > max_factor else torch.eye(q, dtype=G.dtype, device=G.device)
    still = torch.finfo(G.dtype).eps ** (2 / 3)
    for _ in range(iterations):
        left = _side(G, right, p > max_factor)
        if not left.any():
            return Kron(left, right)  # no vector at all
        before, right = right, _side(G.mT, left, q > max_factor)
        if (right / right.norm() - before / before.norm()).norm() <= still:
            break
    return Kron(left, right)


def _side(G: Tensor, other: Tensor, diagonal: bool) -> Tensor:
    """sum_m G_m other G_m^T / |other|^2, or its diagonal."""
    H = G * other if other.dim() == 1 else G @ other
    if diagonal:
        found = (H * G).sum((0, 2))
    else:
        found = H.transpose(0, 1).flatten(1) @ G.transpose(0, 1).flatten(1).T
    return found / other.square().sum()
