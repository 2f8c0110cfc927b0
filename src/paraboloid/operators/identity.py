"""The identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import multiple_of_identity
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.structured.diagonalised import Diagonalised


class Identity(LinearOperator, kind="Identity"):
    """The identity over the given parameters."""

    exact = True

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = parameters

    def _state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> Identity:
        return cls(parameters)

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
