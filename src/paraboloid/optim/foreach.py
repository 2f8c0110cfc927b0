"""torch's fused arithmetic on lists of tensors, and what is read from all their entries together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.passes.torch_internals import foreach_add as added  # (xs, ys, alpha=): x + alpha y
from paraboloid.passes.torch_internals import foreach_add_ as add_
from paraboloid.passes.torch_internals import foreach_mul as scaled  # (xs, factor): factor x
from paraboloid.passes.torch_internals import foreach_mul_ as scale_
from paraboloid.passes.torch_internals import foreach_norm

__all__ = ["add_", "added", "dot", "finite", "norm", "scale_", "scaled"]


def norm(xs: Sequence[Tensor]) -> Tensor:
    """Of all entries together, [], in float64."""
    return torch.stack([n.double() for n in foreach_norm(xs)]).norm()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of all products, [], in float64."""
    return torch.stack([(x * y).sum().double() for x, y in zip(xs, ys, strict=True)]).sum()


def finite(xs: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    # a norm is many times faster than isfinite(), but may overflow where no entry does
    return not xs or bool(norm(xs).isfinite()) or all(bool(x.isfinite().all()) for x in xs)
