"""Raw scale and shift parameters, those of activations, and parameters joined to data (class tokens)."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.layers.registry import channel, rule, spread


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
def add(x, y, *, alpha=1):
    yield spread(x)
    yield spread(y, factor=alpha)


@rule(torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract)
def sub(x, y, *, alpha=1):
    yield spread(x)
    yield spread(y, factor=-alpha)


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def mul(x, y):
    yield spread(x, factor=y, affine=True)
    yield spread(y, factor=x, affine=True)


@rule(torch.div, Tensor.div, Tensor.__truediv__, torch.divide, torch.true_divide)
def div(x, y, *, rounding_mode=None):
    if rounding_mode is None:
        yield spread(x, factor=lambda: 1 / y, affine=True)
        yield spread(y, factor=lambda: -x / (y * y), affine=False)


@rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
def expand(x, *shape, implicit=False):
    yield spread(x)


@rule(Tensor.repeat)
def repeat(x, *counts):
    counts = counts[0] if isinstance(counts[0], tuple | list) else counts
    if all(1 in (c, d) for c, d in zip(reversed(counts), reversed(x.shape), strict=False)):
        yield spread(x)


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(tensors, dim=0):
    axis = dim % tensors[0].dim()
    start = 0
    for t in tensors:
        piece = (axis + 1, start, t.shape[axis])
        yield spread(t, arrange=lambda g, piece=piece: g.narrow(*piece), shape=t.shape)
        start += t.shape[axis]


@rule(torch.prelu)
def prelu(x, weight):
    """One slope for everything, or one for each channel (axis 1)."""
    shared = weight.numel() == 1
    yield (spread if shared else channel)(weight, factor=lambda: x.clamp(max=0), affine=True)
