"""A loss behind a linear measurement: the network's output is seen only through A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.losses.loss import Loss, full


class Observed(Loss):
    """l_n = loss(A f_n, y_n): data y is what a linear A makes of the output f, plus the loss's noise.

        pb.losses.Observed(nn.MSELoss(), pb.tomography.ParallelBeam(128, angles=30))

    A multiplies outputs [N, ...], all samples at once, and ``A.T`` its results: `pb.tomography` has such operators and
    `pb.tomography.as_projector` makes one of any other.  With H_n the curvature of the loss in A f_n,

        gradient A^T l',    curvature A^T H_n A,    root vectors A^T s_v,

    as many as the loss itself has: a measurement of few numbers has few of them, however large the output is.  The
    reduction, sampled labels and what a root is exact for are those of the loss.
    """

    def __init__(self, loss: Any, A: Any):
        self.loss, self.A = Loss.from_torch(loss), A
        self.reduction, self.psd, self.exact_root = self.loss.reduction, self.loss.psd, self.loss.exact_root

    @property
    def terms(self):
        own = self.loss.terms
        return [self] if len(own) == 1 else [Observed(term, self.A) for term in own]

    def sample_losses(self, f, y):
        return self.loss.sample_losses(self.A @ f, y)

    def normalizer(self, f, y):
        return self.loss.normalizer(self._measured(f), y)

    def gradient(self, f, y):
        return self.A.T @ self.loss.gradient(self._measured(f), y)

    def exact_gradient(self, f, y):
        return self.A.T @ self.loss.exact_gradient(self._measured(f), y)

    def hessian_product(self, f, y, u):
        return self.A.T @ self.loss.hessian_product(self._measured(f), y, self.A @ u.to(full(f)))

    def curvature_product(self, f, y, u):
        return self.curvature_at(f, y)(u)

    def curvature_at(self, f, y):
        own, like = self.loss.curvature_at(self._measured(f), y), full(f)
        return lambda u: self.A.T @ own(self.A @ u.to(like))

    def root_columns(self, f):
        return self.loss.root_columns(self._measured(f))

    def hessian_root(self, f, y):
        return (self.A.T @ s for s in self.loss.hessian_root(self._measured(f), y))

    def sample_targets(self, f, generator):
        return self.loss.sample_targets(self._measured(f), generator)

    def sampled_gradients(self, f, y, samples, generator):
        return (self.A.T @ s for s in self.loss.sampled_gradients(self._measured(f), y, samples, generator))

    def check(self, f, y):
        self.loss.check(self._measured(f), y)

    def _measured(self, f: Tensor) -> Tensor:
        with torch.no_grad():
            return self.A @ full(f)
