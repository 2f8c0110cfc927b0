"""torch's fused arithmetic on lists of tensors, under typed names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_torch: Any = torch  # the functions are torch's own, but not among its typed names


def scale_(xs: Sequence[Tensor], factor: float) -> None:
    """x *= factor."""
    _torch._foreach_mul_(list(xs), factor)


def scaled(xs: Sequence[Tensor], factor: float) -> list[Tensor]:
    """factor x."""
    return list(_torch._foreach_mul(list(xs), factor))


def add_(xs: Sequence[Tensor], ys: Sequence[Tensor], alpha: float = 1.0) -> None:
    """x += alpha y."""
    _torch._foreach_add_(list(xs), list(ys), alpha=alpha)


def added(xs: Sequence[Tensor], ys: Sequence[Tensor], alpha: float = 1.0) -> list[Tensor]:
    """x + alpha y."""
    return list(_torch._foreach_add(list(xs), list(ys), alpha=alpha))


def norm(xs: Sequence[Tensor]) -> Tensor:
    """Of all entries together, [], in float64."""
    return torch.stack([n.double() for n in _torch._foreach_norm(list(xs))]).norm()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of all products, [], in float64."""
    return torch.stack([(x * y).sum().double() for x, y in zip(xs, ys, strict=True)]).sum()
