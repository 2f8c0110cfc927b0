"""The canonical form of a parameter's pulled-back vectors, and what it costs to look at it.

For every parameter, pulling an output vector v back through sample n is a sum over positions of outer products:

    (J_n^T v)[g, p, q] = sum_t left[v, n, g, t, p] * right[n, g, t, q]

V vectors, N samples, G groups, T positions (sequence or space), p x q the parameter block.  `left` is linear in the
gradient at the layer's output, `right` is a function of the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paraboloid.engine.patches import unfold
from paraboloid.passes.memory import PIECES, Limit, pooled_product


@dataclass
class Right:
    """The input side of an outer product, built for a range of samples at a time (an unfolded input may be large).

    `rows(slice)` gives [R G T q], or int64 [R G T] (a lookup into q; -1 where there is nothing to look up and left is
    zero), for a range of the rule's rows.  With `q_axes` it gives [R G *q-axes *T-axes] instead, usually a strided view
    of the input: copying is left to who needs it, in the arrangement that serves it.  The rows unflatten into (a, N, b)
    with N the samples; a and b join T.
    """

    rows: Callable[[slice], Tensor]
    layout: tuple[int, int, int]
    lookup: bool = False
    dtype: torch.dtype | None = None
    q_axes: int | None = None
    _kept: Tensor | None = None

    def keep(self) -> None:
        """Copy strided rows once, for the pulls that follow; nothing to do where the rows are the input itself."""
        if self.q_axes is None or self._kept is not None:
            return
        self._kept = self()

    def squared(self) -> Right:
        """The same with every number squared."""
        return self if self.lookup else replace(self, rows=lambda n: self.rows(n).square(), _kept=None)

    def forget(self) -> None:
        self._kept = None

    def _view(self, n: slice) -> Tensor:
        """[n G a b T q], or [n G *q-axes a b *T-axes], without a copy where the rows allow it; without a and b where
        the latter are both one."""
        a, N, b = self.layout
        if a == b == 1 and self.q_axes is not None:
            return self.rows(n)
        if a == 1:
            start, stop, _ = n.indices(N)
            right = self.rows(slice(start * b, stop * b)).unflatten(0, (1, stop - start, b))
        else:
            right = self.rows(slice(None)).unflatten(0, (a, N, b))[:, n]
        right = right.movedim(1, 0).movedim(3, 1)  # [n G a b ..]
        if self.q_axes is not None:
            right = right.movedim((2, 3), (2 + self.q_axes, 3 + self.q_axes))
        return right

    def __call__(self, n: slice = slice(None)) -> Tensor:
        """[n G T q], or int64 [n G T]; for the samples in the slice."""
        if self._kept is not None:
            return self._kept[n]
        return self._matrices(self._view(n))

    def pieces(self, ranges: Iterable[slice]) -> Iterator[Tensor]:
        """The same for each of several slices; what the strided rows lie in (a padded input) is made once for all."""
        if self.q_axes is None or self._kept is not None:
            yield from map(self, ranges)
            return
        rows = self._view(slice(None))
        for n in ranges:
            yield self._matrices(rows[n])

    def _matrices(self, rows: Tensor) -> Tensor:
        if self.lookup:
            return rows.flatten(2)
        rows = rows.to(self.dtype)
        return rows.flatten(2, 4) if self.q_axes is None else unfold(rows, self.q_axes)

    def columns(self, n: slice = slice(None)) -> Tensor:
        """[G q nT]: all positions of the samples in the slice side by side, for one large product."""
        right = self._view(n).to(self.dtype)
        if self.q_axes is None:
            return right.flatten(2, 4).transpose(0, 1).flatten(1, 2).mT
        right = right.movedim(0, 1 + self.q_axes)  # [G *q-axes n a b *T-axes]
        return right.flatten(1 + self.q_axes).flatten(1, self.q_axes)


@dataclass(frozen=True)
class Outer:
    """One use of one parameter: J_n^T v as outer products of `left` [V N G T p] and `right` [N G T q].

    kind "matrix": as above.  "vector": q = 1 and right is one (bias, scale, raw parameter).  "general": left holds
    J_n^T v itself, p being the whole parameter (from a fallback; it has no structure).  "zero": a parameter without
    influence on the output.
    """

    left: Tensor
    right: Right | None  # None: one
    shape: torch.Size  # of the weight that the outer products live on
    q: int = 1
    flip: bool = False  # that weight is stored as q x p
    via: Callable[[Tensor], Tensor] | None = None  # derived weight -> parameter: [B *shape] -> [B *parameter's shape]
    kind: str = "matrix"

    @property
    def lookup(self) -> bool:
        return self.right is not None and self.right.lookup

    def finish(self, J: Tensor, lead: tuple[int, ...]) -> Tensor:
        """[.. G p q] -> [*lead, *parameter's shape]."""
        J = (J.mT if self.flip else J).reshape(-1, *self.shape)
        return (self.via(J) if self.via else J).unflatten(0, lead)

    def sum_over(self, left: Tensor, right: Tensor | None) -> Tensor:
        """sum over positions of left [.. G T p] (x) right [.. G T q] -> [.. G p q]; the axes .. broadcast."""
        if right is None:
            return left.sum(-2).unsqueeze(-1)
        if right.is_floating_point():
            return pooled_product(left.mT, right)
        J = left.new_zeros(*left.shape[:-2], self.q, left.shape[-1])
        index = right.clamp(min=0).unsqueeze(-1).expand_as(left)
        return J.scatter_add_(-2, index, left).mT

    def samples(self, n: slice = slice(None)) -> Tensor:
        """J_n^T v for the samples in the slice, [V n *shape]."""
        left = self.left[:, n]
        right = None if self.right is None else self.right(n)
        V, count = left.shape[:2]
        if V > 1 and right is not None and right.is_floating_point():
            # one product per sample and group, the vectors joining p: nothing is copied V times
            G, T, p = left.shape[2:]
            left = left.permute(1, 2, 0, 4, 3).reshape(count, G, V * p, T)
            J = pooled_product(left, right).view(count, G, V, p, -1).movedim(2, 0)
        else:
            J = self.sum_over(left, right)
        return self.finish(J, (V, count))

    def total(self) -> Tensor:
        """sum_n J_n^T v, [V *shape], without forming the samples."""
        V, _, G, T, _ = self.left.shape
        if self.right is None:
            return self.finish(self.left.sum((1, 3)).unsqueeze(-1), (V,))
        left = self.left.transpose(1, 2)  # [V G N T p]
        if self.lookup:
            return self.finish(self.sum_over(left.flatten(2, 3), self.right().transpose(0, 1).flatten(1, 2)), (V,))
        J = None
        for n in self.chunks(G * T * self.q):
            piece = left[:, :, n].flatten(2, 3).mT @ self.right.columns(n).mT
            J = piece if J is None else J.add_(piece)
        assert J is not None  # there is at least one sample
        return self.finish(J, (V,))

    def chunks(
        self, elements: int, max_memory: int | None = None, limit: Limit = PIECES, least: int = 0
    ) -> Iterator[slice]:
        """Ranges of samples whose pieces of `elements` numbers per sample stay within the limit."""
        step = limit.count(elements * self.left.element_size(), max_memory, self.left.device, least)
        for start in range(0, self.left.shape[1], step):
            yield slice(start, min(start + step, self.left.shape[1]))

    def dense_right(self, n: slice = slice(None)) -> Tensor:
        """`right` as numbers, [N G T q]; for a "vector" it is one."""
        if self.right is None:
            return self.left.new_ones(*self.left[0, n].shape[:3], 1)
        right = self.right(n)
        if self.lookup:
            return torch.nn.functional.one_hot(right + 1, self.q + 1)[..., 1:].to(self.left.dtype)
        return right

    def columns(self, n: slice = slice(None)) -> Tensor:
        """`right` with all positions side by side, [G q nT]."""
        if self.right is None or self.lookup:
            return self.dense_right(n).transpose(0, 1).flatten(1, 2).mT
        return self.right.columns(n)


def keep_inputs(outers: dict[str, list[Outer]], memory: int) -> list[Right]:
    """Keep unfolded inputs for the pulls that follow, the first that fit into `memory` bytes; `forget` them after."""
    kept = []
    for o in (o for uses in outers.values() for o in uses):
        size = o.left[0, ..., 0].numel() * o.q * o.left.element_size()
        if o.right is not None and o.right.q_axes is not None and size <= memory:
            o.right.keep()
            kept.append(o.right)
            memory -= size
    return kept


def general(J: Tensor, shape: torch.Size, kind: str = "general") -> Outer:
    """A use known only through J_n^T v itself, [V N *shape]."""
    return Outer(J.reshape(*J.shape[:2], 1, 1, -1), None, shape, kind=kind)


def merge(outers: list[Outer]) -> list[Outer]:
    """Several uses of one parameter as further positions of one outer product, where their blocks agree."""
    first = outers[0]
    same = all(
        o.via is None and (o.flip, o.shape, o.q, o.kind) == (first.flip, first.shape, first.q, first.kind)
        and (o.left.shape[2], o.left.shape[4]) == (first.left.shape[2], first.left.shape[4])
        for o in outers
    )  # fmt: skip
    if len(outers) == 1 or not same:
        return outers
    if first.right is None:
        return [replace(first, left=sum((o.left for o in outers[1:]), first.left))]
    left = torch.cat([o.left for o in outers], 3)
    lookup = all(o.lookup for o in outers)

    def rows(n: slice) -> Tensor:
        return torch.cat([o.right(n) if lookup and o.right is not None else o.dense_right(n) for o in outers], 2)

    right = Right(rows, (1, left.shape[1], 1), lookup, left.dtype)
    return [replace(first, left=left, right=right)]
