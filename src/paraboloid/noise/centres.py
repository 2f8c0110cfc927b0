"""Cluster centres of rank r, one block for each parameter: C_k = sum_r left[k, r, g] (x) right[k, r, g].

A block takes K r G (p + q) numbers where the parameter takes G p q: a centre is never a dense gradient.  Biases, scales
and raw parameters (q = 1) have exact centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# One parameter's gradient of a sample is [G, p, q]: groups, output side, input side.
Block = tuple[int, int, int]


@dataclass
class Centres:
    """The centres of K clusters in one parameter: left [K r G p], right [K r G q].

    `flip`: the parameter is stored as q x p (embeddings, `x @ W`).
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    flip: bool = False

    @property
    def block(self) -> Block:
        return self.left.shape[2], self.left.shape[3], self.right.shape[3]

    @property
    def elements(self) -> int:
        """Numbers kept: K r G (p + q); for q = 1 the right side is one and counts nothing."""
        return self.left.numel() + (self.right.numel() if self.right.shape[3] > 1 else 0)

    def blocks(self) -> Tensor:
        """The centres written out, [K G p q]."""
        if self.left.shape[1] == 1:  # elementwise: a product over an axis of length one is slow
            return self.left[:, 0].unsqueeze(3) * self.right[:, 0].unsqueeze(2)
        return self.left.permute(0, 2, 3, 1) @ self.right.transpose(1, 2)

    def dense(self) -> Tensor:
        """The centres as gradients of the parameter, [K, *shape]."""
        C = self.blocks()
        return (C.mT if self.flip else C).reshape(len(C), *self.shape)

    def square_norms(self) -> Tensor:
        """||C_k||^2, [K]."""
        left, right = self.left.transpose(1, 2), self.right.transpose(1, 2)  # [K G r ..]
        return ((left @ left.mT) * (right @ right.mT)).sum((1, 2, 3))

    def basis(self, side: str) -> Tensor:
        """Orthonormal columns that span one side, [K G p r] or [K G q r]; in float64 or the sides' own type."""
        return torch.linalg.qr((self.left if side == "left" else self.right).permute(0, 2, 3, 1))[0]


def start(block: Block, clusters: int, rank: int, like: Tensor, generator: torch.Generator, shape, flip) -> Centres:
    """Centres drawn uniformly from (0, 1) / (p + q), as the authors' code draws them."""
    G, p, q = block
    r = min(rank, p, q)
    left, right = (
        (torch.rand(clusters, r, G, n, generator=generator, dtype=torch.float64, device="cpu") / (p + q)).to(like)
        for n in (p, q)
    )
    return Centres(left, torch.ones_like(right) if q == 1 else right, shape, flip)
