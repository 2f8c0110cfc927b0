"""Natural-gradient descent with Kronecker-factored curvature: KFAC, and EKFAC with exact eigenvalues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output, batches
from paraboloid.distributed import collectives
from paraboloid.losses import Loss
from paraboloid.operators import GGN
from paraboloid.optim import foreach
from paraboloid.optim.accumulation import Pooled
from paraboloid.optim.base import Closure, Frame, gradient_of, value_of
from paraboloid.optim.fisher_factors import Eigenvalues, FisherFactors, Held, HeldVectors, finite
from paraboloid.optim.hooks import NOTHING_SEEN, Capture, Observed, distributed_group
from paraboloid.optim.options import (
    check_choices,
    check_count,
    check_number,
    check_samplable,
    check_share,
    group_defaults,
)
from paraboloid.optim.preconditioner import Block
from paraboloid.optim.step_size import GRAFTS, adapted, clip, grafted, quadratic_step
from paraboloid.passes.schedule import due
from paraboloid.quantities.door import statistics
from paraboloid.quantities.named import FISHERS


class KFAC(Frame):
    """theta <- theta - lr (F + damping I)^-1 g with a Kronecker-factored Fisher information F, block by block.

        opt = pb.optim.KFAC(model, loss_fn, lr=1e-2, damping=1e-3)
        loss_fn(model(x), y).backward()
        opt.step()

    F is that of the loss as reduced, averaged over steps: `factor_decay` of the old average stays, the first averages
    are plain means.  Factors are measured every `factor_interval` steps, when the loss is called, and inverted every
    `inverse_interval` steps; until the interval is reached, also in steps 1, 2, 4, 8, ... (0 the first).

    model             called itself, under gradients, in every step.  Batch norm in training mode is accepted
    loss_fn           the loss that is called in the loop; after a loss that is computed by a function call
                      ``opt.observe(output, target)`` before ``backward()``
    params            parameters of the model, or torch's groups; default: all that are trainable
    momentum          heavy ball on the preconditioned gradient, or nesterov=True
    weight_decay      coupled: (F + (damping + weight_decay) I)^-1 (g + weight_decay theta); or decoupled=True: theta
                      shrinks by lr weight_decay
    fisher, samples   "mc" (labels sampled from the model), "exact" or "empirical"
    sharing           "expand" or "reduce", for weights used at several positions
    split             "pi": damping is split between the two factors, two inverses; None: exact, by eigendecomposition
    adapt_damping     Levenberg-Marquardt: every `damping_interval` steps, by the ratio of the loss's change to the
                      model's prediction.  Needs step(closure)
    reject            a step that raises the loss is taken back.  Needs step(closure), which is called twice
    kl_clip, max_step trust regions: lr^2 d . g <= kl_clip, and lr ||d|| <= max_step
    graft             each parameter's step gets the length of "sgd" or "adam"
    step_size         "fixed", or "quadratic": step length and momentum minimise the quadratic model with the exact
                      GGN of the batch, at about four more gradients; lr=1 takes that step as it is
    measure_on        "half": eigenvectors from the first half of each batch, eigenvalues from the second (debiased;
                      needs exact damping, and sets split=None).  Or step(measure_on=batch) gives other data for that
    seed              of the sampled labels;  verify, max_memory: as in `pb.statistics`
    all_reduce        "auto": over the ranks of a DistributedDataParallel model; or as in `pb.statistics`
    output            as in `pb.statistics`, for the passes that the optimiser makes itself

    A weight without Kronecker structure (weight_norm, an operation without a rule) is preconditioned by the diagonal
    of its Fisher information, a bias by its whole block (its diagonal beyond 4096 elements).

    A step with NaN or infinite gradients is skipped, with a warning, and leaves the curvature as it was.  Where a
    factor cannot be inverted, in float64 neither, the last good inverse is kept, with a warning that names the layer.

    Raises ValueError for options out of range, NotImplementedError where fisher="mc" and the loss does not say how to
    draw labels, RuntimeError where the model or loss was not called or the model changed.
    Sources: Martens & Grosse 2015, arXiv:1503.05671; Grosse & Martens 2016 (convolutions), arXiv:1602.01407;
    Eschenhagen et al. 2023, arXiv:2311.00636 (expand, reduce); Ba et al. 2017 (kl_clip).
    """

    exact_values = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss,
        *,
        lr: float = 1e-2,
        damping: float = 1e-3,
        params: Iterable[Any] | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        fisher: str = "mc",
        samples: int = 1,
        sharing: str = "expand",
        factor_decay: float = 0.95,
        factor_interval: int = 10,
        inverse_interval: int = 100,
        split: str | None = "pi",
        adapt_damping: bool = False,
        damping_interval: int = 5,
        reject: bool = False,
        kl_clip: float | None = None,
        max_step: float | None = None,
        graft: str | None = None,
        step_size: str = "fixed",
        measure_on: str | None = None,
        seed: int = 0,
        verify: str | bool = "auto",
        max_memory: int | None = None,
        all_reduce: Any = "auto",
        output: Output | None = None,
    ):
        check_number("damping", damping, 0, above=True)
        for name, value in (("kl_clip", kl_clip), ("max_step", max_step)):
            if value is not None:
                check_number(name, value, 0, above=True)
        check_choices({"split": (split, (None, "pi")), "graft": (graft, (None, *GRAFTS)),
                       "step_size": (step_size, ("fixed", "quadratic")), "measure_on": (measure_on, (None, "half")),
                       "fisher": (fisher, tuple(FISHERS))})  # fmt: skip
        self.factor_decay = check_share("factor_decay", factor_decay)
        self.factor_interval = check_count("factor_interval", factor_interval)
        self.inverse_interval = check_count("inverse_interval", inverse_interval)
        self.damping_interval = check_count("damping_interval", damping_interval)
        self.split = split == "pi" and measure_on is None and not self.exact_values
        self.adapt_damping, self.reject, self.kl_clip, self.max_step = adapt_damping, reject, kl_clip, max_step
        self.graft, self.step_size, self.half = graft, step_size, measure_on == "half"
        self.max_memory, self.output = max_memory, output
        self._options = {"fisher": fisher, "samples": samples}
        self._sharing = sharing
        super().__init__(model, group_defaults(lr, momentum, nesterov, weight_decay, decoupled, damping), params, seed)
        self._group = distributed_group(model, all_reduce)
        if self._group is not None:
            self.generator.manual_seed(collectives.rank_seed(seed, self._group))
        self._blocks = {name: Block(name) for name in self.names.values()}
        self._factors = FisherFactors(set(self._blocks), **self._options, sharing=sharing, halves=self.half)
        self._pooled = Pooled()
        self._batch: tuple[Any, Tensor] | None = None
        self._ratio: float | None = None
        check_samplable(Loss.from_torch(loss_fn), fisher)
        self._capture = Capture(model, loss_fn, self._due_factors, self._measure, verify, group=self._group)

    # --- measuring, while the loss is called ---------------------------------------------------------------------

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Tell the optimiser the output and target of a loss computed by a function; before ``backward()``."""
        self._capture.observe(output, target)

    def remove(self) -> None:
        """Take the optimiser's hooks off the model and the loss."""
        self._capture.remove()

    def warm_start(self, loader: Any) -> None:
        """Measure the factors on every batch of a loader at the present parameters, before the first step: their plain
        mean over the batches is what the averages begin with.  Raises ValueError for an empty loader."""
        for batch in batches(loader):
            found = self._measured_elsewhere(batch, [self._factors])["fisher_factors"]
            for name, block in self._blocks.items():
                first, second = found[name] if self.half else (found[name], None)
                block.average(first, decay=1.0)
                if second is not None:
                    block.average(second, decay=1.0, other=True)

    def _due_factors(self) -> bool:
        return due(self.counters["steps"], self.factor_interval)

    def _due_inverse(self) -> bool:
        return due(self.counters["steps"], self.inverse_interval) or any(b.kron is None for b in self._blocks.values())

    def _measure(self, seen: Observed) -> None:
        self._check_model(seen.tape.parameters)
        quantities: list[Any] = [self._factors]
        if self.exact_values and self._due_inverse():
            quantities.append(Held(set(self._blocks), **self._options, half=self.half))
        elif self.exact_values:
            quantities.append(Eigenvalues(self._forms, **self._options, half=self.half))
        stats = seen.tape.statistics(
            self._capture.loss, seen.output, seen.target, quantities, generator=self.generator,
            max_memory=self.max_memory, all_reduce=self._group or False,
        )  # fmt: skip
        self._pooled.add(stats, sums=self._capture.loss.reduction == "sum")
        self._batch = seen.inputs, seen.target

    @property
    def _forms(self) -> dict[str, Any]:
        return {name: b.form for name, b in self._blocks.items() if b.form is not None}

    # --- the curvature in use ------------------------------------------------------------------------------------

    def _update_curvature(self, measure_on: Any) -> None:
        if self._due_factors():
            if self._capture.passes == 0:
                raise RuntimeError(f"{type(self).__name__} {NOTHING_SEEN}")
            if finite(self._pooled.values):
                self._average(measure_on)
            else:
                self.counters["skipped_curvature"] = self.counters.get("skipped_curvature", 0) + 1
        self._refresh_damping()

    def _average(self, measure_on: Any) -> None:
        found, other, refresh = self._pooled.values["fisher_factors"], None, self._due_inverse()
        if measure_on is not None:
            other = self._measured_elsewhere(measure_on, [self._factors_whole])["fisher_factors"]
        for name, block in self._blocks.items():
            if found.get(name) is None:
                continue
            first, second = found[name] if self.half else (found[name], None)
            block.average(first, self.factor_decay)
            second = second if other is None else other[name]
            if second is not None:
                block.average(second, self.factor_decay, other=True)
        if refresh:
            for block in self._blocks.values():
                if block.kron is not None and not self.split:
                    block.decompose(carried=self.exact_values)
        if self.exact_values:
            self._average_values(measure_on)
        if refresh or not self.split:
            self._invert()

    @property
    def _factors_whole(self) -> FisherFactors:
        return FisherFactors(set(self._blocks), **self._options, sharing=self._sharing)

    def _average_values(self, measure_on: Any) -> None:
        forms, values = self._forms, self._pooled.values.get("eigenvalues", {})
        if measure_on is not None:
            values = self._measured_elsewhere(measure_on, [Eigenvalues(forms, **self._options)])["eigenvalues"]
        for name in forms:
            held: list[HeldVectors] = self._pooled.held.get(name, []) if measure_on is None else []
            found = self._pooled.pool([h.eigenvalues(forms[name]) for h in held]) if held else values.get(name)
            if held and self._group is not None:
                found = collectives.summed(found, self._group, self.generator.device)
            if found is not None:
                self._blocks[name].average_values(found, self.factor_decay)

    def _measured_elsewhere(self, batch: Any, quantities: list[Any]) -> Mapping[str, Any]:
        with self._capture.muted():
            return statistics(
                self.model, self._capture.loss, batch, quantities, seed=self.counters["steps"],
                generator=self.generator, max_memory=self.max_memory, all_reduce=self._group or False,
                output=self.output,
            )  # fmt: skip

    def _invert(self) -> None:
        for group in self.param_groups:
            damping = _total_damping(group)
            for p in group["params"]:
                if (block := self._blocks[self.names[p]]).kron is not None:
                    block.invert(damping, self.split)

    def _refresh_damping(self) -> None:
        """An eigendecomposition serves every damping; the split inverses wait for their interval."""
        if not self.split and any(
            self._blocks[self.names[p]].damping not in (0.0, _total_damping(group))
            for group in self.param_groups for p in group["params"]
        ):  # fmt: skip
            self._invert()

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None, measure_on: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss, if one was given.

        measure_on  another batch, on which the eigenvalues are measured in steps that measure factors
        """
        if closure is None and (self.adapt_damping or self.reject):
            raise ValueError("adapt_damping and reject compare the loss before and after the step; expected "
                             "step(closure) with a closure that evaluates the loss and calls backward().")  # fmt: skip
        if measure_on is not None and self.split:
            raise ValueError("measure_on= measures eigenvalues, which split='pi' does not use; expected a "
                             f"{type(self).__name__} made with split=None.")  # fmt: skip
        loss = self._first(closure)
        try:
            if self._capture.nonfinite:
                self._skip("the loss is NaN or infinite")
            elif self._finite():
                self._update_curvature(measure_on)
                self._take(closure, loss)
                self.counters["steps"] += 1
        finally:
            self._capture.forget()
            self._pooled = Pooled()
            self._batch = None
        return loss

    def _take(self, closure: Closure | None, loss: Any) -> None:
        adapt = self.adapt_damping and (self.counters["steps"] + 1) % self.damping_interval == 0
        before = [(p, p.clone()) for p in self.names if p.grad is not None] if adapt or self.reject else []
        momentum = {
            p: self.state[p]["momentum_buffer"].clone() for p, _ in before if "momentum_buffer" in self.state[p]
        }
        gradients, directions = self._directions()
        predicted = self._move(gradients, directions, predict=adapt)
        if not before:
            return
        assert closure is not None
        with self._capture.muted(), self._again():
            after = value_of(closure())
        if adapt:
            predicted = self._predicted(gradients, before) if predicted is None else predicted
            self._ratio = (after - value_of(loss)) / predicted if predicted else float("nan")
            for group in self.param_groups:
                group["damping"] = adapted(group["damping"], self._ratio, self.damping_interval)
        if self.reject and not after <= value_of(loss):
            self.counters["rejected"] += 1
            for p, value in before:
                p.copy_(value)
                if p in momentum:
                    self.state[p]["momentum_buffer"].copy_(momentum[p])

    def _directions(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Gradients (with coupled weight decay) and preconditioned, perhaps grafted ones, by parameter."""
        gradients, directions = {}, {}
        for group in self.param_groups:
            decay = 0.0 if group["decoupled"] else group["weight_decay"]
            for p in self._with_gradient(group):
                g = gradient_of(p, decay)
                d = self._blocks[self.names[p]].apply(g)
                gradients[p] = g
                directions[p] = grafted(self.graft, self.state[p], g, d) if self.graft else d
        return gradients, directions

    def _move(self, gradients: dict, directions: dict, predict: bool) -> float | None:
        if self.step_size == "quadratic":
            return self._move_by_model(gradients, directions)
        for group in self.param_groups:
            ps = [p for p in group["params"] if p in directions]
            if not ps:
                continue
            d, lr = [directions[p] for p in ps], group["lr"]
            if self.kl_clip is not None or self.max_step is not None:
                factor = clip(lr, [gradients[p] for p in ps], d, self.kl_clip, self.max_step)
                d = foreach.scaled(d, factor) if factor < 1 else d
            if group["decoupled"] and group["weight_decay"]:
                foreach.scale_(ps, 1 - lr * group["weight_decay"])
            foreach.add_(ps, self._with_momentum(group, ps, d), alpha=-lr)
        return None

    def _move_by_model(self, gradients: dict, directions: dict) -> float:
        """delta = alpha d + mu delta_0 at the minimum of the quadratic model of the batch; its predicted change."""
        inputs, target = self._batch_of_step()
        with self._capture.muted():
            C = GGN(self.model, self._capture.loss, (inputs, target), output=self.output, seed=self.counters["steps"])
            zeros = {k: torch.zeros_like(p) for k, p in C.parameters.items()}
            product = lambda v: C @ (zeros | v)  # noqa: E731
            named = lambda by: {self.names[p]: t for p, t in by.items()}  # noqa: E731
            last = {self.names[p]: self.state[p]["last_step"] for p in directions if "last_step" in self.state[p]}
            shift = {self.names[p]: _total_damping(group) for group in self.param_groups for p in group["params"]}
            alpha, mu, predicted = quadratic_step(product, shift, named(gradients), named(directions), last or None)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p in directions):
                delta = directions[p] * alpha
                if "last_step" in self.state[p]:
                    delta.add_(self.state[p]["last_step"], alpha=mu)
                self.state[p]["last_step"] = delta
                p.add_(delta, alpha=group["lr"])
        return predicted

    def _batch_of_step(self) -> tuple[Any, Tensor]:
        if self._batch is None or self._batch[0] is None:
            raise RuntimeError("step_size='quadratic' evaluates the model on the step's batch, but none was seen whose "
                               "inputs are either all positional or all by name; use factor_interval=1 and call the "
                               "model and the loss before step().")  # fmt: skip
        return self._batch

    def _predicted(self, gradients: dict, before: list) -> float:
        """g . delta + delta . F delta / 2 for the step that was taken."""
        total = 0.0
        for p, value in before:
            block = self._blocks[self.names[p]]
            delta = p - value
            total += float((gradients[p] * delta).sum())
            total += float(block.quadratic(delta)) / 2 if block.kron is not None else 0.0
        return total

    def diagnostics(self) -> dict[str, Any]:
        """Counters; the last reduction ratio; and for each parameter its structure, damping, curvature (the mean
        eigenvalue of its block), failed inversions, and trust ratio (norm of momentum's step over the parameter's)."""
        found = self._layers()
        for group in self.param_groups:
            for p in group["params"]:
                moved = self.state[p].get("momentum_buffer") if p in self.state else None
                found[self.names[p]]["trust_ratio"] = (
                    None if moved is None else float(group["lr"] * moved.norm() / p.detach().norm())
                )
        return {"skipped_curvature": 0, **self.counters, "reduction_ratio": self._ratio,
                "damping": [group["damping"] for group in self.param_groups], "layers": found}  # fmt: skip


def _total_damping(group: Mapping[str, Any]) -> float:
    return group["damping"] + (0.0 if group["decoupled"] else group["weight_decay"])
