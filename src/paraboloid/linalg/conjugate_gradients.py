"""Conjugate gradients for symmetric positive definite operators: solutions, and the iterates on the way to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, Operand, check_count
from paraboloid.linalg.row_blocks import relative_residual
from paraboloid.linalg.solution import Solution


def cg(
    A: Any,
    b: Any,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    preconditioner: Any = None,
    *,
    x0: Any = None,
    stopping: str = "residual",
    progress: float = 5e-4,
) -> Any:
    """Solve A x = b by (preconditioned) conjugate gradients from x0, or from 0.

    A symmetric positive definite, [D, D]; b [D] or [D, K] (columns are solved side by side, each product with A taking
    all of them), a torch tensor or a NumPy array; x is of b's shape and kind.  `preconditioner @ r` approximates
    A^-1 r and must be positive definite too; a tensor [D] stands for a diagonal one.

    stopping="residual": a column is done when ||r|| <= tol ||b||.  With `max_iterations=None` the solution meets the
    tolerance or `torch.linalg.LinAlgError` is raised (after 10 D + 100 iterations); a number given is a truncation, and
    x is the iterate that it leads to.
    stopping="martens": a column is done too when the quadratic phi(x) = x.A x / 2 - b.x has hardly moved: after
    iteration i > k = max(10, i / 10), where phi(x_i) < 0 and phi(x_i) - phi(x_{i-k}) is less than k `progress` times
    phi(x_i).  No tolerance is promised then.

    Non-positive curvature p.A p raises: x would not be a minimum.  Sources: Hestenes and Stiefel 1952; Martens 2010,
    Deep learning via Hessian-free optimization, section 4.4.
    """
    as_array = isinstance(b, np.ndarray)
    A, b, x0, M, limit = _checked(A, b, x0, preconditioner, tol, max_iterations)
    stop = stopping_rule(stopping, tol, progress)
    run = _iterate(A, b, x0, limit, M, stop)
    _check_curvature(run)
    if max_iterations is None and stopping == "residual" and run.residual > tol:
        raise LinAlgError(
            f"conjugate gradients stopped after {limit} iterations at a relative residual of {run.residual:.3g}; "
            f"expected {tol:.3g}. Add damping, give a preconditioner, or allow a larger tol."
        )
    x = run.x.squeeze(1) if b.dim() == 1 else run.x
    return x.numpy() if as_array else x


def cg_solution(
    A: Any,
    b: Tensor,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    preconditioner: Any = None,
    *,
    x0: Any = None,
) -> Solution:
    """As `cg` with its tolerance on the residual, but with what it took beside the solution; never raises for a
    tolerance that was not met, which `residual` tells.

    The residual is measured at the end; where rounding has parted it from the one that the iteration updates, it goes
    on from the solution so far, up to twice.
    """
    A, b, x0, M, limit = _checked(A, b, x0, preconditioner, tol, max_iterations)
    history: list[tuple[float, float]] = []
    norms = b.norm(dim=0) if b.dim() == 2 else b.norm().view(1)
    columns, made, passes = b if b.dim() == 2 else b.unsqueeze(1), 0, 0.0
    x, residual = x0, float("inf")
    for _ in range(3):
        run = _iterate(A, b, x, limit - made, M, _Told(tol, norms, history))
        _check_curvature(run)
        before, (residual, seen) = residual, relative_residual(A.A if hasattr(A.A, "rows") else A, columns, run.x)
        made, passes = made + run.iterations, passes + run.iterations + (x is not None) + seen
        x = run.x.view(b.shape)
        if residual <= tol or made >= limit or residual > before / 2:
            break
    return Solution(cast(Tensor, x), residual, made, passes, None, history)


def _check_curvature(run: _Run) -> None:
    if run.flat is not None:
        iteration, curvature = run.flat
        raise LinAlgError(f"iteration {iteration} of conjugate gradients met the curvature p.A p = {curvature:.4g}; "
                          "expected a positive number. A is not positive definite: add damping.")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Iterates:
    """Some of the iterates of conjugate gradients, ever further apart, the last one included.

    steps       the iteration that each was reached after, ascending
    x           the iterates, rows [S, D]
    values      phi(x) = x.A x / 2 - b.x of each, [S]: by how much the quadratic model changes
    iterations  how many were made, which is the number of products with A (one more from an x0)
    residual    ||b - A x|| / ||b|| of the last one
    flat        p.A p <= 0 of the search direction that the iteration ended at, or None where there was none
    """

    steps: list[int]
    x: Tensor
    values: Tensor
    iterations: int
    residual: float
    flat: float | None


def cg_iterates(
    A: Any,
    b: Tensor,
    tol: float = 1e-10,
    max_iterations: int = 250,
    preconditioner: Any = None,
    *,
    x0: Any = None,
    stopping: str = "martens",
    progress: float = 5e-4,
    spacing: float = 1.3,
) -> Iterates:
    """Conjugate gradients for one right-hand side b [D], with iterates to go back to.

    The last iterate of a truncated solution need not be the best for the loss that the quadratic stands for, so a
    Hessian-free optimiser looks at earlier ones: those after iterations 1, 2, ... of which each is at least `spacing`
    times the one before, some log(iterations) / log(spacing) vectors.  Non-positive curvature does not raise: the
    iteration ends there, and `flat` says so (with x0, or 0, as the only iterate if it was met at once).

    The other arguments are those of `cg`.  Source: Martens 2010, sections 4.4 and 4.6.
    """
    A, b, x0, M, limit = _checked(A, b, x0, preconditioner, tol, max_iterations)
    if b.dim() != 1:
        raise ValueError(f"b has shape {tuple(b.shape)}; expected [{A.size}]: one right-hand side.")
    if not spacing > 1:
        raise ValueError(f"spacing is {spacing}; expected a number above 1.")
    steps, xs, values = [], [], []

    def keep(iteration: int, x: Tensor, value: Tensor) -> None:
        if not steps or iteration >= spacing * steps[-1]:
            steps.append(iteration)
            xs.append(x.squeeze(1).clone())
            values.append(value.clone())

    run = _iterate(A, b, x0, limit, M, stopping_rule(stopping, tol, progress), keep)
    if not steps or steps[-1] != run.iterations:
        steps.append(run.iterations)
        xs.append(run.x.squeeze(1))
        values.append(run.value)
    flat = None if run.flat is None else run.flat[1]
    return Iterates(steps, torch.stack(xs), torch.cat(values), run.iterations, run.residual, flat)


def _checked(A: Any, b: Any, x0: Any, preconditioner: Any, tol: float, max_iterations: int | None) -> Any:
    A, b = Operand(A), b if isinstance(b, Tensor) else torch.as_tensor(b, device="cpu")
    if not b.is_floating_point():
        raise ValueError(f"b has dtype {b.dtype}; expected a real floating-point type.")
    if b.dim() not in (1, 2) or len(b) != A.size:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; expected [{A.size}] or [{A.size}, K] for A of shape {A.shape}."
        )
    if not tol >= 0:
        raise ValueError(f"tol is {tol}; expected a number of at least 0.")
    if x0 is not None:
        x0 = (x0 if isinstance(x0, Tensor) else torch.as_tensor(x0, device="cpu")).to(b)
        if x0.shape != b.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)}; expected that of b, {tuple(b.shape)}.")
    limit = 10 * A.size + 100 if max_iterations is None else check_count("max_iterations", max_iterations, least=0)
    return A, b, x0, _preconditioner(preconditioner, A), limit


def _preconditioner(preconditioner: Any, A: Operand) -> Callable[[Tensor], Tensor]:
    if preconditioner is None:
        return lambda r: r
    if isinstance(preconditioner, Tensor) and preconditioner.dim() == 1:
        if len(preconditioner) != A.size:
            raise ValueError(f"the preconditioner's diagonal has {len(preconditioner)} entries; expected {A.size}.")
        return lambda r: preconditioner.to(r).unsqueeze(1) * r
    M = Operand(preconditioner)
    if M.size != A.size:
        raise ValueError(f"the preconditioner has shape {M.shape}; expected {A.shape}.")
    return lambda r: M @ r


@dataclass
class _Run:
    x: Tensor  # [D, K]
    value: Tensor  # phi(x), [K]
    iterations: int
    residual: float  # the largest relative one
    flat: tuple[int, float] | None  # iteration and curvature where it was not positive


def _iterate(
    A: Operand,
    b: Tensor,
    x0: Tensor | None,
    limit: int,
    M: Callable[[Tensor], Tensor],
    stop: Stop,
    keep: Callable[[int, Tensor, Tensor], None] | None = None,
) -> _Run:
    b = b if b.dim() == 2 else b.unsqueeze(1)
    if x0 is None:
        x, r = torch.zeros_like(b), b.clone()
    else:
        x = x0.clone().view(b.shape)
        r = b - A @ x
    norms = b.norm(dim=0)
    valued = keep is not None or stop.progress is not None

    def run(iterations: int, flat: tuple[int, float] | None = None) -> _Run:
        residual = (r.norm(dim=0) / torch.where(norms > 0, norms, 1)).max().item()
        return _Run(x, _value(x, r, b), iterations, residual, flat)

    z = M(r)
    p, rz = z.clone(), (r * z).sum(0)
    value = _value(x, r, b)
    done = stop.start(value, r, norms)
    for iteration in range(limit):
        if done.all():
            return run(iteration)
        active = ~done if bool(done.any()) else None  # None: all of them, which saves a pass over each vector
        Ap = A @ p
        curvature = (p * Ap).sum(0)
        if not torch.isfinite(curvature).all():
            raise LinAlgError("a product with A, or with the preconditioner, holds NaN or infinity; expected finite "
                              "numbers.")  # fmt: skip
        bad = ~(curvature > 0) if active is None else active & ~(curvature > 0)
        if bad.any():
            return run(iteration, (iteration, curvature[bad][0].item()))
        alpha = rz / curvature
        if active is not None:
            alpha = torch.where(active, alpha, 0)  # a column that is done stays where it is
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, Ap, value=-1)
        if valued:
            value = _value(x, r, b)
        if keep is not None:
            keep(iteration + 1, x, value)
        done = done | stop.after(iteration + 1, value, r)
        z = M(r)
        previous, found = rz, (r * z).sum(0)
        rz = found if active is None else torch.where(active, found, rz)
        to = torch.addcmul(z, rz / previous, p)
        p = to if active is None else torch.where(active, to, p)
    return run(limit)


def _value(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """x.A x / 2 - b.x for r = b - A x."""
    return (x * (r + b)).sum(0) / -2


class Stop:
    """When conjugate gradients are done: ||r|| <= tol ||b||, column by column; with `progress`, also Martens' rule on
    the values of the quadratic."""

    def __init__(self, tol: float, progress: float | None = None):
        self.tol, self.progress = tol, progress
        self.values: list[Tensor] = []  # phi(x_i) [K] of every iteration

    def start(self, value: Tensor, r: Tensor, norms: Tensor) -> Tensor:
        """Which columns are done before the first iteration, [K]."""
        self.values, self.target = [value], self.tol * norms
        return r.norm(dim=0) <= self.target

    def after(self, iteration: int, value: Tensor, r: Tensor) -> Tensor:
        """Which columns are done after so many iterations, [K]."""
        done = r.norm(dim=0) <= self.target
        if self.progress is None:
            return done
        self.values.append(value)
        k = max(10, iteration // 10)
        if iteration <= k:
            return done
        return done | (value < 0) & (value - self.values[iteration - k] > k * self.progress * value)


class _Told(Stop):
    """The tolerance on the residual, and what the largest relative one was after every iteration."""

    def __init__(self, tol: float, norms: Tensor, history: list[tuple[float, float]]):
        super().__init__(tol)
        self.norms, self.history = torch.where(norms > 0, norms, 1), history

    def after(self, iteration: int, value: Tensor, r: Tensor) -> Tensor:
        self.history.append((float(iteration), float((r.norm(dim=0) / self.norms).max())))
        return super().after(iteration, value, r)


def stopping_rule(stopping: str, tol: float, progress: float) -> Stop:
    """The rule of that name; raises ValueError for an unknown one."""
    if stopping not in ("residual", "martens"):
        raise ValueError(f"stopping is {stopping!r}; expected 'residual' or 'martens'.")
    if not progress > 0:
        raise ValueError(f"progress is {progress}; expected a positive number.")
    return Stop(tol, progress if stopping == "martens" else None)
