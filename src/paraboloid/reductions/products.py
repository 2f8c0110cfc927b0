"""Outer products of gradients and inputs: summed over positions, at one position, with rows of a table; and vectors.

At one position everything factorises: the square of an outer product is the outer product of squares, its norm the
product of norms.  Sequences and convolutions are formed a piece at a time, unless nothing that is wanted needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.passes.memory import PIECES, Limit, pooled, pooled_product
from paraboloid.reductions.outer import EVERYTHING, Outer, Several, Whole
from paraboloid.reductions.right import Right
from paraboloid.reductions.sums import Recent

NOTHING: frozenset[str] = frozenset()


class Vector(Whole):
    """left [V N 1 1 p] is J_n^T v, the parameter's p elements having no second side: q = 1 and right is one."""

    sides = bias_like = True  # pyright: ignore[reportAssignmentType]

    @property
    def block(self) -> tuple[int, int, int]:
        return 1, self.left.shape[4], 1

    def total(self, left: Tensor | None = None, squared: bool = False) -> Tensor:
        """sum_n J_n^T v, [V *shape]; of other gradients; with the input (one) squared."""
        return (self.left if left is None else left).sum(1).view(-1, *self.shape)

    def together(self, wanted: Set[str]) -> Set[str]:
        return NOTHING

    def squares(self, recent: Recent) -> Tensor:
        return self.total(recent.squares_of(self.left)[None])[0]

    def norms(self, max_memory: int | None = None) -> Tensor:
        return _square_norms(self.left).sum(1)

    def gram(self) -> Tensor:
        return _gram(self.left).sum(0)


@dataclass(eq=False)
class Products(Outer):
    """sum_t left (x) right at T positions: sequences, convolutions, a weight that is used several times."""

    left: Tensor
    right: Right
    shape: torch.Size
    q: int
    flip: bool = False
    sides = True

    @property
    def products(self) -> tuple[Products, ...]:
        return (self,)

    @property
    def first(self) -> Products:
        """The first sample."""
        return self.of(slice(0, 1))

    @property
    def block(self) -> tuple[int, int, int]:
        return self.left.shape[2], self.left.shape[4], self.q

    @property
    def size(self) -> int:
        V, _, G, T, p = self.left.shape
        return G * self.q * max(V * p, T)

    @property
    def positions(self) -> int:
        """N T, without the empty positions of ragged bags and of samples with fewer rows."""
        filled = self.right.filled
        return self.left.shape[1] * self.left.shape[3] if filled is None else int(filled.sum())

    def finish(self, J: Tensor, lead: tuple[int, ...]) -> Tensor:
        """[.. G p q] -> [*lead, *shape]."""
        return (J.mT if self.flip else J).reshape((*lead, *self.shape))

    def of(self, n: slice) -> Products:
        return type(self)(self.left[:, n], self.right.of(n), self.shape, self.q, self.flip)

    def samples(self, n: slice = EVERYTHING) -> Tensor:
        left, right = self.left[:, n], self.right(n)
        V, count, G, T, p = left.shape
        if V == 1:
            return self.finish(pooled_product(left.mT, right), (V, count))
        # one product per sample and group, the vectors joining p: nothing is copied V times
        left = left.permute(1, 2, 0, 4, 3).reshape(count, G, V * p, T)
        return self.finish(pooled_product(left, right).view(count, G, V, p, -1).movedim(2, 0), (V, count))

    def total(self, left: Tensor | None = None, squared: bool = False) -> Tensor:
        """sum_n J_n^T v, [V *shape], without forming the samples; of other gradients `left`, with inputs squared."""
        left = self.left if left is None else left
        V, _, G, T, _ = left.shape
        left = left.transpose(1, 2)  # [V G N T p]
        J = None
        for n in self.chunks(G * T * self.q):
            columns = self.right.columns(n)
            piece = pooled_product(left[:, :, n].flatten(2, 3).mT, (columns.square() if squared else columns).mT)
            J = piece if J is None else J.add_(piece)
        assert J is not None  # there is at least one sample
        return self.finish(J, (V,))

    def together(self, wanted: Set[str]) -> Set[str]:
        """All, or none if only sums are wanted, and norms for which the Gram trick is cheaper."""
        T, p = self.left.shape[3:]
        short = T * (p + self.q) < p * self.q  # the Gram trick: Goodfellow 2015, arXiv:1510.01799
        return wanted if wanted & {"squares", "samples", "gram"} or ("norms" in wanted and not short) else NOTHING

    def norms(self, max_memory: int | None = None) -> Tensor:
        """By the Gram matrices of the positions."""
        V, _, G, T, _ = self.left.shape
        parts = []
        for n in self.chunks(G * (T * self.q + (V + 1) * T * T), max_memory):
            left, right = self.left[:, n], self.right(n)
            parts.append(((left @ left.mT) * (right @ right.mT)).sum((0, 2, 3, 4)))
        return torch.cat(parts)

    def room(self) -> Tensor | None:
        V, N, G, _, p = self.left.shape
        return pooled((N, G, V, p, self.q), self.left)

    def blocks(
        self, max_memory: int | None, out: Tensor | None = None, limit: Limit = PIECES
    ) -> Iterator[tuple[slice, Tensor]]:
        V, _, G, _, p = self.left.shape
        ranges, buffer = self.chunks(self.size, max_memory, limit), None
        for n, right in zip(ranges, self.right.pieces(ranges), strict=True):
            left = self.left[:, n].permute(1, 2, 0, 4, 3).flatten(2, 3).flatten(0, 1)  # [nG Vp T]
            if out is not None:
                place = out[n]
            else:
                buffer = left.new_empty(len(right), G, V, p, self.q) if buffer is None else buffer
                place = buffer[: len(right)]
            torch.bmm(left, right.detach().flatten(0, 1), out=place.view(len(left), V * p, self.q))
            yield n, place

    def columns(self, n: slice = EVERYTHING) -> Tensor:
        """`right` with all positions side by side, [G q nT]."""
        return self.right.columns(n)

    def inputs(self, n: slice = EVERYTHING) -> Tensor:
        """`right` as numbers, [n G T q]."""
        return self.right(n)

    def mean_inputs(self, n: slice = EVERYTHING) -> Tensor:
        """`right` averaged over the positions, [n G q]."""
        if self.right.filled is not None:
            return self.right(n).sum(2) / self.right.filled[n].clamp(min=1)[:, None, None]
        return self.right(n).mean(2)

    def turned(self, U: Tensor) -> Right:
        """`right` times U [q r] or [G q r]."""
        return Right(lambda n: self.right(n) @ U, (1, self.left.shape[1], 1), self.left.dtype)

    def between(self, M: Tensor, right: Tensor) -> Tensor:
        """sum_{n,t,t'} M[n k t t'] right_t right_t' elementwise, [k q], for `right` [N T q] of one group."""
        return ((M.flatten(1, 2) @ right).unflatten(1, M.shape[1:3]) * right.unsqueeze(1)).sum((0, 2))


class OnePosition(Products):
    """left (x) right."""

    def total(self, left: Tensor | None = None, squared: bool = False) -> Tensor:
        """As above: for one vector and group a product of two matrices, in the order in which the result is kept."""
        left, q = self.left if left is None else left, self.q
        V, N, G, _, p = left.shape
        if V * G > 1 or ((squared or self.right.unfolds) and len(self.chunks(q)) > 1):
            return super().total(left, squared)
        rows, left = self.right().view(N, q), left.view(N, p)
        rows = rows.square() if squared else rows
        J = pooled_product(rows.mT, left) if self.flip else pooled_product(left.mT, rows)
        return J.view(1, *self.shape)

    def together(self, wanted: Set[str]) -> Set[str]:
        return NOTHING

    def squares(self, recent: Recent) -> Tensor:
        return self.total(recent.squares_of(self.left)[None], squared=True)[0]

    def norms(self, max_memory: int | None = None) -> Tensor:
        return (_square_norms(self.left) * torch.linalg.vector_norm(self.right(), dim=(2, 3)).square()).sum(1)

    def gram(self) -> Tensor:
        side = self.right().transpose(0, 1).flatten(2)
        return (_gram(self.left) * (side @ side.mT)).sum(0)


class Lookup(Products):
    """Rows of a table: `right` [N G T] are indices into its q rows.  A sample touches few of them."""

    @property
    def positions(self) -> int:
        return int((self.right() >= 0).sum())

    def _summed(self, left: Tensor, index: Tensor) -> Tensor:
        """sum_t left [.. T p] (x) unit vectors of the indices [.. T] -> [.. p q]."""
        J = left.new_zeros(*left.shape[:-2], self.q, left.shape[-1])
        return J.scatter_add_(-2, index.clamp(min=0).unsqueeze(-1).expand_as(left), left).mT

    def samples(self, n: slice = EVERYTHING) -> Tensor:
        left = self.left[:, n]
        return self.finish(self._summed(left, self.right(n)), left.shape[:2])

    def total(self, left: Tensor | None = None, squared: bool = False) -> Tensor:
        left = self.left if left is None else left
        J = self._summed(left.transpose(1, 2).flatten(2, 3), self.right().transpose(0, 1).flatten(1, 2))
        return self.finish(J, (len(left),))

    def together(self, wanted: Set[str]) -> Set[str]:
        return wanted & {"gram", "samples"}

    def room(self) -> Tensor | None:
        return None

    def blocks(
        self, max_memory: int | None, out: Tensor | None = None, limit: Limit = PIECES
    ) -> Iterator[tuple[slice, Tensor]]:
        for n in self.chunks(self.size, max_memory, limit):
            yield n, self._summed(self.left[:, n], self.right(n)).permute(1, 2, 0, 3, 4)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows summed per sample: (sample [U], table row [U], squares [U p], summed over V) where they occur."""
        V, N, G, T, p = self.left.shape
        first = torch.arange(N, device=self.left.device)[:, None] * self.q
        pairs, inverse = (first + self.right().flatten(1).clamp(min=0)).flatten().unique(return_inverse=True)
        value = self.left.new_zeros(V, len(pairs), p).index_add_(1, inverse, self.left.reshape(V, N * G * T, p))
        return pairs // self.q, pairs % self.q, value.square().sum(0)

    def squares(self, recent: Recent) -> Tensor:
        _, row, square = self.pairs
        return self.finish(square.new_zeros(self.q, square.shape[1]).index_add_(0, row, square).mT, ())

    def norms(self, max_memory: int | None = None) -> Tensor:
        sample, _, square = self.pairs
        return square.new_zeros(self.left.shape[1]).index_add_(0, sample, square.sum(1))

    def columns(self, n: slice = EVERYTHING) -> Tensor:
        return self.inputs(n).transpose(0, 1).flatten(1, 2).mT

    def inputs(self, n: slice = EVERYTHING) -> Tensor:
        return torch.nn.functional.one_hot(self.right(n) + 1, self.q + 1)[..., 1:].to(self.left.dtype)

    def mean_inputs(self, n: slice = EVERYTHING) -> Tensor:
        """Averaged over the positions that are not empty."""
        inputs = self.inputs(n)
        return (inputs / inputs.sum((2, 3), keepdim=True).clamp(min=1)).sum(2)

    def counts(self) -> Tensor:
        """How often each row is looked up, [q]."""
        return torch.bincount(self.right().flatten() + 1, minlength=self.q + 1)[1:].to(self.left)

    def turned(self, U: Tensor) -> Right:
        """A row of U for each index; -1 finds nothing."""
        table = torch.cat([U, U.new_zeros(1, U.shape[-1])])
        return Right(lambda n: table[self.right(n)], (1, self.left.shape[1], 1), self.left.dtype)

    def between(self, M: Tensor, right: Tensor) -> Tensor:
        index = right.clamp(min=0)
        value = (M * (index.unsqueeze(2) == index.unsqueeze(1)).unsqueeze(1)).sum(3).transpose(0, 1).flatten(1)
        return value.new_zeros(len(value), self.q).index_add_(1, index.flatten(), value)


def product(left: Tensor, right: Right, shape: torch.Size, q: int, flip: bool = False) -> Products:
    """left [V N G T p] with inputs that are numbers, at T positions or one."""
    return (OnePosition if left.shape[3] == 1 else Products)(left, right, shape, q, flip)


def merge(uses: list[Outer]) -> Outer:
    """All uses of one parameter: further positions of one outer product where their blocks agree, else their sum."""
    first = uses[0]
    if len(uses) == 1:
        return first
    forms = {(o.lasting, o.flip, o.shape, o.block, len(o.products)) for o in uses}
    if len(forms) > 1 or not first.lasting:
        return Several(uses)
    vectors = [isinstance(o, Vector) for o in uses]
    if all(vectors) or (not any(vectors) and all(isinstance(o, Whole) for o in uses)):
        left = sum((o.left for o in uses[1:]), first.left)
        return (Vector if vectors[0] else Whole)(left, first.shape)
    products = [p for o in uses for p in o.products]
    if len(products) < len(uses):
        return Several(uses)
    if all(o.alike for o in uses):
        return products[0].joined(products)
    left, lookup = torch.cat([o.left for o in uses], 3), all(isinstance(o, Lookup) for o in uses)

    def rows(n: slice) -> Tensor:
        return torch.cat([o.right(n) if lookup else o.inputs(n) for o in products], 2)

    filled = None
    if any(o.right.filled is not None for o in products):
        each = [o.left.shape[3] if o.right.filled is None else o.right.filled for o in products]
        filled = sum(each, torch.zeros(left.shape[1], dtype=torch.int64, device=left.device))
    right = Right(rows, (1, left.shape[1], 1), None if lookup else left.dtype, filled=filled)
    return (Lookup if lookup else Products)(left, right, first.shape, products[0].q, first.flip)


def keep_inputs(outers: Iterable[Outer], memory: int) -> list[Right]:
    """Keep unfolded inputs for the pulls that follow, the first that fit into `memory` bytes; `forget` them after."""
    kept = []
    for o in outers:
        for use in getattr(o, "inner", o).products:
            size = use.left[0, ..., 0].numel() * use.q * use.left.element_size()
            if use.right.q_axes is not None and size <= memory:
                use.right.keep()
                kept.append(use.right)
                memory -= size
    return kept


def _square_norms(left: Tensor) -> Tensor:
    """Summed over V, [N G]; left [V N G 1 p]."""
    return torch.linalg.vector_norm(left, dim=(0, 3, 4)).square()


def _gram(left: Tensor) -> Tensor:
    """Summed over V, [G N N]."""
    side = left.movedim(1, 2).flatten(3)  # [V G N p]
    return (side @ side.mT).sum(0)
