"""Sums and multiples of operators, and the identity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paraboloid.operators.base import LinearOperator


class Identity(LinearOperator):
    """The identity over the given parameters."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = parameters

    def _product(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.rows(directions).square().sum(1)

    def to_dense(self) -> Tensor:
        return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)


class Scaled(LinearOperator):
    """scale * A."""

    def __init__(self, operator: LinearOperator, scale: float):
        self.operator, self.scale, self.parameters = operator, scale, operator.parameters

    def _product(self, rows: Tensor) -> Tensor:
        return self.scale * self.operator._product(rows)

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.scale * self.operator.quadratic_forms(directions)

    def to_dense(self) -> Tensor:
        return self.scale * self.operator.to_dense()

    def diagonal(self, samples=None, seed=0):
        return super().diagonal(samples, seed) if samples is not None else self.scale * self.operator.diagonal()


class Sum(LinearOperator):
    """A + B: over the same parameters."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        shapes = [{k: tuple(p.shape) for k, p in A.parameters.items()} for A in (first, second)]
        if list(shapes[0].items()) != list(shapes[1].items()):
            raise ValueError(f"the summed operators have the parameters {shapes[0]} and {shapes[1]}; expected the same "
                             "names and shapes in the same order.")  # fmt: skip
        self.terms, self.parameters = (first, second), first.parameters

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
