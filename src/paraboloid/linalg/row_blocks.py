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

from paraboloid.linalg.probes import generator_of

LARGE, LOOKED_AT = 200_000, 10_000  # rows from which residuals are measured on some of them, and on how many


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


def relative_residual(A: Any, b: Tensor, x: Tensor) -> tuple[float, float]:
    """The largest ||b - A x|| / ||b|| over the columns of b and x, [D, K], and how much of A was gone through.

    Of more than 200,000 rows, 10,000 random ones are looked at where A gives rows, which tells the norm to about one
    percent: all of them cost as much as an iteration, and the work that is asked for may be less than that.
    """
    D, norms = len(b), torch.where(b.norm(dim=0) > 0, b.norm(dim=0), 1)
    if D <= LARGE or not hasattr(A, "rows"):
        return float((b - A @ x).norm(dim=0).div(norms).max()), 1.0
    generator = generator_of(0, b.device)
    I = torch.randperm(D, generator=generator, device=generator.device)[:LOOKED_AT].to(b.device)
    r = b[I] - A.rows(I, x)
    return float(r.norm(dim=0).div(norms).max()) * (D / len(I)) ** 0.5, len(I) / D
