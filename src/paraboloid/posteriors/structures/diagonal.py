"""The diagonal of the curvature over the chosen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior, flat
from paraboloid.reductions.contractions import weighted_gram


@dataclass(frozen=True)
class Diagonal:
    """h by parameter, the diagonal of the GGN of the summed negative log-likelihood; precision strength h + Lambda."""

    parameters: Mapping[str, Tensor]
    h: dict[str, Tensor]

    def plus(self, other: Diagonal) -> Diagonal:
        return replace(self, h={k: t + other.h[k] for k, t in self.h.items()})

    def _flat(self) -> Tensor:
        return torch.cat([self.h[k].reshape(-1) for k in self.parameters])

    def log_det(self, prior: Prior, strength: Any) -> Tensor:
        """log det(I + Lambda^-1 strength H)."""
        return torch.stack([torch.log1p(strength * h / prior[k]).sum() for k, h in self.h.items()]).sum()

    def variances(self, prior: Prior, strength: Any) -> Tensor:
        """The marginal variance of each weight, [D]."""
        return 1 / (strength * self._flat() + flat(prior, self.parameters))

    def apply(self, rows: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Sigma times the rows of a [K, D] tensor."""
        return rows * self.variances(prior, strength)

    def deviations(self, noise: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Draws from N(0, Sigma), [S, D], from standard normal noise [S, D]."""
        return noise * self.variances(prior, strength).sqrt()

    def covariance(
        self, J: Jacobian, prior: Prior, strength: Any, diagonal: bool = False, memory: int | None = None
    ) -> Tensor:
        """J Sigma J^T of each sample, [N, K, K], or its diagonal [N, K]."""
        parts = [weighted_gram(o, 1 / (strength * self.h[k] + prior[k]), diagonal, memory) for k, o in J.uses.items()]
        return torch.stack(parts).sum(0)
