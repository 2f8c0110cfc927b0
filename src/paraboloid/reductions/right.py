"""The input side of an outer product, built for a range of samples at a time: an unfolded input may be large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paraboloid.reductions.patches import unfold


@dataclass
class Right:
    """`rows(slice)` gives [R G T q], or with `dtype=None` int64 [R G T] (indices into q; -1 where nothing is looked up
    and left is zero), for a range of the rule's rows.

    With `q_axes` it gives [R G *q-axes *T-axes] instead, usually a strided view of the input: copying is left to who
    needs it, in the arrangement that serves it.  The rows unflatten into (a, N, b) with N the samples; a and b join T.
    """

    rows: Callable[[slice], Tensor]
    layout: tuple[int, int, int]
    dtype: torch.dtype | None = None
    q_axes: int | None = None
    filled: Tensor | None = None  # positions of each sample that are no padding, [N]; None: all
    _kept: Tensor | None = None

    @property
    def unfolds(self) -> bool:
        """Whether each look at it copies strided rows."""
        return self.q_axes is not None and self._kept is None

    def keep(self) -> None:
        """Copy strided rows once, for the pulls that follow; nothing to do where the rows are the input itself."""
        if self.unfolds:
            self._kept = self()

    def squared(self) -> Right:
        """The same with every number squared."""
        return self if self.dtype is None else replace(self, rows=lambda n: self.rows(n).square(), _kept=None)

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
        if not self.unfolds:
            yield from map(self, ranges)
            return
        rows = self._view(slice(None))
        for n in ranges:
            yield self._matrices(rows[n])

    def _matrices(self, rows: Tensor) -> Tensor:
        if self.dtype is None:
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

    def of(self, n: slice) -> Right:
        """The same for some of the samples, counted from the first of them."""
        start, stop, _ = n.indices(self.layout[1])

        def rows(some: slice) -> Tensor:
            low, high, _ = some.indices(stop - start)
            return self(slice(start + low, start + high))

        filled = None if self.filled is None else self.filled[n]
        return Right(rows, (1, stop - start, 1), self.dtype, filled=filled)
