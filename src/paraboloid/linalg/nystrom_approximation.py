"""The Nystrom approximation of a positive semi-definite operator, and the preconditioner made from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, Operand, check_count
from paraboloid.linalg.probes import Seed, generator_of, normal


class LowRank:
    """shift I + U diag(weights) U^T with orthonormal columns U [D, r]: an operator for torch vectors [D] or [D, K]."""

    def __init__(self, U: Tensor, weights: Tensor, shift: float = 0.0):
        self.U, self.weights, self.shift = U, weights, shift
        self.shape, self.dtype, self.device = (len(U), len(U)), U.dtype, U.device

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.dim() == 2 and v.shape[1] == 1:  # much faster as a vector
            return (self @ v[:, 0]).unsqueeze(1)
        scaled = self.weights if v.dim() == 1 else self.weights.unsqueeze(1)
        return self.U @ (scaled * (self.U.T @ v)) + self.shift * v


class Nystrom(LowRank):
    """A ~ U diag(values) U^T, values [r] descending: at most A, in the order of positive semi-definite matrices."""

    @property
    def values(self) -> Tensor:
        return self.weights

    @property
    def vectors(self) -> Tensor:
        return self.U

    def preconditioner(self, damping: float) -> LowRank:
        """P^-1 = (l_r + damping) U (diag(values) + damping)^-1 U^T + I - U U^T for A + damping I, with l_r the least
        of the values.

        The condition of the preconditioned system is a small constant if r is about twice the effective dimension
        tr(A (A + damping I)^-1).  Source: Frangella, Tropp and Udell 2023, arXiv:2110.02820, section 5.
        """
        if not damping > 0:
            raise ValueError(f"damping is {damping}; expected a positive number: A ~ U diag(values) U^T alone has no "
                             "inverse.")  # fmt: skip
        return LowRank(self.U, (self.weights[-1] + damping) / (self.weights + damping) - 1, 1.0)


def nystrom(A: Any, rank: int, seed: Seed = 0) -> Nystrom:
    """The randomised Nystrom approximation (A W)(W^T A W)^+ (A W)^T for Gaussian W [D, rank]: `rank` products.

    A positive semi-definite; raises `torch.linalg.LinAlgError` where W^T A W is clearly not.  Computed with a small
    shift, taken off the eigenvalues again.  Source: Tropp, Yurtsever, Udell and Cevher 2017, arXiv:1706.05736,
    algorithm 3.
    """
    A = Operand(A)
    check_count("rank", rank, most=A.size)
    W = torch.linalg.qr(normal((A.size, rank), A, generator_of(seed, A.device))).Q
    Y = A @ W
    if not torch.isfinite(Y).all():
        raise LinAlgError("a product with A holds NaN or infinity; expected finite numbers.")
    shift = A.size**0.5 * torch.finfo(A.dtype).eps * Y.norm()
    if not shift > 0:
        return Nystrom(W, torch.zeros(rank, dtype=A.dtype, device=A.device))
    Y = Y + shift * W
    core = W.T @ Y
    L, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if failed.any():
        least = torch.linalg.eigvalsh((core + core.T) / 2)[0].item()
        raise LinAlgError(f"W^T A W has the eigenvalue {least:.4g} for a random orthonormal W; expected a positive "
                          "semi-definite A, such as a GGN or Fisher.")  # fmt: skip
    U, roots, _ = torch.linalg.svd(torch.linalg.solve_triangular(L, Y.T, upper=False).T, full_matrices=False)
    return Nystrom(U, (roots.square() - shift).clamp(min=0))
