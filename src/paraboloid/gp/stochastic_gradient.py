"""Stochastic gradient descent on the primal objective of a Gaussian process's mean and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.definite import check_definite
from paraboloid.linalg.column_nystrom import pivoted_columns
from paraboloid.linalg.dual_descent import largest_eigenvalue
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.linalg.row_blocks import columns_like
from paraboloid.linalg.solution import Solution

PROBED, SAFETY, DIVERGED, AHEAD = 4, 0.7, 10.0, 10
RANK, ENTRIES = 300, 10**6  # columns of the approximation that preconditions: so many, more where N r stays below this
LEFT = 0.01  # of the noise: an eigenvalue that is left out which matters to nothing


def sgd(
    K: Any,
    diagonal: Tensor,
    noise: float,
    values: Tensor,
    shifts: Tensor,
    root: Callable[[], Tensor],
    tol: float = 1e-2,
    steps: int | None = None,
    *,
    step_size: float | None = None,
    batch_size: int = 128,
    momentum: float = 0.9,
    rank: int | None = None,
    x0: Tensor | None = None,
    max_passes: float = 2000,
    seed: Seed = 0,
) -> Solution:
    """Minimise |values - K a|^2 / 2 + noise / 2 (a - shifts / noise).K (a - shifts / noise) over a, by its gradients

        g = (N / B) K_I^T (K_I a - values_I) + R R^T (noise a - shifts)

    from B rows I and fresh random features R [N, q], E[R R^T] = K, with Nesterov momentum and an average of the last
    hundredth of the iterates.  The minimum is (K + noise)^-1 (values + shifts).  In the direction of an eigenvalue l it
    converges at the rate l (l + noise): fast in a few, hardly at all in others.

    That is the paper's form, rank=0.  By default two things are mended: the second term is (N / B) K_I^T (noise a -
    shifts)_I, from the rows that are at hand, whose noise vanishes at the minimum; and g is multiplied by I - U diag(1
    - w / (l (l + noise))) U^T for the top `rank` eigenvectors U (Nystrom's), w that of the last of them, which lets the
    step be as much larger.

    The error that is compared with tol is that of the function, K (K + noise)^-1 r for r = values + shifts - (K +
    noise) a, relative to that of a = 0: through the Nystrom approximation, and for what that leaves out of r by the
    bounds |K r| / noise and |r|; `residual` is the same number.  rank=None: 300 columns, or as many as keep N rank
    below 10^6, fewer where the rest is far below the noise.

    K a positive semi-definite [N, N] with blocks, without the noise; values, shifts [N, S]; root() draws R.
    Sources: Lin et al. 2023, arXiv:2306.11589, sections 3.1 and 3.2; for U Ma and Belkin 2019, arXiv:1806.06144.
    """
    generator = generator_of(seed, K.device)
    b = columns_like(values + shifts)
    N, B = len(b), min(batch_size, len(b))
    check_definite(K, noise, generator, B)
    most = min(N, rank or max(RANK, ENTRIES // N))
    look = pivoted_columns(K, diagonal, most, seed=generator, enough=lambda r, left: left < LEFT * noise).nystrom()
    rates = look.values * (look.values + noise)
    least = rates[-1].clamp(min=2 * noise**2)  # directions below the noise need no help, and amplify it
    damp = (torch.zeros_like(rates) if rank == 0 else (1 - least / rates).clamp(min=0)).unsqueeze(1)
    U = look.vectors
    weights = (look.values / (look.values + noise)).unsqueeze(1)

    def smoothed(r: Tensor) -> Tensor:
        return (weights * (U.T @ r)).norm(dim=0)

    def left_out(r: Tensor) -> Tensor:
        r = r - U @ (U.T @ r)
        return torch.minimum((K @ r).norm(dim=0) / noise, r.norm(dim=0))

    start = smoothed(b).clamp(min=torch.finfo(b.dtype).tiny)
    step = _safe_step(K, B, noise, momentum, U, damp, generator) if step_size is None else step_size
    a = torch.zeros_like(b) if x0 is None else columns_like(x0)
    first, average, v = a.clone(), a.clone(), torch.zeros_like(a)
    limit = math.ceil(max_passes * N / B) if steps is None else steps
    t, since, passes, error, history, notes, best = 0, 0, 0.0, float("nan"), [], [], math.inf
    while t < limit:
        for I in torch.randperm(N, generator=generator, device=generator.device).to(b.device).split(B):
            rows = K.block(I)
            ahead = a.add(v, alpha=momentum)
            r = rows @ ahead - values[I]
            if rank != 0:
                g = rows.T @ ((N / B) * (r + noise * ahead[I] - shifts[I]))
                g -= U @ (damp * (U.T @ g))
            else:
                R = root()
                g = rows.T @ ((N / B) * r) + R @ (R.T @ (noise * ahead - shifts))
            v.mul_(momentum).sub_(g, alpha=step)
            a.add_(v)
            t, since, passes = t + 1, since + 1, passes + len(I) / N
            average.lerp_(a, min(1.0, 100 / since))
            if t >= limit:
                break
        checked = t >= limit or round(passes) % AHEAD == 0
        if checked or not bool(torch.isfinite(a).all()):
            r = b - K @ average - noise * average
            error, passes = float((smoothed(r) / start).max()), passes + 1
            if error <= tol or t >= limit:  # else it is too large already
                error, passes = float((torch.hypot(smoothed(r), left_out(r)) / start).max()), passes + 1
            history.append((passes, error))
            if not math.isfinite(error) or error > DIVERGED * max(1.0, min(best, 1.0)):
                step /= 2
                notes.append(f"the error grew to {error:.3g} times that of 0 at a step size of {2 * step:.3g}: started "
                             f"again with {step:.3g}")  # fmt: skip
                a, average, v, since = first.clone(), first.clone(), torch.zeros_like(a), 0
            elif steps is None and error <= tol:
                break
            best = min(best, error)
    return Solution(average, error, t, passes, step, history, notes)


def _safe_step(
    K: Any, B: int, noise: float, momentum: float, U: Tensor, damp: Tensor, generator: torch.Generator
) -> float:
    """.7 / L and as much for the noise's part, L the larger of max_I lambda_max(M_I), M_I = (N / B) K_I P K_I^T with
    the preconditioner P, and (1 - B / N) max M_ii / (1 - momentum).

    The second is what keeps the variance from growing: E[G_I^2] <= (lambda_max + max M_ii) E[G_I] for the blocks'
    curvatures G_I, which momentum adds up over 1 / (1 - momentum) steps.  Where many directions are made alike it is
    the larger one.
    """
    N, largest, spread = K.shape[0], 0.0, 0.0
    for _ in range(PROBED):
        I = torch.randperm(N, generator=generator, device=generator.device)[:B].to(K.device)
        rows = K.block(I)
        onto = rows @ U
        M = rows @ rows.T - (onto * damp.T) @ onto.T
        largest, spread = max(largest, largest_eigenvalue(M, generator)), max(spread, float(M.diagonal().max()))
    L = N / B * max(largest, (1 - B / N) * spread / (1 - momentum))
    return SAFETY / (L + 2 * noise * L**0.5)
