"""Curvature as A^T A with few rows: a low-rank GGN, and the dual (function-space) form of the exact one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.posteriors.jacobian import Jacobian, weighted_gram
from paraboloid.posteriors.prior import Prior, flat


@dataclass(frozen=True)
class Rows:
    """A [R, D] with A^T A the curvature of the summed negative log-likelihood; precision strength A^T A + Lambda.

    Low rank: sqrt(eigenvalue) * eigenvector of the GGN, the largest R.  Functional: S_n^T J_n of every sample and
    column of the loss's root, which is the whole GGN, or N / n times that of a subset of n samples.  By Woodbury,

        Sigma = Lambda^-1 - Lambda^-1 A^T (I / strength + A Lambda^-1 A^T)^-1 A Lambda^-1,

    and all that is solved has the size R.
    """

    parameters: Mapping[str, Tensor]
    A: Tensor
    rank: int | None = None  # rows that are kept by `plus`; None: all

    def plus(self, other: Rows) -> Rows:
        A = torch.cat([self.A, other.A])
        if self.rank is not None and len(A) > self.rank:
            _, values, vectors = torch.linalg.svd(A, full_matrices=False)
            A = values[: self.rank, None] * vectors[: self.rank]
        return replace(self, A=A)

    def _factor(self, prior: Prior, strength: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda^-1/2 [D], B = sqrt(strength) A Lambda^-1/2 [R, D], and the Cholesky factor of I + B B^T [R, R]."""
        s = flat(prior, self.parameters).rsqrt()
        B = torch.as_tensor(strength, dtype=s.dtype, device=s.device).sqrt() * self.A * s
        M = B @ B.T + torch.eye(len(B), dtype=B.dtype, device=B.device)
        return s, B, torch.linalg.cholesky(M)

    def log_det(self, prior: Prior, strength: Any) -> Tensor:
        """log det(I + Lambda^-1 strength A^T A), from the R x R matrix."""
        return 2 * self._factor(prior, strength)[2].diagonal().log().sum()

    def apply(self, rows: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Sigma times the rows of a [K, D] tensor."""
        s, B, L = self._factor(prior, strength)
        x = rows * s
        return (x - torch.cholesky_solve(B @ x.T, L).T @ B) * s

    def variances(self, prior: Prior, strength: Any) -> Tensor:
        """The marginal variance of each weight, [D]."""
        s, B, L = self._factor(prior, strength)
        half = torch.linalg.solve_triangular(L, B, upper=False)
        return (1 - half.square().sum(0)) * s.square()

    def deviations(self, noise: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Draws from N(0, Sigma), [S, D], from standard normal noise [S, D].

        (I + B^T B)^-1/2 z = z - V (1 - (1 + e)^-1/2) V^T z over the eigenpairs (e, V) of B^T B.
        """
        s, B, _ = self._factor(prior, strength)
        values, U = torch.linalg.eigh(B @ B.T)
        kept = values > values.max() * torch.finfo(values.dtype).eps * len(values)
        values, U = values[kept], U[:, kept]
        V = (U.T @ B) / values.sqrt().unsqueeze(1)  # orthonormal rows
        return (noise - ((noise @ V.T) * (1 - (1 + values).rsqrt())) @ V) * s

    def covariance(
        self, J: Jacobian, prior: Prior, strength: Any, diagonal: bool = False, memory: int | None = None
    ) -> Tensor:
        """J Sigma J^T of each sample, [N, K, K], or its diagonal [N, K]."""
        s, B, L = self._factor(prior, strength)
        half = torch.linalg.solve_triangular(L, B * s, upper=False)
        half = J.times(half)  # [N, K, R]
        parts = [weighted_gram(uses, self._variance(k, prior), diagonal, memory) for k, uses in J.uses.items()]
        found = torch.stack(parts).sum(0)
        return found - (half.square().sum(2) if diagonal else half @ half.mT)

    def _variance(self, name: str, prior: Prior) -> Tensor:
        """The prior's, of each element of a parameter."""
        return (1 / prior[name]).expand(self.parameters[name].shape)
