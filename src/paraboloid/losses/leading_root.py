"""The largest columns of the root of the loss's Hessian, sample by sample, and what the others would have added.

    H_n = sum_v s_v[n] s_v[n]^T,   kept: the K columns with the largest |s_v[n]|^2, an order of its own for each sample

What is left out, sum_n sum_{v not kept} s_v[n] s_v[n]^T, is positive semi-definite whatever is kept, and its trace is
the sum of the squares left out: exact, not estimated.  K is the smallest number for which this is at most `tol` times
the trace of all H_n together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class LeadingRoot(NamedTuple):
    """`columns` of the output's shape, `count` of them, with the traces summed over samples: left out, and in all."""

    columns: Iterator[Tensor]
    count: int
    left: float
    total: float


class Order(NamedTuple):
    """places [N, K]: the columns that each sample keeps, largest first; traces: left out, and in all."""

    places: Tensor
    left: float
    total: float


def largest(squares: Tensor, tol: float) -> Order:
    """The order by squared norms [N, V]; at least one column is kept."""
    ordered, places = squares.double().sort(1, descending=True)
    by_rank = ordered.sum(0)
    beyond = by_rank.flip(0).cumsum(0).flip(0)  # beyond[k]: what the columns from k on add
    total = float(beyond[0])
    count = max(int((beyond > tol * total).sum()), 1)
    return Order(places[:, :count], float(beyond[count]) if count < len(beyond) else 0.0, total)


def of_columns(root: Iterable[Tensor], again: Iterable[Tensor], tol: float) -> LeadingRoot:
    """From all columns, which are read twice: for their norms, and for those that are kept."""
    order = largest(torch.stack([s.reshape(len(s), -1).square().sum(1) for s in root], 1), tol)
    samples, count = order.places.shape
    kept: Tensor | None = None
    for v, s in enumerate(again):
        kept = s.new_zeros(count, *s.shape) if kept is None else kept
        n, k = (order.places == v).nonzero(as_tuple=True)
        kept[k, n] = s[n]
    assert kept is not None and samples
    return LeadingRoot(iter(kept), count, order.left, order.total)
