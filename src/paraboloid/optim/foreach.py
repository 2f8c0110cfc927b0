"""torch's fused arithmetic on lists of tensors, and what is read from all their entries together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from paraboloid.passes.torch_internals import flattened, foreach_norm
from paraboloid.passes.torch_internals import foreach_add as added  # (xs, ys, alpha=): x + alpha y
from paraboloid.passes.torch_internals import foreach_add_ as add_
from paraboloid.passes.torch_internals import foreach_add_ as shift_  # (xs, cs): x + c
from paraboloid.passes.torch_internals import foreach_addcmul_ as addcmul_  # (xs, ys, zs, c): x + c y z
from paraboloid.passes.torch_internals import foreach_div as quotients
from paraboloid.passes.torch_internals import foreach_lerp_ as lerp_  # (xs, ys, w): xs + w (ys - xs)
from paraboloid.passes.torch_internals import foreach_mul as scaled  # (xs, factor): factor x; or a list of them
from paraboloid.passes.torch_internals import foreach_mul_ as scale_
from paraboloid.passes.torch_internals import foreach_sqrt as roots

_DTYPE = attrgetter("dtype")
FEW = 2**18  # entries
RUN = 2**11  # products that are summed in float32

__all__ = ["add_", "addcmul_", "added", "along", "dot", "finite", "joined", "lerp_", "norm", "norms", "quotients",
           "roots", "scale_", "scaled", "shift_"]  # fmt: skip


def norm(xs: Sequence[Tensor]) -> Tensor:
    """Of all entries together, [], in float64."""
    norms = foreach_norm(xs)
    if len({n.dtype for n in norms}) > 1:
        norms = [n.double() for n in norms]
    return torch.stack(norms).double().norm()


def norms(xs: Sequence[Tensor]) -> list[float]:
    """Of each."""
    return torch.stack([n.double() for n in foreach_norm(xs)]).tolist()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor], joined_xs: Tensor | None = None) -> Tensor:
    """The sum of all products, [], in float64; `joined_xs` is `joined(xs)`, where that is there."""
    if joined_xs is not None:
        return _whole(ys).mul_(joined_xs).sum(dtype=torch.float64)
    if _are_few(xs):
        return _whole(xs).mul_(_whole(ys)).sum(dtype=torch.float64)
    if xs[0].is_cuda:
        return torch.stack([product.sum(dtype=torch.float64) for product in scaled(xs, ys)]).sum()
    return torch.stack([_dot(x, y) for x, y in zip(xs, ys, strict=True)]).sum()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """x . y in float64; on a CPU a tenth of the time that a product and its sum take, which go through memory."""
    x, y = x.reshape(-1), y.reshape(-1)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    n = 0 if dtype == torch.float64 else len(x) // RUN * RUN
    rest = torch.dot(x[n:], y[n:]).double()
    if n == 0:
        return rest
    return rest + torch.linalg.vecdot(x[:n].view(-1, RUN), y[:n].view(-1, RUN)).sum(dtype=torch.float64)


def along(xs: Sequence[Tensor], ys: Sequence[Tensor], zs: Sequence[Tensor]) -> Tensor:
    """The sum of all x (y - z), [], in float64."""
    if _are_few(xs):
        return _whole(ys).sub_(_whole(zs)).mul_(_whole(xs)).sum(dtype=torch.float64)
    if xs[0].is_cuda:
        return dot(xs, added(ys, zs, alpha=-1))
    return torch.stack([_dot(x, y - z) for x, y, z in zip(xs, ys, zs, strict=True)]).sum()  # one difference at a time


def _are_few(xs: Sequence[Tensor]) -> bool:
    """Whether the tensors of a list are sooner copied into one than read one by one."""
    first = xs[0]
    if first.is_cuda or first.dtype not in (torch.float32, torch.float64):
        return False
    return sum(map(Tensor.numel, xs)) <= FEW and len(set(map(_DTYPE, xs))) == 1


def joined(xs: Sequence[Tensor]) -> Tensor | None:
    """All entries in one new vector; None where the tensors are sooner read one by one."""
    return _whole(xs) if xs and _are_few(xs) else None


def _whole(xs: Sequence[Tensor]) -> Tensor:
    return flattened(xs) if len(xs) > 1 else xs[0].reshape(-1).clone()


def finite(xs: Sequence[Tensor], joined_xs: Tensor | None = None) -> bool:
    """Whether no entry is NaN or infinite; `joined_xs` is `joined(xs)`, where that is there."""
    # a norm is many times faster than isfinite(), but may overflow where no entry does
    if joined_xs is not None:
        return math.isfinite(torch.linalg.vector_norm(joined_xs).item()) or bool(joined_xs.isfinite().all())
    return not xs or math.isfinite(norm(xs).item()) or all(bool(x.isfinite().all()) for x in xs)
