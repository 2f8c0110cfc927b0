"""Parts of the data: one fold, or all the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs
from paraboloid.data.cutting import Cut
from paraboloid.passes.memory import HELD
from paraboloid.passes.torch_internals import tree_leaves

FOLDS = 5


class Together(ValueError):
    """Samples cannot be left out."""


@dataclass(frozen=True)
class Fold:
    """Every FOLDS-th sample, or all the others; batches that are left empty are left out."""

    data: Data
    cut: Callable[[Inputs], Cut]
    fold: int
    inside: bool

    def __iter__(self) -> Iterator[batch_data.Batch]:
        start = 0
        for inputs, y in batch_data.batches(self.data):
            chosen = (torch.arange(start, start + len(y), device=y.device) % FOLDS == self.fold) == self.inside
            start += len(y)
            if chosen.any():
                if not self.cut(inputs).possible and not chosen.all():
                    raise Together(
                        f"a batch of {len(y)} samples cannot be cut into inputs of some of them (nodes of a graph), so "
                        "that none can be left out of the data; expected separate samples. Give validation= data, or "
                        "match=None."
                    )
                yield self.cut(inputs).take(inputs, chosen.nonzero()[:, 0]), y[chosen]


def held(data: Data) -> tuple[Data, bool]:
    """The same data, and whether every pass over it sees the same samples in the same order.

    A batch or a list does; another iterable, which may shuffle, is put into a list unless its batches are large.
    """
    if batch_data.as_batch(data) is not None or isinstance(data, list | tuple):
        return data, True
    found, size = [], 0
    for batch in batch_data.batches(data):
        found.append(batch)
        size += sum(t.nbytes for t in tree_leaves(batch) if isinstance(t, Tensor))
        if size > HELD.of():
            return data, False
    return found, True
