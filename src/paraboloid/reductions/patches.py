"""Copy strided rows (the patches of images, seen as a view) into matrices: run by run, or gathered by an index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from paraboloid.passes.memory import gives_back, pooled

RUN = 16  # to start on a run of memory that is shorter takes longer than to copy it
SAMPLES = 8  # fewer do not pay for looking up a place
PLACES = 2**17  # the index of a larger sample would itself be much to read


def unfold(rows: Tensor, q_axes: int) -> Tensor:
    """[n G *q-axes *T-axes], strided -> [n G T q]: a view where the strides allow it, else in memory of its own."""
    n, *shape = rows.shape
    step, *steps = rows.stride()
    split = 1 + q_axes
    G, q, T = shape[0], math.prod(shape[1:split]), math.prod(shape[split:])
    if torch.is_grad_enabled() or (
        _run(shape[1:split], steps[1:split]) == q and _run(shape[split:], steps[split:]) == T
    ):
        return rows.reshape(n, G, q, T).mT
    run = _run(shape[split:], steps[split:]) if steps[-1] == 1 else 1
    if run >= min(RUN, T) or n < SAMPLES or G * q * T > PLACES or rows.device.type != "cpu":
        found = pooled((n, G, q, T), rows)  # T runs fastest, as it does in an image
        found.view(rows.shape).copy_(rows)
        return found.mT
    extent = 1 + sum((size - 1) * s for size, s in zip(shape, steps, strict=True))
    memory = rows.as_strided((n, extent), (step, 1))
    found = pooled((n, G, T, q), rows)  # products with a matrix in which q runs fastest are the faster ones
    return torch.index_select(memory, 1, _places(tuple(shape), tuple(steps), q_axes), out=found.flatten(1)).view_as(
        found
    )


def _run(shape: Sequence[int], steps: Sequence[int]) -> int:
    """How many elements lie one after the other in memory, each a step of the last axis from the one before."""
    count = 1
    for size, step in zip(reversed(shape), reversed(steps), strict=True):
        if size > 1 and step != count * steps[-1]:
            break
        count *= size
    return count


@lru_cache(maxsize=16)
def _places(shape: tuple[int, ...], steps: tuple[int, ...], q_axes: int) -> Tensor:
    """Where the elements [G T q] of a sample lie in its memory, flat; the axes are G *q-axes *T-axes."""
    at = torch.zeros((), dtype=torch.int32)
    for size, step in zip(shape, steps, strict=True):
        at = at.unsqueeze(-1) + step * torch.arange(size, dtype=torch.int32)
    return at.flatten(1 + q_axes).flatten(1, q_axes).mT.flatten()


gives_back(_places.cache_clear)
