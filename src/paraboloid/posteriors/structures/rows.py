"""Curvature as A^T A with few rows: a low-rank GGN, and the dual (function-space) form of the exact one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior, flat
from paraboloid.reductions.contractions import weighted_gram


@dataclass(frozen=True)
class Rows:
    """A [R, D] with A^T A the curvature of the summed negative log-likelihood; precision strength A^T A + Lambda.

    Low rank: sqrt(eigenvalue) * eigenvector of the GGN, the largest R.  Functional: S_n^T J_n of every sample and
    column of the loss's root, which is the whole GGN, or N / n times that of a subset of n samples.  By Woodbury,

        Sigma = Lambda^-1 - Lambda^-1 A^T (I / strength + A Lambda^-1 A^T)^-1 A Lambda^-1,

    and all that is solved has the size R <= D.
    """

    parameters: Mapping[str, Tensor]
    A: Tensor
    rank: int | None = None  # rows that are kept by `plus`; None: all

    @property
    def formed(self) -> int:
        """Numbers that `covariance` forms for each output."""
        return len(self.A)

    def plus(self, other: Rows) -> Rows:
        A = compressed(torch.cat([self.A, other.A]))
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
        if (precision := _shared(prior)) is not None:
            return torch.log1p(strength * self._eigenvalues / precision).sum()
        return 2 * self._factor(prior, strength)[2].diagonal().log().sum()

    @cached_property
    def _eigenvalues(self) -> Tensor:
        """Of A A^T, [R]: with one precision for all weights every log determinant is a sum over them."""
        return torch.linalg.eigvalsh(self.A @ self.A.T).clamp(min=0)

    def effective_dimension(self, prior: Prior, strength: Any) -> Tensor | None:
        """tr(strength A^T A Sigma), where all weights have one precision; else None."""
        if (precision := _shared(prior)) is None:
            return None
        e = strength * self._eigenvalues / precision
        return (e / (1 + e)).sum()

    def _left_out(self, prior: Prior, strength: Any) -> tuple[Tensor, Tensor]:
        """(s^2 [D], C [R, D]) with Sigma = diag(s^2) - C^T C; those asked for last are remembered."""
        precision = flat(prior, self.parameters)
        strength = torch.as_tensor(strength, dtype=precision.dtype, device=precision.device)
        if precision.requires_grad or strength.requires_grad:
            return self._made(prior, strength)
        if "of" not in self._last or not all(
            torch.equal(a, b) for a, b in zip(self._last["of"], (precision, strength), strict=True)
        ):
            self._last.clear()
            self._last["of"], self._last["is"] = (precision, strength), self._made(prior, strength)
        return self._last["is"]

    @cached_property
    def _last(self) -> dict[str, Any]:
        return {}

    def _made(self, prior: Prior, strength: Any) -> tuple[Tensor, Tensor]:
        s, B, L = self._factor(prior, strength)
        return s.square(), torch.linalg.solve_triangular(L, B * s, upper=False)

    def apply(self, rows: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Sigma times the rows of a [K, D] tensor."""
        s2, C = self._left_out(prior, strength)
        return rows * s2 - (rows @ C.T) @ C

    def variances(self, prior: Prior, strength: Any) -> Tensor:
        """The marginal variance of each weight, [D]."""
        s2, C = self._left_out(prior, strength)
        return s2 - C.square().sum(0)

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
        left_out = J.times(self._left_out(prior, strength)[1])  # [N, K, R]
        parts = [weighted_gram(o, self._variance(k, prior), diagonal, memory) for k, o in J.uses.items()]
        found = torch.stack(parts).sum(0)
        return found - (torch.linalg.vector_norm(left_out, dim=2).square() if diagonal else left_out @ left_out.mT)

    def _variance(self, name: str, prior: Prior) -> Tensor:
        """The prior's, of each element of a parameter."""
        return (1 / prior[name]).expand(self.parameters[name].shape)


def _shared(prior: Prior) -> Tensor | None:
    """The one precision of all weights, []; None where they are not one and the same tensor."""
    first = next(iter(prior.values()))
    return first if first.dim() == 0 and all(t is first for t in prior.values()) else None


def compressed(A: Tensor) -> Tensor:
    """Rows [min(R, D), D] with the same A^T A."""
    return torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A
