"""One large batch in pieces, for what goes from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Batch, Data, Output
from paraboloid.data.cutting import Cut, Cuts


def in_pieces(data: Data, size: int, model: Any, output: Output | None = None) -> Any:
    """A batch of more than `size` samples as smaller ones that can be read again and again; other data, and inputs
    that cannot be cut, as they are."""
    batch = batch_data.as_batch(data)
    if batch is None or len(batch[1]) <= size:
        return data
    cut = Cuts().of(model, batch[0], output)
    return _Pieces(batch, size, cut) if cut.possible and cut.samples == len(batch[1]) else data


class _Pieces:
    def __init__(self, batch: Batch, size: int, cut: Cut):
        self.batch, self.size, self.cut = batch, size, cut

    def __iter__(self) -> Iterator[Batch]:
        inputs, y = self.batch
        for start in range(0, len(y), self.size):
            at = slice(start, start + self.size)
            yield self.cut.take(inputs, at), y[at]
