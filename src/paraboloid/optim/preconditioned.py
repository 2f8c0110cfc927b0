"""Gradient descent preconditioned by a curvature of each batch: the optimisers of the BackPACK paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.linalg.kron import Kron
from paraboloid.losses import Loss
from paraboloid.optim import foreach
from paraboloid.optim.accumulation import Pooled
from paraboloid.optim.base import Closure, Frame, gradient_of
from paraboloid.optim.fisher_factors import FisherFactors, finite
from paraboloid.optim.hooks import NOTHING_SEEN, Capture, Observed, distributed_group
from paraboloid.optim.options import check_number, check_samplable, check_share
from paraboloid.optim.preconditioner import Block
from paraboloid.quantities.named import FISHERS, QUANTITIES

FISHER_OF = {name: fisher for fisher, name in FISHERS.items()}
DIAGONALS = ("diag_ggn", "diag_ggn_mc", "diag_hessian", "second_moment", "variance")
CURVATURES = (*DIAGONALS, *FISHER_OF, "kfra")
MOMENTS = ("second_moment", "variance")  # of the single samples' gradients, whatever the loss divides by
LEAST = 0.1  # of the damping: what must be left of it where curvature is negative


class Preconditioned(Frame):
    """theta <- theta - lr (C + (damping + weight_decay) I)^-1 (g + weight_decay theta), C the curvature of the batch.

        opt = pb.optim.Preconditioned(model, loss_fn, curvature="diag_ggn_mc", lr=0.1, damping=1e-2)
        loss_fn(model(x), y).backward()
        opt.step()

    curvature   a quantity of `pb.statistics`: "diag_ggn", "diag_ggn_mc", "diag_hessian", "second_moment", "variance",
                "kfac", "kflr", "kfac_empirical" or "kfra"; measured in every step, of that step's batch alone
                over several passes in a step: a variance is the mean of the passes' own, around the mean of each
    decay       of a running average of C over steps; 0: no average
    momentum    heavy ball on the preconditioned gradient

    The inverse is exact: elementwise, or by eigendecompositions of the Kronecker factors.  Where a diagonal is negative
    (the Hessian's) and less than a tenth of damping + weight_decay would be left, its absolute value is taken.
    For "kfac", "kflr" and "kfac_empirical" a weight without Kronecker structure has its diagonal instead.  Gradients
    with NaN, models, losses, `observe` and the other options are treated as in `KFAC`.

    Source: Dangel, Kunstner & Hennig 2020, arXiv:1912.10985, section 4 and eq. 26 (with exact inverses).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss,
        *,
        curvature: str = "diag_ggn_mc",
        lr: float = 0.1,
        damping: float = 1e-2,
        params: Iterable[Any] | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        decay: float = 0.0,
        seed: int = 0,
        verify: str | bool = "auto",
        max_memory: int | None = None,
        all_reduce: Any = "auto",
    ):
        if curvature not in CURVATURES:
            raise ValueError(f"curvature is {curvature!r}; expected one of {CURVATURES}.")
        defaults = {
            "lr": check_number("lr", lr, 0), "damping": check_number("damping", damping, 0),
            "weight_decay": check_number("weight_decay", weight_decay, 0),
            "momentum": check_share("momentum", momentum), "nesterov": False,
        }  # fmt: skip
        self.curvature, self.decay, self.max_memory = curvature, check_share("decay", decay), max_memory
        super().__init__(model, defaults, params, seed)
        self._group = distributed_group(model, all_reduce)
        self._blocks = {name: Block(name) for name in self.names.values()}
        if curvature in FISHER_OF:
            self._quantity: Any = FisherFactors(set(self._blocks), FISHER_OF[curvature], 1, "expand")
        else:
            self._quantity = QUANTITIES[curvature]()
        self._pooled = Pooled()
        check_samplable(Loss.from_torch(loss_fn), "mc" if curvature in ("kfac", "diag_ggn_mc") else "exact")
        self._capture = Capture(model, loss_fn, lambda: True, self._measure, verify, self._quantity.twice, self._group)

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Tell the optimiser the output and target of a loss computed by a function; before ``backward()``."""
        self._capture.observe(output, target)

    def remove(self) -> None:
        """Take the optimiser's hooks off the model and the loss."""
        self._capture.remove()

    def _measure(self, seen: Observed) -> None:
        self._check_model(seen.tape.parameters)
        stats = seen.tape.statistics(
            self._capture.loss, seen.output, seen.target, [self._quantity], generator=self.generator,
            max_memory=self.max_memory, all_reduce=self._group or False,
        )  # fmt: skip
        moment = self.curvature in MOMENTS
        self._pooled.add(stats, self._capture.loss.reduction == "sum" and not moment, by_samples=moment)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss, if one was given."""
        loss = self._first(closure)
        try:
            if self._capture.nonfinite:
                self._skip("the loss is NaN or infinite")
            elif self._finite():
                self._update()
                self._move()
                self.counters["steps"] += 1
        finally:
            self._capture.forget()
            self._pooled = Pooled()
        return loss

    def _update(self) -> None:
        if self._capture.passes == 0:
            raise RuntimeError(f"Preconditioned {NOTHING_SEEN}")
        (found,) = self._pooled.values.values()
        if not finite(found):
            self.counters["skipped_curvature"] = self.counters.get("skipped_curvature", 0) + 1
            return
        for group in self.param_groups:
            for p in group["params"]:
                block = self._blocks[self.names[p]]
                if (value := found.get(block.name)) is None:
                    continue
                block.average(as_kron(value), self.decay)
                damping = group["damping"] + group["weight_decay"]
                if block.structure == "diagonal" or isinstance(value, Tensor):
                    block.inverse, block.damping = diagonal_inverse(block.kron, damping, block.name), damping
                elif block.decompose(carried=False):
                    block.invert(damping, split=False)

    def _move(self) -> None:
        for group in self.param_groups:
            ps = self._with_gradient(group)
            d = [self._blocks[self.names[p]].apply(gradient_of(p, group["weight_decay"])) for p in ps]
            if ps:
                foreach.add_(ps, self._with_momentum(group, ps, d), alpha=-group["lr"])

    def diagnostics(self) -> dict[str, Any]:
        """Counters, and for each parameter its structure, damping, mean curvature and failed inversions."""
        return {"skipped_curvature": 0, **self.counters, "layers": self._layers()}


def as_kron(value: Any) -> Any:
    """A diagonal [*shape] as a block whose right factor is one; blocks as they are."""
    return Kron(value.flatten().clone(), value.new_ones(1, 1)) if isinstance(value, Tensor) else value


def diagonal_inverse(kron: Any, damping: float, name: str) -> Any:
    """1 / (c + damping), elementwise; 1 / (|c| + damping) where less than a tenth of the damping would be left."""
    c = kron.left * kron.right.reshape(())
    c = torch.where(c + damping < LEAST * damping, c.abs(), c)
    if not (c + damping > 0).all():
        raise ValueError(f"parameter {name!r}: curvature and damping + weight_decay are both 0 somewhere (these "
                         f"are {damping}); expected damping > 0.")  # fmt: skip
    return Kron(1 / (c + damping), torch.ones_like(kron.right))
