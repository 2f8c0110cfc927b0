"""Operators whose rows can be asked for by index: what the solvers of dual systems know of a matrix.

Any object with

    shape, dtype, device
    A @ v                      all of it, v [D] or [D, K]
    A.rows(indices, v)         A[indices] @ v, [B, K], for v [D, K]
    A.block(rows, columns)     A[rows][:, columns] as a tensor, for index tensors [B] and [C] (None: all columns)

will do; `row_blocks` makes one of a tensor.  [D, K] tensors that a solver hands over are transposes of contiguous
[K, D] ones, which products with few columns are fastest with.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class RowBlocks(Protocol):
    """A square operator that gives rows."""

    shape: Any
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, v: Tensor) -> Tensor: ...

    def rows(self, indices: Tensor, v: Tensor) -> Tensor: ...

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor: ...


class DenseRows:
    """A tensor [D, D] as `RowBlocks`."""

    def __init__(self, A: Tensor):
        self.A, self.shape, self.dtype, self.device = A, A.shape, A.dtype, A.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.A @ v

    def rows(self, indices: Tensor, v: Tensor) -> Tensor:
        return self.A[indices] @ v

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        return self.A[rows] if columns is None else self.A[rows][:, columns]


def row_blocks(A: Any) -> Any:
    """A itself where it has `rows` and `block`, a tensor with them; ValueError for anything else."""
    if isinstance(A, Tensor) and A.dim() == 2 and A.shape[0] == A.shape[1]:
        return DenseRows(A)
    if hasattr(A, "rows") and hasattr(A, "block") and hasattr(type(A), "__matmul__"):
        return A
    shape = tuple(getattr(A, "shape", ()))
    raise ValueError(f"A is a {type(A).__name__} of shape {shape or None}; expected a square tensor, or an object with "
                     "@, .shape, .rows(indices, v) and .block(rows, columns).")  # fmt: skip


def columns_like(b: Tensor) -> Tensor:
    """A copy of b [D] or [D, K] as the transpose of a contiguous [K, D]."""
    b = b if b.dim() == 2 else b.unsqueeze(1)
    return b.T.clone(memory_format=torch.contiguous_format).T
