"""Vectors in parameter space as one tensor for each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split(v: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A flat [D] vector as one tensor for each parameter; [K, D] as tensors [K, *shape]."""
    pieces = v.split([p.numel() for p in parameters], -1)
    return [t.reshape(v.shape[:-1] + p.shape).to(p.dtype) for t, p in zip(pieces, parameters, strict=True)]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two vectors given as one tensor for each parameter."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def put(tensors: Sequence[Tensor], flat: Tensor, scale: float, add: bool) -> None:
    """scale * (one tensor for each parameter) into a flat [D] vector, or added to it: one pass over the memory.

    Tensors [K, *shape] go into [K, D].
    """
    lead = flat.shape[:-1]
    sizes = [t.numel() // max(1, lead.numel()) for t in tensors]
    for t, piece in zip(tensors, flat.split(sizes, -1), strict=True):
        t = t.reshape(piece.shape)
        if add:
            piece.add_(t, alpha=scale)
        else:
            torch.mul(t, scale, out=piece)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor for each parameter as a flat [D] vector."""
    return torch.cat([t.reshape(-1) for t in tensors])
