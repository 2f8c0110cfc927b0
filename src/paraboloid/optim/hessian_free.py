"""Hessian-free optimisation: truncated conjugate gradients on the batch's quadratic, debiased if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches
from paraboloid.data.batches import Output
from paraboloid.linalg.measured_cg import measured_iterates
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import Loss
from paraboloid.operators.partition import Blocks, resolve_blocks
from paraboloid.optim.acceptance import adapted, reduction_ratio
from paraboloid.optim.base import Frame
from paraboloid.optim.options import check_made, check_number, check_share, of_paper
from paraboloid.optim.trust import go_back, remember
from paraboloid.passes import trees
from paraboloid.passes.random_state import isolated, seeded
from paraboloid.passes.wrappers import unwrapped
from paraboloid.quadratics.local_model import CURVATURES, Quadratic, quadratic
from paraboloid.quantities.door import statistics

RAISE, LOWER = 3 / 2, 2 / 3  # of the damping
AGAIN = 4.0  # of the damping, after a step that another batch took back
ARMIJO, SHRINK, TRIES = 1e-2, 0.8, 60
ALONE = "HessianFree evaluates the model itself, many times in a step."
POWER = 0.75  # of Martens' preconditioner


def _wide(t: Tensor) -> Tensor:
    """In float32 where weights are in half precision, as operators compute."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _mark(theta: Tensor) -> float:
    """By which parameters are known again."""
    return float(theta.double().sum())


class HessianFree(Frame):
    """theta <- theta + lr p, with p from conjugate gradients on (C + damping I) p = -g for the batch that is given.

        opt = pb.optim.HessianFree(model, loss_fn, curvature="ggn", damping=1.0)
        for batch in loader:
            opt.step(batch)                          # or opt.step(batch, measure_on=other_batch)

    debias          the batch in two folds: search directions from the first, step lengths, line search and damping from
                    the second.  On the batch that chose a direction its curvature is overestimated, its slope too.
                    `measure_on=` gives another batch for that; the same batch gives the plain step
    curvature       "ggn", "hessian" (where the curvature along a direction is not positive the iteration ends) or
                    "fisher"
    blocks          "all", or only C's diagonal blocks of each "layer", each "parameter" or lists of names: the exact
                    layer-wise Gauss-Newton step, whose product costs up to a product for each block
    max_iterations  of conjugate gradients, which also stop by Martens' rule with `progress`
    backtrack       go back to an earlier iterate as long as the loss is lower there
    line_search     shorten the step until the loss falls enough (Armijo, 1e-2); a step that never does is rejected
    adapt_damping   Levenberg-Marquardt: 2/3 of the damping where the loss falls by more than 3/4 of what the quadratic
                    predicts, 3/2 of it below 1/4
    warm_start      start from this multiple of the last step's direction; "momentum" in the groups, which cyclic
                    schedules (OneCycleLR, CyclicLR) move
    preconditioner  None, or "second_moment": (mean_n g_n^2 + damping + weight_decay)^(3/4), elementwise
    judge           the loss of the next batch, before and after the last step, says whether that step stays: one that
                    only the batch that chose it liked is taken back, and the damping is four times as high
    paper           True: warm_start .95 and the preconditioner, and steps are not judged by other batches
    params          parameters of the model, or torch's groups with their own lr and weight_decay; default: all.  The
                    damping is that of the first group
    seed            of dropout masks, which are the same in all evaluations of a step
    output, max_memory: as in `pb.quadratic`

    A step makes about 2 gradients for each iteration, one for the gradient, and a forward pass for each evaluation of
    the loss (two of them to judge the last one); measured on another batch, twice the iterations' cost.  Batch norm in
    training mode is accepted as `pb.GGN` accepts it, but not with the preconditioner, whose gradients are those of
    single samples.  NaN and infinite losses or gradients skip the step, see `KFAC`.

    Raises ValueError for options out of range, for something that is no batch, and for a model on several ranks.
    Sources: Martens 2010, Deep learning via Hessian-free optimization; Martens & Sutskever 2012; debiasing:
    Tatzel et al. 2024, arXiv:2410.14325.
    """

    OPTIONS = ("curvature", "blocks", "debias", "seed", "max_iterations", "progress", "backtrack", "line_search",
               "adapt_damping", "warm_start", "preconditioner", "judge", "paper")  # fmt: skip
    OLDER: Mapping[str, Any] = {**Frame.OLDER, "judge": False, "paper": False}
    PAPER: Mapping[str, Any] = {"warm_start": 0.95, "preconditioner": "second_moment", "judge": False}

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss | None = None,
        *,
        curvature: str = "ggn",
        damping: float = 1.0,
        debias: bool = False,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        blocks: Blocks = "all",
        max_iterations: int = 250,
        progress: float = 5e-4,
        backtrack: bool = True,
        line_search: bool = True,
        adapt_damping: bool = True,
        warm_start: float = 0.0,
        preconditioner: str | None = None,
        judge: bool = True,
        paper: bool = False,
        params: Iterable[Any] | None = None,
        seed: int = 0,
        output: Output | None = None,
        max_memory: int | None = None,
        **options: Any,
    ):
        loss_fn = check_made(type(self).__name__, model, loss_fn, options)
        given = {"warm_start": warm_start, "preconditioner": preconditioner, "judge": judge}
        o = of_paper(HessianFree.__init__, self.PAPER, given) if paper else given
        warm_start, preconditioner, self.judge, self.paper = o["warm_start"], o["preconditioner"], o["judge"], paper
        check_choice("curvature", curvature, list(CURVATURES))
        check_choice("preconditioner", preconditioner, (None, "second_moment"))
        defaults = {"lr": check_number("lr", lr, 0), "damping": check_number("damping", damping, 0),
                    "weight_decay": check_number("weight_decay", weight_decay, 0),
                    "momentum": check_share("warm_start", warm_start)}  # fmt: skip
        resolve_blocks(trees.parameters(model), blocks)
        self.curvature, self.blocks, self.debias, self.seed = curvature, blocks, debias, seed
        self.max_iterations = check_count("max_iterations", max_iterations)
        self.progress = check_number("progress", progress, 0, above=True)
        self.backtrack, self.line_search, self.adapt_damping = backtrack, line_search, adapt_damping
        self.warm_start, self.preconditioner = warm_start, preconditioner
        self.output, self.max_memory = output, max_memory
        super().__init__(model, defaults, params, seed)
        if self._group is not None and (ranks := torch.distributed.get_world_size(self._group)) > 1:
            raise ValueError(f"the model is a DistributedDataParallel one over {ranks} ranks; expected a model on one: "
                             "HessianFree steps by its own rank's batch, and ranks would drift apart. Use KFAC, EKFAC "
                             "or KBFGS there.")  # fmt: skip
        self.counters["taken_back"] = 0
        self._left_at: float | None = None  # see `_mark`
        self._found: dict[str, Any] | None = None  # the model's parameters, during a step
        self.loss = Loss.from_torch(loss_fn)
        self._last: dict[str, Any] = {"iterations": 0, "reduction_ratio": None, "rate": None, "iterate": None}

    # --- vectors over all trainable parameters -------------------------------------------------------------------

    def _all(self) -> dict[str, Any]:
        """The model's parameters by name; looked up once in a step."""
        return trees.parameters(self.model) if self._found is None else self._found

    def _by_group(self, option: str | None) -> Tensor:
        """An option of the groups as a flat vector; None: 1 for the optimiser's parameters, 0 for others."""
        parameters = self._all()
        self._check_model(parameters)
        if len(self.param_groups) == 1 and len(self.names) == len(parameters):
            return torch.full_like(self._vector(), 1.0 if option is None else float(self.param_groups[0][option]))
        values = {
            self.names[p]: torch.full_like(p, 1.0 if option is None else float(group[option]))
            for group in self.param_groups for p in group["params"] if self.names[p] in parameters
        }  # fmt: skip
        return _wide(trees.flatten({k: values.get(k, torch.zeros_like(p)) for k, p in parameters.items()}, parameters))

    def _vector(self) -> Tensor:
        parameters = self._all()
        return _wide(trees.flatten({k: p.detach() for k, p in parameters.items()}, parameters))

    def _write(self, theta: Tensor) -> None:
        for p, value in self._pieces(theta):
            p.copy_(value)

    def _pieces(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        values = trees.unflatten(flat, self._all())
        return [(p, values[name]) for p, name in self.names.items() if name in values]

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: Any = None, measure_on: Any = None, *, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the loss of the batch that measures, before the step, without weight decay.

        batch       (inputs, targets), or a dict with "labels"
        measure_on  another batch: directions from `batch`, step lengths, line search and damping from this one
        """
        if closure is not None or callable(batch):
            raise ValueError(f"step got a closure; expected a batch (inputs, targets), or a dict with 'labels': "
                             f"{ALONE} In Lightning, set self.automatic_optimization = False and call "
                             "self.optimizers().optimizer.step(batch) in training_step.")  # fmt: skip
        pair = batches.as_batch(batch)
        other = None if measure_on is None else batches.as_batch(measure_on)
        if pair is None or (measure_on is not None and other is None):
            wrong = batch if pair is None else measure_on
            raise ValueError(f"step got a {type(wrong).__name__}; expected a batch (inputs, targets), or a dict with "
                             f"'labels': {ALONE}")  # fmt: skip
        if other is None and self.debias:
            pair, other = halves(pair)
        self._found = trees.parameters(self.model)
        try:
            return self._stepped(pair, other)
        finally:
            self._found = None

    def _stepped(self, pair: Any, other: Any) -> Any:
        seed = self.seed + self.counters["steps"]
        start = self._judge_last(other or pair, seed)
        self._move_statistics(pair, seed)
        try:
            q = self._quadratic(pair, seed)
            measuring = q if other is None else self._quadratic(other, seed)
        except ValueError as problem:
            if "expected a finite number" not in str(problem):
                raise
            self._skip("the loss is NaN or infinite")
            return None
        if not all(bool(g.isfinite().all()) for each in (q, measuring) for g in each.gradient.values()):
            self._skip("the gradient has NaN or infinite entries")
            return measuring.value
        self._take(q, measuring, pair, other or pair, seed, start)
        self.counters["steps"] += 1
        return measuring.value

    def _judge_last(self, batch: Any, seed: int) -> float | None:
        """Take the last step back, and raise the damping, where the loss of a batch that did not choose it rose; the
        objective of that batch where the parameters are now, or None where it was not evaluated."""
        states = [(p, self.state[p]) for p in self.names]
        now = self._vector()
        if not self.judge or self._left_at != _mark(now) or not all("before" in state for _, state in states):
            return None  # somebody else changed the parameters
        decay = self._by_group("weight_decay")
        go_back(states)
        before = self._value(batch, decay, seed)
        self._write(now)
        after = self._value(batch, decay, seed)
        if not before < after:
            return after
        go_back(states)
        self.counters["taken_back"] += 1
        for group in self.param_groups:
            group["damping"] *= AGAIN
        for _, state in states:
            state["direction"].zero_()
        return before

    def _quadratic(self, batch: Any, seed: int) -> Quadratic:
        with torch.enable_grad():
            return quadratic(self.model, self.loss, batch, self.curvature, blocks=self.blocks, output=self.output,
                             seed=seed, max_memory=self.max_memory)  # fmt: skip

    def _take(self, q: Quadratic, measuring: Quadratic, batch: Any, measured: Any, seed: int,
              start: float | None = None) -> None:  # fmt: skip
        mask, decay = self._by_group(None), self._by_group("weight_decay")
        theta, damping = self._vector(), self.param_groups[0]["damping"]
        A, b = self._system(q, mask, decay, theta, damping)
        M = self._preconditioner(batch, mask, decay, damping, seed)
        x0 = self._start(theta)
        options = {"x0": x0, "preconditioner": M, "max_iterations": self.max_iterations, "progress": self.progress}
        B, c = (A, b) if measuring is q else self._system(measuring, mask, decay, theta, damping)
        run = measured_iterates(A, b, B, c, **options)
        xs = run.x if run.x.any() else (b / b.norm().clamp(min=1)).unsqueeze(0)  # flat at once: steepest descent
        lr = self._by_group("lr")
        predictions = self._predictions(run, c, xs, lr, B, damping)  # before the parameters move
        objective = self._objective(measured, decay, seed)
        start = objective(theta) if start is None else start
        place, value = self._best(objective, theta, lr, xs)
        p = lr * xs[place]
        rate = self._rate(objective, theta, p, value, start, -float(c @ p)) if self.line_search else 1.0
        if self.judge:
            remember((each, self.state[each]) for each in self.names)
        self._write(theta + rate * p)
        predicted = predictions[place]
        actual = (objective(theta + p) if rate != 1 else value) - start
        ratio = reduction_ratio(actual, predicted)
        if self.adapt_damping:
            for group in self.param_groups:
                damping = group["damping"]
                group["damping"] = adapted(damping, ratio, LOWER * damping, RAISE * damping)
        if rate == 0:
            self.counters["rejected"] += 1
        for parameter, direction in self._pieces(xs[-1] if rate else torch.zeros_like(p)):
            self.state[parameter]["direction"] = direction.clone()
        self._left_at = _mark(self._vector())
        self._last = {"iterations": run.iterations, "reduction_ratio": ratio, "rate": rate, "iterate": run.steps[place]}

    def _system(self, q: Quadratic, mask: Tensor, decay: Tensor, theta: Tensor, damping: float):
        """(C + damping + weight decay) restricted to the optimiser's parameters, and -(g + weight decay theta)."""
        g = trees.flatten(q.gradient, q.curvature.parameters).to(theta)
        return Restricted(q.curvature, mask, damping + decay), -mask * (g + decay * theta)

    def _start(self, theta: Tensor) -> Tensor | None:
        share = self.param_groups[0].get("momentum", self.warm_start)  # states of old have none
        if not share or not all("direction" in self.state[p] for p in self.names):
            return None
        parameters = self._all()
        last = {self.names[p]: self.state[p]["direction"] for p in self.names}
        full = {k: last.get(k, torch.zeros_like(p)) for k, p in parameters.items()}
        return share * trees.flatten(full, parameters)

    def _preconditioner(self, batch: Any, mask: Tensor, decay: Tensor, damping: float, seed: int) -> Tensor | None:
        if self.preconditioner is None:
            return None
        moments = statistics(self.model, self.loss, batch, ["second_moment"], output=self.output, seed=seed)
        flat = trees.flatten(moments["second_moment"], self._all())
        return (mask * flat + damping + decay).clamp(min=torch.finfo(flat.dtype).tiny) ** -POWER

    def _value(self, batch: Any, decay: Tensor, seed: int) -> float:
        """Loss with weight decay of the batch, at the parameters as they are."""
        with isolated(self.model, self.device, seed), torch.no_grad():
            loss = self.loss.value(batches.evaluate(unwrapped(self.model), batch[0], self.output), batch[1])
        value = float(loss)
        if any(group["weight_decay"] for group in self.param_groups):
            value += float(decay @ self._vector().square()) / 2
        return value if value == value else float("inf")

    def _objective(self, batch: Any, decay: Tensor, seed: int) -> Callable[[Tensor], float]:
        """`_value` at given parameters; its own are put back."""

        def objective(theta: Tensor) -> float:
            before = [(p, p.clone()) for p in self.names]
            self._write(theta)
            try:
                return self._value(batch, decay, seed)
            finally:
                for p, value in before:
                    p.copy_(value)

        return objective

    def _best(self, objective: Callable, theta: Tensor, lr: Tensor, xs: Tensor) -> tuple[int, float]:
        """The place of the iterate to take, and the loss there."""
        place, value = len(xs) - 1, objective(theta + lr * xs[-1])
        while self.backtrack and place > 0:
            earlier = objective(theta + lr * xs[place - 1])
            if earlier >= value:
                break
            place, value = place - 1, earlier
        return place, value

    def _rate(self, objective: Callable, theta: Tensor, p: Tensor, value: float, start: float, slope: float) -> float:
        """The first of 1, .8, .64, ... with enough descent; 0 where there is none."""
        rate = 1.0
        for _ in range(TRIES):
            if value <= start + ARMIJO * rate * min(slope, 0.0):
                return rate
            rate *= SHRINK
            value = objective(theta + rate * p)
        return 0.0

    def _predictions(self, run: Any, c: Tensor, xs: Tensor, lr: Tensor, system: Any, damping: float) -> list[float]:
        """The undamped quadratic's change for each iterate's step lr x: no product where lr is one number."""
        if run.x.any() and bool((lr == lr[0]).all()):
            rate, linear = lr[0], xs @ c
            quadratics = 2 * (run.values + linear) - damping * xs.square().sum(1)  # x . A x, without the damping
            return (-rate * linear + rate**2 * quadratics / 2).tolist()
        steps = lr * xs
        images = torch.stack([system @ p for p in steps]) - damping * steps
        return (-(steps @ c) + (steps * images).sum(1) / 2).tolist()

    def _move_statistics(self, batch: Any, seed: int) -> None:
        """One pass that leaves running statistics as a training step does; all others leave no trace."""
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        if any(m.training and getattr(m, "track_running_stats", False) for m in modules):
            with seeded(seed, self.device):
                batches.call(unwrapped(self.model), batch[0], self.output)

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"last": dict(self._last), "left_at": self._left_at}

    def _load(self, state: dict[str, Any]) -> None:
        self._last, self._left_at = dict(state["last"]), state.get("left_at")
        self.counters.setdefault("taken_back", 0)

    def diagnostics(self) -> dict[str, Any]:
        """Counters, the damping, and of the last step: iterations of CG, which iterate was taken, the rate of the line
        search, and the reduction ratio of the unshortened step."""
        return {**self.counters, "damping": self.param_groups[0]["damping"], **self._last}


class Restricted:
    """mask C mask + diag(shift), as a matrix known by its products."""

    def __init__(self, C: Any, mask: Tensor, shift: Tensor):
        self.C, self.mask, self.shift = C, mask, shift
        self.shape, self.dtype, self.device = C.shape, C.dtype, C.device

    def __matmul__(self, v: Tensor) -> Tensor:
        mask, shift = (t.unsqueeze(1) if v.dim() == 2 else t for t in (self.mask, self.shift))
        return mask * (self.C @ (mask * v)) + shift * v


def halves(batch: Any) -> tuple[Any, Any]:
    """The batch as two: even and odd samples, so that an ordered batch is split fairly.

    Raises ValueError for fewer than two samples.
    """
    (inputs, targets), N = batch, len(batch[1])
    if N < 2:
        raise ValueError(f"debias=True splits the batch in two folds, but it has {N} sample; expected at least 2.")

    def fold(i: int) -> Any:
        return trees.mapped(lambda t: t[i::2] if t.dim() and len(t) == N else t, inputs), targets[i::2]

    return fold(0), fold(1)
