"""Conjugate gradients for symmetric positive definite operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, Operand, check_count


def cg(
    A: Any,
    b: Any,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    preconditioner: Any = None,
) -> Any:
    """Solve A x = b by (preconditioned) conjugate gradients from x = 0.

    A symmetric positive definite, [D, D]; b [D] or [D, K] (columns are solved side by side, each product with A taking
    all of them), a torch tensor or a NumPy array; x is of b's shape and kind.  `preconditioner @ r` approximates
    A^-1 r and must be positive definite too.

    A column is done when ||r|| <= tol ||b||.  With `max_iterations=None` the solution meets the tolerance or
    `torch.linalg.LinAlgError` is raised (after 10 D + 100 iterations); a number given is a truncation, and x is the
    iterate that it leads to.  Non-positive curvature p.A p raises: x would not be a minimum.
    Source: Hestenes and Stiefel 1952.
    """
    as_array = isinstance(b, np.ndarray)
    A, b = Operand(A), torch.as_tensor(b)
    if not b.is_floating_point():
        raise ValueError(f"b has dtype {b.dtype}; expected a real floating-point type.")
    if b.dim() not in (1, 2) or len(b) != A.size:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; expected [{A.size}] or [{A.size}, K] for A of shape {A.shape}."
        )
    if not tol >= 0:
        raise ValueError(f"tol is {tol}; expected a number of at least 0.")
    limit = 10 * A.size + 100 if max_iterations is None else check_count("max_iterations", max_iterations, least=0)
    M = None if preconditioner is None else Operand(preconditioner)
    if M is not None and M.size != A.size:
        raise ValueError(f"the preconditioner has shape {M.shape}; expected {A.shape}.")
    x, residual = _iterate(A, b if b.dim() == 2 else b.unsqueeze(1), tol, limit, M)
    if max_iterations is None and residual > tol:
        raise LinAlgError(
            f"conjugate gradients stopped after {limit} iterations at a relative residual of {residual:.3g}; expected "
            f"{tol:.3g}. Add damping, give a preconditioner, or allow a larger tol."
        )
    x = x.view(b.shape)
    return x.numpy() if as_array else x


def _iterate(A: Operand, b: Tensor, tol: float, limit: int, M: Operand | None) -> tuple[Tensor, float]:
    """x [D, K] and the largest relative residual."""
    x, r = torch.zeros_like(b), b.clone()
    target = tol * b.norm(dim=0)
    z = r if M is None else M @ r
    p, rz = z.clone(), (r * z).sum(0)
    for iteration in range(limit):
        active = r.norm(dim=0) > target
        if not active.any():
            break
        Ap = A @ p
        curvature = (p * Ap).sum(0)
        if (bad := active & ~(curvature > 0)).any():
            raise LinAlgError(
                f"iteration {iteration} of conjugate gradients met the curvature p.A p = {curvature[bad][0].item():.4g}"
                "; expected a positive number. A is not positive definite: add damping."
            )
        alpha = torch.where(active, rz / curvature, 0)  # a column that is done stays where it is
        x += alpha * p
        r -= alpha * Ap
        z = r if M is None else M @ r
        rz, previous = torch.where(active, (r * z).sum(0), rz), rz
        p = torch.where(active, z + rz / previous * p, p)
    norms = b.norm(dim=0)
    return x, (r.norm(dim=0) / torch.where(norms > 0, norms, 1)).max().item()
