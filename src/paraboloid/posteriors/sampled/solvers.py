"""Solving the tangent system for all samples at once."""

from __future__ import annotations

from torch import Tensor

from paraboloid import linalg
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

MOST_ITERATIONS = 1000  # of conjugate gradients: where more are needed, the residual says so


class _Columns:
    """S (strength G) S + Lambda for columns [D, K]."""

    def __init__(self, system: TangentSystem, precision: Tensor):
        self.system, self.precision = system, precision
        self.shape, self.dtype, self.device = (system.size, system.size), precision.dtype, precision.device

    def __matmul__(self, v: Tensor) -> Tensor:
        rows = v.T.contiguous() if v.dim() == 2 else v.unsqueeze(0)
        return (self.system.product(rows) + self.precision * rows).T.reshape(v.shape)


def by_conjugate_gradients(
    system: TangentSystem, precision: Tensor, b: Tensor, w: Tensor, tol: float, diagonal: Tensor
) -> Tensor:
    """Rows that solve the system to ||r|| <= tol ||b|| each, from the rows `w`; diagonal [D]: of S (strength G) S."""
    A, M = _Columns(system, precision), 1 / (diagonal + precision)
    found = linalg.cg(A, b.T, tol, max_iterations=MOST_ITERATIONS, preconditioner=M, x0=w.T)
    return found.T.contiguous()
