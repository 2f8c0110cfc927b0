"""The largest columns of the root of the loss's Hessian, sample by sample, and what the others would have added.

    H_n = sum_v s_v[n] s_v[n]^T,   kept: the K columns with the largest |s_v[n]|^2, an order of its own for each sample

What is left out, sum_n sum_{v not kept} s_v[n] s_v[n]^T, is positive semi-definite whatever is kept, and its trace is
the sum of the squares left out: exact, not estimated.  K is the smallest number for which this is at most `tol` times
the trace of all H_n together; or each sample keeps a number of its own, K_n, so that the sum of all K_n is smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Of = Callable[[Tensor], Callable[[Tensor], Tensor]]


class Own(NamedTuple):
    """As many columns as each sample needs: K_n, [N] on the CPU, and the trace that these leave out.

    of(n)(k) -> column k, from the largest, of sample n, for places n, k [R]: [R, ...]; zero from K_n on.
    """

    counts: Tensor
    left: float
    of: Of


class LeadingRoot(NamedTuple):
    """`columns` of the output's shape, `count` of them, with the traces summed over samples: left out, and in all.
    `own`: fewer of them, where it is possible to pull other numbers of columns back for other samples."""

    columns: Iterator[Tensor]
    count: int
    left: float
    total: float
    own: Own | None = None


class Order(NamedTuple):
    """places [N, V]: the columns of each sample, largest first; the first `count` of all are kept, or as many as
    `counts` [N] says of each; traces: what these leave out, and all."""

    places: Tensor
    count: int
    left: float
    total: float
    counts: Tensor
    left_by_own: float

    @property
    def kept(self) -> Tensor:
        """[N, count]."""
        return self.places[:, : self.count]

    def own(self, of: Of) -> Own:
        """of(n)(place) -> column `place` of sample n, [R, ...]."""

        def ranked(n: Tensor) -> Callable[[Tensor], Tensor]:
            counts, columns = self.counts.to(n.device)[n], of(n)

            def column(k: Tensor) -> Tensor:
                found = columns(self.places[n, k.clamp(max=self.places.shape[1] - 1)])
                return found.mul_((k < counts).view(-1, *[1] * (found.dim() - 1)))

            return column

        return Own(self.counts, self.left_by_own, ranked)


def largest(squares: Tensor, tol: float) -> Order:
    """The order by squared norms [N, V]; at least one column is kept."""
    ordered, places = squares.double().sort(1, descending=True)
    by_rank = ordered.sum(0)
    beyond = by_rank.flip(0).cumsum(0).flip(0)  # beyond[k]: what the columns from k on add
    total = float(beyond[0])
    count = max(int((beyond > tol * total).sum()), 1)
    smallest, at = ordered.flatten().sort()
    dropped = int((smallest.cumsum(0) <= tol * total).sum())
    counts = torch.ones_like(ordered, dtype=torch.int64).flatten().index_fill_(0, at[:dropped], 0).view_as(ordered)
    left = float(smallest[:dropped].sum())
    return Order(places, count, float(beyond[count]) if count < len(beyond) else 0.0, total, counts.sum(1).cpu(), left)


def of_columns(root: Iterable[Tensor], again: Iterable[Tensor], tol: float) -> LeadingRoot:
    """From all columns, which are read twice: for their norms, and for those that are kept."""
    order = largest(torch.stack([s.reshape(len(s), -1).square().sum(1) for s in root], 1), tol)
    kept: Tensor | None = None
    for v, s in enumerate(again):
        kept = s.new_zeros(order.count, *s.shape) if kept is None else kept
        n, k = (order.kept == v).nonzero(as_tuple=True)
        kept[k, n] = s[n]
    assert kept is not None
    return LeadingRoot(iter(kept), order.count, order.left, order.total)
