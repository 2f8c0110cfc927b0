"""Vectors in parameter space as one tensor for each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split(v: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A flat [D] vector as one tensor for each parameter."""
    pieces = v.split([p.numel() for p in parameters])
    return [t.view_as(p).to(p.dtype) for t, p in zip(pieces, parameters, strict=True)]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two vectors given as one tensor for each parameter."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor for each parameter as a flat [D] vector."""
    return torch.cat([t.reshape(-1) for t in tensors])
