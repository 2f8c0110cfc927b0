"""K-BFGS and K-BFGS(L): Kronecker-factored quasi-Newton descent for deep networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches
from paraboloid.data.batches import Output
from paraboloid.distributed import collectives
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import Loss
from paraboloid.optim import foreach
from paraboloid.optim.acceptance import Trial
from paraboloid.optim.adam_length import AdamLength
from paraboloid.optim.base import Frame
from paraboloid.optim.bfgs import DenseInverse, LimitedMemoryInverse
from paraboloid.optim.closures import Closure, Evaluation
from paraboloid.optim.direction import Move, averaged, coupled_decay, descend
from paraboloid.optim.hooks import check_module
from paraboloid.optim.layer_means import Layer, Means, Readings
from paraboloid.optim.options import check_made, check_number, check_share
from paraboloid.optim.quasi_newton import LayerState, Together, learn
from paraboloid.optim.trust import Trust, check_rise
from paraboloid.passes import trees
from paraboloid.passes.random_state import isolated_with_gradients
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, check_max_factor

WARM_UP = 10  # batches whose plain mean A is without warm_start
KEPT = 0.95  # of the promised change, on the batch that chose the step: steps of Adam's length are far too short
LR, ADAMS = 0.3, 0.01  # the default, and what it is of Adam's learning rate where steps are grafted: 3e-3


class KBFGS(Frame):
    """W <- W - lr Hg M Ha for each layer, with BFGS inverses Hg of the outputs' curvature and Ha of A = E[abar abar^T].

        opt = pb.optim.KBFGS(model, loss_fn)          # or the paper's step: lr=0.3, damping=0.3
        opt.warm_start(loader)
        for x, y in loader:
            def closure():
                opt.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss
            opt.step(closure)

    W = [weight, bias] has the bias as its last column, abar = [a; 1] are the layer's inputs, M <- momentum M +
    (1 - momentum) (gradient + weight_decay W), without bias correction.  Every step evaluates the closure twice on its
    batch: the change of the mean pre-activations, s, and of their mean gradients, y, is averaged with `decay`, doubly
    damped, and updates Hg; A is averaged with `decay`, and its action on the mean input updates Ha.  Everything is read
    from the closure, so it may return any multiple or sum of losses; its second call replays the first one's random
    state, and leaves gradients and running statistics as the first one did.

    model         its linear layers and convolutions without groups are such layers, at one position or many, and
                  whatever a rule of `paraboloid.layers` calls a `matrix`
    loss_fn, output  of other optimisers' interface: the closure evaluates both, and `warm_start` the model alone
    damping       lambda: sqrt(lambda T) is added to A, and mu_2 = sqrt(lambda / T) in the second damping of (s, y), for
                  T positions
    params        parameters of the model, or torch's groups (options lr, damping, weight_decay); default: all
    all_reduce    "auto": over the ranks of a DistributedDataParallel model; or as in `pb.statistics`

    Other parameters (norms, embeddings, grouped convolutions, weights used in several ways) take the step -lr M (as
    long as Adam's, where steps are grafted), with the identity for both inverses; `diagnostics` says which.  Without
    `warm_start` the first 10 batches make A, with a warning.  A step with NaN or infinite gradients is skipped, see
    `KFAC`; one whose second evaluation is not finite leaves Hg as it was.

    lr, graft     without an lr of your own each parameter's step is as long as Adam's with lr / 100 (graft="adam"): the
                  default .3 is Adam's 3e-3, and up to four times that while steps keep what they promise.  With one
                  it is the paper's step (graft=None); either may be said
    paper         True: the paper's step and lr .3, and nothing is watched (graft=None, rise_factor=None)
    rise_factor   a step after which its batch's loss is that many times as high is taken back, and the next ones are
                  shorter (see `Trust`); None: the paper's step, whatever comes of it

    max_factor    a layer with a longer side (a head over a large vocabulary) is one of these others, said once

    Raises ValueError without a closure and for options out of range, RuntimeError for a closure that leaves no
    gradient or a changed model.
    Sources: Goldfarb, Ren & Bahamou 2020, arXiv:2006.08877, algorithm 2; Ren, Bahamou & Goldfarb 2021,
    arXiv:2102.06737.
    """

    OPTIONS = ("rise_factor", "max_factor", "graft", "paper")
    OLDER: Mapping[str, Any] = {**Frame.OLDER, "graft": None}

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss | None = None,
        *,
        lr: float | None = None,
        damping: float = 0.3,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 1e-5,
        graft: str | None = "auto",
        rise_factor: float | None = 2.0,
        paper: bool = False,
        max_factor: int = MAX_FACTOR,
        params: Iterable[Any] | None = None,
        all_reduce: Any = "auto",
        output: Output | None = None,
        **options: Any,
    ):
        loss_fn = check_made(type(self).__name__, model, loss_fn, options)
        check_module(model)
        check_choice("graft", graft, ("auto", "adam", None))
        automatic = "adam" if lr is None and not paper else None
        self.graft = automatic if graft == "auto" else graft
        lr = LR if lr is None else lr
        defaults = {"lr": check_number("lr", lr, 0), "damping": check_number("damping", damping, 0, above=True),
                    "momentum": check_share("momentum", momentum), "decay": check_share("decay", decay),
                    "weight_decay": check_number("weight_decay", weight_decay, 0)}  # fmt: skip
        super().__init__(model, defaults, params, 0, all_reduce)
        self.loss_fn, self.paper = loss_fn, paper
        self.rise_factor = None if paper else check_rise(rise_factor)
        self.max_factor, self._said, self._read_of = check_max_factor(max_factor), False, 0
        self._compose()
        self._layers_found: dict[str, LayerState] = {}
        self._readings: Readings | None = None
        self._together: dict[Any, tuple[list[str], Together]] = {}
        self._warm = 0  # batches that made A so far; -1 after warm_start
        self.counters["second_not_finite"] = 0

    def _compose(self) -> None:
        super()._compose()
        self._length = AdamLength(ADAMS)

    def _short(self) -> float | None:
        return None if self.graft is None else KEPT

    def _inverse(self, p: int, like: Tensor) -> DenseInverse | LimitedMemoryInverse:
        return DenseInverse(p, like)

    # --- reading -------------------------------------------------------------------------------------------------

    def _short_enough(self) -> dict[str, Tensor]:
        """Parameters whose layer may have inverses [p, p] and [q, q]."""
        longest = {name: max(len(p), p[0].numel()) if p.dim() > 1 else 0 for p, name in self.names.items()}
        long = [name for name, rows in longest.items() if rows > self.max_factor]
        if long and not self._said:
            self._said = True
            warnings.warn(
                f"the weights {long} have a side of {max(longest.values())} rows, longer than max_factor="
                f"{self.max_factor}: they take the momentum's step, with the identity for both inverses.", stacklevel=5,
            )  # fmt: skip
        return {name: p for p, name in self.names.items() if name not in long}

    def _read(self) -> Readings:
        """Ready for a step.  Raises RuntimeError where the model changed."""
        readings = self._readings
        if readings is None or self._read_of < len(self.names) or not readings.tree.is_unchanged():
            self._check_model(trees.parameters(self.model))
            self._read_of = len(self.names)
            self._readings = readings = Readings(self.model, self._short_enough())
        else:
            readings.begin()
        return readings

    def _groups(self) -> dict[str, dict[str, Any]]:
        """Each parameter's group as it is now: schedules and loaded states change them."""
        return {self.names[p]: group for group in self.param_groups for p in group["params"]}

    def _state_of(self, layer: Layer, mean: Means, groups: dict[str, Any]) -> LayerState | None:
        """The layer's state; made when it is first seen.  None for one whose bias lies in another group."""
        if layer.weight not in self._layers_found:
            if layer.bias is not None and groups[layer.bias] is not groups[layer.weight]:
                return None
            p, like = len(mean.outputs), mean.outputs
            self._layers_found[layer.weight] = LayerState(layer, self._inverse(p, like), p, like)
        return self._layers_found[layer.weight]

    @torch.no_grad()
    def warm_start(self, loader: Any) -> None:
        """A of every layer as the unweighted mean over a loader's batches at the present parameters, one forward pass
        each, and Ha its damped inverse.  Call it before the first step.  Raises ValueError for an empty loader."""
        sums: dict[str, Any] = {}
        count, groups = 0, self._groups()
        for inputs, _ in batches.batches(loader):
            readings = self._read()
            with isolated_with_gradients(self.model, self.device, count), readings.evaluation(True):
                batches.run(self.model, inputs)
            count += 1
            for name, mean in readings.means(self._group).items():
                state = self._state_of(readings.layers[name], mean, groups)
                if state is not None:
                    total = sums.setdefault(name, [torch.zeros_like(mean.A), mean.positions])
                    total[0] += mean.A
        for name, (A, positions) in sums.items():
            self._layers_found[name].start(A / count, positions, groups[name]["damping"])
        self._warm = -1

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss at the parameters before it."""
        if closure is None:
            raise ValueError(
                f"{type(self).__name__} evaluates the loss twice on one batch; expected step(closure) with a "
                "closure that clears the gradients, evaluates the loss, calls backward() and returns it."
            )
        readings = self._read()
        with readings.evaluation(moments=True):
            first = Evaluation(closure, self.model, self.names, readings.tree.modules)
        if (moves := self._moves(self._group is not None or math.isfinite(first.value))) is None:
            return first.loss
        before, groups = readings.means(self._group), self._groups()
        self._check_backward(readings, before)
        self._learn_inputs(readings, before, groups)
        trial = None if self.trust is None else Trial(moves)
        for m in moves:
            coupled_decay(m)
            averaged(m)
            if self.graft is not None:
                self._length.measure(m)
            self._precondition(m, before)
            if self.graft is not None:
                self._length(m)
            descend(m)
        after = self._evaluate_again(first, readings, trial)
        self._update(before, after or {}, groups)
        self.counters["steps"] += 1
        return first.loss

    def _update(self, before: dict[str, Means], after: dict[str, Means], groups: dict[str, Any]) -> None:
        """Both inverses of the layers that the step reached."""
        ready = [name for name, state in self._layers_found.items() if name in before and state.Ha is not None]
        kinds: dict[Any, list[str]] = {}
        for name in ready:
            kinds.setdefault((self._layers_found[name].s.dtype, name in after), []).append(name)
        for kind, names in kinds.items():
            known = self._together.get(kind)
            if known is None or known[0] != names:
                known = self._together[kind] = names, Together([self._layers_found[name] for name in names])
            known[1].update(
                [before[name] for name in names], [after[name] for name in names] if kind[1] else None,
                [groups[name]["damping"] for name in names], [groups[name]["decay"] for name in names],
            )  # fmt: skip

    def _check_backward(self, readings: Readings, means: dict[str, Any]) -> None:
        if means and all(readings.found[name].gradients is None for name in means):
            raise RuntimeError("the closure's backward pass reached none of the model's layers; expected it to "
                               "evaluate the model and call backward() on the loss.")  # fmt: skip

    def _learn_inputs(self, readings: Readings, means: dict[str, Means], groups: dict[str, Any]) -> None:
        """A, and Ha anew as long as there was no warm start."""
        if self._warm == 0:
            warnings.warn(
                f"{type(self).__name__} was not warmed up; its first {WARM_UP} batches make A. Call "
                "warm_start(loader) before the first step to use all of the data.", stacklevel=5,
            )  # fmt: skip
        warming, learning = 0 <= self._warm < WARM_UP, list[tuple[LayerState, Means, float]]()
        for name, mean in means.items():
            state = self._state_of(readings.layers[name], mean, groups)
            if state is None:
                continue
            group = groups[name]
            if state.A is None or warming:
                share = 1 / (self._warm + 1) if state.A is not None else 1.0
                A = mean.A if state.A is None else state.A.lerp(mean.A, share)
                state.start(A, mean.positions, group["damping"])
            elif self.counters["steps"]:
                learning.append((state, mean, 1 - group["decay"]))
        if learning:
            learn(*zip(*learning, strict=True))
        if warming:
            self._warm += 1

    def _precondition(self, m: Move, means: dict[str, Any]) -> None:
        """Hg M Ha for the layers, M itself for other parameters."""
        place = {name: i for i, name in enumerate(m.names)}
        for name, i in place.items():
            state = self._layers_found.get(name)
            if state is None or name not in means or state.Ha is None:
                continue
            weight, bias, flip = m.params[i], state.layer.bias, state.layer.flip
            M = m.direction[i]
            M = M.T if flip else M if M.dim() == 2 else M.flatten(1)
            if bias is not None:
                b = m.direction[place[bias]] if bias in place else M.new_zeros(len(M))  # without a gradient: forces
                M = torch.cat([M, b.unsqueeze(1)], 1)
            D = state.direction(M if M.dtype == state.s.dtype else M.to(state.s.dtype))
            D = D if D.dtype == weight.dtype else D.to(weight.dtype)
            if bias is not None:
                if bias in place:
                    m.direction[place[bias]] = D[:, -1]
                D = D[:, :-1]
            m.direction[i] = D.T if flip else D.reshape(weight.shape) if weight.dim() != 2 else D

    def _evaluate_again(self, first: Evaluation, readings: Readings, trial: Trial | None) -> dict[str, Means] | None:
        """The means at the new parameters, on the same batch; None where they are not finite.  With a trial, a step
        that raised the loss too much is taken back."""
        with readings.evaluation(moments=False):
            loss = first.again()
        after = readings.means(self._group)
        finite = math.isfinite(loss) and foreach.finite([t for m in after.values() for t in (m.outputs, m.gradients)])
        if self._group is not None:
            finite = collectives.everywhere(torch.tensor(finite, device=self.device), self._group)
        if not finite and self.trust is None and not self.counters["second_not_finite"]:
            warnings.warn(f"step {self.counters['steps'] + 1} led to a loss of {loss:.3g} or to values that are NaN or "
                          "infinite, and stays: rise_factor is None. Give a rise_factor, or a smaller lr; further such "
                          "steps are only counted, see diagnostics()['second_not_finite'].", stacklevel=4)  # fmt: skip
        self.counters["second_not_finite"] += not finite
        if trial is not None and self.trust is not None:
            self.trust.slope = trial.slope()
            self._judge(first, loss if finite else math.nan, trial, self.trust)
        return after if finite else None

    def _judge(self, first: Evaluation, loss: float, trial: Trial, trust: Trust) -> None:
        """Take the step back where the loss of its batch rose beyond the factor, and shorten the next ones."""
        start, loss = (collectives.mean(value, self._group, self.device) for value in (first.value, loss))
        if trust.rises(loss, than=start):
            trial.take_back()
            self._distrust("taken_back", f"step {self.counters['steps'] + 1} raised the loss of its batch from "
                           f"{start:.4g} to {loss:.4g}")  # fmt: skip
        elif trust.overshoots(loss - start):
            self._distrust("overshot", f"the batches' losses rose in the steps before {self.counters['steps'] + 2}")
        else:
            trust.grow()
        trust.note(start)

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"warm": self._warm, "layers": {
            name: {"bias": s.layer.bias, "flip": s.layer.flip, "A": s.A, "Ha": s.Ha, "s": s.s.clone(),
                   "y": s.y.clone(),
                   "Hg": dict(s.Hg.state), "positions": s.positions, "counts": dict(s.counts)}
            for name, s in self._layers_found.items()
        }}  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self._warm, self._layers_found, self._together = state["warm"], {}, {}
        for name, kept in state["layers"].items():
            p = len(kept["s"])
            layer = LayerState(Layer(name, kept["bias"], kept["flip"]), self._inverse(p, kept["s"]), p, kept["s"])
            layer.A, layer.Ha, layer.s, layer.y = kept["A"], kept["Ha"], kept["s"], kept["y"]
            layer.positions, layer.counts = kept["positions"], dict(kept["counts"])
            layer.Hg.load(kept["Hg"])
            self._layers_found[name] = layer

    def diagnostics(self) -> dict[str, Any]:
        """Counters, and for each parameter its structure ("quasi-newton", or "identity" for other parameters); for
        layers also the damping, the last curvature s . y / s . s, updates of Hg and updates that a gate skipped."""
        found: dict[str, Any] = {name: {"structure": "identity"} for name in self.names.values()}
        groups = self._groups()
        for name, state in self._layers_found.items():
            ss = float(state.s.square().sum())
            layer = {"structure": "quasi-newton", "damping": groups[name]["damping"],
                     "positions": state.positions,
                     "curvature": float((state.s * state.y).sum()) / ss if ss else None, **state.counts}  # fmt: skip
            found[name] = layer
            if state.layer.bias is not None:
                found[state.layer.bias] = layer
        return {**super().diagnostics(), "layers": found}


class KBFGSL(KBFGS):
    """`KBFGS` with Hg by its last `memory` pairs in compact form, never as a matrix; Ha stays a matrix.

    Everything else is as in `KBFGS`.  Source: arXiv:2006.08877, section 4.
    """

    OPTIONS = (*KBFGS.OPTIONS, "memory")

    def __init__(self, model: nn.Module, loss_fn: nn.Module | Loss | None = None, *, memory: int = 100, **options: Any):
        self.memory = check_count("memory", memory)
        super().__init__(model, loss_fn, **options)

    def _inverse(self, p: int, like: Tensor) -> LimitedMemoryInverse:
        return LimitedMemoryInverse(p, self.memory, like)
