"""A parameter's pulled-back vectors: what every form of them answers, and the forms that are no outer product.

For every parameter, pulling an output vector v back through sample n is a sum over positions of outer products:

    (J_n^T v)[g, p, q] = sum_t left[v, n, g, t, p] * right[n, g, t, q]

V vectors, N samples, G groups, T positions (sequence or space), p x q the parameter block.  `left` is linear in the
gradient at the layer's output, `right` is a function of the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from paraboloid.passes.memory import PIECES, Limit

EVERYTHING = slice(None)


class Outer:
    """J_n^T v of one parameter.  A form says `samples`; the rest follows a piece at a time, unless it knows better.

    left       [V N G T p]: the form's gradients, or those of a part that has as many vectors and samples
    shape      of the parameter
    sides      whether J_n^T v is `left` (x) a `right`, which is one for a vector
    bias_like  whether the parameter's curvature block is kept as it is (bias, scale, raw parameter)
    flip       the parameter is stored as q x p
    lasting    whether it can be looked at when the graph of the pass has gone
    products   the products whose sum it is, if it is one
    alike      whether all samples have the same inputs
    """

    left: Tensor
    shape: torch.Size
    sides: ClassVar[bool] = False
    bias_like: bool = False
    flip: bool = False
    lasting: bool = True
    products: tuple[Any, ...] = ()
    alike: ClassVar[bool] = False

    @property
    def block(self) -> tuple[int, int, int]:
        """[G p q], in which a sample's gradient is seen."""
        p = self.shape[0] if len(self.shape) > 0 else 1
        return 1, p, self.shape.numel() // max(1, p)

    @property
    def size(self) -> int:
        """Numbers that a sample takes when it is formed."""
        return len(self.left) * self.shape.numel()

    def samples(self, n: slice = EVERYTHING) -> Tensor:
        """J_n^T v for the samples in the slice, [V n *shape], in memory of its own."""
        raise NotImplementedError

    def of(self, n: slice) -> Outer:
        """The same for some of the samples."""
        raise NotImplementedError

    def total(self) -> Tensor:
        """sum_n J_n^T v, [V *shape]."""
        found = None
        for _, J in self.pieces(None):
            part = J.sum(1)
            found = part if found is None else found.add_(part)
        assert found is not None  # there is at least one sample
        return found

    def chunks(
        self, elements: int, max_memory: int | None = None, limit: Limit = PIECES, least: int = 0
    ) -> list[slice]:
        """Ranges of samples whose pieces of `elements` numbers per sample stay within the limit."""
        N, step = (
            self.left.shape[1],
            limit.count(elements * self.left.element_size(), max_memory, self.left.device, least),
        )
        return [slice(0, N)] if step >= N else [slice(i, min(i + step, N)) for i in range(0, N, step)]

    def pieces(self, max_memory: int | None, limit: Limit = PIECES) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive ranges of samples and their J_n^T v, [V n *shape]."""
        for n in self.chunks(self.size, max_memory, limit):
            yield n, self.samples(n)

    def rows(self, max_memory: int | None) -> Iterator[Tensor]:
        """J_n^T v for consecutive ranges of samples as rows, [n V D]; not to be changed."""
        for _, J in self.pieces(max_memory):
            yield J.reshape(*J.shape[:2], -1).transpose(0, 1)

    def together(self, wanted: Set[str]) -> Set[str]:
        """Those of the wanted parts that are found from the formed samples, each formed once for all of them."""
        return wanted

    def room(self) -> Tensor | None:
        """Memory to form all samples in, [N ..] as `blocks` has them; None: each piece comes with its own."""
        return None

    def blocks(
        self, max_memory: int | None, out: Tensor | None = None, limit: Limit = PIECES
    ) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of samples and their J_n^T v, [n G V ..]: in a part of `out`, or to be used before the next one."""
        for n, J in self.pieces(max_memory, limit):
            yield n, J.transpose(0, 1).unsqueeze(1)

    def finish(self, J: Tensor, lead: tuple[int, ...]) -> Tensor:
        """[.. G ..] as in `blocks`, the vectors and samples before -> [*lead, *shape]."""
        return J.reshape((*lead, *self.shape))


@dataclass(eq=False)
class Whole(Outer):
    """J_n^T v known only by itself, left [V N 1 1 D]: from a fallback; a matrix has no structure then."""

    left: Tensor
    shape: torch.Size

    @property
    def bias_like(self) -> bool:
        return len(self.shape) < 2

    def samples(self, n: slice = EVERYTHING) -> Tensor:
        left = self.left[:, n].clone(memory_format=torch.contiguous_format)
        return left.view(*left.shape[:2], *self.shape)

    def of(self, n: slice) -> Outer:
        return type(self)(self.left[:, n], self.shape)

    def rows(self, max_memory: int | None) -> Iterator[Tensor]:
        yield self.left.flatten(2).transpose(0, 1)  # it is there already


def known(J: Tensor) -> Whole:
    """A use known only through J_n^T v itself, [V N *shape]."""
    return Whole(J.reshape(*J.shape[:2], 1, 1, -1), J.shape[2:])


class Zero(Whole):
    """A parameter without influence on the output; left is a zero, expanded."""


def zero(p: Tensor, vectors: int, samples: int) -> Zero:
    return Zero(p.new_zeros(()).expand(vectors, samples, 1, 1, p.numel()), p.shape)


@dataclass(eq=False)
class Derived(Outer):
    """A use of a tensor that is computed from the parameter: `inner` is that tensor's, `via` the way back to the
    parameter, [B *tensor's shape] -> [B *shape], which needs the graph."""

    inner: Outer
    via: Callable[[Tensor], Tensor]
    shape: torch.Size
    lasting = False

    @property
    def left(self) -> Tensor:
        return self.inner.left

    @property
    def bias_like(self) -> bool:
        return self.inner.sides and self.inner.bias_like

    @property
    def size(self) -> int:
        return max(len(self.left) * self.shape.numel(), self.inner.size)

    def samples(self, n: slice = EVERYTHING) -> Tensor:
        J = self.inner.samples(n)
        return self.via(J.flatten(0, 1)).contiguous().unflatten(0, J.shape[:2])

    def total(self) -> Tensor:
        return self.via(self.inner.total())

    def of(self, n: slice) -> Outer:
        return Derived(self.inner.of(n), self.via, self.shape)


@dataclass(eq=False)
class Several(Outer):
    """The sum of uses whose forms differ."""

    uses: list[Outer]

    def __post_init__(self):
        self.left = self.uses[0].left
        self.shape = self.uses[0].shape

    @property
    def bias_like(self) -> bool:
        return all(o.bias_like for o in self.uses)

    @property
    def lasting(self) -> bool:
        return all(o.lasting for o in self.uses)

    @property
    def products(self) -> tuple[Any, ...]:
        each = [o.products for o in self.uses]
        return tuple(p for found in each for p in found) if all(each) else ()

    @property
    def size(self) -> int:
        return max(o.size for o in self.uses)

    def samples(self, n: slice = EVERYTHING) -> Tensor:
        result = self.uses[0].samples(n)
        for o in self.uses[1:]:
            result = result + o.samples(n)
        return result

    def of(self, n: slice) -> Outer:
        return Several([o.of(n) for o in self.uses])
