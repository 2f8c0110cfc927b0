"""The full curvature matrix [D, D] over the chosen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior, flat


@dataclass(frozen=True)
class Full:
    """H [D, D], the GGN of the summed negative log-likelihood (of a squared error: at noise variance 1).

    The posterior precision is strength * H + Lambda.
    """

    parameters: Mapping[str, Tensor]
    H: Tensor

    @property
    def formed(self) -> int:
        """Numbers that `covariance` forms for each output."""
        return len(self.H)

    def plus(self, other: Full) -> Full:
        return replace(self, H=self.H + other.H)

    def _factor(self, prior: Prior, strength: Any) -> tuple[Tensor, Tensor]:
        """s [D] and the Cholesky factor of I + S H S, where S = diag(s) = Lambda^-1/2: well conditioned."""
        s = flat(prior, self.parameters).rsqrt()
        B = strength * s.unsqueeze(1) * self.H * s
        B = B + torch.eye(len(s), dtype=B.dtype, device=B.device)
        L, info = torch.linalg.cholesky_ex(B)
        if info.item():
            low = torch.linalg.eigvalsh(self.H).min().item()
            raise LinAlgError(
                f"the posterior precision of {len(s)} weights has no Cholesky factor (the curvature's smallest "
                f"eigenvalue is {low:.4g}, the smallest prior precision {s.max().item() ** -2:.4g}); expected a "
                "positive definite matrix. Increase prior_precision, or fit in float64."
            )
        return s, L

    def log_det(self, prior: Prior, strength: Any) -> Tensor:
        """log det(I + Lambda^-1 strength H)."""
        return 2 * self._factor(prior, strength)[1].diagonal().log().sum()

    def apply(self, rows: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Sigma times the rows of a [K, D] tensor."""
        s, L = self._factor(prior, strength)
        return torch.cholesky_solve((rows * s).T, L).T * s

    def variances(self, prior: Prior, strength: Any) -> Tensor:
        """The marginal variance of each weight, [D]."""
        s, L = self._factor(prior, strength)
        eye = torch.eye(len(s), dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False).square().sum(0) * s.square()

    def deviations(self, noise: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Draws from N(0, Sigma), [S, D], from standard normal noise [S, D]."""
        s, L = self._factor(prior, strength)
        return torch.linalg.solve_triangular(L.T, noise.T, upper=True).T * s

    def covariance(
        self, J: Jacobian, prior: Prior, strength: Any, diagonal: bool = False, memory: int | None = None
    ) -> Tensor:
        """J Sigma J^T of each sample, [N, K, K], or its diagonal [N, K]."""
        s, L = self._factor(prior, strength)
        dense = J.dense() * s
        N, K, D = dense.shape
        half = torch.linalg.solve_triangular(L, dense.reshape(N * K, D).T, upper=False).T.view(N, K, D)
        return half.square().sum(2) if diagonal else half @ half.mT
