"""Which solver a dual system gets, and what it needs beside the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.choosing import block_size, choose
from paraboloid.gp.gram import Gram
from paraboloid.gp.preconditioned import Preconditioned
from paraboloid.gp.stochastic_gradient import sgd
from paraboloid.linalg.block_descent import block_solves
from paraboloid.linalg.dual_descent import sdd
from paraboloid.linalg.operand import LinAlgError, check_choice, check_count
from paraboloid.linalg.row_blocks import DenseRows, columns_like
from paraboloid.linalg.solution import Solution
from paraboloid.passes.memory import DENSE, GIB

SOLVERS = ("auto", "cholesky", "cg", "block", "sdd", "sgd")
TOL = {"cg": 1e-4, "block": 1e-4, "sdd": 3e-4, "sgd": 1e-3}


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


def check_settings(settings: Settings) -> None:
    """ValueError for numbers that no solver can be run with."""
    check_choice("solver", settings.solver, SOLVERS)
    if not isinstance(settings.seed, int) or isinstance(settings.seed, bool):
        raise ValueError(f"seed is {settings.seed!r}; expected an integer.")
    for name, least in (("steps", 0), ("batch_size", 1), ("rank", 0 if settings.solver == "sgd" else 1)):
        if getattr(settings, name) is not None:
            check_count(name, getattr(settings, name), least=least)
    for name in ("tol", "step_size"):
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}; expected a positive number, or None.")


def solve(gram: Gram, values: Tensor, shifts: Tensor, prior: Any, settings: Settings, start: Tensor | None) -> Solved:
    """(K + noise)^-1 (values + shifts), columns [N, S]; `start` is where an iteration starts."""
    b, solver, reason, system = columns_like(values + shifts), settings.solver, "asked for", None
    if solver == "auto":
        choice = choose(gram, b, settings.tol or TOL["cg"], settings.rank, settings.seed)
        solver, reason, system = choice.solver, choice.reason, choice.preconditioned
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
    shared = {"tol": tol, "steps": settings.steps, "x0": start, "seed": settings.seed}
    if solver == "cg":
        system = system or Preconditioned(gram, settings.rank, settings.seed, tol, b.shape[1])
        return Solved(solver, reason, system.solve(b, tol, settings.steps, start), tol=promised)
    rows = gram if gram.shape[0] ** 2 * gram.dtype.itemsize > gram.budget else DenseRows(gram.dense())
    if solver == "block":
        size = settings.batch_size or block_size(gram.shape[0])
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


def cholesky(gram: Gram) -> Tensor:
    """The factor of K + noise; ValueError where it would not fit, LinAlgError where the matrix is not definite."""
    N, size = gram.shape[0], gram.shape[0] ** 2 * gram.dtype.itemsize
    if 2 * size > DENSE.of():
        raise ValueError(f"a Cholesky factor of {N} inputs takes {2 * size / GIB:.1f} GiB with its matrix; expected at "
                         f"most {DENSE.of() / GIB:.0f}: take solver='cg', 'block' or 'auto'.")  # fmt: skip
    A = gram.dense()
    L, failed = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal().square()
    if failed or float(pivots.min()) <= N * torch.finfo(A.dtype).eps * float(A.diagonal().max()):  # all rounding
        column = int(failed) or int(pivots.argmin()) + 1
        least = f"the eigenvalue {float(torch.linalg.eigvalsh(A.double())[0]):.3g}" if N <= 2000 else "no pivot"
        raise LinAlgError(f"K + noise has {least} at column {column}, {gram.dtype}; expected a positive definite "
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
