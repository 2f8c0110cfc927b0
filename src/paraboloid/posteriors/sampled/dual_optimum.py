"""The optimum of the linearised model in the space of its outputs, whose size no network's width changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.conjugate_gradients import cg_solution
from paraboloid.linalg.operand import LinAlgError
from paraboloid.posteriors.prior_tuning.linearised import HALVINGS, NEWTON_STEPS
from paraboloid.posteriors.sampled.output_kernel import OutputKernel, contracted
from paraboloid.posteriors.sampled.scaled_model import ScaledModel
from paraboloid.posteriors.sampled.tangent_kernel import factor_of, solved

TRIES = 30  # iterations with an older factor, which take about as long as a new one
INNER = 1e-6  # residual of a Newton step at most: what it leaves out enlarges a, of which K sees little
RIDGE = 1e-6  # of the mean of K's diagonal
EXACT, ROUNDED = 1e-8, 1e-5  # of the gradient's norm, to which the optimum is found: in float64, and in float32


class _Curvature:
    """I + L^T K L for the root L of the loss's Hessians at some outputs, by blocks [n C V]."""

    def __init__(self, K: Tensor, roots: list[Tensor]):
        self.K, self.roots = K, roots
        size = sum(L.shape[0] * L.shape[2] for L in roots)
        self.shape, self.dtype, self.device = (size, size), K.dtype, K.device

    def spread(self, y: Tensor) -> Tensor:
        """L y, [Q]."""
        parts = y.split([L.shape[0] * L.shape[2] for L in self.roots])
        return torch.cat([(L @ p.view(len(L), -1, 1)).flatten() for L, p in zip(self.roots, parts, strict=True)])

    def gathered(self, u: Tensor) -> Tensor:
        """L^T u, [R]."""
        parts = u.split([L.shape[0] * L.shape[1] for L in self.roots])
        return torch.cat([(L.mT @ p.view(len(L), -1, 1)).flatten() for L, p in zip(self.roots, parts, strict=True)])

    def __matmul__(self, y: Tensor) -> Tensor:
        columns = y.view(len(y), -1).T
        found = [c + self.gathered(self.K @ self.spread(c)) for c in columns]
        return torch.stack(found, 1).view(y.shape)

    def factor(self) -> Tensor:
        kernel = contracted(self.K, self.roots)
        kernel.diagonal().add_(1)
        return factor_of(kernel)


class _Solved:
    """By a Cholesky factor, of this curvature or of one like it."""

    def __init__(self, factor: Tensor):
        self.factor, self.shape, self.dtype, self.device = factor, factor.shape, factor.dtype, factor.device

    def __matmul__(self, y: Tensor) -> Tensor:
        return solved(self.factor, y.view(len(y), -1)).view(y.shape)


@torch.no_grad()
def dual_optimum(
    kernel: OutputKernel, linear: ScaledModel, precision: Tensor, strength: float, start: Tensor | None,
    factor: Tensor,
) -> Tensor:  # fmt: skip
    """argmin over delta of strength * loss(f + J S delta) + |S^-1 theta + delta|^2_Lambda / 2, flat [D], as `optimum`.

    The weights are Lambda^-1 S J^T a for an a [Q]: with F_0 = f - J theta it is the minimiser of

        strength loss(F_0 + K a) + a.K a / 2,        K = J S Lambda^-1 S J^T,

    by Newton's method: a step L (I + L^T K L)^-1 L^T K g - g for g = a + strength l'(F), L L^T = strength H(F).  Each
    by conjugate gradients with the factor of an earlier point's I + L^T K L (at first that of the model itself,
    `factor`), or with one of its own where these take long; halved until the objective falls.  It ends where float32,
    or a small part of float64, does, so that the prior does not hang on the path to the optimum.
    Source: Rasmussen and Williams 2006, algorithm 3.3; Antoran et al. 2022, arXiv:2206.08900.
    """
    tol = EXACT if linear.theta.dtype == torch.float64 else ROUNDED
    problem = _Outputs(kernel, linear.loss, strength)
    K, before = kernel.at(precision), kernel.pushed(linear.theta).double()
    base = problem.model - before
    if start is None:
        a = _told(K, before)
    else:
        before += kernel.pushed(start).double()
        a = -problem.gradient(base + before)  # at an optimum, and up to a factor at one under another precision
        Ka = K @ a
        a *= (Ka.dot(before) / Ka.dot(Ka).clamp(min=torch.finfo(K.dtype).tiny)).clamp(min=0)
    Ka = K @ a
    value, quadratic = problem.value(base + Ka) + a.dot(Ka) / 2, linear.is_quadratic
    for _ in range(NEWTON_STEPS):
        F = base + Ka
        slope = problem.gradient(F)
        K_slope = K @ slope
        g, Kg = a + slope, Ka + K_slope
        rest = g.dot(Kg).clamp(min=0).sqrt()
        scale = torch.maximum(slope.dot(K_slope), a.dot(Ka)).clamp(min=torch.finfo(K.dtype).tiny).sqrt()
        if rest <= tol * scale:
            break
        A = _Curvature(K, problem.roots(F))
        right, within = A.gathered(Kg), tol if quadratic else max(tol, min(INNER, float(rest / scale)))
        y = None
        try:
            found = cg_solution(A, right, within, TRIES, _Solved(factor))
            y = found.x if found.residual <= within else None
        except LinAlgError:  # rounding alone
            pass
        if y is None:
            factor = A.factor()
            y = _Solved(factor) @ right
        step = A.spread(y) - g
        K_step, size = K @ step, 1.0
        for _ in range(HALVINGS):
            moved, K_moved = a + size * step, Ka + size * K_step
            lower = problem.value(base + K_moved) + moved.dot(K_moved) / 2
            if lower <= value:
                break
            size /= 2
        else:
            break  # no descent left in this precision
        a, Ka, value = moved, K_moved, lower
    return kernel.pulled(a) / precision - linear.theta


def _told(K: Tensor, u: Tensor) -> Tensor:
    """a with K a about u, and a.K a no more than the weights' that made u."""
    known = K.clone()
    known.diagonal().add_(RIDGE * K.diagonal().mean())
    return solved(factor_of(known), u.unsqueeze(1))[:, 0]


class _Outputs:
    """The summed loss, times the strength, of all outputs [Q] in float64; in the model's type where the loss has
    tensors of its own that are not."""

    def __init__(self, kernel: OutputKernel, loss: Any, strength: float):
        self.graphs, self.sizes, self.loss, self.strength = kernel.graphs, kernel.sizes, loss, strength
        self.model, self.double = torch.cat([graph.f.detach().flatten() for graph in self.graphs]).double(), True
        try:
            self.gradient(self.model)
        except RuntimeError:
            self.double = False

    def _parts(self, F: Tensor) -> Iterator[tuple[Tensor, Any]]:
        for graph, part in zip(self.graphs, F.split(self.sizes), strict=True):
            y = graph.y
            if self.double and isinstance(y, Tensor) and y.is_floating_point():
                y = y.double()
            yield part.to(torch.float64 if self.double else graph.f.dtype).view(graph.f.shape), y

    def value(self, F: Tensor) -> Tensor:
        sums = [self.loss.sample_losses(f, y).double().sum() for f, y in self._parts(F)]
        return self.strength * torch.stack(sums).sum()

    def gradient(self, F: Tensor) -> Tensor:
        return self.strength * torch.cat([self.loss.gradient(f, y).flatten() for f, y in self._parts(F)]).double()

    def roots(self, F: Tensor) -> list[Tensor]:
        """Of each graph, [n C V]."""
        return [
            self.strength**0.5 * torch.stack(list(self.loss.hessian_root(f, y))).flatten(2).permute(1, 2, 0).double()
            for f, y in self._parts(F)
        ]
