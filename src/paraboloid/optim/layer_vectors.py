"""Vectors of several layers, one behind the other: what is a number per layer is one reduction for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerVectors:
    """Where each layer's vector lies in a flat one, [P]; sizes: the layers' [p]."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes = list(sizes)
        self.lengths = torch.tensor(self.sizes, device=device)
        self._layer = torch.repeat_interleave(self.lengths)  # of each entry

    def parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of a flat [.. P], by layer."""
        return flat.split(self.sizes, -1)

    def each(self, numbers: Sequence[float], like: Tensor) -> Tensor | float:
        """A number per layer for every entry, [P]; the number itself where all layers have the same."""
        if numbers.count(numbers[0]) == len(numbers):
            return numbers[0]
        return self.rows([numbers], like)[0]

    def rows(self, numbers: Sequence[Sequence[float]], like: Tensor) -> Tensor:
        """Several numbers per layer for every entry, [k, P]."""
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).index_select(1, self._layer)

    def dots(self, vectors: Tensor) -> list[list[float]]:
        """All inner products of some flat vectors [k, P], layer by layer: [layers][k k], summed in float64."""
        V = vectors.double()
        products = (V.unsqueeze(0) * V.unsqueeze(1)).view(-1, V.shape[1]).T  # [P, k k]
        return torch.segment_reduce(products, "sum", lengths=self.lengths, axis=0, unsafe=True).tolist()
