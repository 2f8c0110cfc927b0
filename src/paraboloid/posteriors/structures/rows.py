"""With a curvature A^T A of few rows: a low-rank GGN, and the dual (function-space) form of the exact one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.operators.structured.low_rank import LowRank
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior, flat
from paraboloid.reductions.contractions import weighted_grams


class Rows(LowRank):
    """A^T A for A [R, D].

    Low rank: sqrt(eigenvalue) * eigenvector of the GGN, the largest R.  Functional: S_n^T J_n of every sample and
    column of the loss's root, which is the whole GGN, or N / n times that of a subset of n samples.
    """

    def __init__(self, parameters: Mapping[str, Tensor], A: Tensor, rank: int | None = None):
        super().__init__(parameters, A.T, A.new_ones(len(A)))
        self.A, self.rank = A, rank  # rows that are kept by `plus`; None: all

    def plus(self, other: Rows) -> Rows:
        A = compressed(torch.cat([self.A, other.A]))
        if self.rank is not None and len(A) > self.rank:
            _, values, vectors = torch.linalg.svd(A, full_matrices=False)
            A = values[: self.rank, None] * vectors[: self.rank]
        return Rows(self.parameters, A, self.rank)

    @cached_property
    def gram_eigenvalues(self) -> Tensor:
        """Of A A^T, [R]: with one precision for all weights every log determinant is a sum over them."""
        return torch.linalg.eigvalsh(self.A @ self.A.T).clamp(min=0)


class Woodbury(Precision):
    """strength A^T A + Lambda for `Rows`: with Woodbury's identity all that is solved has the size R <= D,

    Sigma = Lambda^-1 - Lambda^-1 A^T (I / strength + A Lambda^-1 A^T)^-1 A Lambda^-1.
    """

    @property
    def formed(self) -> int:
        return len(self.curvature.A)

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda^-1/2 [D], B = sqrt(strength) A Lambda^-1/2 [R, D], and the Cholesky factor of I + B B^T [R, R]."""
        s = flat(self.prior, self.curvature.parameters).rsqrt()
        B = torch.as_tensor(self.strength, dtype=s.dtype, device=s.device).sqrt() * self.curvature.A * s
        M = B @ B.T + torch.eye(len(B), dtype=B.dtype, device=B.device)
        return s, B, torch.linalg.cholesky(M)

    @cached_property
    def _ratios(self) -> Tensor | None:
        """strength times the eigenvalues of A A^T over the one precision of all weights; None where they have more."""
        precision = _shared(self.prior)
        return None if precision is None else self.strength * self.curvature.gram_eigenvalues / precision

    def log_det(self) -> Tensor:
        if self._ratios is not None:
            return torch.log1p(self._ratios).sum()
        return 2 * self._factor[2].diagonal().log().sum()

    def effective_dimension(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        if (e := self._ratios) is None or [set(names) for names in groups] != [set(self.curvature.parameters)]:
            return super().effective_dimension(groups)
        return [(e / (1 + e)).sum().clamp(min=torch.finfo(e.dtype).eps)]

    @cached_property
    def _left_out(self) -> tuple[Tensor, Tensor]:
        """(s^2 [D], C [R, D]) with Sigma = diag(s^2) - C^T C."""
        s, B, L = self._factor
        return s.square(), torch.linalg.solve_triangular(L, B * s, upper=False)

    def apply(self, rows: Tensor) -> Tensor:
        s2, C = self._left_out
        return rows * s2 - (rows @ C.T) @ C

    def variances(self) -> Tensor:
        s2, C = self._left_out
        return s2 - C.square().sum(0)

    def deviations(self, noise: Tensor) -> Tensor:
        """(I + B^T B)^-1/2 z = z - V (1 - (1 + e)^-1/2) V^T z over the eigenpairs (e, V) of B^T B."""
        s, B, _ = self._factor
        values, U = torch.linalg.eigh(B @ B.T)
        kept = values > values.max() * torch.finfo(values.dtype).eps * len(values)
        values, U = values[kept], U[:, kept]
        V = (U.T @ B) / values.sqrt().unsqueeze(1)  # orthonormal rows
        return (noise - ((noise @ V.T) * (1 - (1 + values).rsqrt())) @ V) * s

    def covariance(self, J: Jacobian, diagonal: bool = False, memory: int | None = None) -> Tensor:
        left_out = J.times(self._left_out[1])  # [N, K, R]
        shapes = {k: p.shape for k, p in self.curvature.parameters.items()}
        prior = {k: (1 / t).expand(shapes[k]) for k, t in self.prior.items()}
        found = weighted_grams(J.uses, prior, diagonal, memory)
        return found - (torch.linalg.vector_norm(left_out, dim=2).square() if diagonal else left_out @ left_out.mT)


def _shared(prior: Prior) -> Tensor | None:
    """The one precision of all weights, []; None where they are not one and the same tensor."""
    first = next(iter(prior.values()))
    return first if first.dim() == 0 and all(t is first for t in prior.values()) else None


def compressed(A: Tensor) -> Tensor:
    """Rows [min(R, D), D] with the same A^T A."""
    return torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A
