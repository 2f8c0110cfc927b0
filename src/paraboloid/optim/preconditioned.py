"""Gradient descent preconditioned by a curvature of each batch: the optimisers of the BackPACK paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output
from paraboloid.linalg.kronecker import Kron
from paraboloid.linalg.operand import check_choice
from paraboloid.losses import Loss
from paraboloid.optim import direction
from paraboloid.optim.adam_length import AdamLength
from paraboloid.optim.base import Frame
from paraboloid.optim.closures import Closure
from paraboloid.optim.curvature import Curvature
from paraboloid.optim.direction import Part
from paraboloid.optim.fisher_factors import FisherDiagonal, FisherFactors
from paraboloid.optim.measurement import Measurement
from paraboloid.optim.options import check_made, check_samplable, check_share, group_defaults
from paraboloid.optim.trust import check_rise
from paraboloid.quantities.kronecker import FISHERS, KFRA
from paraboloid.quantities.named import QUANTITIES
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, merged

FISHER_OF = {name: fisher for fisher, name in FISHERS.items()}
DIAGONALS = ("diag_ggn", "diag_ggn_mc", "diag_hessian", "second_moment", "variance")
CURVATURES = (*DIAGONALS, *FISHER_OF, "kfra")
LEAST = 0.1  # of the damping: what must be left of it where curvature is negative
KEPT = 0.8  # of the promised change, on the next batch: steps of Adam's length are far too short
ADAMS = 0.015  # of Adam's step at lr 1: the default .1 is Adam's 1.5e-3


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
    rise_factor, kl_clip, output: as in `KFAC`; no clip if none is given

    Without `curvature` and `damping` it is a step that needs no tuning: a diagonal of the Fisher information with
    sampled labels, averaged with decay .95, batch norm included; the damping .1 is in units of the diagonal's mean; the
    gradient is averaged (momentum .9), then preconditioned; each parameter's step is as long as Adam's with .015 lr,
    1.5e-3, up to four times that while steps keep what they promise.  With either of them, or paper=True, it is
    BackPACK's (lr .1, damping .01, no momentum, no averages); paper=True watches nothing.

    The inverse is exact: elementwise, or by eigendecompositions of the Kronecker factors.  Where a diagonal is negative
    (the Hessian's) and less than a tenth of damping + weight_decay would be left, its absolute value is taken.
    For "kfac", "kflr" and "kfac_empirical" a weight without Kronecker structure has its diagonal instead.  Gradients
    with NaN, models, losses, `observe` and the other options are treated as in `KFAC`.

    Source: Dangel, Kunstner & Hennig 2020, arXiv:1912.10985, section 4 and eq. 26 (with exact inverses).
    """

    OPTIONS = ("curvature", "decay", "max_factor", "kl_clip", "rise_factor", "graft", "paper")
    OLDER: Mapping[str, Any] = {**Frame.OLDER, "graft": None}
    PAPER: Mapping[str, Any] = {"lr": 0.1, "damping": 1e-2, "momentum": 0.0, "decay": 0.0, "graft": None}
    OURS: Mapping[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "decay": 0.95, "graft": "adam"}

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss | None = None,
        *,
        curvature: str | None = None,
        lr: float | None = None,
        damping: float | None = None,
        params: Iterable[Any] | None = None,
        weight_decay: float = 0.0,
        momentum: float | None = None,
        decay: float | None = None,
        kl_clip: float | None = None,
        rise_factor: float | None = 2.0,
        paper: bool = False,
        max_factor: int = MAX_FACTOR,
        seed: int = 0,
        verify: str | bool = "auto",
        max_memory: int | None = None,
        all_reduce: Any = "auto",
        output: Output | None = None,
        **options: Any,
    ):
        loss_fn = check_made(type(self).__name__, model, loss_fn, options)
        check_choice("curvature", curvature, (None, *CURVATURES))
        chosen = self.OURS if curvature is None and damping is None and not paper else self.PAPER
        curvature = "diag_ggn_mc" if chosen is self.PAPER and curvature is None else curvature
        given = {"lr": lr, "damping": damping, "momentum": momentum, "decay": decay}
        o = {**chosen, **{name: value for name, value in given.items() if value is not None}}
        defaults = group_defaults(o["lr"], o["momentum"], False, weight_decay, False, o["damping"])
        self.curvature, self.decay, self.max_factor = curvature, check_share("decay", o["decay"]), max_factor
        self.kl_clip, self.graft, self.paper = kl_clip, o["graft"], paper
        self.rise_factor = None if paper else check_rise(rise_factor)
        super().__init__(model, defaults, params, seed, all_reduce)
        self._compose()
        check_samplable(Loss.from_torch(loss_fn), "mc" if curvature in (None, "kfac", "diag_ggn_mc") else "exact")
        self._measured = Measurement(self, loss_fn, verify=verify, twice=self._curvature.quantity.twice,
                                     max_memory=max_memory, output=output)  # fmt: skip

    def _compose(self) -> None:
        super()._compose()
        grafted = self.graft is not None
        self._curvature = BatchCurvature(self.names.values(), self.curvature, self.decay, self.max_factor, grafted)
        self._blocks = self._curvature.blocks
        clip, length = direction.TrustRegion(self.kl_clip), AdamLength(ADAMS)
        precondition = self._curvature.precondition
        if grafted:
            shape: list[Part] = [direction.averaged, length.measure, precondition, length, clip]
        else:
            shape = [precondition, clip, direction.momentum]
        self._parts = [direction.coupled_decay, *shape, direction.descend]

    def _short(self) -> float | None:
        return None if self.graft is None else KEPT

    def _first_options(self) -> dict[str, Any]:
        return {"curvature": "diag_ggn_mc", "decay": 0.0} if self.curvature is None else {}

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

    def _forget(self) -> None:
        self._measured.forget()

    def _unwatched(self) -> AbstractContextManager[Any]:
        return self._measured.muted()

    def _quantities(self) -> list[Any]:
        return [self._curvature.quantity]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss, if one was given."""
        first = self._evaluated(closure)
        try:
            first = self._judged(first, self._measured.loss_seen if first is None else first.value)
            if (moves := self._moves(not self._measured.nonfinite)) is None:
                self._lose()
            elif self._begin(moves):
                self._curvature.update(self._measured, self._dampings())
                for m in moves:
                    for part in self._parts:
                        part(m)
                self._end(moves)
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
        return {"skipped_curvature": 0, **super().diagnostics(), "layers": layers}


class MergedKFRA(KFRA):
    """KFRA's factors of several passes together, each pass's curvature averaged by itself on its way down."""

    def merge(self, a, b):
        return merged(a, b)


class BatchCurvature(Curvature):
    """A quantity of `pb.statistics` for every parameter, inverted in every step.

    relative  dampings are in units of a diagonal's mean
    """

    def __init__(self, names: Iterable[str], curvature: str | None, decay: float, max_factor: int, relative: bool):
        super().__init__(names, decay)
        self.relative = relative
        if curvature is None:
            self.quantity: Any = FisherDiagonal()
        elif curvature in FISHER_OF:
            self.quantity = FisherFactors(self.blocks.keys(), FISHER_OF[curvature], 1, "expand", max_factor=max_factor)
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
                assert block.kron is not None
                c = block.kron.left * block.kron.right.reshape(())
                scale = (float(c.mean()) or 1.0) if self.relative else 1.0  # 1 behind a layer that nothing reaches
                block.damping = dampings[name] * scale
                block.inverse = Kron(diagonal_inverse(c, block.damping, name), torch.ones_like(block.kron.right))
            elif block.decompose(carried=False):
                block.invert(dampings[name], split=False)


def diagonal_inverse(c: Tensor, damping: float, name: str) -> Tensor:
    """1 / (c + damping), elementwise; 1 / (|c| + damping) where less than a tenth of the damping would be left."""
    shifted = c + damping
    if damping <= 0 or not float(shifted.min()) >= LEAST * damping:
        shifted = torch.where(shifted < LEAST * damping, c.abs() + damping, shifted)
        if not (shifted > 0).all():
            raise ValueError(f"parameter {name!r}: curvature and damping + weight_decay are both 0 somewhere (these "
                             f"are {damping}); expected damping > 0.")  # fmt: skip
    return shifted.reciprocal_()
