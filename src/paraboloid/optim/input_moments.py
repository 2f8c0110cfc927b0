"""Second moments of a layer's inputs, sum of [a; 1] [a; 1]^T over samples and positions, in pieces of memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers import RULES, Use
from paraboloid.passes.memory import PIECES
from paraboloid.reductions.kronecker_factors import LARGE, add_gram, mirror
from paraboloid.reductions.right import Right


def of_layer(op: Any, args: tuple, dtype: torch.dtype) -> Tensor:
    """[q + 1, q + 1] of a plain layer (see `plain_layers`); its last column is the sum of [a; 1]."""
    x = args[0].detach()
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if op is F.linear:
        x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        return of_rows(x if x.dtype == dtype else x.to(dtype))
    use = next(iter(RULES[op](x, args[1].detach(), *args[2:])))
    return _of_patches(use, x, dtype)


def of_use(use: Use, h: Tensor) -> Tensor:
    """The same of a layer that a rule describes; h: its outputs [rows, p]."""
    assert use.right is not None
    if use.q_axes is None:
        return of_rows(use.right(slice(None)).detach().reshape(-1, use.q).to(h.dtype))
    samples = h.shape[0] // (use.right(slice(0, 1))[0].numel() // use.q)  # rows of the rule's `right`
    return _of_patches(use, h, h.dtype, samples)


def of_rows(x: Tensor) -> Tensor:
    """For rows [K, q]."""
    rows, q = x.shape
    if q < LARGE:
        x = torch.constant_pad_nd(x, (0, 1), 1.0)
        return x.T @ x
    found = x.new_empty(1, q + 1, q + 1)  # a copy of the rows with their ones would cost more than a sum
    inner = found[:, :q, :q]
    add_gram(inner, x.T.unsqueeze(0), add=False)
    mirror(inner)
    found[0, :q, q] = found[0, q, :q] = x.sum(0)
    found[0, q, q] = rows
    return found[0]


def _of_patches(use: Use, like: Tensor, dtype: torch.dtype, samples: int | None = None) -> Tensor:
    """For a strided view of patches, some samples at a time."""
    assert use.right is not None
    samples, size = len(like) if samples is None else samples, use.q + 1
    products = torch.empty(1, size, size, dtype=dtype, device=like.device)
    right = Right(use.right, (1, samples, 1), dtype=dtype, q_axes=use.q_axes)
    most = PIECES.of(None, like.device, least=4 * products.nbytes)
    positions = use.right(slice(0, 1))[0].numel() // use.q
    step = max(1, most // max(1, positions * size * products.element_size()))
    for start in range(0, samples, step):
        columns = right.columns(slice(start, min(start + step, samples))).detach()  # [1 q nT]
        columns = torch.cat([columns, columns.new_ones(1, 1, columns.shape[2])], 1)
        add_gram(products, columns, start > 0)
    return mirror(products)[0]
