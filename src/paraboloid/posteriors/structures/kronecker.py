"""Kronecker-factored curvature over the chosen weights, in an eigenbasis for each parameter (KFAC, EKFAC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker import Decomposed
from paraboloid.passes.trees import mapped
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.posteriors.prior import Prior
from paraboloid.reductions.contractions import gram, weighted_gram
from paraboloid.reductions.eigenbasis import Gradients, rotate
from paraboloid.reductions.kronecker_factors import Factors, merged, scale_factors
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.products import Vector, merge


@dataclass(frozen=True)
class Kronecker:
    """The curvature's blocks by their eigenvalues h, `forms[name]`; precision strength h + lambda.

    There is one prior precision for each parameter, so that a damped block has the eigenvectors of the block.
    `factors` are the sums that the blocks were made of, to which more data is added; where the eigenvalues were
    measured apart from the eigenvectors (EKFAC, debiased) there are none, and more data only adds eigenvalues.
    """

    parameters: Mapping[str, Tensor]
    forms: dict[str, Eigenform]
    factors: dict[str, Factors] | None = field(default=None, repr=False)

    @staticmethod
    def of_factors(parameters: Mapping[str, Tensor], factors: dict[str, Factors]) -> Kronecker:
        copies = {k: mapped(torch.clone, v) for k, v in factors.items()}  # scaling is done in place
        known: list[Decomposed] = []
        forms = {k: scale_factors(v, 1.0).eigenform(f"parameter {k!r}", known) for k, v in copies.items()}
        return Kronecker(parameters, forms, factors)

    def plus(self, other: Kronecker) -> Kronecker:
        if self.factors is not None and other.factors is not None:
            both = {k: merged(v, other.factors[k]) for k, v in self.factors.items()}
            return Kronecker.of_factors(self.parameters, both)
        own = {k: f.completed().values for k, f in self.forms.items()}  # other's bases are these, completed
        return replace(self, forms={k: replace(f, values=f.values + own[k]) for k, f in other.forms.items()})

    def log_det(self, prior: Prior, strength: Any) -> Tensor:
        """log det(I + Lambda^-1 strength H)."""
        return torch.stack([torch.log1p(strength * f.values / prior[k]).sum() for k, f in self.forms.items()]).sum()

    def _sigma(self, name: str, prior: Prior, strength: Any) -> Eigenform:
        return self.forms[name].map(lambda h: 1 / (strength * h + prior[name]))

    def _mapped(self, rows: Tensor, prior: Prior, strength: Any, root: bool) -> Tensor:
        parts = rows.split([p.numel() for p in self.parameters.values()], 1)
        found = []
        for name, part in zip(self.parameters, parts, strict=True):
            sigma = self._sigma(name, prior, strength)
            found.append((sigma.sqrt() if root else sigma).product(part))
        return torch.cat(found, 1)

    def apply(self, rows: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Sigma times the rows of a [K, D] tensor."""
        return self._mapped(rows, prior, strength, False)

    def deviations(self, noise: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Draws from N(0, Sigma), [S, D], from standard normal noise [S, D]."""
        return self._mapped(noise, prior, strength, True)

    def variances(self, prior: Prior, strength: Any) -> Tensor:
        """The marginal variance of each weight, [D]."""
        return torch.cat([self._sigma(name, prior, strength).diagonal() for name in self.parameters])

    def covariance(
        self, J: Jacobian, prior: Prior, strength: Any, diagonal: bool = False, memory: int | None = None
    ) -> Tensor:
        """J Sigma J^T of each sample, [N, K, K], or its diagonal [N, K]."""
        gradients = Gradients()
        parts = [form_gram(o, self._sigma(k, prior, strength), diagonal, memory, gradients) for k, o in J.uses.items()]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class CrossFitted:
    """An even mixture of two Gaussians with the same mean: all data is used, none for both of direction and value.

    Each part takes its eigenvectors from one half of the data and measures along them on the other half, so that its
    eigenvalues are not those that the noise of its own half picked out.  Moments of the mixture are exact; `log_det` is
    the mean of the two.  The two-batch principle is that of Tatzel et al. 2024, arXiv:2410.14325.
    """

    parts: Sequence[Kronecker]  # two

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.parts[0].parameters

    def plus(self, other: CrossFitted) -> CrossFitted:
        first, second = (a.plus(b) for a, b in zip(self.parts, other.parts, strict=True))
        return CrossFitted((first, second))

    def _mean(self, method: str, *args: Any) -> Tensor:
        first, second = (getattr(part, method)(*args) for part in self.parts)
        return (first + second) / 2

    def log_det(self, prior: Prior, strength: Any) -> Tensor:
        """Mean of the parts' log det(I + Lambda^-1 strength H)."""
        return self._mean("log_det", prior, strength)

    def apply(self, rows: Tensor, prior: Prior, strength: Any) -> Tensor:
        """The mixture's covariance times the rows of a [K, D] tensor."""
        return self._mean("apply", rows, prior, strength)

    def variances(self, prior: Prior, strength: Any) -> Tensor:
        """The marginal variance of each weight, [D]."""
        return self._mean("variances", prior, strength)

    def deviations(self, noise: Tensor, prior: Prior, strength: Any) -> Tensor:
        """Draws from the mixture, [S, D], from standard normal noise [S, D]: every other one from either part."""
        result = torch.empty_like(noise)
        for i, part in enumerate(self.parts):
            if len(noise) > i:
                result[i::2] = part.deviations(noise[i::2], prior, strength)
        return result

    def covariance(
        self, J: Jacobian, prior: Prior, strength: Any, diagonal: bool = False, memory: int | None = None
    ) -> Tensor:
        """J Sigma J^T of each sample, [N, K, K], or its diagonal [N, K]."""
        return self._mean("covariance", J, prior, strength, diagonal, memory)


def form_gram(
    o: Outer, form: Eigenform, diagonal: bool, memory: int | None, gradients: Gradients | None = None
) -> Tensor:
    """J A J^T of each sample for one parameter's block A, [N, K, K] or its diagonal [N, K].

    In A's eigenbasis it is a diagonal.  The sides of the outer products are rotated, position by position; where there
    are more positions than outputs times rows, or no outer products, J itself is.
    """
    V, _, _, T, p = o.left.shape
    weights = form.values if form.full else form.values - form.rest
    if len(o.products) > 1 or (o.products and V * p >= T):
        rotated = merge([rotate(use, form.left, form.right, gradients=gradients) for use in o.products])
        found = weighted_gram(rotated, weights, diagonal, memory)
        if form.full:
            return found
        return found + weighted_gram(o, form.rest.expand(o.shape), diagonal, memory)
    if isinstance(o, Vector) and form.full and form.right.vectors is None:  # its rotated gradients are all
        c = (gradients or Gradients()).rotated(o.left, form.left).flatten(2).transpose(0, 1)
        return gram(c, weights.reshape(1, 1, -1), diagonal)
    parts = []
    for flat in o.rows(memory):  # [n V D]
        c = form.rotated(flat.flatten(0, 1)).flatten(1).unflatten(0, flat.shape[:2])
        part = gram(c, weights.reshape(1, 1, -1), diagonal)
        parts.append(part if form.full else part + form.rest * gram(flat, 1.0, diagonal))
    return torch.cat(parts)
