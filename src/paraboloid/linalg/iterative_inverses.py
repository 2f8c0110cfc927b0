"""Inverses by iteration beside conjugate gradients: least squares (LSMR), and a truncated Neumann series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, Operand, check_count


def lsmr(
    A: Any, b: Tensor, damping: float = 0.0, tol: float = 1e-8, max_iterations: int | None = None
) -> Tensor:  # fmt: skip
    """x [D] that minimises |A x - b|^2 + damping^2 |x|^2, for any square A, singular or indefinite, symmetric or not.

    Two products for each iteration, one with A and one with its transpose (A itself where it has none: a symmetric
    one).  Ends where |A^T r| <= tol |A| |r| or |r| <= tol |b|, with r the residual of the damped system.
    Source: Fong and Saunders 2011, arXiv:1006.0758.
    """
    A = Operand(A)
    if b.shape != (A.size,):
        raise ValueError(f"b has shape {tuple(b.shape)}; expected [{A.size}].")
    T = A if (other := getattr(A.A, "T", None)) is None else Operand(other)
    steps = 4 * A.size if max_iterations is None else check_count("max_iterations", max_iterations)
    u, beta = _unit(b.to(A.dtype))
    v, alpha = _unit(T @ u)
    zeta_bar, alpha_bar, rho, rho_bar, c_bar, s_bar = alpha * beta, alpha, 1.0, 1.0, 1.0, 0.0
    h, h_bar, x = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
    norm_squared, length = alpha**2, beta
    if not alpha * beta > 0:  # b is 0, or beside the range of A
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
        residual = (b.to(A.dtype) - A @ x).norm().item()
        damped = (residual**2 + (damping * x.norm().item()) ** 2) ** 0.5
        if abs(zeta_bar) <= tol * norm_squared**0.5 * damped or residual <= tol * length or alpha * beta == 0:
            break
    return x


def _unit(v: Tensor) -> tuple[Tensor, float]:
    length = v.norm().item()
    return (v / length if length > 0 else v), length


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """(c, s, r) with c a + s b = r and s a = c b."""
    r = (a * a + b * b) ** 0.5
    return (1.0, 0.0, 0.0) if r == 0 else (a / r, b / r, r)


def neumann(A: Any, b: Tensor, terms: int = 100, scale: float | None = None) -> Tensor:
    """scale sum_{k < terms} (I - scale A)^k b, which tends to A^-1 b for a positive definite A: [D] or [D, K].

    terms - 1 products.  It converges for 0 < scale < 2 / lambda_max; by default scale = 1 / lambda_max, estimated by
    ten steps of the power method.  The error along an eigenvector is (1 - scale lambda)^terms: small eigenvalues are
    left damped, as if the inverse had been stopped early.
    Raises `LinAlgError` where the terms grow.  Source: Lorraine, Vicol and Duvenaud 2020, arXiv:1911.02590.
    """
    A = Operand(A)
    check_count("terms", terms)
    if scale is None:
        scale = 1 / _largest(A, b)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number below 2 over the largest eigenvalue.")
    term = b.to(A.dtype)
    total, first = term.clone(), term.norm()
    for _ in range(terms - 1):
        term = term - scale * (A @ term)
        total += term
        if not term.norm() <= 1e3 * first:
            raise LinAlgError(f"the terms of the Neumann series grow, to {term.norm():.4g} from {first:.4g}; expected "
                              f"a positive definite matrix and a scale (now {scale:.4g}) below 2 over its largest "
                              "eigenvalue.")  # fmt: skip
    return scale * total


def _largest(A: Operand, like: Tensor) -> float:
    """A number not far above the largest eigenvalue."""
    generator = torch.Generator(device=A.device).manual_seed(0)
    v = torch.randn(A.size, generator=generator, dtype=A.dtype, device=A.device)
    value = 1.0
    for _ in range(10):
        v = v / v.norm()
        w = A @ v
        value, v = w.norm().item(), w
        if value == 0:
            return 1.0
    return 1.1 * value
