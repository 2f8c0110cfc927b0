"""What is added to a curvature before it is inverted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paraboloid.linalg.kronecker import check_split
from paraboloid.linalg.operand import check_damping


class Damped:
    """A + damping I, for solvers."""

    def __init__(self, A: Any, damping: float):
        self.A, self.damping = A, float(check_damping(damping))
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return (self.A @ v).add_(v, alpha=self.damping)


def whole_damping(A: Any, split: Any) -> None:
    """Raise ValueError where damping is to be split between two factors that A has not."""
    if check_split(split) is not None:
        raise ValueError(
            f"split is {split!r}, which shares damping between the two Kronecker factors of a block, but a "
            f"{type(A).__name__} is not kept by such factors; expected None, by which damping is exact. "
            "pb.KFAC(...).inverse(damping, split=...) has them."
        )
