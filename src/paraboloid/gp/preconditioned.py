"""Conjugate gradients on a kernel system, with a preconditioner from columns of the kernel matrix."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.linalg.column_nystrom import pivoted_columns
from paraboloid.linalg.conjugate_gradients import cg_solution
from paraboloid.linalg.solution import Solution
from paraboloid.passes.memory import GIB

LIMIT = 1000  # iterations at most
TRIED = 0.1  # of the time of what is done instead

# Nanoseconds on one core, float32, measured: an entry of a tile; an entry times one right-hand side, alone (reading it,
# once for both of its places) and among many; an operation of a factorisation, and of the columns.  Only their ratios
# matter.
TILE, READ, PRODUCT, OPERATION, COLUMN = 1.2, 0.15, 0.03, 0.015, 0.05


class Preconditioned:
    """(K + noise) and its preconditioner; noise of its own for each input is scaled away, D^-1/2 K D^-1/2 + I.

    rank  of the preconditioner; None: as long as more columns are predicted to cost less than the iterations that they
          save, to the tolerance `tol` of S right-hand sides; at most N / 2 columns and 1 GiB
    instead  nanoseconds of what is done where this is slower: no more columns are made once they took a tenth of it and
             the iterations would still take twice as long
    """

    def __init__(
        self, gram: Gram, rank: int | None, seed: int, tol: float = 1e-4, S: int = 1, instead: float = math.inf
    ):
        self.gram, N, noise = gram, gram.shape[0], gram.noise
        self.instead, self.tol, self.seen = instead, tol, list[tuple[int, float]]()
        self.product = N**2 * (max(READ, PRODUCT * S) + (0 if gram.keeps_all else TILE / 2))  # one with all of K
        self.per_column = N * max(4 * READ, 2 * PRODUCT * S)  # what each column, read twice, adds to an iteration
        if noise.dim():
            self.scale: Tensor | None = noise.rsqrt()
            self.A: Any = Scaled(gram, self.scale)
            K, diagonal, damping = Scaled(gram.without_noise(), self.scale), gram.diagonal / noise, 1.0
        else:
            self.scale, self.A, K = None, gram, gram.without_noise()
            diagonal, damping = gram.diagonal, float(noise)
        self.damping = damping
        most = min(rank or N, max(20, min(N // 2, GIB // (N * gram.dtype.itemsize))))
        self.columns = pivoted_columns(K, diagonal, most, seed=seed, enough=None if rank else self._enough)
        self.P = self.columns.preconditioner(damping)

    @property
    def rank(self) -> int:
        return self.columns.F.shape[1]

    @property
    def iterations(self) -> float:
        """About how many it takes to the tolerance: log(2 / tol) / log((c + 1) / (c - 1)), c^2 the condition, in which
        the largest eigenvalue that the preconditioner leaves is about what the last columns took of the trace."""
        return self._iterations(self.columns.taken)

    def predicted(self) -> float:
        """Nanoseconds of the preconditioner and the iterations, without forming K."""
        return self._set_up(self.rank) + self.iterations * (self.product + self.rank * self.per_column)

    def _iterations(self, taken: float) -> float:
        root = (1 + max(taken / self.damping, 1e-6)) ** 0.5
        return math.log(2 / self.tol) / math.log1p(2 / (root - 1))  # exact for large roots too

    def _set_up(self, rank: int) -> float:
        N = self.gram.shape[0]
        return N * rank * (TILE + COLUMN * rank)

    def _enough(self, r: int, taken: float) -> bool:
        """Whether the next columns would cost more than they save, if what they take falls on as a power of r."""
        now = self._iterations(taken)
        if self._set_up(r) > TRIED * self.instead and now * (self.product + r * self.per_column) > 2 * self.instead:
            return True
        self.seen.append((r, taken))
        r0, before = next(pair for pair in self.seen if 3 * pair[0] > r)
        if r0 == r:
            return False
        more = r + max(16, r // 4)
        power = math.log(max(before, 1e-300) / max(taken, 1e-300)) / math.log(r / r0)
        then = self._iterations(taken * (r / more) ** max(power, 0.0))
        saved = now * (self.product + r * self.per_column) - then * (self.product + more * self.per_column)
        return saved < self._set_up(more) - self._set_up(r)

    def solve(self, b: Tensor, tol: float, steps: int | None, start: Tensor | None) -> Solution:
        """(K + noise)^-1 b, columns [N, S]."""
        scale = None if self.scale is None else self.scale.unsqueeze(1)
        if scale is not None:
            b, start = b * scale, None if start is None else start / scale
        found = cg_solution(self.A, b, tol, LIMIT if steps is None else steps, self.P, x0=start)
        x = found.x if scale is None else found.x * scale
        passes = found.passes + self.rank / len(b)
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
