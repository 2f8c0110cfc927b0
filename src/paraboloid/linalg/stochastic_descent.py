"""Stochastic gradient descent on quadratics, many at a time: Nesterov's momentum, averaging, and a step that is safe.

For systems A x = b whose A is a sum over data of which a part is seen at a time, and too large for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PIECE = 2**18  # elements that are updated together, so that all their operands stay in the cache
GROWTH = 1e3  # of a gradient over its first one, which is the end of it


class Diverged(ArithmeticError):
    """The iterates grow without bound: the step is too large."""


class NesterovDescent:
    """x <- x + v at points that look ahead, in place, for K rows x [K, D] of A x = b:

        v <- momentum v - lr P g(x + momentum v),    x <- x + v,    average <- mean of the points since `average_from`

    The rows of `x` hold the points that look ahead, x + momentum v, which have the same limit.  One more tensor [K, D]
    is kept, and another one while points are averaged.  P is diagonal, or the identity.

    Sources: Nesterov 1983; Sutskever et al. 2013; Polyak and Juditsky 1992; for posterior samples Lin et al. 2023,
    arXiv:2306.11589.
    """

    def __init__(self, x: Tensor, lr: float, momentum: float = 0.9, preconditioner: Tensor | None = None):
        self.x, self.lr, self.momentum, self.P = x, lr, momentum, preconditioner
        self.v = torch.zeros_like(x)
        self.average: Tensor | None = None
        self.averaged = 0  # points that are in it
        self.first = [0.0] * len(x)  # the squared norms of each row's first gradient

    def start_average(self) -> None:
        self.average, self.averaged = torch.zeros_like(self.x), 0

    def step(self, row: int, parts: Sequence[Tensor], coefficient: float, precision: Tensor, b: Tensor | None,
             scale: Tensor | None = None) -> None:  # fmt: skip
        """One step of a row along g = coefficient scale * parts + precision * x - b, all diagonal.

        parts: the data's part, as tensors whose elements are those of the row.  Raises Diverged where the gradient is
        not finite or has grown beyond reason.
        """
        x, v, start, squares = self.x[row], self.v[row], 0, 0.0
        mean = None if self.average is None else self.average[row]
        for part in parts:
            for piece in part.reshape(-1).split(PIECE):
                at = slice(start, start + len(piece))
                # A new tensor: autograd may give the same one for two parameters.
                g = piece * coefficient if scale is None else (piece * scale[at]).mul_(coefficient)
                g.addcmul_(precision[at], x[at])
                if b is not None:
                    g.sub_(b[at])
                squares += torch.dot(g, g).item()
                if self.P is not None:
                    g.mul_(self.P[at])
                v[at].mul_(self.momentum).sub_(g, alpha=self.lr)
                x[at].add_(v[at], alpha=self.momentum).sub_(g, alpha=self.lr)
                if mean is not None:
                    mean[at].lerp_(x[at], 1 / (self.averaged + 1))
                start += len(g)
        self._check(row, squares)

    def advance(self) -> None:
        """To be called when all rows have made their step."""
        if self.average is not None:
            self.averaged += 1

    def result(self) -> Tensor:
        """The average where there is one, else the last points, [K, D]."""
        return self.x if self.average is None or not self.averaged else self.average

    def _check(self, row: int, squares: float) -> None:
        if not self.first[row]:
            self.first[row] = squares
        if not squares <= GROWTH**2 * max(self.first[row], 1e-30):  # NaN too
            raise Diverged(f"the squared gradient has grown from {self.first[row]:.3g} to {squares:.3g}")


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 10) -> float:
    """That of a positive semi-definite matrix, from below, by the power method from the vector `start` [D]."""
    v, value = start / start.norm(), 0.0
    for _ in range(iterations):
        w = product(v)
        value = float(w.norm())
        if not value > 0:
            return 0.0
        v = w / value
    return value
