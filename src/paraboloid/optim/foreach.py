"""torch's fused arithmetic on lists of tensors, under typed names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.passes.torch_internals import foreach_add, foreach_add_, foreach_mul, foreach_mul_, foreach_norm


def scale_(xs: Sequence[Tensor], factor: float) -> None:
    """x *= factor."""
    foreach_mul_(list(xs), factor)


def scaled(xs: Sequence[Tensor], factor: float) -> list[Tensor]:
    """factor x."""
    return list(foreach_mul(list(xs), factor))


def add_(xs: Sequence[Tensor], ys: Sequence[Tensor], alpha: float = 1.0) -> None:
    """x += alpha y."""
    foreach_add_(list(xs), list(ys), alpha=alpha)


def added(xs: Sequence[Tensor], ys: Sequence[Tensor], alpha: float = 1.0) -> list[Tensor]:
    """x + alpha y."""
    return list(foreach_add(list(xs), list(ys), alpha=alpha))


def norm(xs: Sequence[Tensor]) -> Tensor:
    """Of all entries together, [], in float64."""
    return torch.stack([n.double() for n in foreach_norm(list(xs))]).norm()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of all products, [], in float64."""
    return torch.stack([(x * y).sum().double() for x, y in zip(xs, ys, strict=True)]).sum()


def finite(xs: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    # a norm is many times faster than isfinite(), but may overflow where no entry does
    return not xs or bool(norm(xs).isfinite()) or all(bool(x.isfinite().all()) for x in xs)
