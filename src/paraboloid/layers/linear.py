"""Products with a weight matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers import Use, rule, spread


def matrix(x: Tensor, weight: Tensor, flip: bool, scale: float = 1) -> Use:
    """z = x W^T (or x W when the weight is stored flipped): left is g, right is x; all but the last axis are rows."""
    p = weight.shape[1] if flip else weight.shape[0]
    return Use(
        weight, tuple(range(x.dim() - 1)), lambda g: (scale * g if scale != 1 else g).reshape(len(g), -1, 1, 1, p),
        lambda rows: x.reshape(-1, 1, 1, x.shape[-1])[rows], flip, x.shape[-1],
    )  # fmt: skip


@rule(F.linear)
def linear(x, weight, bias=None):
    if weight.dim() == 2:
        yield matrix(x, weight, flip=False)
        if bias is not None:
            yield spread(bias, lambda g: g)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(x, weight):
    if weight.dim() == 2 and x.dim() > 1:
        yield matrix(x, weight, flip=True)


@rule(torch.addmm, Tensor.addmm)
def addmm(bias, x, weight, *, beta=1, alpha=1):
    yield spread(bias, lambda g: beta * g)
    yield matrix(x, weight, flip=True, scale=alpha)
