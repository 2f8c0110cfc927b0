"""Over single weights, wherever they lie: the curvature among the chosen ones, the others certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import flat


class Subnetwork(LinearOperator):
    """H among the S weights at flat places `at` of the parameters: H [S, S], or its diagonal [S]; zero elsewhere."""

    def __init__(self, parameters: Mapping[str, Tensor], at: Tensor, H: Tensor):
        self.parameters, self.at, self.H = parameters, at, H

    def plus(self, other: Subnetwork) -> Subnetwork:
        return Subnetwork(self.parameters, self.at, self.H + other.H)

    def _product(self, rows: Tensor) -> Tensor:
        found, chosen = torch.zeros_like(rows), rows[:, self.at]
        found[:, self.at] = chosen * self.H if self.H.dim() == 1 else chosen @ self.H
        return found

    def restricted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with zero in the place of those that are not chosen."""
        mask = self.at.new_zeros(self.shape[0], dtype=torch.bool)
        mask[self.at] = True
        pieces = mask.split([w.numel() for w in weights.values()])
        return {k: w * m.view_as(w) for (k, w), m in zip(weights.items(), pieces, strict=True)}


class InSubnetwork(Precision):
    """strength H + Lambda among the chosen weights; the others have no variance."""

    @property
    def formed(self) -> int:
        return self.curvature.shape[0]

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        """s [S] = Lambda^-1/2, and the Cholesky factor of I + s H s [S, S] or the root of its diagonal [S]."""
        at, H = self.curvature.at, self.strength * self.curvature.H
        s = flat(self.prior, self.curvature.parameters)[at].rsqrt()
        if H.dim() == 1:
            ratio = 1 + s * H * s
            if not (ratio > 0).all():
                raise _indefinite(H, s)
            return s, ratio.sqrt()
        B = s.unsqueeze(1) * H * s + torch.eye(len(s), dtype=H.dtype, device=H.device)
        L, info = torch.linalg.cholesky_ex(B)
        if info.item():
            raise _indefinite(torch.linalg.eigvalsh(H), s)
        return s, L

    def _among(self, rows: Tensor) -> Tensor:
        """Sigma^(1/2) times chosen entries [.., S], for a root with Sigma = root^T root: L^-1 s x."""
        s, L = self._factor
        x = rows * s
        if L.dim() == 1:
            return x / L
        flat_rows = x.reshape(-1, x.shape[-1])
        return torch.linalg.solve_triangular(L, flat_rows.T, upper=False).T.view_as(x)

    def log_det(self) -> Tensor:
        L = self._factor[1]
        return 2 * (L if L.dim() == 1 else L.diagonal()).log().sum()

    def _scattered(self, found: Tensor) -> Tensor:
        full = found.new_zeros(*found.shape[:-1], self.curvature.shape[0])
        return full.index_copy(-1, self.curvature.at, found)

    def apply(self, rows: Tensor) -> Tensor:
        s, L = self._factor
        half = self._among(rows[:, self.curvature.at])
        back = half / L if L.dim() == 1 else torch.linalg.solve_triangular(L.T, half.T, upper=True).T
        return self._scattered(back * s)

    def variances(self) -> Tensor:
        s, L = self._factor
        if L.dim() == 1:
            return self._scattered((s / L).square())
        eye = torch.eye(len(s), dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)
        return self._scattered(inverse.square().sum(0) * s.square())

    def deviations(self, noise: Tensor) -> Tensor:
        s, L = self._factor
        chosen = noise[:, self.curvature.at]
        found = chosen / L if L.dim() == 1 else torch.linalg.solve_triangular(L.T, chosen.T, upper=True).T
        return self._scattered(found * s)

    def effective_dimension(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        parameters, at = self.curvature.parameters, self.curvature.at
        variances = self.variances()
        determined = torch.zeros_like(variances)
        determined[at] = 1 - (flat(self.prior, parameters) * variances)[at]
        by_name = dict(zip(parameters, determined.split([p.numel() for p in parameters.values()]), strict=True))
        eps = torch.finfo(determined.dtype).eps
        return [torch.stack([by_name[name].sum() for name in names]).sum().clamp(min=eps) for names in groups]

    def covariance(self, J: Jacobian, diagonal: bool = False, memory: int | None = None) -> Tensor:
        half = self._among(J.dense()[..., self.curvature.at])
        return half.square().sum(2) if diagonal else half @ half.mT


def _indefinite(values: Tensor, s: Tensor) -> RuntimeError:
    return LinAlgError(
        f"the posterior precision of {len(s)} weights is not positive definite (the curvature's smallest eigenvalue is "
        f"{float(values.min()):.4g}, the smallest prior precision {float(s.max()) ** -2:.4g}); expected a positive "
        "definite matrix. Increase prior_precision."
    )
