"""Small batches joined: a fit does not depend on how its data is batched, but each batch costs the same again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data
from paraboloid.passes.memory import JOINED

PARAMETERS = 1_000_000  # of the largest models that it pays for


def joined(data: Data, model: nn.Module, max_memory: int | None) -> Any:
    """The same data with consecutive batches of one input tensor joined up to 512 KiB of inputs; larger ones, and other
    kinds of inputs, as they are.  Only for small models, whose gradients at layers' outputs stay small too."""
    if max_memory is not None or batch_data.as_batch(data) is not None:
        return data
    if sum(p.numel() for _, p in model.named_parameters()) > PARAMETERS:
        return data
    return _Joined(data)


class _Joined:
    """Can be iterated as often as the data."""

    def __init__(self, data: Data):
        self.data = data

    def __iter__(self) -> Iterator[batch_data.Batch]:
        held: list[tuple[Tensor, Tensor]] = []
        for x, y in batch_data.batches(self.data):
            if held and not (_fits(held[0], (x, y)) and sum(a.nbytes for a, _ in held) + x.nbytes <= JOINED.of()):
                yield _together(held)
                held = []
            if _is_plain(x, y):
                held.append((x, y))
            else:
                yield x, y
        if held:
            yield _together(held)


def _is_plain(x: Any, y: Any) -> bool:
    """Numbers, one row for each sample; token ids stand for much larger layer outputs.

    Where another axis is as long the samples may lie on that one, as in a recurrent layer's [T, N, D].
    """
    plain = isinstance(x, Tensor) and x.layout == torch.strided and x.dim() > 1 and x.is_floating_point()
    return plain and isinstance(y, Tensor) and y.dim() > 0 and len(x) == len(y) and len(x) not in x.shape[1:]


def _fits(first: tuple[Tensor, Tensor], then: tuple[Any, Tensor]) -> bool:
    same = all(
        isinstance(b, Tensor) and a.shape[1:] == b.shape[1:] and (a.dtype, a.device) == (b.dtype, b.device)
        for a, b in zip(first, then, strict=True)
    )
    return same and _is_plain(*then)


def _together(held: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(held) == 1:
        return held[0]
    return torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
