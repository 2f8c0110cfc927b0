"""One large batch in pieces, for what goes from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Batch, Data
from paraboloid.passes.trees import mapped


def in_pieces(data: Data, size: int) -> Any:
    """A batch of more than `size` samples as a list of smaller ones that can be read again; other data as it is."""
    batch = batch_data.as_batch(data)
    return data if batch is None or len(batch[1]) <= size else _Pieces(batch, size)


class _Pieces:
    def __init__(self, batch: Batch, size: int):
        self.batch, self.size = batch, size

    def __iter__(self) -> Iterator[Batch]:
        inputs, y = self.batch
        for start in range(0, len(y), self.size):
            at = slice(start, start + self.size)
            yield mapped(lambda t, at=at: t[at], inputs), y[at]
