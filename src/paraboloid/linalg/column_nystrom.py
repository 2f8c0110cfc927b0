"""The Nystrom approximation from columns of a positive semi-definite matrix, chosen by randomly pivoted Cholesky."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.nystrom_approximation import LowRank, Nystrom
from paraboloid.linalg.operand import LinAlgError, check_count
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.linalg.row_blocks import row_blocks

FIRST = 16  # columns of the first blocks
SQUARE = 64  # rows of a Gram matrix at a time
ROUNDED = 4  # times the rounding of 1: what an eigenvalue of F (F^T F + damping I)^-1 F^T may be above it


@dataclass(frozen=True, eq=False)
class Columns:
    """A ~ F F^T with F [D, r] in the span of the columns `pivots` [r] of A; A - F F^T is positive semi-definite.

    left   its trace over that of A: what the approximation leaves out
    taken  of the trace by each of the last columns, on average: about the largest eigenvalue of A - F F^T
    """

    F: Tensor
    pivots: Tensor
    left: float
    taken: float

    def nystrom(self) -> Nystrom:
        """The same matrix by its eigenvalues, for a preconditioner."""
        F = self.F
        values, Q = torch.linalg.eigh((F.T @ F).double())
        keep = values > torch.finfo(F.dtype).eps * values[-1]
        values, Q = values[keep].flip(0), Q[:, keep].flip(1)
        return Nystrom(F @ (Q / values.sqrt()).to(F), values.to(F))

    def preconditioner(self, damping: float) -> LowRank | Inverse:
        """An approximate inverse of A + damping I: that of F F^T + damping I where rounding allows it, which is cheap
        to set up, else by eigenvalues (`Nystrom.preconditioner`).

        It is (I - F (F^T F + damping I)^-1 F^T) / damping.  The eigenvalues of what is taken off, l / (l + damping),
        come so close to 1 that rounding would take some of them across, where the damping is below eps l.
        """
        if not damping > 0:
            raise ValueError(f"damping is {damping}; expected a positive number: F F^T alone has no inverse.")
        F, eps = self.F.T, torch.finfo(self.F.dtype).eps
        core = torch.zeros(len(F), len(F), dtype=torch.float64, device=F.device)
        for i in range(0, len(F), SQUARE):
            core[i : i + SQUARE, : i + SQUARE] = F[i : i + SQUARE] @ F[: i + SQUARE].T  # its lower triangle is enough
        core.diagonal().add_(damping)
        L, failed = torch.linalg.cholesky_ex(core)
        if failed or damping < eps * float(core.norm()):
            return self.nystrom().preconditioner(damping)
        one = torch.eye(len(L), dtype=L.dtype, device=L.device)
        return Inverse(F, torch.linalg.solve_triangular(L, one, upper=False), 1 + ROUNDED * eps)


class Inverse:
    """shift I - F (L L^T)^-1 F^T on vectors [D], [D, K], with rows F^T [r, D], L L^T = F^T F + damping I and `root` =
    L^-1 in float64: the inverse of F F^T + damping I, times damping.

    Conjugate gradients do not see the factor.  The r numbers F^T v go through L in float64, whose condition float32
    does not carry; F L^-T itself would cost as much to form as F^T F.
    """

    def __init__(self, rows: Tensor, root: Tensor, shift: float):
        D = rows.shape[1]
        self.rows, self.root, self.shift = rows, root, shift
        self.shape, self.dtype, self.device = (D, D), rows.dtype, rows.device

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.dim() == 2 and v.shape[1] == 1:  # much faster as a vector
            return (self @ v[:, 0]).unsqueeze(1)
        if v.dim() == 1:
            inner = self.root.T @ (self.root @ (self.rows @ v).double())
            return torch.addmv(v, self.rows.T, inner.to(v), beta=self.shift, alpha=-1)
        columns = v.T  # contiguous ones in the solvers
        inner = (columns @ self.rows.T).double() @ self.root.T @ self.root
        return torch.addmm(columns, inner.to(v), self.rows, beta=self.shift, alpha=-1).T


def pivoted_columns(
    A: Any,
    diagonal: Tensor,
    rank: int,
    tol: float = 0.0,
    block: int | None = None,
    seed: Seed = 0,
    enough: Callable[[int, float], bool] | None = None,
) -> Columns:
    """Columns of A drawn in blocks with probabilities proportional to what is left of its diagonal.

    A positive semi-definite with blocks (`linalg.row_blocks`), diagonal [D].  It ends at `rank` columns, or when what
    is left of the trace is at most tol times the trace, or when `enough(columns so far, taken)` says so after a block
    (see `Columns`).  Without `block` blocks grow with what is there.  D rank^2 operations, rank columns of A.
    Source: Chen, Epperly, Tropp and Webber 2022, arXiv:2207.06503, algorithm 2.1 in blocks (2410.03969).
    """
    A, generator = row_blocks(A), generator_of(seed, A.device)
    D = A.shape[0]
    rank = check_count("rank", min(rank, D))
    d = diagonal.clone()
    F = torch.empty(rank, D, dtype=A.dtype, device=A.device)  # rows, so that columns of A lie side by side
    pivots, r, total, taken = [], 0, float(diagonal.sum()), float("inf")
    while r < rank and float(d.sum()) > (max(tol, 10 * torch.finfo(A.dtype).eps) if pivots else 0) * total:
        weights = d.double()
        count = min(block or max(FIRST, r // 4), rank - r, int((weights > 0).sum()))
        if D <= 2**24:
            S = torch.multinomial(weights.to(generator.device), count, generator=generator).to(A.device)
        else:
            cumulated = weights.cumsum(0)
            u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64).to(A.device)
            S = torch.searchsorted(cumulated, u * cumulated[-1]).clamp(max=D - 1).unique()
        G = torch.addmm(A.block(S), F[:r, S].T, F[:r], alpha=-1)
        chosen, L = _independent(G[:, S].double())
        S, G = S[chosen], G[chosen]
        if not len(S):
            break
        one = torch.eye(len(S), dtype=L.dtype, device=L.device)
        k, inverse = len(S), torch.linalg.solve_triangular(L, one, upper=False).to(G)  # L is well conditioned
        part = torch.mm(inverse, G, out=F[r : r + k])
        less = (d - part.square().sum(0)).clamp(min=0)
        less[S] = 0
        taken, d = float((d - less).sum()) / k, less
        pivots.append(S)
        r += k
        if enough is not None and enough(r, taken):
            break
    if not pivots:
        raise LinAlgError(f"the trace of A is {total:.4g}; expected a positive one.")
    return Columns(F[:r].T, torch.cat(pivots), float(d.sum()) / total, taken)


def _independent(core: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the block whose columns are clearly independent, and their Cholesky factor (diagonal pivoting)."""
    size, floor = len(core), 1e-3 * float(core.diagonal().max().clamp(min=0))
    L, failed = torch.linalg.cholesky_ex(core)
    if not failed and float(L.diagonal().square().min()) >= floor:
        return torch.arange(size, device=core.device), L
    chosen: list[int] = []
    left, rows = core.diagonal().clone(), torch.zeros(size, size, dtype=core.dtype, device=core.device)
    for i in range(size):
        j = int(left.argmax())
        if not float(left[j]) > floor:
            break
        column = (core[:, j] - rows[:, :i] @ rows[j, :i]) / left[j].sqrt()
        rows[:, i] = column
        left = left - column.square()
        left[j] = -torch.inf
        chosen.append(j)
    index = torch.tensor(chosen, dtype=torch.long, device=core.device)
    return index, rows[index, : len(chosen)]
