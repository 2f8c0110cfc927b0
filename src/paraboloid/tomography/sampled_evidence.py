"""The evidence of the linearised reconstruction by products alone: conjugate gradients and random probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid import linalg
from paraboloid.linalg.estimate import Estimate
from paraboloid.linalg.nystrom_approximation import LowRank
from paraboloid.linalg.probes import generator_of, signs
from paraboloid.passes.memory import DENSE
from paraboloid.tomography.dense_evidence import GramEvidence, factor
from paraboloid.tomography.image_jacobian import ImageJacobian
from paraboloid.tomography.kernel_prior import KernelPrior
from paraboloid.tomography.measured_jacobian import KEPT, MeasuredJacobian
from paraboloid.tomography.projector import Projector

RANK = 60  # of the preconditioner
ITERATIONS = 200  # of conjugate gradients, at most
TOL = 1e-3  # of the solutions that samples are made of


class Measurements:
    """B Sigma B^T + s2 I for B = A J, [m, m], by products."""

    def __init__(self, B: MeasuredJacobian, prior: KernelPrior, noise_variance: float):
        self.B, self.prior, self.noise_variance = B, prior, noise_variance
        self.shape, self.dtype, self.device = (B.size, B.size), B.J.weights[0].dtype, B.J.weights[0].device

    def __matmul__(self, v: Tensor) -> Tensor:
        rows = v.T if v.dim() == 2 else v.unsqueeze(0)
        seen = self.B.forth(self.prior.times(self.B.back(rows)))
        return (seen + self.noise_variance * rows).T.reshape(v.shape)

    def images(self, rows: Tensor) -> Tensor:
        """J Sigma B^T times rows [K, m]: [K, n]."""
        return self.B.J.push(self.prior.times(self.B.back(rows)))

    def nystrom(self, rank: int, seed: int) -> linalg.Nystrom:
        """B Sigma B^T of at most this rank."""
        return linalg.nystrom(Measurements(self.B, self.prior, 0.0), min(rank, self.B.size), seed)

    def preconditioner(self, seed: int) -> Any:
        """Its inverse from a Cholesky factor, where B is formed; else about it, of low rank and the identity."""
        S = self.B.gram(self.prior)
        if S is not None:
            return _Inverse(factor(S, self.noise_variance))
        return self.nystrom(RANK, seed).preconditioner(self.noise_variance)

    def solve(self, b: Tensor, tol: float, start: Tensor | None = None, preconditioner: Any = None) -> Tensor:
        """For columns b [m, K]."""
        return linalg.cg(self, b, tol, ITERATIONS, preconditioner, x0=start)


class SampledEvidence:
    """log N(r; 0, A K A^T + s2 I) as `DenseEvidence` has it, for images whose K is too large to be formed.

    Its gradient in a coefficient c of A K A^T + s2 I = sum_c c M_c is (a . M_c a - tr((A K A^T + s2 I)^-1 M_c)) / 2
    with a = (A K A^T + s2 I)^-1 r, and the trace is the mean of u . M_c z over random signs z, u the solution for z.
    The probes are the same on every call, and solutions start from the last ones.
    """

    def __init__(
        self, J: ImageJacobian, A: Projector, residual: Tensor, probes: int = 8, seed: int = 0, tol: float = 1e-2
    ):
        self.J, self.residual, self.tol, self.seed = J, residual, tol, seed
        self.B = MeasuredJacobian(J, A, residual.shape)
        generator = generator_of(seed, residual.device)
        self.probes = signs((residual.numel(), probes), residual, generator)
        self.solutions: Tensor | None = None

    def operator(self, prior: KernelPrior, noise_variance: float) -> Measurements:
        return Measurements(self.B, prior, noise_variance)

    def parts(
        self, prior: KernelPrior, noise_variance: float, preconditioner: Any, fit: bool = True
    ) -> tuple[Tensor, Tensor]:
        """a . M_c a and tr((A K A^T + s2 I)^-1 M_c), [coefficients + 1] each; the last is the noise's, M = I.

        fit=False: 0 for the former.
        """
        operator = self.operator(prior, noise_variance)
        b = torch.cat([self.residual.reshape(-1, 1), self.probes], 1)
        self.solutions = operator.solve(b, self.tol, self.solutions, preconditioner)
        u, z = self.solutions.T, self.probes.T
        pulled = self.B.back(torch.cat([u, z]))
        ours = [t[:1] for t in pulled]
        theirs = [t[1 : len(u)] for t in pulled], [t[len(u) :] for t in pulled]
        fits = float(fit) * torch.cat([prior.forms(ours, ours), u[:1].double().square().sum().view(1)])
        traces = torch.cat([prior.forms(*theirs), (u[1:] * z).double().sum().view(1)]) / len(z)
        return fits, traces

    def value(
        self, prior: KernelPrior, noise_variance: float, samples: int = 16, steps: int = 20, rank: int = 3 * RANK
    ) -> Estimate:
        """The log evidence, with the standard error of its log determinant.

        log det S = log det P + tr log(P^-1/2 S P^-1/2) for P = Nystrom's approximation + s2 I: what P leaves is near
        the identity, so few probes and steps tell its logarithm.
        """
        operator, s2 = self.operator(prior, noise_variance), noise_variance
        low = operator.nystrom(rank, self.seed)
        r = self.residual.reshape(-1, 1)
        a = operator.solve(r, 1e-5, preconditioner=low.preconditioner(s2))
        root = LowRank(low.U, (low.values + s2).rsqrt() - s2**-0.5, s2**-0.5)
        rest = linalg.logdet(_Sandwiched(operator, root), samples, steps, self.seed)
        volume = float((low.values.double() + s2).log().sum()) + (r.numel() - len(low.values)) * math.log(s2)
        value = -(float((r * a).sum()) + volume + float(rest) + r.numel() * math.log(2 * math.pi)) / 2
        return Estimate(value, rest.standard_error / 2)

    def formed(self, prior: KernelPrior) -> GramEvidence | None:
        """The same without probes, where matrices of the measurements fit; else None."""
        m = self.B.size
        if self.B.rows is None or 4 * m * (m + 1) * len(prior.coefficients()) > DENSE.of() // KEPT:
            return None
        return GramEvidence(self.B.grams(prior), self.residual.flatten().double())

    def at(self, prior: KernelPrior, noise_variance: float) -> SampledSolution:
        return SampledSolution(self, prior, noise_variance)


class SampledSolution:
    """The linear model's posterior under one prior and one noise variance, by conjugate gradients."""

    def __init__(self, evidence: SampledEvidence, prior: KernelPrior, noise_variance: float):
        self.evidence, self.prior, self.noise_variance = evidence, prior, noise_variance
        self.system = evidence.operator(prior, noise_variance)

    @cached_property
    def preconditioner(self) -> Any:
        return self.system.preconditioner(self.evidence.seed)

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """J v for v [K, *shape] of each weight, [K, n]."""
        return self.evidence.J.push(v)

    def measured(self, v: Sequence[Tensor], images: Tensor) -> Tensor:
        """A J v for images = J v, [K, m]."""
        return self.evidence.B.forth(v, images)

    def gain(self, b: Tensor) -> Tensor:
        """K A^T S^-1 b for rows [K, m]: [K, n]."""
        solved = self.system.solve(b.to(self.evidence.residual).T, TOL, preconditioner=self.preconditioner)
        return self.system.images(solved.T)

    def log_evidence(self) -> Estimate:
        return self.evidence.value(self.prior, self.noise_variance)


class _Inverse:
    """(L L^T)^-1."""

    def __init__(self, L: Tensor):
        self.L, self.shape, self.dtype, self.device = L, tuple(L.shape), L.dtype, L.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v.view(len(v), -1), self.L).view_as(v)


class _Sandwiched:
    """R S R for a symmetric R."""

    def __init__(self, S: Measurements, R: LowRank):
        self.S, self.R, self.shape, self.dtype, self.device = S, R, S.shape, S.dtype, S.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.R @ (self.S @ (self.R @ v))
