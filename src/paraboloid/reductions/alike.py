"""Outer products of samples that have the same inputs: each sees all rows of one graph, and pulls back through them."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

import torch
from torch import Tensor

from paraboloid.passes.memory import PIECES, Limit
from paraboloid.reductions.outer import Derived, Outer, Several, Whole, Zero
from paraboloid.reductions.products import NOTHING, Lookup, Products
from paraboloid.reductions.right import Right


class Alike(Products):
    """sum_t left[n, t] (x) right[t]: products of all samples' gradients with the one input at once."""

    alike = True

    @property
    def size(self) -> int:
        V, _, G, T, p = self.left.shape
        return G * max(V * p * self.q, V * p * T)

    @property
    def one(self) -> Tensor:
        """The inputs of every sample, [G T q]."""
        return self.right(slice(0, 1))[0]

    @property
    def first(self) -> Products:
        """The first sample."""
        return Products(self.left[:, :1], self.right.of(slice(0, 1)), self.shape, self.q, self.flip)

    def samples(self, n=slice(None)):
        (J,) = (J for _, J in self._formed([n]))
        return self.finish(J.movedim(2, 0), (J.shape[2], J.shape[0]))

    def total(self, left: Tensor | None = None, squared: bool = False) -> Tensor:
        left = (self.left if left is None else left).sum(1)  # [V G T p]
        return self.finish(left.mT @ (self.one.square() if squared else self.one), (len(left),))

    def together(self, wanted: Set[str]) -> Set[str]:
        return wanted if wanted - {"total"} else NOTHING

    def room(self) -> Tensor | None:
        return None

    def blocks(
        self, max_memory: int | None, out: Tensor | None = None, limit: Limit = PIECES
    ) -> Iterator[tuple[slice, Tensor]]:
        yield from self._formed(self.chunks(self.size, max_memory, limit))

    def _formed(self, ranges: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """[n G V p q] of each range."""
        V, _, G, T, p = self.left.shape
        right = self.one
        for n in ranges:
            left = self.left[:, n].permute(2, 1, 0, 4, 3).reshape(G, -1, T)  # [G nVp T]
            yield n, (left @ right).view(G, -1, V, p, self.q).transpose(0, 1)

    def joined(self, uses: list[Alike]) -> Alike:
        """All uses of one parameter, as further positions."""
        inputs = torch.cat([o.one for o in uses], 1)
        return replace(self, left=torch.cat([o.left for o in uses], 3), right=_of_all(inputs, self.left))


def _of_all(inputs: Tensor, like: Tensor, one: Right | None = None) -> Right:
    """One sample's inputs [G T q], or indices [G T], for as many samples as `like` [V N ..] has; `one` gave them."""
    N = like.shape[1]

    def rows(n: slice) -> Tensor:
        return inputs.expand(len(range(*n.indices(N))), *inputs.shape)

    return Right(rows, (1, N, 1), inputs.dtype if inputs.is_floating_point() else None, one=one)


def apart(o: Outer, V: int) -> Outer:
    """Vectors [V n] that were pulled back through one sample, as V vectors of n samples that have its input."""
    if isinstance(o, Derived):
        return Derived(apart(o.inner, V), o.via, o.shape)
    if isinstance(o, Several):
        return Several([apart(use, V) for use in o.uses])
    if isinstance(o, Zero):
        return Zero(o.left.reshape(V, -1, 1, 1, o.left.shape[-1]), o.shape)
    left = o.left.view(V, -1, *o.left.shape[2:])
    if isinstance(o, Whole):
        return type(o)(left, o.shape)
    assert isinstance(o, Products)
    right = _of_all(o.right(slice(0, 1))[0], left, o.right)
    return (Lookup if isinstance(o, Lookup) else Alike)(left, right, o.shape, o.q, o.flip)
