"""What clustering needs of the samples' gradients g_n, from their outer products: C_k . g_n, ||g_n||^2, and sums.

The orders of contraction are algebraically equal; the cheapest is chosen from the shapes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paraboloid.noise.centres import Centres
from paraboloid.passes.memory import UNFOLDED
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.products import Lookup, OnePosition, Products, Vector
from paraboloid.reductions.sums import formed

ORDERS = ("gram", "matrix")


def order(T: int, p: int, q: int, columns: int) -> str:
    """How C_k . g_n and ||g_n||^2 are found together, for `columns` = K r, by the multiplications that it takes.

    gram     sum_t (c . right_t)(d . left_t), and the norm by the Gram matrices of the positions
    matrix   P . (d c^T) and ||P||^2, with the gradient itself P = sum_t left_t (x) right_t

    (The first for the product with the second for the norm is never the cheapest.)
    """
    gram = T * (p + q) * columns + T * T * (p + q)
    return "gram" if gram < T * p * q + p * q * columns else "matrix"


class Found(NamedTuple):
    """C_k . g_n [N, K] and ||g_n||^2 [N] of one parameter; and the gradients [N G p q], where they were formed."""

    cross: Tensor
    norms: Tensor
    gradients: Tensor | None = None


def products(o: Outer, centres: Centres, memory: int | None = None, by: str | None = None, keep: int = 0) -> Found:
    """Products with the centres, and norms; `by` names the order of contraction (default: the cheapest).

    Where the cheapest way forms the gradients of this parameter, those of a batch are returned too if they take no more
    than `keep` bytes.
    """
    if isinstance(o, Vector):
        return Found(o.left[0].flatten(1) @ centres.blocks().flatten(1).T, o.norms())
    if isinstance(o, OnePosition):
        inner = _per_group(o.left[0, :, :, 0], centres.left) * _per_group(o.right()[:, :, 0], centres.right)
        return Found(inner.sum((1, 3)), o.norms())  # [N G K r]
    if isinstance(o, Lookup):
        return Found(_looked_up(o.left[0], o.right(), centres), o.norms())
    if not isinstance(o, Products) or (by or order_of(o, centres)) == "matrix":
        return _from_matrices(o, centres, memory, keep)
    _, _, G, T, _ = o.left.shape
    crosses, norms = [], []
    for n in o.chunks(G * T * o.q, memory, UNFOLDED):
        left, right = o.left[0, n], o.right(n)
        crosses.append(_by_position(left, right, centres))
        norms.append(((left @ left.mT) * (right @ right.mT)).sum((1, 2, 3)))
    return Found(torch.cat(crosses), torch.cat(norms))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, elementwise where the inner axis has length one: torch multiplies such matrices one by one."""
    return left * right if left.shape[-1] == 1 else left @ right


def order_of(o: Products, centres: Centres) -> str:
    """The cheapest order of contraction for many positions."""
    return order(o.left.shape[3], o.left.shape[4], o.q, len(centres.left) * centres.left.shape[1])


def _from_matrices(o: Outer, centres: Centres, memory: int | None, keep: int) -> Found:
    """By the gradients of ranges of samples, [n G p q]; those that may be kept meet all centres in one product."""
    if o.left.shape[1] * o.shape.numel() * o.left.element_size() <= keep:
        J = formed(o, memory, UNFOLDED).reshape(-1, *centres.block)
        flat = J.flatten(1)
        return Found(flat @ centres.blocks().flatten(1).T, torch.linalg.vector_norm(flat, dim=1).square(), J)
    K, r, G, q = centres.right.shape
    right = centres.right.permute(2, 3, 0, 1).reshape(G, q, K * r)
    rows = centres.left.permute(2, 3, 0, 1).reshape(G, -1, K * r)
    crosses, norms = [], []
    for _, J in o.blocks(memory, limit=UNFOLDED):
        J = J.reshape(-1, *centres.block)
        crosses.append(((J @ right) * rows).sum((1, 2)).unflatten(1, (K, r)).sum(2))
        norms.append(J.square().sum((1, 2, 3)))
    return Found(torch.cat(crosses), torch.cat(norms))


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
    o: Outer, kept: str, basis: Tensor, cluster: Tensor, memory: int | None = None, J: Tensor | None = None
) -> Tensor:
    """sum over the samples of each cluster of g_n V_k (kept "right") or g_n^T V_k (kept "left").

    `basis` [K G q r] or [K G p r] are the columns V_k of the side that is kept; `cluster` [N] the samples' clusters; J
    the gradients [N G p q], if they are known.  Returns [K r G p] or [K r G q].
    """
    K, G = basis.shape[:2]
    if J is not None:
        return _through(_collect(J, cluster, K), kept, basis)
    if isinstance(o, Vector):
        return _through(_collect(o.left[0, :, :, 0, :, None], cluster, K), kept, basis)
    if isinstance(o, Lookup):
        return _sums_of_lookup(o, kept, basis, cluster)
    if not isinstance(o, Products):
        block = (1, -1, basis.shape[2]) if kept == "right" else (1, basis.shape[2], -1)
        total = None
        for n, J in o.blocks(memory):
            part = _collect(J.reshape(len(J), *block), cluster[n], K)
            total = part if total is None else total.add_(part)
        assert total is not None
        return _through(total, kept, basis)
    parts = []
    for n in o.chunks(G * o.left.shape[3] * o.q, memory):
        left, right, columns = o.left[0, n], o.right(n), basis[cluster[n]]
        if kept == "right":
            parts.append(_product(left.mT, right @ columns))
        else:
            parts.append(_product(right.mT, left @ columns))
    each = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _collect(each, cluster, K).permute(0, 3, 1, 2)


def _through(total: Tensor, kept: str, basis: Tensor) -> Tensor:
    """Sums of gradients [K G p q], seen through the columns that are kept."""
    return _product(total if kept == "right" else total.mT, basis).permute(0, 3, 1, 2)


def _sums_of_lookup(o: Lookup, kept: str, basis: Tensor, cluster: Tensor) -> Tensor:
    left, index = o.left[0, :, 0], o.right()[:, 0].clamp(min=0)  # [N T p], [N T]; a lookup has one group
    K, _, _, r = basis.shape
    if kept == "right":
        columns = basis[:, 0][cluster[:, None], index]  # [N T r]
        return _collect((left.mT @ columns)[:, None], cluster, K).permute(0, 3, 1, 2)
    inner = left @ basis[:, 0][cluster]  # [N T r]
    flat = (cluster[:, None] * o.q + index).flatten()
    total = inner.new_zeros(K * o.q, r).index_add_(0, flat, inner.flatten(0, 1))
    return total.view(K, 1, o.q, r).permute(0, 3, 1, 2)


def _collect(each: Tensor, cluster: Tensor, K: int) -> Tensor:
    """[N ..] summed over the samples of each cluster -> [K ..]."""
    return each.new_zeros(K, *each.shape[1:]).index_add_(0, cluster, each)


def mean_sides(o: Vector | Products, cluster: Tensor, K: int, memory: int | None = None) -> tuple[Tensor, Tensor]:
    """Sums over each cluster of the positions' summed left [K 1 G p], and of their mean right [K 1 G q]."""
    _, _, G, T, _ = o.left.shape
    d = _collect(o.left[0, :, :, 0] if T == 1 else o.left[0].sum(2), cluster, K)[:, None]
    if isinstance(o, Vector):
        ones = d.new_ones(len(cluster), G, 1)
        return d, _collect(ones, cluster, K)[:, None]
    if isinstance(o, Lookup):
        index = o.right()[:, 0]
        flat = (cluster[:, None] * o.q + index.clamp(min=0)).flatten()
        counts = d.new_zeros(K * o.q).index_add_(0, flat, (index >= 0).flatten().to(d) / T)
        return d, counts.view(K, 1, 1, o.q)
    means = [o.mean_inputs(n) for n in o.chunks(G * T * o.q, memory)]
    return d, _collect(torch.cat(means), cluster, K)[:, None]
