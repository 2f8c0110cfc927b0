"""Pulled-back vectors against rows, weights and each other, sample by sample; the form tells the cheapest order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paraboloid.passes.memory import CACHED
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.products import OnePosition, Vector
from paraboloid.reductions.sums import same_memory

SAMPLES = 128  # of products that are made at a time, to stay in the cache


def layers(uses: Mapping[str, Outer]) -> list[tuple[str, str | None]]:
    """Names of parameters; those with the same gradients at one position as a pair: a weight and its layer's bias,
    whose input is one."""
    found: list[tuple[str, str | None]] = []
    for name, o in uses.items():
        before = uses[found[-1][0]] if found and found[-1][1] is None else None
        if isinstance(o, Vector) and isinstance(before, OnePosition) and same_memory(before.left, o.left):
            found[-1] = found[-1][0], name
        else:
            found.append((name, None))
    return found


def times(o: Outer, rows: Tensor, added: Tensor | None = None) -> Tensor:
    """J r for rows r [R D] of one parameter, [N V R], without forming J where there is a single position; `added` are
    those of the vector that `layers` pairs it with, [R p]."""
    if not isinstance(o, OnePosition) or o.left.shape[2] > 1:
        if isinstance(o, Vector):
            return (o.left.flatten(2) @ rows.T).transpose(0, 1)
        return torch.cat([J @ rows.T for J in o.rows(None)])
    R, p, right = len(rows), o.left.shape[4], o.right().flatten(1)  # [N q]
    left = o.left.flatten(2).transpose(0, 1)  # [N V p]
    blocks = rows.view(R, o.q, p).mT if o.flip else rows.view(R, p, o.q)
    N = len(right)
    step = min(N, SAMPLES) if right.device.type == "cpu" else N
    rows_at_a_time = CACHED.count(step * p * rows.element_size(), device=right.device)
    found = right.new_empty(N, len(o.left), R)
    for start in range(0, R, rows_at_a_time):
        some = blocks[start : start + rows_at_a_time]
        flat = some.reshape(-1, o.q).T
        shift = None if added is None else added[start : start + rows_at_a_time].reshape(-1)
        for n in (slice(first, first + step) for first in range(0, N, step)):
            inner = right[n] @ flat if shift is None else torch.addmm(shift, right[n], flat)
            found[n, :, start : start + len(some)] = left[n] @ inner.view(-1, len(some), p).mT  # [n r p]
    return found


def weighted_gram(
    o: Outer, W: Tensor, diagonal: bool = False, memory: int | None = None, added: Tensor | None = None
) -> Tensor:
    """sum_d J[n, k, d] W[d] J[n, l, d] over the elements d of one parameter, [N, V, V]; its diagonal [N, V] if asked.

    W has the parameter's shape (any shape of so many elements).  Outer products with a single position are never
    formed: the sum over q runs first, (r^2 W^T) [N, p], to which those of the vector that `layers` pairs it with, [p],
    are `added`.
    """
    if not isinstance(o, OnePosition):
        return torch.cat([gram(J, W.reshape(1, 1, -1), diagonal) for J in o.rows(memory)])
    G, p, q = o.block
    weights = W.reshape(G, q, p).mT if o.flip else W.reshape(G, p, q)
    right = o.right().squeeze(2).square().transpose(0, 1)  # [G N q]
    inner = (right @ weights.mT).transpose(0, 1).flatten(1)  # [N Gp]
    inner = inner if added is None else inner.add_(added.reshape(-1))
    left = o.left.squeeze(3).flatten(2).transpose(0, 1)  # [N V Gp]
    return gram(left, inner.unsqueeze(1), diagonal)


def weighted_grams(
    uses: Mapping[str, Outer], weights: Mapping[str, Tensor], diagonal: bool, memory: int | None
) -> Tensor:
    """The sum of that over all parameters."""
    parts = [
        weighted_gram(uses[name], weights[name], diagonal, memory, None if bias is None else weights[bias])
        for name, bias in layers(uses)
    ]
    return torch.stack(parts).sum(0)


def weighted_squares(o: Outer, weights: Tensor, memory: int | None) -> Tensor:
    """sum_{v,n} weights[v, n] (J_n^T v)^2 elementwise, [*shape]."""
    if isinstance(o, OnePosition | Vector):
        left = (o.left.square() * weights[:, :, None, None, None].to(o.left)).sum(0, keepdim=True)
        return o.total(left, squared=True)[0]
    total = torch.zeros(o.shape.numel(), dtype=o.left.dtype, device=o.left.device)
    for n, J in o.pieces(memory):
        total += weights[:, n].to(J).flatten() @ J.square().reshape(weights[:, n].numel(), -1)
    return total.view(o.shape)


def sample_weighted_squares(o: Outer, weights: Tensor, memory: int | None) -> Tensor:
    """sum_v weights[v, n] (J_n^T v)^2 elementwise, [N, *shape]."""
    parts, start = [], 0
    for J in o.rows(memory):  # [n V D]
        w = weights[:, start : start + len(J)].T.to(J)
        parts.append((w.unsqueeze(1) @ J.square()).squeeze(1))
        start += len(J)
    return torch.cat(parts).view(-1, *o.shape)


def gram(left: Tensor, weights: Tensor | float, diagonal: bool) -> Tensor:
    """sum_d left[n, v, d] weights[n, d] left[n, u, d], [n V V], for left [n V d] and weights [n or 1, 1, d]; or its
    diagonal [n V]."""
    if not diagonal:
        return (left * weights) @ left.mT
    d = left.shape[2]
    if not isinstance(weights, Tensor):
        return weights * _squares(left, left.new_ones(d))
    if len(weights) == 1:
        return _squares(left, weights[0, 0])
    V_first, ones, w = left.transpose(0, 1), left.new_ones(d), weights[:, 0]  # [V n d], [n d]
    step = CACHED.count(w.shape.numel() * left.element_size(), device=w.device)
    return torch.cat([piece.square().mul_(w) @ ones for piece in V_first.split(step)]).T


def _squares(left: Tensor, w: Tensor) -> Tensor:
    """sum_d left[n, v, d]^2 w[d], [n V], in pieces that stay in the cache, along the order in memory."""
    swap = left.transpose(0, 1).is_contiguous()
    rows = (left.transpose(0, 1) if swap else left).reshape(-1, len(w))
    step = CACHED.count(len(w) * left.element_size(), device=w.device)
    found = torch.cat([piece.square() @ w for piece in rows.split(step)])
    return found.view(left.shape[1], -1).T if swap else found.view(left.shape[:2])
