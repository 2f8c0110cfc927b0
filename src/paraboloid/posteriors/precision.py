"""The posterior's precision, strength H + Lambda: what every structure of H knows of it and of its inverse Sigma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior, flat


@dataclass(frozen=True, eq=False)
class Precision:
    """strength H + Lambda over the chosen weights, [D, D], and Sigma = (strength H + Lambda)^-1.

    curvature  H, of the summed negative log-likelihood (of a squared error: at noise variance 1), as an operator
    prior      Lambda's diagonal by parameter
    strength   a number, or a tensor [] that gradients flow through
    """

    curvature: Any
    prior: Prior
    strength: Any

    @property
    def formed(self) -> int:
        """Numbers that `covariance` forms for each output."""
        return 0

    def log_det(self) -> Tensor:
        """log det(I + Lambda^-1 strength H)."""
        raise NotImplementedError

    def apply(self, rows: Tensor) -> Tensor:
        """Sigma times the rows of a [K, D] tensor."""
        raise NotImplementedError

    def variances(self) -> Tensor:
        """The marginal variance of each weight, [D]."""
        raise NotImplementedError

    def deviations(self, noise: Tensor) -> Tensor:
        """Draws from N(0, Sigma), [S, D], from standard normal noise [S, D]."""
        raise NotImplementedError

    def covariance(self, J: Jacobian, diagonal: bool = False, memory: int | None = None) -> Tensor:
        """J Sigma J^T of each sample, [N, K, K], or its diagonal [N, K]."""
        raise NotImplementedError

    def effective_dimension(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        """gamma_g = sum over the weights of a group of 1 - Lambda_d Sigma_dd: how many of them the data determines."""
        parameters = self.curvature.parameters
        determined = 1 - flat(self.prior, parameters) * self.variances()
        sizes = [p.numel() for p in parameters.values()]
        by_name = dict(zip(parameters, determined.split(sizes), strict=True))
        eps = torch.finfo(determined.dtype).eps
        return [torch.stack([by_name[name].sum() for name in names]).sum().clamp(min=eps) for names in groups]

    def roughly_determined(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        """`effective_dimension`, within some percent where that is much cheaper."""
        return self.effective_dimension(groups)

    def left_by_others(self) -> Tensor | None:
        """strength times the variances [N, V] of the samples' own outputs, each under the posterior without its sample;
        None where they are not at hand."""
        return None

    def holds(self, curvature: Any, prior: Prior, strength: Any) -> bool:
        """Whether it is that of these numbers, none of which gradients flow through."""
        if isinstance(strength, Tensor) or (self.curvature, self.strength) != (curvature, strength):
            return False
        for a, b in zip(prior.values(), self.prior.values(), strict=True):
            if a.requires_grad or b.requires_grad or not (a is b or torch.equal(a, b)):
                return False
        return True
