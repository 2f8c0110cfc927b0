"""Inverses by iteration beside conjugate gradients: least squares (LSMR), and a truncated Neumann series."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, Operand, check_count, check_damping


def lsmr(
    A: Any, b: Any, damping: float = 0.0, tol: float | None = None, max_iterations: int | None = None
) -> Tensor:  # fmt: skip
    """x that minimises |A x - b|^2 + damping^2 |x|^2, for any square A, singular or indefinite, symmetric or not.

    b and x are [D], or [D, K] for K systems one after the other.  Two products for each iteration, one with A and one
    with its transpose (A itself where it has none: a symmetric one).  Ends where |A^T r| <= tol |A| |r| or
    |r| <= tol |b|, with r the residual of the damped system; tol is 1e-8 in float64, 1e-5 in lower precision unless
    given.  With `max_iterations=None` that is met, or `torch.linalg.LinAlgError` is raised (after 10 D + 100
    iterations); a number given is a truncation.  Raises `LinAlgError` for NaN and infinity too.
    Source: Fong and Saunders 2011, arXiv:1006.0758.
    """
    A = Operand(A)
    b = _right_side(A, b)
    check_damping(damping)
    steps = 10 * A.size + 100 if max_iterations is None else check_count("max_iterations", max_iterations)
    goal = (1e-8 if A.dtype == torch.float64 else 1e-5) if tol is None else tol
    if isinstance(goal, bool) or not isinstance(goal, Real) or not goal >= 0:
        raise ValueError(f"tol is {tol!r}; expected a number of at least 0.")
    ends = float(goal), steps, max_iterations is None
    if b.dim() == 2:
        return torch.stack([_lsmr(A, column, damping, *ends) for column in b.T], 1)
    return _lsmr(A, b, damping, *ends)


def _lsmr(A: Operand, b: Tensor, damping: float, tol: float, steps: int, must_end: bool) -> Tensor:
    T = A if (other := getattr(A.A, "T", None)) is None else Operand(other)
    u, beta = _unit(b)
    v, alpha = _unit(T @ u)
    zeta_bar, alpha_bar, rho, rho_bar, c_bar, s_bar = alpha * beta, alpha, 1.0, 1.0, 1.0, 0.0
    h, h_bar, x = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
    norm_squared, length = alpha**2, beta
    if not math.isfinite(alpha * beta):
        raise LinAlgError("b, or its product with A, holds NaN or infinity; expected finite numbers.")
    if alpha * beta == 0:  # b is 0, or beside the range of A
        return x
    for _ in range(steps):
        u, beta = _unit(A @ v - alpha * u)
        v, alpha = _unit(T @ u - beta * v)
        norm_squared += beta**2 + alpha**2
        alpha_hat = (alpha_bar**2 + damping**2) ** 0.5
        rho_old = rho
        c, s, rho = _rotation(alpha_hat, beta)
        theta, alpha_bar = s * alpha, c * alpha
        rho_bar_old, zeta_old_bar = rho_bar, zeta_bar
        theta_bar = s_bar * rho
        c_bar, s_bar, rho_bar = _rotation(c_bar * rho, theta)
        zeta, zeta_bar = c_bar * zeta_old_bar, -s_bar * zeta_old_bar
        h_bar = h - h_bar * (theta_bar * rho / (rho_old * rho_bar_old))
        x = x + h_bar * (zeta / (rho * rho_bar))
        h = v - h * (theta / rho)
        residual = (b - A @ x).norm().item()
        if not math.isfinite(residual):
            raise LinAlgError("a product with A holds NaN or infinity; expected finite numbers.")
        damped = (residual**2 + (damping * x.norm().item()) ** 2) ** 0.5
        if abs(zeta_bar) <= tol * norm_squared**0.5 * damped or residual <= tol * length or alpha * beta == 0:
            return x
    if must_end:
        raise LinAlgError(
            f"LSMR stopped after {steps} iterations at a residual of {residual / length:.3g} times b; expected "
            f"{tol:.3g}, or a gradient as small. Add damping, or allow a larger tol."
        )
    return x


def _right_side(A: Operand, b: Any) -> Tensor:
    """b [D] or [D, K] in the dtype of A; raises ValueError for another shape, and for what is no array."""
    shape = getattr(b, "shape", None)
    if shape is None or len(shape) not in (1, 2) or shape[0] != A.size:
        found = type(b).__name__ if shape is None else f"of shape {tuple(shape)}"
        raise ValueError(f"b is {found}; expected a tensor [{A.size}] or [{A.size}, K].")
    return torch.as_tensor(b, device=A.device).to(A.dtype)


def _unit(v: Tensor) -> tuple[Tensor, float]:
    length = v.norm().item()
    return (v / length if length > 0 else v), length


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """(c, s, r) with c a + s b = r and s a = c b."""
    r = (a * a + b * b) ** 0.5
    return (1.0, 0.0, 0.0) if r == 0 else (a / r, b / r, r)


def neumann(A: Any, b: Any, terms: int = 100, scale: float | None = None) -> Tensor:
    """scale sum_{k < terms} (I - scale A)^k b, which tends to A^-1 b for a positive definite A: [D] or [D, K].

    terms - 1 products.  It converges for 0 < scale < 2 / lambda_max; by default scale = 1 / lambda_max, estimated by
    ten steps of the power method.  The error along an eigenvector is (1 - scale lambda)^terms: small eigenvalues are
    left damped, as if the inverse had been stopped early.
    Raises `LinAlgError` where the terms grow.  Source: Lorraine, Vicol and Duvenaud 2020, arXiv:1911.02590.
    """
    A = Operand(A)
    check_count("terms", terms)
    term = _right_side(A, b)
    if scale is None:
        scale = 1 / _largest(A)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not scale > 0:
        raise ValueError(f"scale is {scale!r}; expected a positive number below 2 over the largest eigenvalue.")
    total, first = term.clone(), term.norm()
    for _ in range(terms - 1):
        term = term - scale * (A @ term)
        total += term
        if not term.norm() <= 1e3 * first:
            raise LinAlgError(f"the terms of the Neumann series grow, to {term.norm():.4g} from {first:.4g}; expected "
                              f"a positive definite matrix and a scale (now {scale:.4g}) below 2 over its largest "
                              "eigenvalue.")  # fmt: skip
    return scale * total


def _largest(A: Operand) -> float:
    """A number not far above the largest eigenvalue."""
    generator = torch.Generator(device=A.device).manual_seed(0)
    v = torch.randn(A.size, generator=generator, dtype=A.dtype, device=A.device)
    value = 1.0
    for _ in range(10):
        v = v / v.norm()
        w = A @ v
        value, v = w.norm().item(), w
        if not 0 < value < math.inf:
            raise LinAlgError(f"A times a random vector has the norm {value:.4g}; expected a positive definite matrix.")
    return 1.1 * value
