"""The largest eigenvalues by blocks: one matrix product for all vectors in each step, and a preconditioner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigen import dense_top, eigh, relative_tolerance
from paraboloid.linalg.operand import LinAlgError, Operand, check_count
from paraboloid.linalg.probes import Seed, generator_of, normal


def lobpcg(
    A: Any,
    k: int,
    tol: float | None = None,
    max_iterations: int = 500,
    preconditioner: Any = None,
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """The k algebraically largest eigenvalues [k], descending, and orthonormal eigenvectors [D, k].

    Locally optimal block preconditioned conjugate gradients: Rayleigh-Ritz over the block, its preconditioned residuals
    and the last step, the basis kept orthonormal.  Every step multiplies A with a whole block [D, k + 2], which a GPU
    does in little more than the time of one vector, and copies of an eigenvalue are found together; counted in products
    `eigsh` needs fewer.  `preconditioner @ r` approximates (c I - A)^-1 r, positive definite.

    Every pair satisfies ||A u - lambda u|| <= tol * (largest |Ritz value|); tol defaults to eps^(2/3) of the dtype.
    More than `max_iterations` steps raise `torch.linalg.LinAlgError`.  Sources: Knyazev 2001; the stable choice of the
    basis is that of Hetmaniuk and Lehoucq 2006.
    """
    A = Operand(A)
    check_count("k", k, most=A.size)
    check_count("max_iterations", max_iterations)
    tol = relative_tolerance(tol, A)
    M = None if preconditioner is None else Operand(preconditioner)
    if M is not None and M.size != A.size:
        raise ValueError(f"the preconditioner has shape {M.shape}; expected {A.shape}.")
    width = k + 2  # two more than asked for: the last pairs of a block converge slowest
    if 3 * width >= A.size:
        return dense_top(A, k)
    X = torch.linalg.qr(normal((A.size, width), A, generator_of(seed, A.device))).Q
    AX = A @ X
    values, C = _ritz(X, AX)
    X, AX = X @ C, AX @ C
    P = AP = X[:, :0]
    worst = float("inf")
    for _ in range(max_iterations):
        R = AX - X * values
        worst = (R[:, :k].norm(dim=0) / values.abs().max().clamp(min=torch.finfo(A.dtype).tiny)).max().item()
        if worst <= tol:
            return values[:k], X[:, :k].contiguous()
        W = _complement(R if M is None else M @ R, torch.cat([X, P], 1))
        S, AS = torch.cat([X, W, P], 1), torch.cat([AX, A @ W, AP], 1)
        found, C = _ritz(S, AS)
        values, C = found[:width], C[:, :width]
        step = C.clone()
        step[:width] = 0  # what the new block adds to the old one: the direction of the step
        step = torch.linalg.qr(torch.cat([C, step], 1)).Q[:, width:]
        X, AX, P, AP = S @ C, AS @ C, S @ step, AS @ step
    raise LinAlgError(
        f"the {k} largest eigenpairs had not converged after {max_iterations} steps with blocks of {width}; the "
        f"largest relative residual was {worst:.3g}, expected {tol:.3g}. Allow a larger tol, more steps, or use eigsh."
    )


def _ritz(S: Tensor, AS: Tensor) -> tuple[Tensor, Tensor]:
    T = S.T @ AS
    if not torch.isfinite(T).all():
        raise LinAlgError(
            "a product with A, or with the preconditioner, holds NaN or infinity; expected finite numbers."
        )
    return eigh((T + T.T) / 2)


def _complement(W: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns that span W outside the span of the orthonormal basis, of which W may have lost some."""
    W = W / W.norm(dim=0).clamp(min=torch.finfo(W.dtype).tiny)
    for _ in range(2):
        W = torch.linalg.qr(W - basis @ (basis.T @ W)).Q
    return torch.linalg.qr(W - basis @ (basis.T @ W)).Q
