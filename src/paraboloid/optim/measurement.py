"""What the training passes since the last step measure, as on one big batch (gradient accumulation)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output
from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import Loss
from paraboloid.optim import foreach
from paraboloid.optim.base import Frame
from paraboloid.optim.fisher_factors import HeldVectors
from paraboloid.optim.hooks import NOTHING_SEEN, Capture, Observed
from paraboloid.quantities.door import statistics
from paraboloid.quantities.quantity import Quantity
from paraboloid.quantities.result import Statistics


class Measurement(Capture):
    """Quantities of an optimiser's training passes, measured when the loss is called.

    opt          says in `_wanted()` whether passes are to be watched at all, in `_quantities()` what to measure now, in
                 `_keeps_batches()` whether it evaluates the model on the step's batches itself
    by_samples   they are weighted by the number of samples, even where the loss is a sum
    """

    def __init__(
        self, opt: Frame, loss_fn: nn.Module | Loss, *, verify: str | bool, twice: bool = False,
        max_memory: int | None = None, output: Output | None = None, by_samples: bool = False,
    ):  # fmt: skip
        self._opt: Any = weakref.proxy(opt)  # no cycle: the hooks go with an optimiser that nobody holds, at once
        self.max_memory, self.output, self.by_samples = max_memory, output, by_samples
        self.pooled, self.batches = Pooled(), list[Any]()
        super().__init__(opt.model, loss_fn, verify, twice, opt._group)

    def wanted(self) -> bool:
        return self._opt._wanted()

    def measure(self, seen: Observed) -> None:
        opt = self._opt
        opt._check_model(seen.tape.parameters)
        if quantities := opt._quantities():
            stats = seen.tape.statistics(
                self.loss, seen.output, seen.target, quantities, generator=opt.generator, max_memory=self.max_memory,
                all_reduce=self.group or False,
            )  # fmt: skip
            sums = self.loss.reduction == "sum" and not self.by_samples
            self.pooled.add(stats, sums, self.by_samples)
        if opt._keeps_batches():
            self.batches.append(None if seen.inputs is None else (seen.inputs, seen.target))

    def elsewhere(self, batch: Any, quantities: Sequence[Quantity]) -> Mapping[str, Any]:
        """Quantities of another batch at the present parameters."""
        opt = self._opt
        with self.muted():
            return statistics(
                opt.model, self.loss, batch, quantities, seed=opt.counters["steps"], generator=opt.generator,
                max_memory=self.max_memory, all_reduce=self.group or False, output=self.output,
            )  # fmt: skip

    def found(self) -> dict[str, dict[str, Any]] | None:
        """What was measured since the last step; None, and counted, where it is not finite.

        Raises RuntimeError where no pass was seen.
        """
        if self.passes == 0:
            raise RuntimeError(f"{self._opt.__class__.__name__} {NOTHING_SEEN}")
        if foreach.finite([t for values in self.pooled.values.values() for v in values.values() for t in _tensors(v)]):
            return self.pooled.values
        self._opt.counters["skipped_curvature"] = self._opt.counters.get("skipped_curvature", 0) + 1
        return None

    def forget(self) -> None:
        """The step is over."""
        super().forget()
        self.pooled, self.batches = Pooled(), []


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


def _tensors(value: Any) -> list[Tensor]:
    """Those of a block (or of its halves)."""
    if isinstance(value, tuple):
        return [t for part in value for t in _tensors(part)]
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [value.left, value.right]
