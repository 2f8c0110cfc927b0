"""Block-diagonal curvature with dense blocks: what couples the parameters of different blocks is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis, Eigenform, decomposed
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.partition import block_names, spans
from paraboloid.operators.structured.diagonalised import Diagonalised, dense_of
from paraboloid.passes.modes import precisely


class BlockDiagonal(LinearOperator, kind="BlockDiagonal"):
    """A block-diagonal matrix with dense symmetric blocks: block b couples the parameters at the places blocks[b]."""

    exact = True

    def __init__(self, parameters: Mapping[str, Tensor], blocks: Sequence[Sequence[int]], matrices: Sequence[Tensor]):
        self.parameters, self.blocks, self.matrices = parameters, [list(b) for b in blocks], list(matrices)
        self.at = spans(parameters, self.blocks)

    def _state(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "matrices": self.matrices}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> BlockDiagonal:
        return cls(parameters, state["blocks"], state["matrices"])

    def plus(self, other: BlockDiagonal) -> BlockDiagonal:
        """The sum with a matrix of the same blocks."""
        return BlockDiagonal(self.parameters, self.blocks or [], [*map(torch.add, self.matrices, other.matrices)])

    @precisely
    def _product(self, rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for where, B in zip(self.at, self.matrices, strict=True):
            result[:, where] = rows[:, where] @ B
        return result

    def to_dense(self) -> Tensor:
        return dense_of(self.shape[0], self.at, self.matrices, self)

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        result = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for where, B in zip(self.at, self.matrices, strict=True):
            result[where] = B.diagonal()
        return result

    @cached_property
    def eigenform(self) -> Diagonalised:
        """The same matrix by the eigenvalues and eigenvectors of its blocks."""
        forms = []
        for name, B in zip(block_names(self.parameters, self.blocks or []), self.matrices, strict=True):
            values, vectors = decomposed(B.unsqueeze(0), name)
            bases = Basis(vectors, len(B)), Basis(None, 1)
            forms.append(Eigenform(*bases, values.unsqueeze(2), values.new_zeros(())))
        return Diagonalised(self.parameters, forms, self.blocks)

    def _structured(self, what: str) -> Diagonalised:
        return self.eigenform

    def frobenius_norm(self) -> Tensor:
        return torch.stack([B.norm() for B in self.matrices]).norm()

    def trace(self, samples=None, seed=0):
        return super().trace(samples, seed) if samples is not None else sum(B.trace().item() for B in self.matrices)
