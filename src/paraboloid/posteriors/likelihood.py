"""Losses read as negative log-likelihoods: what is summed, which constants belong to it, and how strongly it counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_choice
from paraboloid.losses import (
    MSE,
    BCEWithLogits,
    CrossEntropy,
    GaussianNLL,
    Loss,
    LossFunction,
    Observed,
    PoissonNLL,
    Scaled,
    Unweighted,
)

CURVATURES = ("ggn", "jacobian")
KINDS = ("categorical", "bernoulli", "gaussian", "heteroscedastic", "poisson", "other")


def _nothing(y: Tensor) -> float:
    return 0.0


def _half_log_two_pi(y: Tensor) -> float:
    return y.numel() * math.log(2 * math.pi) / 2


def _log_factorials(y: Tensor) -> float:
    return torch.lgamma(y.double() + 1).sum().item()


@dataclass(frozen=True)
class Likelihood:
    """-log p(y | f) = loss(f, y) + constant(y), summed over the samples and unreduced, whatever `reduction` says.

    A squared error is read as N(f, noise_variance I): `loss` is half of it, and the noise variance enters by `strength`
    (and `log_normalizer`), so that it can be changed, or tuned, without another pass over the data.  One behind a
    linear measurement (`losses.Observed`) is N(A f, noise_variance I).
    """

    kind: str
    loss: Scaled
    constant: Callable[[Any], float] = _nothing
    curvature: str = "ggn"  # or "jacobian": the identity in place of the loss's Hessian

    @staticmethod
    def of(loss_fn: LossFunction, curvature: str = "ggn") -> Likelihood:
        """Raises TypeError for a loss that paraboloid does not know, ValueError for sums that divide differently."""
        check_choice("curvature", curvature, CURVATURES)
        loss = Loss.from_torch(loss_fn)
        if len({term.reduction for term in loss.terms}) > 1:
            raise ValueError(
                f"the loss is a sum of terms with the reductions {[t.reduction for t in loss.terms]}; expected one "
                "reduction, so that the unreduced loss is a negative log-likelihood."
            )
        is_squared = isinstance(loss.loss if isinstance(loss, Observed) else loss, MSE)
        summed = Scaled(loss, 0.5 if is_squared else 1.0, normalizer=1.0)
        if is_squared:
            return Likelihood("gaussian", summed, curvature=curvature)
        if isinstance(loss, CrossEntropy):
            return Likelihood("categorical", summed, curvature=curvature)
        if isinstance(loss, BCEWithLogits):
            return Likelihood("bernoulli", summed, curvature=curvature)
        if isinstance(loss, GaussianNLL):
            return Likelihood("heteroscedastic", summed, _nothing if loss.full else _half_log_two_pi, curvature)
        if isinstance(loss, PoissonNLL):
            return Likelihood("poisson", summed, _nothing if loss.full else _log_factorials, curvature)
        return Likelihood("other", summed, curvature=curvature)

    @property
    def curved(self) -> Loss:
        """The loss whose curvature the posterior takes."""
        return self.loss if self.curvature == "ggn" else Unweighted(self.loss)

    @property
    def given(self) -> Any:
        """The loss itself, of the class that `kind` stands for."""
        return self.loss.loss

    @property
    def is_observed(self) -> bool:
        """Whether the targets are measurements of the outputs, so that a prediction, of outputs, has no noise."""
        return isinstance(self.given, Observed)

    @property
    def takes_noise(self) -> bool:
        """Whether `noise_variance` is a parameter of it."""
        return self.kind == "gaussian"

    def strength(self, noise_variance: Any) -> Any:
        """What the summed loss and its curvature are multiplied by: 1 / noise_variance of a Gaussian, else 1."""
        return 1 / noise_variance if self.takes_noise else 1.0

    def curvature_strength(self, noise_variance: Any, fisher: str) -> Any:
        """What the curvature is multiplied by: as the loss, but for products of gradients, which it enters twice."""
        strength = self.strength(noise_variance)
        return strength * strength if fisher == "empirical" else strength

    def log_normalizer(self, elements: int, noise_variance: Any) -> Any:
        """Sum over the target's elements of log(2 pi noise_variance) / 2 of a Gaussian, else 0."""
        if not self.takes_noise:
            return 0.0
        log = torch.log if isinstance(noise_variance, Tensor) else math.log
        return elements / 2 * log(2 * math.pi * noise_variance)
