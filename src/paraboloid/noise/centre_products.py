"""What clustering needs of the samples' gradients g_n, from their outer products: C_k . g_n, ||g_n||^2, and sums.

The orders of contraction are algebraically equal; the cheapest is chosen from the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from paraboloid.engine.outer_products import Outer
from paraboloid.noise.centres import Block, Centres, is_dense
from paraboloid.passes.memory import UNFOLDED, pooled
from paraboloid.reductions.sums import pieces, reduce

ORDERS = ("gram", "matrix")


def order(T: int, p: int, q: int, columns: int) -> str:
    """How C_k . g_n and ||g_n||^2 are found together, for `columns` = K r, by the multiplications that it takes.

    gram     sum_t (c . right_t)(d . left_t), and the norm by the Gram matrices of the positions
    matrix   P . (d c^T) and ||P||^2, with the gradient itself P = sum_t left_t (x) right_t

    (The first for the product with the second for the norm is never the cheapest.)
    """
    gram = T * (p + q) * columns + T * T * (p + q)
    return "gram" if gram < T * p * q + p * q * columns else "matrix"


class Products(NamedTuple):
    """C_k . g_n [N, K] and ||g_n||^2 [N] of one parameter; and the gradients [N G p q], where they were formed."""

    cross: Tensor
    norms: Tensor
    gradients: Tensor | None = None


def products(
    uses: list[Outer], centres: Centres, memory: int | None = None, by: str | None = None, keep: int = 0
) -> Products:
    """Products with the centres, and norms; `by` names the order of contraction (default: the cheapest).

    Where the cheapest way forms the gradients of this parameter, those of a batch are returned too if they take no more
    than `keep` bytes.
    """
    if is_dense(uses):
        return _from_matrices(uses, centres, memory, keep)
    o = uses[0]
    left = o.left[0]  # [N G T p]
    _, G, T, _ = left.shape
    if o.right is None:
        d = _over_positions(left).flatten(1)
        return Products(d @ centres.blocks().flatten(1).T, d.square().sum(1))  # q = 1
    if o.lookup:
        return Products(_looked_up(left, o.right(), centres), reduce(uses, {"norms"}, memory)["norms"])
    if T == 1:
        right = o.right()
        inner = _per_group(left[:, :, 0], centres.left) * _per_group(right[:, :, 0], centres.right)  # [N G K r]
        return Products(inner.sum((1, 3)), (left.square().sum((2, 3)) * right.square().sum((2, 3))).sum(1))
    by = by or order_of(o, centres)
    if by == "matrix":
        return _from_matrices(uses, centres, memory, keep)
    ranges = o.chunks(G * T * o.q, memory, UNFOLDED)
    crosses, norms = [], []
    for n in ranges:
        right = o.right(n)
        crosses.append(_by_position(left[n], right, centres))
        norms.append(((left[n] @ left[n].mT) * (right @ right.mT)).sum((1, 2, 3)))
    return Products(torch.cat(crosses), torch.cat(norms))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, elementwise where the inner axis has length one: torch multiplies such matrices one by one."""
    return left * right if left.shape[-1] == 1 else left @ right


def order_of(o: Outer, centres: Centres) -> str:
    """The cheapest order of contraction for one use with many positions."""
    return order(o.left.shape[3], o.left.shape[4], o.q, len(centres.left) * centres.left.shape[1])


def _from_matrices(uses: list[Outer], centres: Centres, memory: int | None, keep: int) -> Products:
    """By the gradients of ranges of samples, [n G p q]; those that may be kept meet all centres in one product."""
    left = uses[0].left
    whole = left.shape[1], *centres.block
    if math.prod(whole) * left.element_size() <= keep:
        J = pooled(whole, left)
        for _ in _matrices(uses, centres.block, memory, J):
            pass
        flat = J.flatten(1)
        return Products(flat @ centres.blocks().flatten(1).T, torch.linalg.vector_norm(flat, dim=1).square(), J)
    K, r, G, q = centres.right.shape
    right = centres.right.permute(2, 3, 0, 1).reshape(G, q, K * r)
    rows = centres.left.permute(2, 3, 0, 1).reshape(G, -1, K * r)
    crosses, norms = [], []
    for J in _matrices(uses, centres.block, memory):
        crosses.append(((J @ right) * rows).sum((1, 2)).unflatten(1, (K, r)).sum(2))
        norms.append(J.square().sum((1, 2, 3)))
    return Products(torch.cat(crosses), torch.cat(norms))


def _matrices(uses: list[Outer], block: Block, memory: int | None, out: Tensor | None = None) -> Iterator[Tensor]:
    """The gradients of ranges of samples, [n G p q]; put into `out` [N G p q] if it is given."""
    if is_dense(uses):
        for n, J in pieces(uses, memory):
            J = J[0].reshape(-1, *block)
            yield J if out is None else out[n].copy_(J)
        return
    o, (G, p, q) = uses[0], block
    left = o.left[0].mT  # [N G p T]
    assert o.right is not None
    ranges = list(o.chunks(G * q * max(p, left.shape[3]), memory, UNFOLDED))
    for n, right in zip(ranges, o.right.pieces(ranges), strict=True):
        yield torch.matmul(left[n], right.detach(), out=None if out is None else out[n])


def _per_group(side: Tensor, vectors: Tensor) -> Tensor:
    """side [N G p] . vectors [K r G p] -> [N G K r]."""
    K, r, G, p = vectors.shape
    found = side.transpose(0, 1) @ vectors.permute(2, 3, 0, 1).reshape(G, p, K * r)
    return found.transpose(0, 1).unflatten(2, (K, r))


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


def sums(
    uses: list[Outer], kept: str, basis: Tensor, cluster: Tensor, memory: int | None = None, J: Tensor | None = None
) -> Tensor:
    """sum over the samples of each cluster of g_n V_k (kept "right") or g_n^T V_k (kept "left").

    `basis` [K G q r] or [K G p r] are the columns V_k of the side that is kept; `cluster` [N] the samples' clusters; J
    the gradients [N G p q], if they are known.  Returns [K r G p] or [K r G q].
    """
    K, G = basis.shape[:2]
    if J is not None:
        return _through(_collect(J, cluster, K), kept, basis)
    if is_dense(uses):
        total = None
        m = basis.shape[2]
        for n, each in pieces(uses, memory):
            part = _collect(
                each[0].reshape(each.shape[1], 1, *((-1, m) if kept == "right" else (m, -1))), cluster[n], K
            )
            total = part if total is None else total.add_(part)
        assert total is not None
        return _through(total, kept, basis)
    o = uses[0]
    left = o.left[0]  # [N G T p]
    if o.right is None:
        d = _collect(_over_positions(left)[..., None], cluster, K)  # [K G p 1]
        return _through(d, kept, basis)
    if o.lookup:
        return _sums_of_lookup(o, left, kept, basis, cluster)
    parts = []
    for n in o.chunks(G * left.shape[2] * o.q, memory):
        right, columns = o.right(n), basis[cluster[n]]
        if kept == "right":
            parts.append(_product(left[n].mT, right @ columns))
        else:
            parts.append(_product(right.mT, left[n] @ columns))
    each = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _collect(each, cluster, K).permute(0, 3, 1, 2)


def _through(total: Tensor, kept: str, basis: Tensor) -> Tensor:
    """Sums of gradients [K G p q], seen through the columns that are kept."""
    return _product(total if kept == "right" else total.mT, basis).permute(0, 3, 1, 2)


def _sums_of_lookup(o: Outer, left: Tensor, kept: str, basis: Tensor, cluster: Tensor) -> Tensor:
    assert o.right is not None
    index = o.right()[:, 0].clamp(min=0)  # [N T]; a lookup has one group
    K, _, _, r = basis.shape
    if kept == "right":
        columns = basis[:, 0][cluster[:, None], index]  # [N T r]
        return _collect((left[:, 0].mT @ columns)[:, None], cluster, K).permute(0, 3, 1, 2)
    inner = left[:, 0] @ basis[:, 0][cluster]  # [N T r]
    flat = (cluster[:, None] * o.q + index).flatten()
    total = inner.new_zeros(K * o.q, r).index_add_(0, flat, inner.flatten(0, 1))
    return total.view(K, 1, o.q, r).permute(0, 3, 1, 2)


def _over_positions(left: Tensor) -> Tensor:
    """The sum over positions of [N G T p], without a copy where there is one."""
    return left[:, :, 0] if left.shape[2] == 1 else left.sum(2)


def _collect(each: Tensor, cluster: Tensor, K: int) -> Tensor:
    """[N ..] summed over the samples of each cluster -> [K ..]."""
    return each.new_zeros(K, *each.shape[1:]).index_add_(0, cluster, each)


def mean_sides(uses: list[Outer], cluster: Tensor, K: int, memory: int | None = None) -> tuple[Tensor, Tensor]:
    """Sums over each cluster of the positions' summed left [K 1 G p], and of their mean right [K 1 G q]."""
    o = uses[0]
    left = o.left[0]
    d = _collect(_over_positions(left), cluster, K)[:, None]
    if o.right is None:
        ones = d.new_ones(len(cluster), d.shape[2], 1)
        return d, _collect(ones, cluster, K)[:, None]
    T = left.shape[2]
    if o.lookup:
        index = o.right()[:, 0]
        flat = (cluster[:, None] * o.q + index.clamp(min=0)).flatten()
        counts = d.new_zeros(K * o.q).index_add_(0, flat, (index >= 0).flatten().to(d) / T)
        return d, counts.view(K, 1, 1, o.q)
    means = [o.right(n).mean(2) for n in o.chunks(left.shape[1] * T * o.q, memory)]
    return d, _collect(torch.cat(means), cluster, K)[:, None]
