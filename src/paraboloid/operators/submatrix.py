"""Some rows and columns of an operator, as a matrix known by its products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraboloid.operators.partition import places
from paraboloid.operators.product import as_scipy

Places = Tensor | Sequence[int] | Sequence[str] | slice | str


class Submatrix:
    """A[rows, columns] of an operator A [D, D]: products with the whole of it between an embedding and a choice.

        S = pb.operators.Submatrix(G, ["0.weight"], ["2.bias"])          # a block beside the diagonal
        S @ v; S.T @ u; S.to_dense(); S.to_scipy()

    rows, columns  int64 places in 0..D-1 (a tensor, an array, a list or a slice), or names of parameters; columns
                   default to rows, which gives a symmetric matrix that goes wherever any object with `@` and `.shape`
                   does

    A product costs one of A's.  Raises ValueError for places or names that A has not.
    """

    __array_ufunc__ = None  # so that NumPy leaves v @ S to us

    def __init__(self, A: Any, rows: Places, columns: Places | None = None):
        shape = getattr(A, "shape", (0, 1))
        if shape[0] != shape[1]:
            raise ValueError(f"the operator is {list(shape)}; expected a square one, whose rows and columns are places "
                             "of parameters.")  # fmt: skip
        self.A, self.rows = A, _resolved(A, rows)
        self.columns = self.rows if columns is None else _resolved(A, columns)
        self.shape = len(self.rows), len(self.columns)
        self.dtype, self.device = A.dtype, A.device

    @property
    def T(self) -> Submatrix:
        """The transpose: A is symmetric."""
        return Submatrix(self.A, self.columns, self.rows)

    def __matmul__(self, v: Tensor) -> Tensor:
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != self.shape[1]:
            found = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"the vector is {found}; expected a tensor [{self.shape[1]}] or [{self.shape[1]}, K].")
        full = torch.zeros(self.A.shape[0], *v.shape[1:], dtype=self.dtype, device=self.device)
        full[self.columns] = v.to(self.dtype)
        return (self.A @ full)[self.rows]

    def to_dense(self) -> Tensor:
        """[rows, columns]; as many products as the smaller side has."""
        transposed = self.shape[0] < self.shape[1]
        one, size = (self.T, self.shape[0]) if transposed else (self, self.shape[1])
        found = one @ torch.eye(size, dtype=self.dtype, device=self.device)
        return found.T if transposed else found

    def to_scipy(self) -> Any:
        """The same as a `scipy.sparse.linalg.LinearOperator`, float64 in and out."""
        return as_scipy(self, self.T)

    def __repr__(self) -> str:
        return f"Submatrix({list(self.shape)} of {self.A!r})"


def _resolved(A: Any, given: Places) -> Tensor:
    given = [given] if isinstance(given, str) else given
    if isinstance(given, slice):
        given = range(*given.indices(A.shape[0]))
    if isinstance(given, Sequence) and given and all(isinstance(name, str) for name in given):
        names = list(A.parameters)
        if unknown := [name for name in given if name not in names]:
            raise ValueError(f"the operator has no parameters {unknown}; expected some of {names}.")
        return torch.cat([places(A.parameters, [names.index(name)]) for name in given])
    at = given if isinstance(given, Tensor) else torch.as_tensor(_numbers(given), device="cpu")
    wrong = at.dim() != 1 or at.is_floating_point() or at.dtype == torch.bool or not len(at)
    if wrong or at.min() < 0 or at.max() >= A.shape[0] or len(at.unique()) != len(at):
        raise ValueError(f"the places are {at.dtype} of shape {tuple(at.shape)}; expected different int64 numbers in "
                         f"0..{A.shape[0] - 1}, or names of parameters.")  # fmt: skip
    return at.to(A.device)


def _numbers(given: Any) -> Any:
    """A list of what is no array: an empty one has a type of its own."""
    return given if hasattr(given, "dtype") else np.array(list(given), dtype=None if len(given) else np.int64)
