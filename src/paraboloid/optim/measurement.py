"""What the training passes since the last step measure, as on one big batch (gradient accumulation)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import Output
from paraboloid.distributed import collectives
from paraboloid.linalg.kronecker import Kron
from paraboloid.optim import foreach
from paraboloid.optim.base import Frame
from paraboloid.optim.fisher_factors import HeldVectors
from paraboloid.optim.hooks import NOTHING_SEEN, Capture, Observed
from paraboloid.quantities.door import statistics
from paraboloid.quantities.named import check_samples
from paraboloid.quantities.quantity import Quantity
from paraboloid.quantities.sums import Sums, combine, merged, scale_of


class Measurement(Capture):
    """Quantities of an optimiser's training passes, measured when the loss is called; their sums over samples add up
    from pass to pass, and are divided at the step.

    opt          says in `_wanted()` whether passes are to be watched at all, in `_quantities()` what to measure now, in
                 `_keeps_batches()` whether it evaluates the model on the step's batches itself
    """

    def __init__(
        self, opt: Frame, loss_fn: Any, *, verify: str | bool, twice: bool = False,
        max_memory: int | None = None, output: Output | None = None,
    ):  # fmt: skip
        self._opt: Any = weakref.proxy(opt)  # no cycle: the hooks go with an optimiser that nobody holds, at once
        self.max_memory, self.output = max_memory, output
        self.sums: Sums | None = None
        self.quantities: Sequence[Quantity] = []
        self.batches, self.losses = list[Any](), list[tuple[float, float]]()  # losses with what each was divided by
        super().__init__(opt.model, loss_fn, verify, twice, opt._group)

    def wanted(self) -> bool:
        return self._opt._wanted()

    def measure(self, seen: Observed) -> None:
        opt = self._opt
        opt._check_model(seen.tape.parameters)
        if quantities := opt._quantities():
            sums = seen.tape.sums(
                self.loss, seen.output, seen.target, quantities, opt.generator, self.max_memory, total=0.0
            )
            with torch.no_grad():
                self.sums = merged(quantities, self.loss, self.sums, sums)
            self.quantities = quantities
            self.losses.append((seen.value, self.loss.normalizer(seen.output.detach(), seen.target)))
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

    @torch.no_grad()
    def found(self) -> dict[str, dict[str, Any]] | None:
        """What was measured since the last step, over all ranks; None, and counted, where it is not finite.

        Raises RuntimeError where no pass was seen.
        """
        if self.passes == 0 or self.sums is None:
            raise RuntimeError(f"{self._opt.__class__.__name__} {NOTHING_SEEN}")
        sums, self.sums = self.sums, None
        if self.group is None:
            scale = scale_of(self.loss, [(sums.N, sums.normalizers)], "pass")
        else:
            parameters = {name: p for p, name in self._opt.names.items()}
            sums, scale = combine(self.quantities, sums, parameters, self.loss, self._opt.device, self.group)
        check_samples(self.quantities, scale.N)
        values: dict[str, dict[str, Any]] = {}
        for q in self.quantities:
            q.announce(sums.values[q.name])
            values[q.name] = {k: q.finish(v, scale) for k, v in sums.values[q.name].items()}
        entries: list[Tensor] = []
        for each in values.values():
            for v in each.values():
                if isinstance(v, Kron):
                    entries += (v.sides[0].data, v.sides[1].data)
                else:
                    entries += _tensors(v)
        if foreach.finite(entries):
            return values
        self._opt.counters["skipped_curvature"] = self._opt.counters.get("skipped_curvature", 0) + 1
        return None

    @property
    def loss_seen(self) -> float | None:
        """The loss that was measured since the last step, of all passes and ranks as one batch; None where there is
        none, or one was not finite."""
        if self.nonfinite or not self.losses:
            return None
        totals = torch.tensor([(n * loss, n) for loss, n in self.losses], dtype=torch.float64, device="cpu").sum(0)
        if self.group is not None:
            totals = collectives.summed(totals, self.group, self._opt.device)
        return float(totals[0] if self.loss.reduction == "sum" else totals[0] / totals[1])

    def forget(self) -> None:
        """The step is over."""
        super().forget()
        self.sums, self.quantities, self.batches, self.losses = None, [], [], []


def _tensors(value: Any) -> list[Tensor]:
    """Those of a block (or of its halves)."""
    if isinstance(value, HeldVectors) or value is None:
        return []
    if isinstance(value, tuple):
        return [t for part in value for t in _tensors(part)]
    return [side.data for side in value.sides] if isinstance(value, Kron) else [value]
