"""Exact solves on blocks of coordinates, in the order of random permutations: no step size, no divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, check_count
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.linalg.row_blocks import columns_like, relative_residual, row_blocks
from paraboloid.linalg.solution import Solution


def block_solves(
    A: Any,
    b: Tensor,
    tol: float = 1e-3,
    steps: int | None = None,
    *,
    block_size: int = 1000,
    x0: Tensor | None = None,
    max_passes: float = 400,
    seed: Seed = 0,
) -> Solution:
    """Solve A x = b by exact block coordinate descent: for each block I of a random permutation of the D coordinates,

        x_I <- x_I + A_II^-1 (b_I - A_I x).

    Every step lowers x.A x / 2 - b.x as far as the block allows, so that nothing has to be chosen and nothing can
    diverge.  Every pass has a permutation of its own: with blocks that stay the same, errors that lie between them go
    hundreds of times more slowly.  A, b, tol, steps, max_passes as for `sdd`.  Source: Tu et al. 2016,
    arXiv:1602.05310, with Gaussian processes in Rathore et al. 2025, arXiv:2505.13723.
    """
    A, single = row_blocks(A), b.dim() == 1
    target = columns_like(b)
    D = len(target)
    B = min(check_count("block_size", block_size), D)
    norms = torch.where(target.norm(dim=0) > 0, target.norm(dim=0), 1)
    x = torch.zeros_like(target) if x0 is None else columns_like(x0)
    generator = generator_of(seed, A.device)
    limit = round(max_passes * -(-D // B)) if steps is None else check_count("steps", steps, least=0)
    t, passes, history = 0, 0.0, []

    def measured() -> float:
        nonlocal passes
        value, seen = relative_residual(A, target, x)
        passes += seen
        return value

    residual = None
    while t < limit:
        squares, seen = torch.zeros_like(norms), 0
        order = torch.randperm(D, generator=generator, device=generator.device).to(target.device)
        for I in order.split(B):
            r = target[I] - A.rows(I, x)
            x[I] += torch.cholesky_solve(r, _factor(A, I))
            squares += r.square().sum(0)
            t, seen, passes = t + 1, seen + len(I), passes + len(I) / D
            if t >= limit:
                break
        estimate = float((squares * (D / seen)).sqrt().div(norms).max())
        history.append((passes, estimate))
        residual = None
        if steps is None and estimate <= 3 * tol:
            residual = measured()
            if residual <= tol:
                break
    residual = measured() if residual is None else residual
    return Solution(x[:, 0] if single else x, residual, t, passes, None, history)


def _factor(A: Any, I: Tensor) -> Tensor:
    block = A.block(I, I)
    L, failed = torch.linalg.cholesky_ex(block)
    if failed:
        least = float(torch.linalg.eigvalsh(block.double())[0])
        raise LinAlgError(f"a block of {len(I)} rows of A has the eigenvalue {least:.4g}; expected a positive definite "
                          "A. Add noise (damping), or use float64.")  # fmt: skip
    return L
