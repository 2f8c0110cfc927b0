"""A Gaussian process given data: its mean, its variance, and functions drawn from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.gp.inputs import inputs_of, targets_of
from paraboloid.gp.kernel import Kernel
from paraboloid.gp.prior import PriorFunctions
from paraboloid.gp.solvers import Settings, Solved, solve

ROWS = 2048  # inputs whose exact variance is found at a time, from a factor
SOLVED = 256  # and by an iterative solver


@dataclass(eq=False)
class GaussianProcess:
    """What `condition` returns: f ~ GP(0, kernel) given y = f(x) + N(0, noise_variance).

    x, y            the data, [N, d] and [N] or [N, C] (C outputs with one kernel)
    noise_variance  as given
    solver, reason  which solver was taken, and why
    residual        ||b - A x|| / ||b||, the largest over the right-hand sides: how exactly the systems were solved
    iterations, passes, step, history, notes   what the solver says, see `paraboloid.linalg.solution.Solution`
    weights         A^-1 y, [N, C], A = K + noise: mean(x) = k(x, X) weights
    sample_weights  A^-1 (f_s(X) + e_s), [N, samples C]: sample(x) = mean(x) + f_s(x) - k(x, X) sample_weights
    """

    kernel: Kernel
    x: Tensor
    y: Tensor
    noise_variance: Tensor
    samples: int
    settings: Settings
    gram: Gram
    prior: PriorFunctions | None
    noise_draws: Tensor  # standard normal, [samples C, N]
    solved: Solved
    grow: Callable[..., GaussianProcess]  # what `append` calls

    @property
    def solver(self) -> str:
        return self.solved.solver

    @property
    def reason(self) -> str:
        return self.solved.reason

    @property
    def residual(self) -> float:
        return self.solved.solution.residual

    @property
    def iterations(self) -> int:
        return self.solved.solution.iterations

    @property
    def passes(self) -> float:
        return self.solved.solution.passes

    @property
    def step(self) -> float | None:
        return self.solved.solution.step

    @property
    def history(self) -> list[tuple[float, float]]:
        return self.solved.solution.history

    @property
    def notes(self) -> list[str]:
        return self.solved.notes

    @property
    def outputs(self) -> int:
        return 1 if self.y.dim() == 1 else self.y.shape[1]

    @property
    def weights(self) -> Tensor:
        return self.solved.solution.x[:, : self.outputs]

    @property
    def sample_weights(self) -> Tensor:
        return self.solved.solution.x[:, self.outputs :]

    def mean(self, x: Any) -> Tensor:
        """The posterior mean of f at inputs [M, d]: [M], or [M, C]."""
        return self._one(self.gram.cross(self._inputs(x), self.weights))

    def sample(self, x: Any) -> Tensor:
        """Values at inputs [M, d] of the functions drawn when the data came: [samples, M], or [samples, M, C].

        Pathwise (Matheron's rule): the functions are fixed, and a value does not depend on what else is asked for.
        """
        x = self._inputs(x)
        both = self.gram.cross(x, self.solved.solution.x)
        return self._one(both[:, : self.outputs].unsqueeze(0) + self._deviations(x, both[:, self.outputs :]))

    def variance(self, x: Any) -> Tensor:
        """The posterior variance of f at inputs [M, d], [M]; the same for every output.

        Exact where there is a Cholesky factor; else the mean square of the samples' deviations from the mean, with a
        relative standard error of (2 / samples)^1/2, or (without samples) by conjugate gradients for each input.
        """
        x = self._inputs(x)
        if self.solved.explained is not None:
            return self._explained(x)
        if not self.samples:
            return self._solved_for(x)
        deviations = self._deviations(x, self.gram.cross(x, self.sample_weights))
        return deviations.square().mean((0, 2))

    def predict(self, x: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at inputs [M, d], by one pass over the data."""
        x = self._inputs(x)
        if self.solved.explained is not None or not self.samples:
            return self.mean(x), self.variance(x)
        both = self.gram.cross(x, self.solved.solution.x)
        deviations = self._deviations(x, both[:, self.outputs :])
        return self._one(both[:, : self.outputs]), deviations.square().mean((0, 2))

    def nll(self, x: Any, y: Any) -> float:
        """The mean negative log density of targets y at inputs x, each alone: N(mean, variance + noise_variance)."""
        mean, variance = self.predict(x)
        if self.noise_variance.dim():
            raise ValueError("noise_variance has one entry for each input of the data; the noise at other inputs is "
                             "not known.")  # fmt: skip
        _, y = targets_of(y, mean)
        y, total = y.to(mean), variance + self.noise_variance
        if y.shape != mean.shape:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected that of the mean, {tuple(mean.shape)}.")
        total = total if mean.dim() == 1 else total.unsqueeze(1)
        return float((0.5 * ((y - mean).square() / total + torch.log(2 * math.pi * total))).mean())

    def log_evidence(self) -> float:
        """log N(y; 0, K + noise), every constant included; only with a Cholesky factor, which is exact."""
        if self.solved.factor is None:
            raise ValueError(f"solver {self.solver!r} keeps no factor for the determinant; condition with "
                             "solver='cholesky', on a subset of the data if need be.")  # fmt: skip
        y = self.y.view(len(self.y), -1)
        fit = (y * self.weights).sum()
        half = self.solved.factor.diagonal().log().sum()
        return float(-0.5 * fit - self.outputs * (half + 0.5 * len(y) * math.log(2 * math.pi)))

    def append(self, x: Any, y: Any, noise_variance: float | Tensor | None = None) -> GaussianProcess:
        """The process given (x, y) too: the same prior functions, noise of the old data and settings of the solver.

        Iterative solvers start from the old solution (0 for the new data), and tiles of the old kernel matrix that were
        kept are used again.  noise_variance of the new data: that of the old by default.  Gives a new process and
        leaves this one; sample s of both is the same prior function.
        """
        return self.grow(self, x, y, noise_variance)

    def _inputs(self, x: Any) -> Tensor:
        return inputs_of(x, self.x)

    def _one(self, values: Tensor) -> Tensor:
        """Without the axis of outputs where y has none."""
        return values.squeeze(-1) if self.y.dim() == 1 else values

    def _deviations(self, x: Tensor, projected: Tensor) -> Tensor:
        """f_s(x) - k(x, X) A^-1 (f_s(X) + e_s), [samples, M, C]."""
        if self.prior is None:
            return projected.new_zeros(0, len(x), self.outputs)
        found = self.prior(x) - projected.T
        return found.view(self.samples, self.outputs, len(x)).transpose(1, 2)

    def _solved_for(self, x: Tensor) -> Tensor:
        """k(x, x) - k(x, X).(K + noise)^-1 k(X, x), to the tolerance of the solver that was taken.

        By conjugate gradients for "sdd", "sgd" and "block" too: their residual is orthogonal to their solution, so that
        what is subtracted has an error of second order in it, and of first order by all others.  Where the data leaves
        little of the prior's variance that can be many times what is left.
        """
        settings, found = replace(self.settings, solver=self.solver, rank=self.settings.rank or None), []
        if self.solver in ("sdd", "sgd", "block"):
            settings = replace(settings, solver="cg", steps=None, step_size=None, batch_size=None)
        for part in x.split(SOLVED):
            k = self.gram.cross_matrix(part).T  # [N, M]
            solution = solve(self.gram, k, torch.zeros_like(k), None, settings, None).solution
            found.append(self.kernel.diagonal(part) - (k * solution.x).sum(0))
        return torch.cat(found).clamp(min=0)

    def _explained(self, x: Tensor) -> Tensor:
        assert self.solved.explained is not None
        parts = [self.kernel.diagonal(p) - self.solved.explained(self.gram.cross_matrix(p)) for p in x.split(ROWS)]
        return torch.cat(parts).clamp(min=0)
