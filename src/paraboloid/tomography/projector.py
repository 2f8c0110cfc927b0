"""Line integrals of images as a linear map with its exact adjoint, differentiable as often as one likes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from paraboloid.passes.modes import autocast

Shape = tuple[int, ...]


def native(x: NDArray[Any]) -> NDArray[Any]:
    """The same numbers without gaps, in this machine's order of bytes: files of the field often have the other one."""
    return np.ascontiguousarray(x, x.dtype.newbyteorder("="))


class LinearMap(Protocol):
    """What a projector is made of: products with flat images, and the transpose."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def T(self) -> LinearMap: ...
    def times(self, x: Tensor) -> Tensor:
        """x [B, n] to [B, m], without derivatives."""
        ...


class Matrix:
    """A sparse matrix [m, n] and its transpose, as torch tensors of every precision and device that is asked for.

    A plain object, not a tensor: `torch.func` cannot take sparse tensors through its transforms.
    """

    def __init__(self, rows: scipy.sparse.csr_array, transposed: Matrix | None = None):
        self.rows, self._transposed = rows, transposed
        self._made: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape  # type: ignore[return-value]

    @property
    def T(self) -> Matrix:
        """The transpose, stored by its own rows: products with it are as fast."""
        if self._transposed is None:
            self._transposed = Matrix(scipy.sparse.csr_array(self.rows.T), self)
        return self._transposed

    def on(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix as a torch tensor with compressed rows."""
        if (dtype, device) not in self._made:
            starts, at, values = (torch.from_numpy(t) for t in (self.rows.indptr, self.rows.indices, self.rows.data))
            with warnings.catch_warnings():  # that torch calls sparse rows a beta feature
                warnings.simplefilter("ignore")
                self._made[dtype, device] = torch.sparse_csr_tensor(
                    starts, at, values.to(dtype), self.shape, device=device, check_invariants=False
                )
        return self._made[dtype, device]

    def times(self, x: Tensor) -> Tensor:
        """x [B, n] to [B, m]."""
        narrow = x.dtype in (torch.float16, torch.bfloat16)
        A = self.on(torch.float32 if narrow else x.dtype, x.device)
        columns = x.to(A.dtype)
        with autocast(x.device, None):  # there are no sparse products of 16 bits
            found = (A @ columns[0]).unsqueeze(0) if len(columns) == 1 else (A @ columns.T.contiguous()).T
        return found.to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_transposed": None, "_made": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Matrix:
        return self  # nothing ever changes it


class _Product(torch.autograd.Function):
    """x [..., n] to [..., m]; its derivatives are products with the same matrix and its transpose."""

    @staticmethod
    def forward(x: Tensor, linear: LinearMap) -> Tensor:
        return linear.times(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], linear.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Product.apply(grads[0], ctx.linear.T), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(tangents[0], ctx.linear)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, linear: LinearMap) -> Any:
        return _Product.apply(x.movedim(in_dims[0], 0), linear), 0


class Projector:
    """A linear map of images, ``A @ image``, and its Euclidean adjoint ``A.T @ sinogram``: <A x, y> = <x, A.T y>.

    A @ image     [..., H, W] to [..., angles, detectors], of the image's dtype and device; any leading axes (a batch, a
                  volume of slices) are projected one by one
    A.T           the adjoint, again a projector: [..., angles, detectors] to [..., H, W].  It is not an inverse: no
                  filter, no division
    A.shape       (angles * detectors, H * W), that of the matrix; A.to_scipy() is the matrix itself

    Differentiable in both modes and twice, under `torch.func`'s transforms too.  NumPy arrays give NumPy arrays.
    Raises ValueError for an image of another shape.
    """

    def __init__(self, linear: LinearMap, takes: Shape, gives: Shape, names: tuple[str, str], dtype: torch.dtype):
        self.linear, self.takes, self.gives, self.names, self.dtype = linear, takes, gives, names, dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape

    @property
    def T(self) -> Projector:
        return Projector(self.linear.T, self.gives, self.takes, (self.names[1], self.names[0]), self.dtype)

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and x.dtype.itemsize <= 8:
            return (self @ torch.from_numpy(native(x))).numpy()
        if not isinstance(x, Tensor):
            if hasattr(type(x), "__rmatmul__") and not isinstance(x, np.ndarray):
                return NotImplemented
            kind = f" of {x.dtype}" if isinstance(x, np.ndarray) else ""
            raise TypeError(f"the {self.names[0]} is a {type(x).__name__}{kind}; expected a tensor or an array of "
                            f"numbers, [..., {', '.join(map(str, self.takes))}].")  # fmt: skip
        if tuple(x.shape[-len(self.takes) :]) != self.takes:
            raise ValueError(f"the {self.names[0]} has shape {tuple(x.shape)}; expected [..., "
                             f"{', '.join(map(str, self.takes))}], with any leading axes.")  # fmt: skip
        if x.is_complex() or (x.dtype.itemsize == 1 and x.is_floating_point()):
            raise ValueError(f"the {self.names[0]} has dtype {x.dtype}; expected real numbers of 16 bits or more.")
        if x.layout != torch.strided or x.is_meta:
            raise ValueError(f"the {self.names[0]} has layout {x.layout} on {x.device}; expected a dense tensor that "
                             "holds numbers: call to_dense() on a sparse one.")  # fmt: skip
        if not x.is_floating_point():
            x = x.to(self.dtype)
        lead = x.shape[: x.dim() - len(self.takes)]
        return _applied(x.reshape(*lead, self.shape[1]), self.linear).reshape(*lead, *self.gives)

    def to_scipy(self) -> scipy.sparse.csr_array:
        """The matrix, of float64: entry (ray, pixel) is the length of the ray inside the pixel."""
        if isinstance(self.linear, Matrix):
            return self.linear.rows
        raise NotImplementedError(f"{self!r} is known by its products alone; expected a projector with a matrix.")

    def __repr__(self) -> str:
        axes = ["[" + ", ".join(map(str, axes)) + "]" for axes in (self.takes, self.gives)]
        return f"{type(self).__name__}({axes[0]} to {axes[1]})"


_applied: Callable[[Tensor, LinearMap], Any] = _Product.apply  # type: ignore[assignment]
