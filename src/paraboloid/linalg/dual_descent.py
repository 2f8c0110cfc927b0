"""Stochastic dual descent: momentum on blocks of coordinates of a dual system, with a step that cannot diverge."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, check_count
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.linalg.row_blocks import columns_like, relative_residual, row_blocks
from paraboloid.linalg.solution import Solution

PROBED, SAFETY, DIVERGED = 8, 0.7, 10.0
AVERAGED = 8  # steps between two updates of the average: it is dense, a step is not
TINY = 64  # a step so many times smaller than the safe one that diverges too says that A is not positive definite
PASSES, ENTRIES = 2000, 10**10  # it ends after so many passes over A, or this many of its entries: the later


def sdd(
    A: Any,
    b: Tensor,
    tol: float = 1e-3,
    steps: int | None = None,
    *,
    step_size: float | None = None,
    batch_size: int = 64,
    momentum: float = 0.9,
    x0: Tensor | None = None,
    max_passes: float | None = None,
    seed: Seed = 0,
) -> Solution:
    """Solve A x = b by stochastic dual descent, a minimisation of x.A x / 2 - b.x from rows of A alone:

        g = (D / B) sum_{i in I} [A_i (x + momentum v) - b_i] e_i
        v <- momentum v - step_size g,   x <- x + v,   average <- r x + (1 - r) average,   r = min(1, 100 / t)

    A symmetric positive definite [D, D] with rows (`linalg.row_blocks`); b [D] or [D, K]; the blocks I are those of a
    random permutation, B = batch_size.  The safe step hardly depends on B, and D / B of them make a pass over A: small
    blocks go further with the same work, until their overhead shows (the paper, on GPUs, takes 512).  `step_size=None`
    takes `safe_step`; a larger one of the caller's that diverges is noticed by the growing residual, halved, and told
    in `notes`; `torch.linalg.LinAlgError` where even small ones diverge: A is not positive definite.

    `steps=None` stops when the average's residual is at most tol ||b|| in every column, or after `max_passes` (2000, or
    10^10 entries of A where these are more: a small system may be as badly conditioned as a large one); a number makes
    so many.  Source: Lin et al. 2024, arXiv:2310.20581, algorithm 1.
    """
    A, single = row_blocks(A), b.dim() == 1
    target = columns_like(b)
    D, B = len(target), min(check_count("batch_size", batch_size), len(target))
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1).")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size is {step_size}; expected a positive number, or None for a safe one.")
    generator = generator_of(seed, A.device)
    step = safe_step(A, B, generator) if step_size is None else step_size
    most = max(PASSES, ENTRIES / D**2) if max_passes is None else max_passes
    limit = math.ceil(most * D / B) if steps is None else check_count("steps", steps, least=0)
    run = _Descent(A, target, None if x0 is None else columns_like(x0), step, B, momentum, generator)
    run.make(limit, tol if steps is None else None)
    x = run.average[:, 0] if single else run.average
    residual = run.measured()
    return Solution(x, residual, run.t, run.passes, run.step, run.history, run.notes)


def safe_step(A: Any, batch_size: int, seed: Seed = 0) -> float:
    """A step size with which stochastic dual descent contracts: .7 / L, L = (D / B) max_I lambda_max(A_II).

    L bounds lambda_max(A) on average; Nesterov's momentum .9 allows 1.36 / lambda_max for all rows at once, and half of
    it leaves room for the noise of the blocks.  The largest eigenvalue is that of several random blocks, each found by
    power iteration.
    """
    A, generator = row_blocks(A), generator_of(seed, A.device)
    D = A.shape[0]
    B = min(batch_size, D)
    largest = 0.0
    for _ in range(PROBED if B < D else 1):
        I = torch.randperm(D, generator=generator, device=generator.device)[:B].to(A.device)
        largest = max(largest, largest_eigenvalue(A.block(I, I), generator))
    return SAFETY / (D / B * largest)


def largest_eigenvalue(A: Any, seed: Seed = 0, iterations: int = 30) -> float:
    """An upper estimate of the largest eigenvalue of a positive semi-definite A by power iteration: the last norm ratio
    of several vectors side by side, times 1.05."""
    generator = generator_of(seed, A.device)
    v = torch.randn(A.shape[0], 4, generator=generator, device=generator.device, dtype=A.dtype).to(A.device)
    norm = v.norm(dim=0)
    for _ in range(iterations):
        v = A @ (v / norm)
        norm = v.norm(dim=0)
        if not bool((norm > 0).all()):
            return float(norm.max())
    return 1.05 * float(norm.max())


class _Descent:
    """The state of the iteration; columns that have met the tolerance go on with the others.

    With momentum m, the iterate is x_t = z_t - m^(t+1) / (1 - m) u_t and the point looked ahead to is z_t - m^(t+2) /
    (1 - m) u_t for two sequences that a step changes in its own rows only: z by -g / (1 - m), u by -m^(-t) g.
    """

    def __init__(
        self,
        A: Any,
        b: Tensor,
        x0: Tensor | None,
        step: float,
        B: int,
        momentum: float,
        generator: torch.Generator,
    ):
        self.A, self.b, self.step, self.B, self.momentum, self.generator = A, b, step, B, momentum, generator
        self.start = torch.zeros_like(b) if x0 is None else x0
        self.norms = torch.where(b.norm(dim=0) > 0, b.norm(dim=0), 1)
        self.t, self.passes = 0, 0.0
        self.history: list[tuple[float, float]] = []
        self.notes: list[str] = []
        self._from_start()

    def _from_start(self) -> None:
        self.z, self.average, self.u = self.start.clone(), self.start.clone(), torch.zeros_like(self.b)
        self.power, self.since = 1.0, 0  # m^t, of the steps since u was last rescaled; steps since the start

    def make(self, limit: int, tol: float | None) -> None:
        D, seen, squares, first = len(self.b), 0, torch.zeros_like(self.norms), None
        while self.t < limit:
            order = torch.randperm(D, generator=self.generator, device=self.generator.device).to(self.b.device)
            for I in order.split(self.B):
                r = self._one(I)
                squares += r.square().sum(0)
                seen += len(I)
                if self.t >= limit:
                    break
            self._into_average()
            estimate = float((squares * (D / seen)).sqrt().div(self.norms).max())
            self.history.append((self.passes, estimate))
            first = estimate if first is None or not math.isfinite(first) else first
            if not math.isfinite(estimate) or estimate > DIVERGED * max(first, 1.0):
                self._halve(estimate)
                first = None
            elif tol is not None and estimate <= 1.5 * tol and self.measured() <= tol:
                return
            seen, squares = 0, torch.zeros_like(self.norms)

    def _one(self, I: Tensor) -> Tensor:
        """One step; the residual of its rows at the point looked ahead to, [B, K]."""
        m = self.momentum
        ahead = self.z.add(self.u, alpha=-self.power * m**2 / (1 - m))
        r = self.A.rows(I, ahead).sub_(self.b[I])
        g = (self.step * len(self.b) / self.B) * r  # also where the last block of a permutation is short
        self.power *= m
        self.z[I] -= g / (1 - m)
        if m:
            self.u[I] -= g / self.power
        if 0 < self.power < 1e-6:
            self.u.mul_(self.power)
            self.power = 1.0
        self.t, self.since, self.passes = self.t + 1, self.since + 1, self.passes + len(I) / len(self.b)
        if self.since % AVERAGED == 0:
            self._into_average()
        return r

    def _into_average(self) -> None:
        m = self.momentum
        x = self.z.add(self.u, alpha=-self.power * m / (1 - m))
        self.average.lerp_(x, min(1.0, 100 * AVERAGED / max(1, self.since)))

    def _halve(self, estimate: float) -> None:
        self.step /= 2
        if TINY * self.step < safe_step(self.A, self.B):
            raise LinAlgError(
                f"the residual grew to {estimate:.3g} times the right-hand side at a step size of "
                f"{2 * self.step:.3g}, far below what is safe; expected a positive definite A."
            )
        self.notes.append(
            f"the residual grew to {estimate:.3g} times the right-hand side at a step size of {2 * self.step:.3g}: "
            f"started again with {self.step:.3g}"
        )
        self._from_start()

    def measured(self) -> float:
        """||b - A average|| / ||b||, the largest over the columns."""
        value, seen = relative_residual(self.A, self.b, self.average)
        self.passes += seen
        return value
