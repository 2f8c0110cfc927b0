"""Curvature measured on several passes of one step (gradient accumulation), as that of one big batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kron import Kron
from paraboloid.optim.fisher_factors import HeldVectors
from paraboloid.quantities.door import Statistics


class Pooled:
    """The pooled values so far, quantity -> parameter -> value, and the held vectors of every pass.

    Curvature is weighted by what the loss divides by, the layers' inputs by the number of samples; for a loss that is a
    sum, curvature adds up.
    """

    def __init__(self):
        self.values: dict[str, dict[str, Any]] = {}
        self.held: dict[str, list[HeldVectors]] = {}
        self.normalizers: list[float] = []
        self.samples: list[int] = []
        self.sums = False

    def add(self, stats: Statistics, sums: bool, by_samples: bool = False) -> None:
        self.sums = sums
        self.normalizers.append(stats.samples if by_samples else stats.normalizer)
        self.samples.append(stats.samples)
        for quantity, values in stats.items():
            if quantity == "held":
                for name, held in values.items():
                    if held is not None:
                        self.held.setdefault(name, []).append(held)
            elif quantity not in self.values:
                self.values[quantity] = dict(values)
            else:
                mine = self.values[quantity]
                self.values[quantity] = {name: self._joined(mine[name], new) for name, new in values.items()}

    def _joined(self, old: Any, new: Any) -> Any:
        """The running value with that of one more pass."""
        if old is None or new is None:
            return new if old is None else old
        if isinstance(old, tuple):
            return tuple(self._joined(a, b) for a, b in zip(old, new, strict=True))
        if isinstance(old, Tensor):
            return self._curvature(old, new)
        right = torch.lerp(old.right, new.right, self.samples[-1] / sum(self.samples))
        return Kron(self._curvature(old.left, new.left), right, old.groups)

    def _curvature(self, old: Tensor, new: Tensor) -> Tensor:
        return old + new if self.sums else torch.lerp(old, new, self.normalizers[-1] / sum(self.normalizers))

    def pool(self, each: list[Tensor]) -> Tensor:
        """One value from those of the passes."""
        if self.sums:
            return torch.stack(each).sum(0)
        total = sum(self.normalizers)
        return torch.stack([n / total * value for n, value in zip(self.normalizers, each, strict=True)]).sum(0)
