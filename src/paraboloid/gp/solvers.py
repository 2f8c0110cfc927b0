"""Which solver a dual system gets, and what it needs beside the matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.gp.stochastic_gradient import sgd
from paraboloid.linalg.block_descent import block_solves
from paraboloid.linalg.column_nystrom import pivoted_columns
from paraboloid.linalg.conjugate_gradients import cg_solution
from paraboloid.linalg.dual_descent import sdd
from paraboloid.linalg.operand import LinAlgError
from paraboloid.linalg.row_blocks import DenseRows, columns_like
from paraboloid.linalg.solution import Solution
from paraboloid.passes.memory import DENSE, GIB

SOLVERS = ("auto", "cholesky", "cg", "block", "sdd", "sgd")
SMALL = 3000  # inputs up to which a Cholesky factor is the fastest solver that there is
TOL = {"cg": 1e-4, "block": 1e-4, "sdd": 3e-4, "sgd": 5e-3}


@dataclass(frozen=True, eq=False)
class Solved:
    """The solver that was taken and why, A^-1 b, and a Cholesky factor of A where there is one.

    explained  for rows k [M, N] of k(x, X) by how much the data lowers the variance at x, [M]; None where only samples
               tell
    """

    solver: str
    reason: str
    solution: Solution
    factor: Tensor | None = None
    explained: Callable[[Tensor], Tensor] | None = None
    tol: float | None = None  # that the residual should meet

    @property
    def notes(self) -> list[str]:
        """What the solver says, and whether it met its tolerance."""
        found = self.solution
        if self.tol is None or found.residual <= self.tol:
            return found.notes
        missed = (f"stopped after {found.iterations} iterations at a relative residual of {found.residual:.3g}; "
                  f"expected {self.tol:.3g}: raise noise_variance or tol, or take another solver")  # fmt: skip
        return [*found.notes, missed]


@dataclass(frozen=True)
class Settings:
    """What a user may set: see `condition`."""

    solver: str = "auto"
    steps: int | None = None
    tol: float | None = None
    step_size: float | None = None
    batch_size: int | None = None
    rank: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def solve(gram: Gram, values: Tensor, shifts: Tensor, prior: Any, settings: Settings, start: Tensor | None) -> Solved:
    """(K + noise)^-1 (values + shifts), columns [N, S]; `start` is where an iteration starts."""
    solver, reason = settings.solver, "asked for"
    if solver == "auto":
        solver, reason = chosen(gram)
    b = columns_like(values + shifts)
    if solver == "cholesky":
        L = cholesky(gram)
        x = torch.cholesky_solve(b, L)
        return Solved(solver, reason, Solution(x, float(relative(gram, b, x)), 1, 1.0), L, partial(quadratic, L))
    if not bool((gram.noise > 0).all()):
        raise ValueError(f"noise_variance is {float(gram.noise.min())}; solver {solver!r} expects a positive one "
                         "(without noise the system may have no solution in floating point): give a small one, or "
                         "solver='cholesky'.")  # fmt: skip
    tol = TOL[solver] if settings.tol is None else settings.tol
    promised = tol if settings.steps is None else None
    shared = {"tol": tol, "steps": settings.steps, "x0": start, "seed": settings.seed, **settings.options}
    if solver == "cg":
        return Solved(solver, reason, conjugate_gradients(gram, b, tol, settings, start), tol=promised)
    rows = gram if gram.shape[0] ** 2 * gram.dtype.itemsize > gram.budget else DenseRows(gram.dense())
    if solver == "block":
        size = settings.batch_size or max(300, min(2000, gram.shape[0] // 10))
        return Solved(solver, reason, block_solves(rows, b, block_size=size, **shared), tol=promised)
    shared["step_size"] = settings.step_size
    if settings.batch_size is not None:
        shared["batch_size"] = settings.batch_size
    if solver == "sdd":
        return Solved(solver, reason, sdd(rows, b, **shared), tol=promised)
    if gram.noise.dim():
        raise ValueError("noise_variance has one entry for each input; solver 'sgd' expects a number: take 'sdd'.")
    if settings.rank is not None:
        shared["rank"] = settings.rank
    K = gram.without_noise()
    found = sgd(K, gram.diagonal, float(gram.noise), values, shifts, prior, **shared)
    return Solved(solver, reason, found, tol=promised)


def chosen(gram: Gram) -> tuple[str, str]:
    """A solver for this system, and the reason in words."""
    N = gram.shape[0]
    if N <= SMALL:
        return "cholesky", f"{N} inputs are at most {SMALL}: a Cholesky factor is fastest, and exact"
    return "cg", f"{N} inputs are more than {SMALL}: conjugate gradients on the Nystrom approximation's preconditioner"


def conjugate_gradients(gram: Gram, b: Tensor, tol: float, settings: Settings, start: Tensor | None) -> Solution:
    """With the preconditioner from columns of K, of N^1/2 to a quarter of the memory."""
    N, noise = gram.shape[0], gram.noise
    if noise.dim():  # D^-1/2 K D^-1/2 + I for the noise D
        scale = noise.rsqrt()
        A, b, damping = Scaled(gram, scale), b * scale.unsqueeze(1), 1.0
        start = None if start is None else start / scale.unsqueeze(1)
        K, diagonal = Scaled(gram.without_noise(), scale), gram.diagonal / noise
    else:
        A, K, diagonal, damping, scale = gram, gram.without_noise(), gram.diagonal, float(noise), None
    rank = settings.rank or max(20, min(N // 2, int(5 * N**0.5), GIB // (N * gram.dtype.itemsize)))
    columns = pivoted_columns(K, diagonal, rank, 0.1 * damping * N / float(diagonal.sum()), seed=settings.seed)
    P = columns.preconditioner(damping)
    limit = settings.steps if settings.steps is not None else 1000
    found = cg_solution(A, b, tol, limit, P, x0=start)
    x = found.x if scale is None else found.x * scale.unsqueeze(1)
    passes = found.passes + columns.F.shape[1] / N
    return Solution(x, found.residual, found.iterations, passes, None, found.history, found.notes)


class Scaled:
    """diag(s) A diag(s) as an operator with blocks."""

    def __init__(self, A: Any, scale: Tensor):
        self.A, self.scale, self.shape, self.dtype, self.device = A, scale, A.shape, A.dtype, A.device

    def __matmul__(self, v: Tensor) -> Tensor:
        s = self.scale if v.dim() == 1 else self.scale.unsqueeze(1)
        return s * (self.A @ (s * v))

    def rows(self, indices: Tensor, v: Tensor) -> Tensor:
        return self.scale[indices].unsqueeze(1) * self.A.rows(indices, self.scale.unsqueeze(1) * v)

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        right = self.scale if columns is None else self.scale[columns]
        return self.scale[rows].unsqueeze(1) * self.A.block(rows, columns) * right


def cholesky(gram: Gram) -> Tensor:
    """The factor of K + noise; ValueError where it would not fit, LinAlgError where the matrix is not definite."""
    N, size = gram.shape[0], gram.shape[0] ** 2 * gram.dtype.itemsize
    if 2 * size > DENSE.of():
        raise ValueError(f"a Cholesky factor of {N} inputs takes {2 * size / GIB:.1f} GiB with its matrix; expected at "
                         f"most {DENSE.of() / GIB:.0f}: take solver='cg', 'block' or 'auto'.")  # fmt: skip
    A = gram.dense()
    L, failed = torch.linalg.cholesky_ex(A)
    if failed:
        least = f"the eigenvalue {float(torch.linalg.eigvalsh(A.double())[0]):.3g}" if N <= 2000 else "no pivot"
        raise LinAlgError(f"K + noise has {least} at column {int(failed)}, {gram.dtype}; expected a positive definite "
                          f"matrix. Raise noise_variance (it is {float(gram.noise.min()):.3g}), take out duplicate "
                          "inputs, or use float64.")  # fmt: skip
    return L


def quadratic(L: Tensor, k: Tensor) -> Tensor:
    """k_m.(L L^T)^-1 k_m for rows k [M, N]."""
    return torch.linalg.solve_triangular(L, k.T, upper=False).square().sum(0)


def relative(gram: Gram, b: Tensor, x: Tensor) -> Tensor:
    """The largest ||b - A x|| / ||b|| of the columns."""
    norms = b.norm(dim=0)
    return ((b - gram @ x).norm(dim=0) / torch.where(norms > 0, norms, 1)).max()
