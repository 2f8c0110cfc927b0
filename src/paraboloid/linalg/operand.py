"""What counts as an operator: anything with ``@`` and a square ``.shape``, on the torch or on the NumPy side."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # type: ignore[reportPrivateImportUsage]  (torch's stubs leave it out)


class Operand:
    """A square matrix known by its products with torch vectors [D] or [D, K].

    An object whose ``dtype`` is a torch dtype, or that has none, is multiplied with torch tensors; any other (NumPy
    arrays, SciPy's sparse matrices and LinearOperators) with NumPy arrays, and the product is converted back.
    """

    def __init__(self, A: Any):
        if isinstance(A, Operand):
            self.__dict__.update(A.__dict__)
            return
        shape = tuple(getattr(A, "shape", ()))
        if not hasattr(type(A), "__matmul__") or len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"A is a {type(A).__name__} of shape {shape or None}; expected a square operator, that is "
                             "an object with @ and .shape (D, D).")  # fmt: skip
        dtype = getattr(A, "dtype", None)
        self.A, self.size, self.shape = A, shape[0], shape
        self.on_torch = isinstance(dtype, torch.dtype) or not hasattr(A, "dtype")
        if self.on_torch:
            self.dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
        else:
            of_numpy: Any = np.float64 if dtype is None else dtype
            self.dtype = torch.from_numpy(np.empty(0, of_numpy)).dtype
        if self.dtype.is_complex:
            raise ValueError(f"A has dtype {self.dtype}; expected a real operator.")
        if not self.dtype.is_floating_point:
            self.dtype = torch.float64
        self.is_matrix = isinstance(A, Tensor) and A.layout == torch.strided
        device = getattr(A, "device", None)
        self.device = torch.device(device) if self.on_torch and device is not None else torch.device("cpu")

    def __matmul__(self, v: Tensor) -> Tensor:
        if not self.on_torch:
            return torch.from_numpy(np.asarray(self.A @ v.numpy())).to(v.dtype)
        A = self.A.to(v.dtype) if isinstance(self.A, Tensor) else self.A
        return (A @ v).detach().to(v.dtype)


def transposed(A: Operand, what: str) -> Operand:
    """The transpose of a matrix that is not symmetric; raises ValueError where it is not at hand as `A.T`."""
    other = getattr(A.A, "T", None)
    if other is None or tuple(getattr(other, "shape", ())) != A.shape:
        raise ValueError(f"A, a {type(A.A).__name__}, is not symmetric, and {what} needs products with its transpose "
                         "too; expected a symmetric operator, or one with a transpose A.T. Use "
                         "pb.linalg.diagonal(A, samples=...), which takes products with A alone.")  # fmt: skip
    return Operand(other)


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if getattr(value, "ndim", 0) or value not in allowed:  # an array is equal to each of its elements or none
        raise ValueError(f"{name} is {value!r}; expected one of {allowed}.")


def check_damping(damping: Any) -> Any:
    """`damping`, or ValueError where it is no finite number (or a tensor of one); it may be negative."""
    number = damping.item() if isinstance(damping, Tensor) and damping.numel() == 1 else damping
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"damping is {damping!r}; expected a finite number, which is added to every eigenvalue.")
    return damping


def check_count(name: str, count: Any, least: int = 1, most: int | None = None) -> int:
    """`count` as an int; raises ValueError unless it is an integer (NumPy's too) in least..most."""
    whole: bool = isinstance(count, Integral) and not isinstance(count, bool)
    if not (whole and least <= int(count) and (most is None or int(count) <= most)):
        limits = f"an integer of at least {least}" if most is None else f"an integer in {least}..{most}"
        raise ValueError(f"{name} is {count!r}; expected {limits}.")
    return int(count)
