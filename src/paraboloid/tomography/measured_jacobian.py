"""The Jacobian of what is measured in the network's kernels: formed where it fits, else by products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.passes.memory import DENSE
from paraboloid.tomography.image_jacobian import ImageJacobian
from paraboloid.tomography.kernel_grams import packed_grams
from paraboloid.tomography.kernel_prior import KernelPrior
from paraboloid.tomography.projector import Projector

KEPT = 4  # it is formed where it takes this part of what a dense matrix may
TOGETHER = 64  # rows that are pulled at once


class MeasuredJacobian:
    """B = A J [m, D]: the derivatives of A x in the chosen weights.

    forth  B v for v [K, *shape] of each weight: [K, m]
    back   B^T u for u [K, m]: [K, *shape] of each weight

    Where it fits it is formed once, at m products; later ones are of dense matrices, which take an eighth of the time.
    Its rows have the fit's precision and all products that of J, float64: forth and back are each other's transpose to
    rounding, which is what conjugate gradients need.
    """

    def __init__(self, J: ImageJacobian, A: Projector, gives: tuple[int, ...]):
        self.J, self.A, self.gives, self.shapes = J, A, gives, [w.shape for w in J.weights]
        self.size = math.prod(gives)
        need, limit = 8 * self.size * sum(w.numel() for w in J.weights), DENSE.of() // KEPT
        self.rows = self._formed() if need <= min(limit, math.inf if J.max_memory is None else J.max_memory) else None

    @property
    def image(self) -> tuple[int, ...]:
        """The image's shape, of one slice or more."""
        return (*self.gives[: len(self.gives) - len(self.A.gives)], *self.A.takes)

    def forth(self, v: Sequence[Tensor], images: Tensor | None = None) -> Tensor:
        """images: J v where it is known."""
        if self.rows is None:
            images = self.J.push(v) if images is None else images
            return (self.A @ images.view(len(images), *self.image)).reshape(len(images), -1)
        return torch.stack([t.flatten(1) @ rows.T for t, rows in zip(v, self.rows, strict=True)]).sum(0)

    def back(self, u: Tensor) -> list[Tensor]:
        if self.rows is None:
            return self._pulled(self.J, u)
        return [(u @ rows).view(len(u), *shape) for rows, shape in zip(self.rows, self.shapes, strict=True)]

    def gram(self, prior: KernelPrior) -> Tensor | None:
        """B Sigma B^T, [m, m]; None where B is not formed."""
        if self.rows is None:
            return None
        found = self.rows[0].new_zeros(self.size, self.size)
        for rows, shape, C in zip(self.rows, self.shapes, prior.covariances(), strict=True):
            half = (rows.view(self.size, -1, len(C)) @ torch.linalg.cholesky(C).to(rows)).view(self.size, shape.numel())
            found.addmm_(half, half.T)
        return found

    def grams(self, prior: KernelPrior) -> Tensor:
        """B S_br B^T for every block and distance, packed; where B is formed."""
        assert self.rows is not None
        own = self.J.fit.input.dtype
        rows = [t.to(own).view(self.size, -1, s[-1] * s[-2]) for t, s in zip(self.rows, self.shapes, strict=True)]
        return packed_grams(rows, prior.blocks)

    def _pulled(self, J: ImageJacobian, u: Tensor) -> list[Tensor]:
        return J.pull((self.A.T @ u.view(len(u), *self.gives)).reshape(len(u), -1))

    def _formed(self) -> list[Tensor]:
        """[m, numel] of each weight."""
        J, like = self.J, self.J.weights[0]
        own = self.J.fit.input.dtype
        J = J if like.dtype == own else ImageJacobian(J.fit, J.names, J.max_memory, own)
        found = [like.new_empty(self.size, w.numel()) for w in self.J.weights]
        for first in range(0, self.size, TOGETHER):
            count = min(TOGETHER, self.size - first)
            u = torch.zeros(count, self.size, dtype=own, device=like.device)
            u.diagonal(first).fill_(1.0)
            for rows, part in zip(found, self._pulled(J, u), strict=True):
                rows[first : first + count] = part.flatten(1)
        return found
