"""The input side of an outer product, built for a range of samples at a time: an unfolded input may be large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from paraboloid.passes.memory import gives_back, pooled

RUN = 16  # to start on a run of memory that is shorter takes longer than to copy it
SAMPLES = 8  # fewer do not pay for looking up a place
PLACES = 2**17  # the index of a larger sample would itself be much to read


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
    one: Right | None = None  # where all samples have the same inputs: those, which last from pull to pull
    factors: dict[Any, Any] = field(default_factory=dict)  # Gram matrices of `one`, by how they are kept

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
        if self.dtype is None:
            return self
        return replace(self, rows=lambda n: self.rows(n).square(), _kept=None, one=None, factors={})

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
        if self.q_axes is None and self.layout[0] == self.layout[2] == 1:
            rows = self.rows(n)
            return rows if self.dtype in (None, rows.dtype) else rows.to(self.dtype)
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


def unfold(rows: Tensor, q_axes: int) -> Tensor:
    """Strided rows (patches of images, seen as a view), [n G *q-axes *T-axes] -> [n G T q]: a view where the strides
    allow it, else in memory of its own, copied run by run or gathered by an index."""
    n, *shape = rows.shape
    step, *steps = rows.stride()
    split = 1 + q_axes
    G, q, T = shape[0], math.prod(shape[1:split]), math.prod(shape[split:])
    if torch.is_grad_enabled() or (
        _run(shape[1:split], steps[1:split]) == q and _run(shape[split:], steps[split:]) == T
    ):
        return rows.reshape(n, G, q, T).mT
    run = _run(shape[split:], steps[split:]) if steps[-1] == 1 else 1
    if run >= min(RUN, T) or n < SAMPLES or G * q * T > PLACES or rows.device.type != "cpu":
        found = pooled((n, G, q, T), rows)  # T runs fastest, as it does in an image
        found.view(rows.shape).copy_(rows)
        return found.mT
    extent = 1 + sum((size - 1) * s for size, s in zip(shape, steps, strict=True))
    memory = rows.as_strided((n, extent), (step, 1))
    found = pooled((n, G, T, q), rows)  # products with a matrix in which q runs fastest are the faster ones
    return torch.index_select(memory, 1, _places(tuple(shape), tuple(steps), q_axes), out=found.flatten(1)).view_as(
        found
    )


def _run(shape: Sequence[int], steps: Sequence[int]) -> int:
    """How many elements lie one after the other in memory, each a step of the last axis from the one before."""
    count = 1
    for size, step in zip(reversed(shape), reversed(steps), strict=True):
        if size > 1 and step != count * steps[-1]:
            break
        count *= size
    return count


@lru_cache(maxsize=16)
def _places(shape: tuple[int, ...], steps: tuple[int, ...], q_axes: int) -> Tensor:
    """Where the elements [G T q] of a sample lie in its memory, flat; the axes are G *q-axes *T-axes."""
    at = torch.zeros((), dtype=torch.int32, device="cpu")
    for size, step in zip(shape, steps, strict=True):
        at = at.unsqueeze(-1) + step * torch.arange(size, dtype=torch.int32, device="cpu")
    return at.flatten(1 + q_axes).flatten(1, q_axes).mT.flatten()


gives_back(_places.cache_clear)
