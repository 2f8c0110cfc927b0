"""The dual form without a factor of the tangent kernel: its rows in blocks, solved for one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.linalg.block_descent import block_solves
from paraboloid.posteriors.sampled.tangent_kernel import PIECE, TangentKernel

BLOCK = 256  # rows of a block: forming one takes as many multiplications as this many samples' products do
PASSES = 100  # over the rows at most, for one solution
ROUNDS = 3  # of solving to what the weights' residual asks for


class TangentBlocks:
    """I + B Lambda^-1 B^T [R, R] by rows (`linalg.row_blocks`), in float64, of the rows B [R, D] of a tangent kernel.

    Products with a vector that moved in a few rows since the last one take these rows of B alone, since
    Lambda^-1 B^T v [D, K] is kept: a pass of block solves reads B as often as a pass over the data would.
    """

    def __init__(self, B: Tensor, precision: Tensor):
        self.B, self.precision = B, precision
        self.shape, self.dtype, self.device = (len(B), len(B)), torch.float64, B.device
        self.seen: Tensor | None = None  # v [R, K], and Lambda^-1 B^T v [D, K]
        self.weighted: Tensor | None = None

    def __matmul__(self, v: Tensor) -> Tensor:
        self.seen = None  # anew, without what rounding has left
        every = torch.arange(len(self.B), device=self.device)
        return self.rows(every, v)

    def rows(self, indices: Tensor, v: Tensor) -> Tensor:
        """(I + B Lambda^-1 B^T)[indices] v, [B, K]."""
        self._follow(v)
        assert self.weighted is not None
        found = v[indices].clone()
        for at in self._pieces():
            found += self.B[indices, at].double() @ self.weighted[at]
        return found

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Entries at these rows and columns (all), [B, C]."""
        columns = torch.arange(len(self.B), device=self.device) if columns is None else columns
        found = (rows.unsqueeze(1) == columns).double()
        for at in self._pieces():
            left = self.B[rows, at].double() / self.precision[at]
            found.addmm_(left, self.B[columns, at].double().T)
        return found

    def _follow(self, v: Tensor) -> None:
        if self.seen is None or self.seen.shape != v.shape:
            self.seen, self.weighted = torch.zeros_like(v), v.new_zeros(self.B.shape[1], v.shape[1])
        assert self.weighted is not None
        step = v - self.seen
        moved = step.any(1).nonzero()[:, 0]
        if len(moved):
            step = step[moved]
            for at in self._pieces():
                self.weighted[at] += self.B[moved, at].double().T @ step / self.precision[at].unsqueeze(1)
            self.seen = v.clone()

    def _pieces(self) -> list[slice]:
        size = self.B.shape[1]
        return [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]


def by_blocks(
    kernel: TangentKernel, precision: Tensor, b: Tensor, start: Tensor, tol: float, passes: float | None = None
) -> Tensor:
    """Rows w that solve (B^T B + Lambda) w = b to ||r|| <= tol ||b|| each, from `start`.

    w = Lambda^-1 (b - B^T u) for the u [R] of (I + B Lambda^-1 B^T) u = B Lambda^-1 b; u = B w, so that of `start` is
    what the blocks begin at.  What they leave, r, leaves -B^T r of the weights' system: they go on to a smaller
    residual where that is too large.
    """
    assert kernel.B is not None
    A, right = TangentBlocks(kernel.B, precision.double()), kernel.forward(b / precision).double().T
    u, norms, within, left = kernel.forward(start).double().T, b.norm(dim=1), tol, passes or PASSES
    w = start
    for _ in range(ROUNDS):
        found = block_solves(A, right, within, block_size=BLOCK, x0=u, max_passes=left, seed=kernel.system.seed)
        u, left = found.x, left - found.passes
        w = (b - kernel.backward(u.T.to(b))) / precision
        r = b - kernel.backward(kernel.forward(w)) - precision * w
        residual = float((r.norm(dim=1) / norms).max())
        if residual <= tol or left < 1:
            break
        within *= max(0.01, 0.5 * tol / residual)
    return w
