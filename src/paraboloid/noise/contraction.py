"""What clustering needs of the samples' gradients g_n, from their outer products: C_k . g_n, ||g_n||^2, and sums.

The orders of contraction are algebraically equal; the cheapest is chosen from the shapes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.noise.centres import Centres, is_dense
from paraboloid.outer import Outer
from paraboloid.reductions import pieces, reduce

ORDERS = ("gram", "matrix")


def order(T: int, p: int, q: int, columns: int) -> str:
    """How C_k . g_n and ||g_n||^2 are found together, for `columns` = K r, by the multiplications that it takes.

    gram     sum_t (c . right_t)(d . left_t), and the norm by the Gram matrices of the positions
    matrix   d . P c and ||P||^2, with the gradient itself P = sum_t left_t (x) right_t

    (The first for the product with the second for the norm is never the cheapest.)
    """
    gram = T * (p + q) * columns + T * T * (p + q)
    return "gram" if gram < T * p * q + p * q * columns else "matrix"


def cross_and_norms(
    uses: list[Outer], centres: Centres, memory: int | None = None, by: str | None = None
) -> tuple[Tensor, Tensor]:
    """C_k . g_n [N, K] and ||g_n||^2 [N] of one parameter; `by` names the order of contraction (default: cheapest)."""
    if is_dense(uses):
        found = [_matrix(J[0].reshape(-1, *centres.block), centres) for _, J in pieces(uses, memory)]
        return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])
    o = uses[0]
    left = o.left[0]  # [N G T p]
    _, G, T, p = left.shape
    K = len(centres.left)
    if o.right is None:
        d = left.sum(2).flatten(1)
        C = torch.einsum("krgp,krgq->kgp", centres.left, centres.right).flatten(1)  # q = 1
        return d @ C.T, d.square().sum(1)
    if o.lookup:
        return _looked_up(left, o.right(), centres), reduce(uses, {"norms"}, memory)["norms"]
    if T == 1:
        right = o.right()
        inner = _per_group(left[:, :, 0], centres.left) * _per_group(right[:, :, 0], centres.right)  # [N G K r]
        return inner.sum((1, 3)), (left.square().sum((2, 3)) * right.square().sum((2, 3))).sum(1)
    by = by or order(T, p, o.q, K * centres.left.shape[1])
    crosses, norms = [], []
    for n in o.chunks(G * max(T * o.q, p * o.q), memory):
        right = o.right(n)
        if by == "matrix":
            cross, norm = _matrix(left[n].mT @ right, centres)
        else:
            cross = _by_position(left[n], right, centres)
            norm = ((left[n] @ left[n].mT) * (right @ right.mT)).sum((1, 2, 3))
        crosses.append(cross)
        norms.append(norm)
    return torch.cat(crosses), torch.cat(norms)


def _per_group(side: Tensor, vectors: Tensor) -> Tensor:
    """side [N G p] . vectors [K r G p] -> [N G K r]."""
    K, r, G, p = vectors.shape
    found = side.transpose(0, 1) @ vectors.permute(2, 3, 0, 1).reshape(G, p, K * r)
    return found.transpose(0, 1).unflatten(2, (K, r))


def _matrix(J: Tensor, centres: Centres) -> tuple[Tensor, Tensor]:
    """From the gradients themselves, J [n G p q]."""
    K, r, G, q = centres.right.shape
    right = centres.right.permute(2, 3, 0, 1).reshape(G, q, K * r)
    left = centres.left.permute(2, 3, 0, 1).reshape(G, -1, K * r)
    cross = ((J @ right) * left).sum((1, 2))  # [n K r]
    return cross.unflatten(1, (K, r)).sum(2), J.square().sum((1, 2, 3))


def _by_position(left: Tensor, right: Tensor, centres: Centres) -> Tensor:
    """sum_t (c . right_t)(d . left_t), [n K]; left [n G T p], right [n G T q]."""
    K, r = centres.left.shape[:2]
    rows = centres.left.permute(2, 0, 1, 3).flatten(1, 2)  # [G Kr p]
    columns = centres.right.permute(2, 0, 1, 3).flatten(1, 2)
    inner = ((rows @ left.mT) * (columns @ right.mT)).sum((1, 3))  # [n Kr]
    return inner.unflatten(1, (K, r)).sum(2)


def _looked_up(left: Tensor, index: Tensor, centres: Centres) -> Tensor:
    """The same where right_t is a row of the identity, given by its index [N G T]; left is zero where there is none."""
    total = None
    for g in range(left.shape[1]):
        picked = centres.right[:, :, g][..., index[:, g].clamp(min=0)]  # [K r N T]
        inner = torch.einsum("krp,ntp->krnt", centres.left[:, :, g], left[:, g])
        part = (picked * inner).sum((1, 3)).T
        total = part if total is None else total + part
    assert total is not None
    return total


def sums(uses: list[Outer], kept: str, basis: Tensor, cluster: Tensor, memory: int | None = None) -> Tensor:
    """sum over the samples of each cluster of g_n V_k (kept "right") or g_n^T V_k (kept "left").

    `basis` [K G q r] or [K G p r] are the columns V_k of the side that is kept; `cluster` [N] the samples' clusters.
    Returns [K r G p] or [K r G q].
    """
    K, G = basis.shape[:2]
    if is_dense(uses):
        result = None
        for n, J in pieces(uses, memory):
            m = basis.shape[2]
            shape = (J.shape[1], 1, -1, m) if kept == "right" else (J.shape[1], 1, m, -1)
            matrices = J[0].reshape(shape)
            matrices = matrices if kept == "right" else matrices.mT
            part = _collect(matrices @ basis[cluster[n]], cluster[n], K)
            result = part if result is None else result + part
        assert result is not None
        return result
    o = uses[0]
    left = o.left[0]  # [N G T p]
    if o.right is None:
        d = left.sum(2)[..., None]  # [N G p 1]
        return _collect(d * basis[cluster] if kept == "right" else d.mT @ basis[cluster], cluster, K)
    if o.lookup:
        return _sums_of_lookup(o, left, kept, basis, cluster)
    parts = []
    for n in o.chunks(G * left.shape[2] * o.q, memory):
        right, columns = o.right(n), basis[cluster[n]]
        if kept == "right":
            parts.append(left[n].mT @ (right @ columns))
        else:
            parts.append(right.mT @ (left[n] @ columns))
    return _collect(torch.cat(parts), cluster, K)


def _sums_of_lookup(o: Outer, left: Tensor, kept: str, basis: Tensor, cluster: Tensor) -> Tensor:
    assert o.right is not None
    index = o.right()[:, 0].clamp(min=0)  # [N T]; a lookup has one group
    K, _, _, r = basis.shape
    if kept == "right":
        columns = basis[:, 0][cluster[:, None], index]  # [N T r]
        return _collect((left[:, 0].mT @ columns)[:, None], cluster, K)
    inner = left[:, 0] @ basis[:, 0][cluster]  # [N T r]
    flat = (cluster[:, None] * o.q + index).flatten()
    total = inner.new_zeros(K * o.q, r).index_add_(0, flat, inner.flatten(0, 1))
    return total.view(K, 1, o.q, r).permute(0, 3, 1, 2)


def _collect(per_sample: Tensor, cluster: Tensor, K: int) -> Tensor:
    """[N G p r], summed over the samples of each cluster -> [K r G p]."""
    total = per_sample.new_zeros(K, *per_sample.shape[1:]).index_add_(0, cluster, per_sample)
    return total.permute(0, 3, 1, 2)


def mean_sides(uses: list[Outer], cluster: Tensor, K: int, memory: int | None = None) -> tuple[Tensor, Tensor]:
    """Sums over each cluster of the positions' summed left [K 1 G p], and of their mean right [K 1 G q]."""
    o = uses[0]
    left = o.left[0]
    d = _collect(left.sum(2)[..., None], cluster, K)
    if o.right is None:
        return d, d.new_zeros(*d.shape[:3], 1).index_add_(0, cluster, d.new_ones(len(cluster), 1, d.shape[2], 1))
    T = left.shape[2]
    if o.lookup:
        index = o.right()[:, 0]
        flat = (cluster[:, None] * o.q + index.clamp(min=0)).flatten()
        counts = d.new_zeros(K * o.q).index_add_(0, flat, (index >= 0).flatten().to(d) / T)
        return d, counts.view(K, 1, 1, o.q)
    means = [o.right(n).mean(2) for n in o.chunks(left.shape[1] * T * o.q, memory)]
    return d, _collect(torch.cat(means)[..., None], cluster, K)
