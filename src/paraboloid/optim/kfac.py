"""Natural-gradient descent with Kronecker-factored curvature: KFAC, and EKFAC with exact eigenvalues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output, batches
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import Loss
from paraboloid.operators import GGN
from paraboloid.optim import direction, foreach
from paraboloid.optim.acceptance import Trial, adapted, quadratic_step, reduction_ratio
from paraboloid.optim.base import Frame
from paraboloid.optim.closures import Closure, Evaluation
from paraboloid.optim.curvature import FisherCurvature
from paraboloid.optim.direction import AUTO, SHARE, Move, Part
from paraboloid.optim.measurement import Measurement
from paraboloid.optim.options import check_made, check_number, check_samplable, group_defaults, of_paper, rate
from paraboloid.optim.trust import check_rise
from paraboloid.reductions.kronecker_factors import MAX_FACTOR

OMEGA = 19 / 20  # of the damping, to the power of its interval
NOT_BOTH = ("expected one of the two, for the other data's eigenvalues are measured with plain factors, which those of "
            "the least divergence are not.")  # fmt: skip


class KFAC(Frame):
    """theta <- theta - lr (F + damping I)^-1 g with a Kronecker-factored Fisher information F, block by block.

        opt = pb.optim.KFAC(model, loss_fn)
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
    paper             True: the paper's constants for all that is left at its default.  KFAC's: damping 150, adapted,
                      steps by the quadratic model with lr 1, factors in every step, inverses every 20, no clip, nothing
                      watched; it needs step(closure).  EKFAC's: eigenvalues in every step, no clip (its learning rate
                      and damping came from a grid: give yours)
    fisher, samples   "mc" (labels sampled from the model), "exact" or "empirical"
    sharing           "expand" or "reduce", for weights used at several positions
    factors           "kfac", or "kl": those nearest to the Fisher block in Kullback-Leibler divergence, by fixed-point
                      steps: every vector weighs as much as the last damped inverse of the other factor says.  Not with
                      measure_on, whose eigenvalues are those of plain factors
    split             "pi": damping is split between the two factors, two inverses; None: exact, by eigendecomposition
    adapt_damping     Levenberg-Marquardt: every `damping_interval` steps, by the ratio of the loss's change to the
                      model's prediction.  Needs step(closure)
    reject            a step that raises the loss is taken back.  Needs step(closure), which is called twice
    kl_clip, max_step trust regions: lr^2 d . g <= kl_clip, and lr ||d|| <= max_step.  kl_clip="auto": 3e-4 times the
                      size of the loss, 1.5e-4 for EKFAC
    graft             each parameter's step gets the length of "sgd" or "adam"
    step_size         "fixed", or "quadratic": step length and momentum minimise the quadratic model with the exact
                      GGN of the batch, at about four more gradients; lr=1 takes that step as it is
    measure_on        "half": eigenvectors from the first half of each batch, eigenvalues from the second (debiased;
                      needs exact damping, and sets split=None).  Directions that the first half does not see have
                      no eigenvectors of their own: these share their mean.  Or step(measure_on=batch) gives other
                      data for that
    max_factor        a Kronecker side with more rows (over a large vocabulary) is kept as its diagonal, said once
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
    clip_share = SHARE
    OLDER: Mapping[str, Any] = {**Frame.OLDER, "factors": "kfac"}
    PAPER: Mapping[str, Any] = {
        "lr": 1.0, "damping": 150.0, "factor_interval": 1, "inverse_interval": 20, "adapt_damping": True,
        "step_size": "quadratic", "kl_clip": None,
    }  # fmt: skip
    OPTIONS = ("fisher", "samples", "sharing", "factor_decay", "factor_interval", "inverse_interval", "split",
               "factors", "max_factor", "adapt_damping", "damping_interval", "reject", "kl_clip", "max_step",
               "rise_factor", "graft", "step_size", "half", "paper")  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss | None = None,
        *,
        lr: float = 0.1,
        damping: float = 0.1,
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
        factors: str = "kfac",
        split: str | None = "pi",
        adapt_damping: bool = False,
        damping_interval: int = 5,
        reject: bool = False,
        kl_clip: float | str | None = AUTO,
        max_step: float | None = None,
        rise_factor: float | None = 2.0,
        paper: bool = False,
        graft: str | None = None,
        step_size: str = "fixed",
        measure_on: str | None = None,
        max_factor: int = MAX_FACTOR,
        seed: int = 0,
        verify: str | bool = "auto",
        max_memory: int | None = None,
        all_reduce: Any = "auto",
        output: Output | None = None,
        **options: Any,
    ):
        loss_fn = check_made(type(self).__name__, model, loss_fn, options)
        given = {"lr": lr, "damping": damping, "factor_interval": factor_interval, "inverse_interval": inverse_interval,
                 "adapt_damping": adapt_damping, "step_size": step_size, "kl_clip": kl_clip}  # fmt: skip
        o = of_paper(KFAC.__init__, self.PAPER, given) if paper else given
        lr, damping, adapt_damping, step_size, kl_clip = (
            o[name] for name in ("lr", "damping", "adapt_damping", "step_size", "kl_clip")
        )
        check_number("damping", damping, 0, above=True)
        check_choice("split", split, (None, "pi"))
        check_choice("step_size", step_size, ("fixed", "quadratic"))
        check_choice("measure_on", measure_on, (None, "half"))
        check_choice("factors", factors, ("kfac", "kl"))
        if factors == "kl" and measure_on is not None:
            raise ValueError(f"measure_on is {measure_on!r} with factors='kl'; {NOT_BOTH}")
        self.fisher, self.samples, self.sharing, self.factor_decay = fisher, samples, sharing, factor_decay
        self.factor_interval, self.inverse_interval, self.paper = o["factor_interval"], o["inverse_interval"], paper
        self.factors = factors
        self.split, self.half = split == "pi" and measure_on is None and not self.exact_values, measure_on == "half"
        self.adapt_damping, self.damping_interval = adapt_damping, check_count("damping_interval", damping_interval)
        self.reject, self.kl_clip, self.max_step = reject, kl_clip, max_step
        self.rise_factor = None if kl_clip is None else check_rise(rise_factor)
        self.graft, self.step_size, self.max_factor = graft, step_size, max_factor
        defaults = group_defaults(lr, momentum, nesterov, weight_decay, decoupled, damping)
        super().__init__(model, defaults, params, seed, all_reduce)
        self._ratio: float | None = None
        self._compose()
        check_samplable(Loss.from_torch(loss_fn), fisher)
        self._measured = Measurement(self, loss_fn, verify=verify, max_memory=max_memory, output=output)

    def _compose(self) -> None:
        super()._compose()
        self._curvature = FisherCurvature(
            self.names.values(), fisher=self.fisher, samples=self.samples, sharing=self.sharing,
            decay=self.factor_decay, factor_interval=self.factor_interval, inverse_interval=self.inverse_interval,
            split=self.split, half=self.half, exact=self.exact_values, max_factor=self.max_factor,
            alone=self._group is None, kl=self.factors == "kl",
        )  # fmt: skip
        self._blocks = self._curvature.blocks
        shape: list[Part] = [direction.coupled_decay, self._curvature.precondition, direction.Graft(self.graft)]
        clip = direction.TrustRegion(self.kl_clip, self.max_step, self.clip_share)
        move: list[Part] = [clip, direction.decoupled_decay, direction.momentum, direction.descend]
        self._parts = shape if self.step_size == "quadratic" else shape + move

    def _added(self, names: Iterable[str]) -> None:
        self._curvature.add(names)

    # --- measuring, while the loss is called ---------------------------------------------------------------------

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Tell the optimiser the output and target of a loss computed by a function; before ``backward()``."""
        self._measured.observe(output, target)

    def remove(self) -> None:
        """Take the optimiser's hooks off the model and the loss."""
        self._measured.remove()

    def warm_start(self, loader: Any) -> None:
        """Measure the factors on every batch of a loader at the present parameters, before the first step: their plain
        mean over the batches is what the averages begin with.  Raises ValueError for an empty loader."""
        self._curvature.warm_start(self._measured, batches(loader))

    def _wanted(self) -> bool:
        return self._curvature.factors_due(self.counters["steps"]) or self.step_size == "quadratic"

    def _renew(self) -> None:
        self._curvature.stale = True

    def _forget(self) -> None:
        self._measured.forget()

    def _unwatched(self) -> AbstractContextManager[Any]:
        return self._measured.muted()

    def _keeps_batches(self) -> bool:
        return self.step_size == "quadratic"

    def _quantities(self) -> list[Any]:
        return self._curvature.quantities(self.counters["steps"])

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None, measure_on: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss, if one was given.

        measure_on  another batch, on which the eigenvalues are measured in steps that measure factors
        """
        if closure is None and (self.adapt_damping or self.reject):
            raise ValueError("adapt_damping and reject compare the loss before and after the step; expected "
                             "step(closure) with a closure that evaluates the loss and calls backward().")  # fmt: skip
        if measure_on is not None and self.factors == "kl":
            raise ValueError(f"step(measure_on=) of a {type(self).__name__} with factors='kl'; {NOT_BOTH}")
        if measure_on is not None and self.split:
            raise ValueError("measure_on= measures eigenvalues, which split='pi' does not use; expected a "
                             f"{type(self).__name__} made with split=None.")  # fmt: skip
        first = self._evaluated(closure)
        try:
            first = self._judged(first, self._measured.loss_seen if first is None else first.value)
            if (moves := self._moves(not self._measured.nonfinite)) is None:
                self._lose()
            elif self._begin(moves):
                self._curvature.update(self.counters["steps"], self._measured, self._dampings(), measure_on)
                self._take(moves, first)
                self._end(moves)
                self.counters["steps"] += 1
        finally:
            self._measured.forget()
        return None if first is None else first.loss

    def _take(self, moves: list[Move], first: Evaluation | None) -> None:
        adapt = self.adapt_damping and (self.counters["steps"] + 1) % self.damping_interval == 0
        trial = Trial(moves) if adapt or self.reject else None
        for m in moves:
            for part in self._parts:
                part(m)
        predicted = self._move_by_model(moves) if self.step_size == "quadratic" else None
        if trial is None or first is None:
            return
        with self._measured.muted():
            after = first.again()
        if adapt:
            predicted = trial.predicted(self._curvature.quadratic) if predicted is None else predicted
            self._ratio = reduction_ratio(after - first.value, predicted)
            factor = OMEGA**self.damping_interval
            for group in self.param_groups:
                damping = group["damping"]
                group["damping"] = adapted(damping, self._ratio, damping * factor, damping / factor)
        if self.reject and not after <= first.value:
            self.counters["rejected"] += 1
            trial.take_back()

    def _move_by_model(self, moves: list[Move]) -> float:
        """delta = alpha d + mu delta_0 at the minimum of the quadratic model of the batch; its predicted change."""
        batches = self._measured.batches
        if not batches or None in batches:
            raise RuntimeError("step_size='quadratic' evaluates the model on the step's batch, but none was seen, or "
                               "one whose inputs are neither all positional nor all by name, or a loss of several "
                               "passes of the model; call the model and then the loss before step().")  # fmt: skip
        started = any("last_step" in state for m in moves for state in m.states)
        with self._measured.muted():
            data = batches[0] if len(batches) == 1 else batches
            C = GGN(self.model, self._measured.loss, data, output=self._measured.output, seed=self.counters["steps"])
            zeros = {k: torch.zeros_like(p) for k, p in C.parameters.items()}
            last = _named((m, m.kept("last_step")) for m in moves) if started else None
            alpha, mu, predicted = quadratic_step(
                lambda v: C @ (zeros | v), self._dampings(), _named((m, m.gradient) for m in moves),
                _named((m, m.direction) for m in moves), last,
            )  # fmt: skip
        for m in moves:
            step = foreach.scaled(m.direction, alpha)
            if started:
                foreach.add_(step, m.kept("last_step"), alpha=mu)
            for state, delta in zip(m.states, step, strict=True):
                state["last_step"] = delta
            foreach.add_(m.params, step, alpha=rate(m.group) * m.rate)
        return predicted

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"blocks": self._curvature.state(), "ratio": self._ratio, "new": self._curvature.new,
                "stale": self._curvature.stale}  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self._curvature.load(state["blocks"])
        self._ratio, self._curvature.new = state.get("ratio"), state.get("new", False)
        self._curvature.stale = state.get("stale", False)

    def diagnostics(self) -> dict[str, Any]:
        """Counters; the last reduction ratio; and for each parameter its structure, damping, curvature (the mean
        eigenvalue of its block), failed inversions, and trust ratio (norm of momentum's step over the parameter's)."""
        found = self._curvature.diagnostics({name: p.numel() for p, name in self.names.items()})
        for group in self.param_groups:
            for p in group["params"]:
                moved = self.state[p].get("momentum_buffer") if p in self.state else None
                found[self.names[p]]["trust_ratio"] = (
                    None if moved is None else float(rate(group) * moved.norm() / p.detach().norm())
                )
        return {"skipped_curvature": 0, **super().diagnostics(), "reduction_ratio": self._ratio,
                "damping": [group["damping"] for group in self.param_groups], "layers": found}  # fmt: skip


def _named(lists: Iterable[tuple[Move, list[Tensor]]]) -> dict[str, Tensor]:
    return {name: t for m, tensors in lists for name, t in zip(m.names, tensors, strict=True)}


class EKFAC(KFAC):
    """`KFAC` with exact eigenvalues along the eigenvectors of its factors:

        theta <- theta - lr U (S + damping)^-1 U^T g

    S are running averages of a sum_{v,n} (u . (J_n^T v) w)^2, measured in every step that measures factors; when the
    eigenvectors are renewed, S is carried over: the diagonal of the old matrix in the new basis.  Damping is exact, so
    `split` has no effect.  With several passes in a step that renews eigenvectors (gradient accumulation), all their
    layer inputs and gradients are kept until then.  Everything else is as in `KFAC`.

    Source: George et al. 2018, arXiv:1806.03884.
    """

    exact_values = True
    clip_share = SHARE / 2  # exact damping takes longer steps than the split one where the batch saw no curvature
    PAPER: Mapping[str, Any] = {"factor_interval": 1, "kl_clip": None}
