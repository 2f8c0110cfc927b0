"""From the Hessian in a call's output to the diagonal of the Hessian in its weights.

Let a weight be used once, in a call whose output z is affine in it.  Then its block of the Hessian is
sum_n A_n^T H_n A_n, with A_n = dz_n / dweight and H_n the Hessian of the loss as a function of z_n, that is of all
that comes behind the call.  In the outer-product form the diagonal of the block is

    sum_n sum_{t,t'} H_n[(t, p), (t', p)] right[n, t, q] right[n, t', q]

so it needs the diagonal of H_n alone where there is one position (T = 1), or where H_n itself is diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paraboloid.engine.per_sample import Part
from paraboloid.engine.sample_independence import Layout
from paraboloid.reductions.products import Products

Multiply = Callable[[Tensor], Tensor]  # H v for columns v [V *z]


def coordinates(shape: torch.Size, layout: Layout, device: torch.device) -> Tensor:
    """[N, C]: the flat positions of every sample's C elements in a tensor of the given shape."""
    flat = torch.arange(shape.numel(), device=device).view(shape).unflatten(layout.axis, layout.sizes)
    return flat.movedim(layout.axis + 1, 0).flatten(1)


def units(at: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Columns [V *shape] with `values` [V K] at the flat positions `at` [V K] (-1, of value zero: none)."""
    return values.new_zeros(len(at), shape.numel()).scatter_add_(1, at.clamp(min=0), values).view(-1, *shape)


def from_diagonal(part: Part, d: Tensor, each: bool = False) -> Tensor:
    """sum_n sum_i (dz_i / dweight)^2 d_i for a diagonal d of z's shape: the weight's Hessian diagonal, [*shape]; or
    `each` sample's, [N, *shape].

    Each element of z is to be met at most once by each element of the weight, see `meets_once`.
    """
    o = part.outer(d[None], 2)
    return torch.cat([J[:, 0] for J in o.rows(None)]).view(-1, *o.shape) if each else o.total()[0]


def separable(part: Part) -> bool:
    """Whether every element of the weight reaches one element of each sample's z at most (no positions to sum over)."""
    assert part.use is not None
    if part.elements is None:
        return False
    at, scale = part.elements()
    if part.use.right is None:
        return bool(((at >= 0) & (scale != 0)).sum(2).max() <= 1)
    return at.shape[2] == 1


def meets_once(part: Part) -> bool:
    """Whether no element of z stands at two positions of one row of left (as it does in a bag of embeddings)."""
    if part.elements is None:
        return True  # looked up at fixed positions, and added
    at, scale = part.elements()
    at = torch.where(scale == 0, -1, at)
    if at.shape[2] == 1 or torch.bincount(at[at >= 0].flatten()).max() <= 1:
        return True
    at = at.sort(2)[0]
    return not bool(((at[:, :, 1:] == at[:, :, :-1]) & (at[:, :, 1:] >= 0)).any())


def output_diagonal(products: Multiply, shape: torch.Size, at: Tensor, count: int, like: Tensor) -> Tensor:
    """The diagonal of all H_n, of z's shape: as many products as a sample has elements, `count` at a time."""
    d = like.new_zeros(shape.numel())
    for positions in at.T.split(count):  # [V N]
        h = products(units(positions, like.new_ones(()).expand(positions.shape), shape))
        d[positions] = h.flatten(1).gather(1, positions)
    return d.view(shape)


def from_products(
    part: Part, products: Multiply, shape: torch.Size, count: int, like: Tensor, each: bool = False
) -> Tensor:  # fmt: skip
    """The diagonal for a weight matrix or table with T positions, [*shape]: G p T products, `count` at a time; for a
    matrix also `each` sample's, [N, *shape]."""
    assert part.elements is not None
    at, scale = part.elements()
    o = part.outer(like.new_zeros(()).expand(1, *shape))
    assert isinstance(o, Products)
    N, G, T, p = at.shape
    J = like.new_zeros(N if each else 1, G, p, o.q)
    right = o.right()
    for g in range(G):
        used = scale[:, g].abs().sum((0, 1)).nonzero().flatten()
        for rows in used.split(max(1, count // T)):
            where, factor = (t[:, g, :, rows].movedim(2, 0) for t in (at, scale))  # [K N T]
            columns = units(where.mT.flatten(0, 1), factor.mT.flatten(0, 1), shape)  # one for each (row, position)
            h = products(columns).flatten(1).view(len(rows), T, -1)
            M = h.gather(2, where.flatten(1).clamp(min=0).unsqueeze(1).expand(-1, T, -1)).view(len(rows), T, N, T)
            M = (M * factor.unsqueeze(1)).permute(2, 0, 1, 3)  # [N K T T]
            if each:
                J[:, g, rows] = torch.einsum("nkts,ntq,nsq->nkq", M, right[:, g], right[:, g])
            else:
                J[0, g, rows] = o.between(M, right[:, g])
    return o.finish(J, (N,)) if each else o.finish(J[0], ())
