"""Small batches joined: a fit does not depend on how its data is batched, but each batch costs the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.data.cutting import Cuts
from paraboloid.passes.memory import JOINED

PARAMETERS = 1_000_000  # of the largest models that it pays for


def joined(
    data: Data, model: nn.Module, max_memory: int | None, output: Output | None = None, cuts: Cuts | None = None
) -> Any:  # fmt: skip
    """The same data with consecutive batches of one input tensor joined up to 512 KiB of inputs; larger ones, and other
    kinds of inputs, as they are.  Only for small models, whose gradients at layers' outputs stay small too.

    `cuts` say, by running the model, where the samples lie in inputs with two axes of their number.
    """
    if max_memory is not None or batch_data.as_batch(data) is not None:
        return data
    if sum(p.numel() for _, p in model.named_parameters()) > PARAMETERS:
        return data
    cuts = Cuts() if cuts is None else cuts
    return _Joined(data, lambda x: cuts.of(model, x, output).axes == (0,))


class _Joined:
    """Can be iterated as often as the data."""

    def __init__(self, data: Data, along_first: Callable[[Tensor], bool]):
        self.data, self.along_first = data, along_first

    def __iter__(self) -> Iterator[batch_data.Batch]:
        held: list[tuple[Tensor, Tensor]] = []
        for x, y in batch_data.batches(self.data):
            alike = bool(held) and _same(held[0][0], x) and _same(held[0][1], y)  # as nearly always
            plain = alike or self._is_plain(x, y)
            if held and not (
                plain and (alike or _fits(held[0], (x, y))) and sum(a.nbytes for a, _ in held) + x.nbytes <= JOINED.of()
            ):
                yield _together(held)
                held = []
            if plain:
                held.append((x, y))
            else:
                yield x, y
        if held:
            yield _together(held)

    def _is_plain(self, x: Any, y: Any) -> bool:
        """Numbers, one row for each sample; token ids stand for much larger layer outputs.

        Where another axis is as long the samples may lie on that one, as in a recurrent layer's [T, N, D].
        """
        plain = isinstance(x, Tensor) and x.layout == torch.strided and x.dim() > 1 and x.is_floating_point()
        if not plain or not isinstance(y, Tensor) or y.dim() == 0 or len(x) != len(y):
            return False
        return len(x) not in x.shape[1:] or self.along_first(x)


def _same(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)


def _fits(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> bool:
    return all(
        a.shape[1:] == b.shape[1:] and (a.dtype, a.device) == (b.dtype, b.device)
        for a, b in zip(first, then, strict=True)
    )


def _together(held: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(held) == 1:
        return held[0]
    return torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
