"""With a curvature A^T A of few rows: a low-rank GGN, and the dual (function-space) form of the exact one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.linalg.probes import Seed
from paraboloid.operators.structured.low_rank import LowRank
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior, flat
from paraboloid.reductions.contractions import weighted_grams


class Rows(LowRank):
    """A^T A for A [R, D].

    Low rank: sqrt(eigenvalue) * eigenvector of the GGN, the largest R.  Functional: S_n^T J_n of every sample and
    column of the loss's root, which is the whole GGN, or N / n times that of a subset of n samples.

    rank     rows that are kept by `plus`; None: all
    batches  (columns V, samples N) of each batch, where the rows are still S_n^T J_n [V N, D] of one after the other
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], A: Tensor, rank: int | None = None,
        batches: Sequence[tuple[int, int]] = (),
    ):  # fmt: skip
        super().__init__(parameters, A.T, A.new_ones(len(A)))
        self.A, self.rank, self.batches = A, rank, tuple(batches)

    def plus(self, other: Rows) -> Rows:
        A = compressed(torch.cat([self.A, other.A]))
        if self.rank is not None and len(A) > self.rank:
            _, values, vectors = torch.linalg.svd(A, full_matrices=False)
            A = values[: self.rank, None] * vectors[: self.rank]
        return Rows(self.parameters, A, self.rank)

    @cached_property
    def gram(self) -> Tensor:
        """A A^T, [R, R]."""
        return self.A @ self.A.T

    @cached_property
    def gram_eigenvalues(self) -> Tensor:
        """Of A A^T, [R]: with one precision for all weights every log determinant is a sum over them."""
        return torch.linalg.eigvalsh(self.gram).clamp(min=0)

    def diagonal(self, samples: int | None = None, seed: Seed = 0) -> Tensor:
        return super().diagonal(samples, seed) if samples is not None else self.A.square().sum(0)


class Woodbury(Precision):
    """strength A^T A + Lambda for `Rows`: with Woodbury's identity all that is solved has the size R <= D,

    Sigma = Lambda^-1 - Lambda^-1 A^T (I / strength + A Lambda^-1 A^T)^-1 A Lambda^-1.
    """

    @property
    def formed(self) -> int:
        return len(self.curvature.A)

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor]:
        """Lambda^-1/2 [D], and sqrt(strength), []."""
        s = flat(self.prior, self.curvature.parameters).rsqrt()
        return s, torch.as_tensor(self.strength, dtype=s.dtype, device=s.device).sqrt()

    @cached_property
    def _factor(self) -> Tensor:
        """The Cholesky factor of I + B B^T, [R, R], for B = sqrt(strength) A Lambda^-1/2."""
        (s, root), precision = self._root, shared_precision(self.prior)
        if precision is None:
            B = root * self.curvature.A * s
            M = B @ B.T
        else:  # no more than a multiple of what is known already
            M = root.square() / precision * self.curvature.gram
        return torch.linalg.cholesky(M + torch.eye(len(M), dtype=M.dtype, device=M.device))

    @cached_property
    def _ratios(self) -> Tensor | None:
        """strength times the eigenvalues of A A^T over the one precision of all weights; None where they have more."""
        precision = shared_precision(self.prior)
        return None if precision is None else self.strength * self.curvature.gram_eigenvalues / precision

    def log_det(self) -> Tensor:
        if self._ratios is not None:
            return torch.log1p(self._ratios).sum()
        return 2 * self._factor.diagonal().log().sum()

    def effective_dimension(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        if (e := self._ratios) is None or [set(names) for names in groups] != [set(self.curvature.parameters)]:
            return super().effective_dimension(groups)
        return [(e / (1 + e)).sum().clamp(min=torch.finfo(e.dtype).eps)]

    def left_by_others(self) -> Tensor | None:
        """[N, V]: the diagonal of S (I - S)^-1 = ((I + B B^T)^-1)_nn^-1 - I of each sample's rows, S = B_n Sigma B_n^T.

        None where rows are no longer those of samples.
        """
        if not self.curvature.batches:
            return None
        inverse, found, start = torch.cholesky_inverse(self._factor), [], 0
        for V, N in self.curvature.batches:
            own = inverse[start : start + V * N, start : start + V * N].view(V, N, V, N)
            values, vectors = torch.linalg.eigh(own.diagonal(dim1=1, dim2=3).movedim(2, 0).double())
            values = 1 / values.clamp(min=torch.finfo(inverse.dtype).eps ** 0.5) - 1
            found.append((vectors.square() @ values.clamp(min=0).unsqueeze(2)).squeeze(2).to(inverse.dtype))
            start += V * N
        return torch.cat(found)

    @cached_property
    def _left_out(self) -> tuple[Tensor, Tensor]:
        """(s^2 [D], C [R, D]) with Sigma = diag(s^2) - C^T C."""
        s, root = self._root
        return s.square(), torch.linalg.solve_triangular(
            self._factor, root * self.curvature.A * s.square(), upper=False
        )

    @property
    def determined(self) -> Tensor:
        """C [R, D] with Sigma = Lambda^-1 - C^T C: what the rows take away from the prior."""
        return self._left_out[1]

    def apply(self, rows: Tensor) -> Tensor:
        if "_left_out" not in self.__dict__ and len(rows) * 4 < len(self.curvature.A):
            (s, root), A = self._root, self.curvature.A
            scaled = rows * s.square()
            solved = torch.cholesky_solve(A @ scaled.T, self._factor)
            return scaled - root.square() * s.square() * (solved.T @ A)
        s2, C = self._left_out
        return rows * s2 - (rows @ C.T) @ C

    def variances(self) -> Tensor:
        s2, C = self._left_out
        return s2 - C.square().sum(0)

    def deviations(self, noise: Tensor) -> Tensor:
        """(I + B^T B)^-1/2 z = z - V (1 - (1 + e)^-1/2) V^T z over the eigenpairs (e, V) of B^T B."""
        s, root = self._root
        B = root * self.curvature.A * s
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


def shared_precision(prior: Prior) -> Tensor | None:
    """The one precision of all weights, []; None where they are not one and the same tensor."""
    first = next(iter(prior.values()))
    return first if first.dim() == 0 and all(t is first for t in prior.values()) else None


def compressed(A: Tensor) -> Tensor:
    """Rows [min(R, D), D] with the same A^T A."""
    return torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A
