"""Sums and multiples of operators, and the identity."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import multiple_of_identity
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.structured.diagonalised import Diagonalised


class Identity(LinearOperator):
    """The identity over the given parameters."""

    exact = True

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = parameters

    def _product(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.rows(directions).square().sum(1)

    def to_dense(self) -> Tensor:
        return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def diagonal(self, samples=None, seed=0):
        return super().diagonal(samples, seed) if samples is not None else self._ones()

    def _ones(self) -> Tensor:
        return torch.ones(self.shape[0], dtype=self.dtype, device=self.device)

    def frobenius_norm(self) -> Tensor:
        return self._ones().norm()

    def _structured(self, what: str) -> Diagonalised:
        one = self._ones()[0]
        return Diagonalised(self.parameters, [multiple_of_identity(one, p.numel()) for p in self.parameters.values()])


class Scaled(LinearOperator):
    """scale * A."""

    def __init__(self, operator: LinearOperator, scale: float):
        self.operator, self.scale, self.parameters = operator, scale, operator.parameters
        self.exact = operator.exact

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    def _product(self, rows: Tensor) -> Tensor:
        return self.scale * self.operator._product(rows)

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.scale * self.operator.quadratic_forms(directions)

    def to_dense(self) -> Tensor:
        return self.scale * self.operator.to_dense()

    def diagonal(self, samples=None, seed=0):
        return super().diagonal(samples, seed) if samples is not None else self.scale * self.operator.diagonal()

    def frobenius_norm(self) -> Tensor:
        return abs(self.scale) * self.operator.frobenius_norm()

    def _structured(self, what: str) -> Diagonalised:
        return self.operator._structured(what).map(lambda s: self.scale * s)


class Sum(LinearOperator):
    """A + B: over the same parameters."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        shapes = [{k: tuple(p.shape) for k, p in A.parameters.items()} for A in (first, second)]
        if list(shapes[0].items()) != list(shapes[1].items()):
            raise ValueError(f"the summed operators have the parameters {shapes[0]} and {shapes[1]}; expected the same "
                             "names and shapes in the same order.")  # fmt: skip
        self.terms, self.parameters = (first, second), first.parameters

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(*(A.dtype for A in self.terms))

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(A.exact for A in self.terms) and self._joint is not None

    @cached_property
    def _joint(self) -> Diagonalised | None:
        """The summands' eigenvalues added up, where they share their eigenvectors."""
        first, second = (A._structured("eigenvalues") for A in self.terms)
        return first.plus(second)

    def _product(self, rows: Tensor) -> Tensor:
        return self.terms[0]._product(rows) + self.terms[1]._product(rows)

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.terms[0].quadratic_forms(directions) + self.terms[1].quadratic_forms(directions)

    def to_dense(self) -> Tensor:
        return self.terms[0].to_dense() + self.terms[1].to_dense()

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        return self.terms[0].diagonal() + self.terms[1].diagonal()

    def frobenius_norm(self) -> Tensor:
        return self._joint.frobenius_norm() if self.exact and self._joint is not None else super().frobenius_norm()

    def _structured(self, what: str) -> Diagonalised:
        """The eigenvalues added up, where the summands have one eigenbasis; raises NotImplementedError otherwise."""
        for A in self.terms:
            if not A.exact:
                A._structured(what)  # raises where there is none
        if self._joint is None:
            kinds = " and ".join(type(A).__name__ for A in self.terms)
            raise NotImplementedError(
                f"the sum of {kinds} has no {what}: the summands have different eigenvectors; expected summands that "
                "share them, such as A + c * Identity, or operators made with one eigenbasis. Use "
                "solve(b, damping=...), which knows the products alone."
            )
        return self._joint
