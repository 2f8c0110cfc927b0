"""A loss read without its Hessian: the identity stands between the Jacobians."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.losses.cross_entropy import CrossEntropy
from paraboloid.losses.loss import Loss, Scaled, full


class Unweighted(Loss):
    """The values and gradients of `loss` with the curvature I in the output: sum_n J_n^T J_n, which no target enters.

    The softmax Hessian diag(p) - p p^T vanishes where a network is sure, so that data it is right about counts for
    nothing; here every sample counts the same.  Positions that the loss ignores, or gives no weight, count zero.
    For a squared error of scale 1/2, N(f, I), it is the loss itself.
    """

    def __init__(self, loss: Loss):
        self.loss, self.reduction, self.exact_root = loss, loss.reduction, False

    @property
    def inner(self) -> Loss:
        """The loss without its multiples."""
        loss = self.loss
        while isinstance(loss, Scaled):
            loss = loss.loss
        return loss

    def _counted(self, f: Tensor, y: Tensor) -> Tensor:
        """1 where an element of the output belongs to a target, 0 where that is ignored; broadcasts to f."""
        if isinstance(self.inner, CrossEntropy):
            return (self.inner._mass(f, y) > 0).to(f.dtype)
        return f.new_ones((1,) * f.dim())

    def sample_losses(self, f, y):
        return self.loss.sample_losses(f, y)

    def normalizer(self, f, y):
        return self.loss.normalizer(f, y)

    def gradient(self, f, y):
        return self.loss.gradient(f, y)

    def hessian_product(self, f, y, u):
        return self.loss.hessian_product(f, y, u)

    def curvature_product(self, f, y, u):
        return self._counted(full(f), y) * u

    def root_columns(self, f):
        return f[0].numel()

    def hessian_root(self, f, y):
        f = full(f)
        counted = self._counted(f, y).expand_as(f).reshape(len(f), -1)
        for j in range(counted.shape[1]):
            column = torch.zeros_like(counted)
            column[:, j] = counted[:, j]
            yield column.view_as(f)

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        counted = self._counted(f, y) / samples**0.5
        for _ in range(samples):
            yield counted * torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)

    def check(self, f, y):
        self.loss.check(f, y)
