"""The product of operators, and operators as SciPy sees them."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor


class Product:
    """A B ...: a product of operators over the same parameters, known by its products with vectors alone.

    It is not symmetric in general, and so no `LinearOperator`: it has ``P @ v`` and ``v @ P`` in every form of vectors,
    ``P.T``, multiples, `to_dense` and `to_scipy`, and goes wherever any object with `@` and `.shape` does, such as
    ``pb.linalg.hutchinson_trace(P, samples=100)``.
    """

    __array_ufunc__ = None  # so that NumPy leaves v @ P to us

    def __init__(self, *factors: Any):
        self.factors, self.parameters = factors, factors[0].parameters
        self.shape, self.device = factors[0].shape, factors[0].device
        self.dtype = torch.promote_types(factors[0].dtype, factors[-1].dtype)

    @property
    def T(self) -> Product:
        """The transpose, ... B A."""
        return Product(*reversed(self.factors))

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector in any form that an operator takes, or with an operator."""
        for A in reversed(self.factors):
            v = A @ v
        return v

    def __rmatmul__(self, v: Any) -> Any:
        for A in self.factors:
            v = v @ A
        return v

    def __mul__(self, scale: Any) -> Product:
        if as_number(scale) is None:
            return NotImplemented
        return Product(scale * self.factors[0], *self.factors[1:])

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> Product:
        if as_number(scale) is None:
            return NotImplemented
        return Product(self.factors[0] / scale, *self.factors[1:])

    def __neg__(self) -> Product:
        return -1.0 * self

    def to_dense(self) -> Tensor:
        """The matrix [D, D]; D products."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> Any:
        """The same operator as a `scipy.sparse.linalg.LinearOperator`; see `as_scipy`."""
        return as_scipy(self, self.T)

    def __repr__(self) -> str:
        return " @ ".join(repr(A) for A in self.factors)


def as_number(scale: Any) -> float | None:
    """A real number, a tensor's or a NumPy array's of no axes too, as a float; None for anything else."""
    if isinstance(scale, Real):
        return float(scale)
    if getattr(scale, "shape", None) == () and not isinstance(scale, complex):
        value = scale.item()
        return float(value) if isinstance(value, Real) else None
    return None


def as_scipy(A: Any, transposed: Any) -> Any:
    """An operator as a `scipy.sparse.linalg.LinearOperator`, float64 in and out, on the CPU's side."""
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    def of(matrix: Any) -> Any:
        def multiply(v: Any) -> Any:
            columns = torch.from_numpy(v.astype("float64")).to(A.device, A.dtype)
            return (matrix @ columns).double().cpu().numpy()

        return multiply

    products: dict[str, Any] = {"matvec": lambda v: of(A)(v.reshape(-1)), "matmat": of(A), "dtype": "float64"}
    products |= {"rmatvec": lambda v: of(transposed)(v.reshape(-1)), "rmatmat": of(transposed)}
    return ScipyOperator(A.shape, **products)
