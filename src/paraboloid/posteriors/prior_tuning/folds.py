"""Parts of the data: one fold, or all the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs
from paraboloid.data.cutting import Cut

FOLDS = 5


class Together(ValueError):
    """Samples cannot be left out."""


@dataclass(frozen=True)
class Fold:
    """Every FOLDS-th sample of each batch, or all the others; batches that are left empty are left out."""

    data: Data
    cut: Callable[[Inputs], Cut]
    fold: int
    inside: bool

    def __iter__(self) -> Iterator[batch_data.Batch]:
        for inputs, y in batch_data.batches(self.data):
            chosen = (torch.arange(len(y), device=y.device) % FOLDS == self.fold) == self.inside
            if chosen.any():
                if not self.cut(inputs).possible and not chosen.all():
                    raise Together(
                        f"a batch of {len(y)} samples cannot be cut into inputs of some of them (nodes of a graph), so "
                        "that none can be left out of the data; expected separate samples. Give validation= data, or "
                        "match=None."
                    )
                yield self.cut(inputs).take(inputs, chosen.nonzero()[:, 0]), y[chosen]
