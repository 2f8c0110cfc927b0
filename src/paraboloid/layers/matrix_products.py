"""Products with a weight matrix, a weight vector, or a stack of matrices (bilinear)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers.registry import Use, matrix, rule, spread


def vector(x: Tensor, weight: Tensor) -> Use:
    """z = x w, without the last axis of x."""
    return spread(
        weight, shape=x.shape, arrange=lambda g: g.unsqueeze(-1).expand(*g.shape, x.shape[-1]), factor=x, affine=True
    )


@rule(F.linear)
def linear(x, weight, bias=None):
    yield matrix(x, weight) if weight.dim() == 2 else vector(x, weight)
    yield spread(bias)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.mv, Tensor.mv)
def matmul(x, weight):
    if x.dim() > 1 and weight.dim() < 3:
        yield matrix(x, weight, flip=True) if weight.dim() == 2 else vector(x, weight)


@rule(torch.addmm, Tensor.addmm)
def addmm(bias, x, weight, *, beta=1, alpha=1):
    yield spread(bias, factor=beta)
    yield matrix(x, weight, flip=True, scale=alpha)


@rule(torch.bilinear)
def bilinear(x, y, weight, bias=None):
    """z_o = x^T W_o y: a linear layer on the products of the entries of both inputs, q = in1 in2."""

    def right(rows: slice) -> Tensor:
        a, b = x.reshape(-1, x.shape[-1])[rows], y.reshape(-1, y.shape[-1])[rows]
        return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)[:, None, None]

    p, q = len(weight), weight[0].numel()
    yield Use(weight, tuple(range(x.dim() - 1)), right=right, q=q, arrange=lambda g: g.reshape(len(g), -1, 1, 1, p))
    yield spread(bias)
