"""Gradient descent preconditioned by a curvature of each batch: the optimisers of the BackPACK paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output
from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import Loss
from paraboloid.optim import direction
from paraboloid.optim.base import Frame
from paraboloid.optim.closures import Closure
from paraboloid.optim.curvature import Curvature
from paraboloid.optim.fisher_factors import FisherFactors
from paraboloid.optim.measurement import Measurement
from paraboloid.optim.options import check_made, check_samplable, check_share, group_defaults
from paraboloid.quantities.kronecker import FISHERS, KFRA
from paraboloid.quantities.named import QUANTITIES
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, merged

FISHER_OF = {name: fisher for fisher, name in FISHERS.items()}
DIAGONALS = ("diag_ggn", "diag_ggn_mc", "diag_hessian", "second_moment", "variance")
CURVATURES = (*DIAGONALS, *FISHER_OF, "kfra")
LEAST = 0.1  # of the damping: what must be left of it where curvature is negative


class Preconditioned(Frame):
    """theta <- theta - lr (C + (damping + weight_decay) I)^-1 (g + weight_decay theta), C the curvature of the batch.

        opt = pb.optim.Preconditioned(model, loss_fn, curvature="diag_ggn_mc", lr=0.1, damping=1e-2)
        loss_fn(model(x), y).backward()
        opt.step()

    curvature   a quantity of `pb.statistics`: "diag_ggn", "diag_ggn_mc", "diag_hessian", "second_moment", "variance",
                "kfac", "kflr", "kfac_empirical" or "kfra"; measured in every step, of that step's batch alone, which
                several passes make up together
    decay       of a running average of C over steps; 0: no average
    momentum    heavy ball on the preconditioned gradient
    output      as in `KFAC`

    The inverse is exact: elementwise, or by eigendecompositions of the Kronecker factors.  Where a diagonal is negative
    (the Hessian's) and less than a tenth of damping + weight_decay would be left, its absolute value is taken.
    For "kfac", "kflr" and "kfac_empirical" a weight without Kronecker structure has its diagonal instead.  Gradients
    with NaN, models, losses, `observe` and the other options are treated as in `KFAC`.

    Source: Dangel, Kunstner & Hennig 2020, arXiv:1912.10985, section 4 and eq. 26 (with exact inverses).
    """

    OPTIONS = ("curvature", "decay", "max_factor")

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss | None = None,
        *,
        curvature: str = "diag_ggn_mc",
        lr: float = 0.1,
        damping: float = 1e-2,
        params: Iterable[Any] | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        decay: float = 0.0,
        max_factor: int = MAX_FACTOR,
        seed: int = 0,
        verify: str | bool = "auto",
        max_memory: int | None = None,
        all_reduce: Any = "auto",
        output: Output | None = None,
        **options: Any,
    ):
        loss_fn = check_made(type(self).__name__, model, loss_fn, options)
        if curvature not in CURVATURES:
            raise ValueError(f"curvature is {curvature!r}; expected one of {CURVATURES}.")
        defaults = group_defaults(lr, momentum, False, weight_decay, False, damping)
        self.curvature, self.decay, self.max_factor = curvature, check_share("decay", decay), max_factor
        super().__init__(model, defaults, params, seed, all_reduce)
        self._compose()
        check_samplable(Loss.from_torch(loss_fn), "mc" if curvature in ("kfac", "diag_ggn_mc") else "exact")
        self._measured = Measurement(self, loss_fn, verify=verify, twice=self._curvature.quantity.twice,
                                     max_memory=max_memory, output=output)  # fmt: skip

    def _compose(self) -> None:
        super()._compose()
        self._curvature = BatchCurvature(self.names.values(), self.curvature, self.decay, self.max_factor)
        self._blocks = self._curvature.blocks
        self._parts = [direction.coupled_decay, self._curvature.precondition, direction.momentum, direction.descend]

    def _added(self, names: Iterable[str]) -> None:
        self._curvature.add(names)

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Tell the optimiser the output and target of a loss computed by a function; before ``backward()``."""
        self._measured.observe(output, target)

    def remove(self) -> None:
        """Take the optimiser's hooks off the model and the loss."""
        self._measured.remove()

    def _wanted(self) -> bool:
        return True

    def _quantities(self) -> list[Any]:
        return [self._curvature.quantity]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss, if one was given."""
        first = self._evaluated(closure)
        try:
            if (moves := self._moves(not self._measured.nonfinite)) is not None:
                self._curvature.update(self._measured, self._dampings())
                for m in moves:
                    for part in self._parts:
                        part(m)
                self.counters["steps"] += 1
        finally:
            self._measured.forget()
        return None if first is None else first.loss

    def _state(self) -> dict[str, Any]:
        return {"blocks": self._curvature.state()}

    def _load(self, state: dict[str, Any]) -> None:
        self._curvature.load(state["blocks"])

    def diagnostics(self) -> dict[str, Any]:
        """Counters, and for each parameter its structure, damping, mean curvature and failed inversions."""
        layers = self._curvature.diagnostics({name: p.numel() for p, name in self.names.items()})
        return {"skipped_curvature": 0, **self.counters, "layers": layers}


class MergedKFRA(KFRA):
    """KFRA's factors of several passes together, each pass's curvature averaged by itself on its way down."""

    def merge(self, a, b):
        return merged(a, b)


class BatchCurvature(Curvature):
    """A quantity of `pb.statistics` for every parameter, inverted in every step."""

    def __init__(self, names: Iterable[str], curvature: str, decay: float, max_factor: int):
        super().__init__(names, decay)
        if curvature in FISHER_OF:
            self.quantity: Any = FisherFactors(
                self.blocks.keys(), FISHER_OF[curvature], 1, "expand", max_factor=max_factor
            )
        else:
            self.quantity = MergedKFRA(max_factor) if curvature == "kfra" else QUANTITIES[curvature]()

    def update(self, measured: Measurement, dampings: Mapping[str, float]) -> None:
        """Average what the step measured, and invert it."""
        if (found := measured.found()) is None:
            return
        (values,) = found.values()
        for name, block in self.blocks.items():
            if (value := values.get(name)) is None:
                continue
            if isinstance(value, Tensor):  # a diagonal
                value = Kron(value.flatten().clone(), value.new_ones(1, 1))
            block.average(value, self.decay)
            if block.structure == "diagonal":
                block.inverse, block.damping = diagonal_inverse(block.kron, dampings[name], name), dampings[name]
            elif block.decompose(carried=False):
                block.invert(dampings[name], split=False)


def diagonal_inverse(kron: Any, damping: float, name: str) -> Any:
    """1 / (c + damping), elementwise; 1 / (|c| + damping) where less than a tenth of the damping would be left."""
    c = kron.left * kron.right.reshape(())
    c = torch.where(c + damping < LEAST * damping, c.abs(), c)
    if not (c + damping > 0).all():
        raise ValueError(f"parameter {name!r}: curvature and damping + weight_decay are both 0 somewhere (these "
                         f"are {damping}); expected damping > 0.")  # fmt: skip
    return Kron(1 / (c + damping), torch.ones_like(kron.right))
