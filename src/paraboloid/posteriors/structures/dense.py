"""With the full curvature matrix [D, D] over the chosen weights."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import flat


class Dense(Precision):
    """strength H + Lambda for a `BlockDiagonal` H of one block."""

    @property
    def formed(self) -> int:
        return self.curvature.shape[0]

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        """s [D] and the Cholesky factor of I + S H S, where S = diag(s) = Lambda^-1/2: well conditioned."""
        H, s = self.curvature.matrices[0], flat(self.prior, self.curvature.parameters).rsqrt()
        B = self.strength * s.unsqueeze(1) * H * s
        B = B + torch.eye(len(s), dtype=B.dtype, device=B.device)
        L, info = torch.linalg.cholesky_ex(B)
        if info.item():
            low = torch.linalg.eigvalsh(H).min().item()
            raise LinAlgError(
                f"the posterior precision of {len(s)} weights has no Cholesky factor (the curvature's smallest "
                f"eigenvalue is {low:.4g}, the smallest prior precision {s.max().item() ** -2:.4g}); expected a "
                "positive definite matrix. Increase prior_precision, or fit in float64."
            )
        return s, L

    def log_det(self) -> Tensor:
        return 2 * self._factor[1].diagonal().log().sum()

    def apply(self, rows: Tensor) -> Tensor:
        s, L = self._factor
        return torch.cholesky_solve((rows * s).T, L).T * s

    def variances(self) -> Tensor:
        s, L = self._factor
        eye = torch.eye(len(s), dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False).square().sum(0) * s.square()

    def deviations(self, noise: Tensor) -> Tensor:
        s, L = self._factor
        return torch.linalg.solve_triangular(L.T, noise.T, upper=True).T * s

    def covariance(self, J: Jacobian, diagonal: bool = False, memory: int | None = None) -> Tensor:
        s, L = self._factor
        dense = J.dense() * s
        N, K, D = dense.shape
        half = torch.linalg.solve_triangular(L, dense.reshape(N * K, D).T, upper=False).T.view(N, K, D)
        return half.square().sum(2) if diagonal else half @ half.mT
