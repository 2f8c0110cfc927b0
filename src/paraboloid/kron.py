"""Kronecker factors of a parameter's curvature block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kron:
    """A block left (x) right, in the parameter's own row-major order.

    `left` is [p, p] and `right` [q, q], symmetric positive semi-definite; a one-dimensional [p] or [q] is a diagonal.
    A grouped convolution has one pair for each of its G groups, [G, p, p] and [G, q, q]; its block is block-diagonal.
    """

    left: Tensor
    right: Tensor
    groups: int = 1

    def to_dense(self) -> Tensor:
        """The block as a matrix, [D, D] with D = groups p q."""
        if self.groups > 1:
            blocks = [torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(self.left, self.right, strict=True)]
            return torch.block_diag(*blocks)
        left, right = (t.diag() if t.dim() == 1 else t.contiguous() for t in (self.left, self.right))
        return torch.kron(left, right)
