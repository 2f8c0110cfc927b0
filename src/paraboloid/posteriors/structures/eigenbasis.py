"""With a curvature that is known by its eigenvalues in a basis for each parameter: a diagonal, KFAC, EKFAC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis, Eigenform
from paraboloid.linalg.kronecker import Decomposed
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import Jacobian
from paraboloid.reductions.contractions import gram, weighted_gram, weighted_grams
from paraboloid.reductions.eigenbasis import Gradients, rotate
from paraboloid.reductions.kronecker_factors import Factors, merged, scale_factors
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.products import Vector, merge


class Kronecker(Diagonalised):
    """Kronecker-factored curvature in the eigenbases `forms[name]`.

    `factors` are the sums that the blocks were made of, to which more data is added; where the eigenvalues were
    measured apart from the eigenvectors (EKFAC, debiased) there are none, and more data only adds eigenvalues.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        forms: Mapping[str, Eigenform],
        factors: dict[str, Factors] | None = None,
    ):
        super().__init__(parameters, [forms[k] for k in parameters])
        self.by_name, self.factors = dict(zip(parameters, self.forms, strict=True)), factors

    @staticmethod
    def of_factors(parameters: Mapping[str, Tensor], factors: dict[str, Factors]) -> Kronecker:
        known: list[Decomposed] = []
        forms = {k: scale_factors(v, 1.0, own=False).eigenform(f"parameter {k!r}", known) for k, v in factors.items()}
        return Kronecker(parameters, forms, factors)

    def plus(self, other: Any) -> Kronecker:
        if self.factors is not None and other.factors is not None:
            both = {k: merged(v, other.factors[k]) for k, v in self.factors.items()}
            return Kronecker.of_factors(self.parameters, both)
        own = {k: f.completed() for k, f in self.by_name.items()}  # other's bases are these, completed
        return Kronecker(self.parameters, {k: own[k].plus(f) for k, f in other.by_name.items()})


def diagonal_of(parameters: Mapping[str, Tensor], h: Mapping[str, Tensor]) -> Diagonalised:
    """A diagonal curvature, h [*shape] of each parameter; as a matrix [p, q] for the eigenvectors of single weights."""
    forms = []
    for name in parameters:
        values = h[name].reshape(1, *(h[name].shape[:1] or (1,)), -1)
        left, right = (Basis(None, size) for size in values.shape[1:])
        forms.append(Eigenform(left, right, values, values.new_zeros(())))
    return Diagonalised(parameters, forms)


@dataclass(frozen=True, eq=False)
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


class InEigenbasis(Precision):
    """strength H + Lambda for a `Diagonalised` H: a damped block has the eigenvectors of the block.

    There is one prior precision for each parameter, or for each weight where the eigenvectors are single weights.
    """

    def _precision(self, name: str, form: Eigenform) -> Tensor:
        """The prior's, to go with the eigenvalues of a block."""
        precision = self.prior[name]
        return precision.reshape(form.values.shape) if precision.dim() else precision

    @cached_property
    def sigma(self) -> dict[str, Eigenform]:
        """Sigma's blocks by parameter."""
        found = {}
        for name, form in zip(self.curvature.parameters, self.curvature.forms, strict=True):
            precision = self._precision(name, form)
            rest = 1 / (self.strength * form.rest + precision) if form.left_out else torch.zeros_like(form.rest)
            values = 1 / (self.strength * form.values + precision)
            found[name] = Eigenform(form.left, form.right, values, rest)
        return found

    @cached_property
    def _variances(self) -> dict[str, Tensor]:
        return {}

    def variances_of(self, name: str) -> Tensor:
        """The marginal variances of one parameter, [p q]."""
        if name not in self._variances:
            self._variances[name] = self.sigma[name].diagonal()
        return self._variances[name]

    @cached_property
    def _sigma(self) -> Diagonalised:
        return Diagonalised(self.curvature.parameters, list(self.sigma.values()))

    def log_det(self) -> Tensor:
        pairs = zip(self.curvature.parameters, self.curvature.forms, strict=True)
        ratios = [self.strength * form.values / self._precision(name, form) for name, form in pairs]
        return torch.stack([torch.log1p(ratio).sum() for ratio in ratios]).sum()

    def apply(self, rows: Tensor) -> Tensor:
        return self._sigma._product(rows)

    def deviations(self, noise: Tensor) -> Tensor:
        return self._sigma.sqrt()._product(noise)

    def variances(self) -> Tensor:
        return self._sigma.diagonal()

    def covariance(self, J: Jacobian, diagonal: bool = False, memory: int | None = None) -> Tensor:
        if all(form.left.vectors is None and form.right.vectors is None for form in self.sigma.values()):
            return weighted_grams(J.uses, {k: self.sigma[k].values for k in J.uses}, diagonal, memory)
        gradients = Gradients()
        parts = [form_gram(o, self.sigma[k], diagonal, memory, gradients) for k, o in J.uses.items()]
        return torch.stack(parts).sum(0)


class Mixture(Precision):
    """The two precisions of a `CrossFitted` curvature, and the covariance of the mixture."""

    @cached_property
    def parts(self) -> list[InEigenbasis]:
        return [InEigenbasis(part, self.prior, self.strength) for part in self.curvature.parts]

    def _mean(self, method: str, *args: Any) -> Tensor:
        first, second = (getattr(part, method)(*args) for part in self.parts)
        return (first + second) / 2

    def log_det(self) -> Tensor:
        return self._mean("log_det")

    def apply(self, rows: Tensor) -> Tensor:
        return self._mean("apply", rows)

    def variances(self) -> Tensor:
        return self._mean("variances")

    def deviations(self, noise: Tensor) -> Tensor:
        """Every other one from either part."""
        result = torch.empty_like(noise)
        for i, part in enumerate(self.parts):
            if len(noise) > i:
                result[i::2] = part.deviations(noise[i::2])
        return result

    def covariance(self, J: Jacobian, diagonal: bool = False, memory: int | None = None) -> Tensor:
        return self._mean("covariance", J, diagonal, memory)


def form_gram(
    o: Outer, form: Eigenform, diagonal: bool, memory: int | None, gradients: Gradients | None = None
) -> Tensor:
    """J A J^T of each sample for one parameter's block A, [N, K, K] or its diagonal [N, K].

    In A's eigenbasis it is a diagonal.  The sides of the outer products are rotated, position by position; where there
    are more positions than outputs times rows, or no outer products, J itself is.
    """
    if form.left.vectors is None and form.right.vectors is None:
        return weighted_gram(o, form.values, diagonal, memory)
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
