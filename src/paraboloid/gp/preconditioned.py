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

LIMIT, AVERAGE = 1000, 3000  # iterations at most; inputs for which columns and iterations cost about the same


class Preconditioned:
    """(K + noise) and its preconditioner; noise of its own for each input is scaled away, D^-1/2 K D^-1/2 + I.

    rank  of the preconditioner; None: until the diagonal that is left is that of the noise on average (less where
          iterations are dear, with many inputs), at most 10 N^1/2 columns and 1 GiB
    """

    def __init__(self, gram: Gram, rank: int | None, seed: int):
        self.gram, N, noise = gram, gram.shape[0], gram.noise
        if noise.dim():
            self.scale: Tensor | None = noise.rsqrt()
            self.A: Any = Scaled(gram, self.scale)
            K, diagonal, damping = Scaled(gram.without_noise(), self.scale), gram.diagonal / noise, 1.0
        else:
            self.scale, self.A, K = None, gram, gram.without_noise()
            diagonal, damping = gram.diagonal, float(noise)
        left = damping * N / float(diagonal.sum()) * min(1.0, (AVERAGE / N) ** 0.5)
        most = rank or max(20, min(N // 2, int(10 * N**0.5), GIB // (N * gram.dtype.itemsize)))
        self.columns = pivoted_columns(K, diagonal, most, 0.0 if rank else left, seed=seed)
        self.P, self.condition = self.columns.preconditioned(damping)

    @property
    def rank(self) -> int:
        return self.columns.F.shape[1]

    def iterations(self, tol: float) -> float:
        """About how many it takes to the tolerance: condition^1/2 log(2 / tol) / 2."""
        return 0.5 * self.condition**0.5 * math.log(2 / tol)

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
