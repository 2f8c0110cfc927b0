"""The door for measurement operators: what a user gives as A, made a `Projector`, and tried once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from paraboloid.linalg.operand import check_count
from paraboloid.tomography.projector import Matrix, Projector, Shape
from paraboloid.tomography.sinograms import as_sinogram

ROUNDING = {8: 1e-8, 4: 1e-3, 2: 2e-2}  # of <A x, y>, over the norms, by a number's bytes


class Foreign:
    """Products with somebody else's operator, one image after another, in its own arrays (torch's or NumPy's)."""

    def __init__(self, A: Any, takes: Shape, gives: Shape, on_torch: bool):
        self.A, self.takes, self.gives, self.on_torch = A, takes, gives, on_torch
        self.shape = (math.prod(gives), math.prod(takes))

    @property
    def T(self) -> Foreign:
        return Foreign(self.A.T, self.gives, self.takes, self.on_torch)

    def times(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([_product(self.A, one.view(self.takes), self.on_torch).reshape(-1) for one in x])


def as_projector(A: Any, sinogram: Any, image_shape: Shape | None = None) -> Projector:
    """A as a `Projector` of [H, W] images: itself, or any object with ``@`` and ``.T``.

    A matrix [m, n] (SciPy's sparse matrices and LinearOperators, NumPy's and torch's arrays, sparse too) multiplies
    flat images; n is a square number, or `image_shape` says what shape they have.  The sinogram has m numbers, or is a
    stack of such ones [..., angles, detectors].  Any other object multiplies images [H, W], and
    its ``A.T @ sinogram`` shows which.  One product each way is made to see that A.T is the adjoint of A.

    Raises TypeError for an object without ``@`` and ``.T``; ValueError where shapes and the sinogram disagree, and for
    an A.T that is not the adjoint: <A x, y> and <x, A.T y> differ for random x and y.
    """
    sinogram = as_sinogram(sinogram)
    if isinstance(A, Projector):
        _check_sinogram(A.gives, sinogram)
        return A
    if "complex" in str(getattr(A, "dtype", "")):
        raise ValueError(f"A has dtype {A.dtype}; expected real numbers.")
    if isinstance(A, Tensor) and A.is_meta:
        raise ValueError("A is a tensor on the meta device, which holds no numbers; expected a matrix of numbers.")
    if isinstance(A, Tensor) and A.layout != torch.strided and A.dim() == 2:
        entries = A.detach().cpu().to_sparse_coo().coalesce()
        A = scipy.sparse.coo_array((entries.values().double().numpy(), entries.indices().numpy()), shape=tuple(A.shape))
    is_array = isinstance(A, np.ndarray | Tensor) or scipy.sparse.issparse(A)
    if is_array and A.ndim != 2:
        raise ValueError(f"A is an array of shape {tuple(A.shape)}; expected a matrix [sinogram's numbers, pixels].")
    if not hasattr(type(A), "__matmul__") or not hasattr(A, "T"):
        raise TypeError(f"A is a {type(A).__name__}; expected an operator, that is an object with @ and .T.")
    shape = tuple(getattr(A, "shape", ()))
    on_torch = _multiplies_flat(A, shape) if len(shape) == 2 and not is_array else None
    if is_array or on_torch is not None:
        made = _of_matrix(A, shape, sinogram, image_shape, on_torch)
    else:
        made = _of_images(A, sinogram)
    check_adjoint(made, sinogram.dtype)
    return made


def check_adjoint(A: Projector, dtype: torch.dtype) -> None:
    """Raise ValueError unless <A x, y> = <x, A.T y> for one pair of x and y, within the precision's rounding.

    x is random; y is random plus as much of A x, so that an A.T that is off by a factor shows as well.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (A.takes, A.gives))
    Ax = _said("A @ image", A, x)
    y = y * (Ax.norm() / y.norm()) + Ax
    back = _said("A.T @ sinogram", A.T, y)
    one, other = (float((u.double() * v.double()).sum()) for u, v in ((Ax, y), (x, back)))
    if not abs(one - other) <= ROUNDING[dtype.itemsize] * float(Ax.double().norm() * y.double().norm()):
        raise ValueError(
            f"A.T is not the adjoint of A: <A x, y> = {one:.6g} but <x, A.T y> = {other:.6g} for a random image x and "
            "sinogram y; expected equal numbers. A back projection with a filter, or one that interpolates otherwise "
            "than the projection, is no adjoint; pb.tomography.ParallelBeam has one, and so has a sparse matrix."
        )


def _said(what: str, A: Projector, x: Tensor) -> Tensor:
    """A @ x; ValueError for whatever somebody else's product raises."""
    try:
        return A @ x
    except Exception as e:
        raise _raises(what, e, tuple(x.shape)) from e


def _raises(what: str, e: Exception, shape: Shape, more: str = "") -> ValueError:
    return ValueError(f"{what} raises {type(e).__name__} ({str(e)[:200]}) for the shape {shape}{more}; expected an "
                      "image [H, W] to [angles, detectors] by A, and the reverse by A.T.")  # fmt: skip


def _multiplies_flat(A: Any, shape: Shape) -> bool | None:
    """Whether an object of this shape [m, n] multiplies flat tensors (else arrays); None for neither."""
    kinds = (False, True) if isinstance(getattr(A, "dtype", None), np.dtype) else (True, False)
    for on_torch in kinds:
        try:
            if _product(A, torch.zeros(shape[1], dtype=torch.float64), on_torch).shape == (shape[0],):
                return on_torch
        except Exception:  # whatever an operator says to what it does not take
            pass
    return None


def _of_matrix(A: Any, shape: Shape, sinogram: Tensor, image_shape: Shape | None, on_torch: bool | None) -> Projector:
    m, n = shape
    if not m or not n:
        raise ValueError(f"A has the shape {shape}; expected rows and columns.")
    if m not in _counts(sinogram):
        raise ValueError(f"A has the shape {shape} but the sinogram {tuple(sinogram.shape)}, {sinogram.numel()} "
                         f"numbers; expected {m} of them, in the last two axes of a stack.")  # fmt: skip
    gives = tuple(sinogram.shape) if m == sinogram.numel() else tuple(sinogram.shape[-2:])
    side = math.isqrt(n)
    takes = (side, side) if image_shape is None else _image_shape(image_shape)
    if math.prod(takes) != n:
        raise ValueError(f"A has {n} columns, which are no {takes[0]} x {takes[-1]} image; expected a square number of "
                         "them, or image_shape=(H, W).")  # fmt: skip
    names = ("image", "sinogram")
    if scipy.sparse.issparse(A):
        return Projector(Matrix(scipy.sparse.csr_array(A, dtype=np.float64)), takes, gives, names, sinogram.dtype)
    A = A.to(sinogram) if isinstance(A, Tensor) else A
    linear = Foreign(A, (n,), (m,), isinstance(A, Tensor) if on_torch is None else on_torch)
    return Projector(linear, takes, gives, names, sinogram.dtype)


def _counts(sinogram: Tensor) -> tuple[int, int]:
    """How many numbers all of it and its last two axes have."""
    return sinogram.numel(), math.prod(sinogram.shape[-2:])


def _image_shape(given: Any) -> Shape:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise ValueError(f"image_shape is {given!r}; expected (H, W).")
    return tuple(check_count("image_shape", side) for side in given)


def _of_images(A: Any, sinogram: Tensor) -> Projector:
    """Of one image at a time; a stack of sinograms shows what A takes by its first one."""
    if sinogram.dim() > 2:
        sinogram = sinogram.reshape(-1, *sinogram.shape[-2:])[0]
    on_torch, back = _tried(A.T, sinogram)
    if back.dim() != 2:
        raise ValueError(f"A.T @ sinogram has shape {tuple(back.shape)} for a sinogram {tuple(sinogram.shape)}; "
                         "expected an image [H, W].")  # fmt: skip
    takes, gives = tuple(back.shape), tuple(sinogram.shape)
    try:
        forth = _product(A, back, on_torch)
    except Exception as e:
        raise _raises("A @ image", e, takes) from e
    if tuple(forth.shape) != gives:
        raise ValueError(f"A gives sinograms of shape {tuple(forth.shape)}; found one of shape {gives}.")
    return Projector(Foreign(A, takes, gives, on_torch), takes, gives, ("image", "sinogram"), sinogram.dtype)


def _tried(A: Any, x: Tensor) -> tuple[bool, Tensor]:
    """Whether A multiplies torch tensors (else NumPy arrays), and A @ x."""
    try:
        return True, _product(A, x, True)
    except Exception:  # whatever an operator on NumPy arrays says to a tensor
        pass
    try:
        return False, _product(A, x, False)
    except Exception as e:
        raise _raises("A.T @ sinogram", e, tuple(x.shape), ", a tensor and an array alike") from e


def _product(A: Any, x: Tensor, on_torch: bool) -> Tensor:
    found = A @ (x if on_torch else (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy())
    found = found.detach() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    if found.is_complex():
        raise ValueError(f"the product has dtype {found.dtype}; expected real numbers")
    return found.to(x)


def _check_sinogram(expected: Shape, sinogram: Tensor) -> None:
    if tuple(sinogram.shape[-len(expected) :]) != expected and len(expected) != 2:
        raise ValueError(f"the projections have shape {tuple(sinogram.shape)}; expected [..., "
                         f"{', '.join(map(str, expected))}], as A has.")  # fmt: skip
    if tuple(sinogram.shape[-len(expected) :]) != expected:
        raise ValueError(f"the sinogram has shape {tuple(sinogram.shape)}; expected [..., angles, detectors] with "
                         f"{expected[0]} angles and {expected[1]} detectors, as A has.")  # fmt: skip
