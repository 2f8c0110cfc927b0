"""The loss on all data along conjugate-gradient steps of batches, biased and debiased."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from paraboloid.jobs.studies.debiasing.plan import Plan
from paraboloid.jobs.studies.debiasing.trained import Batch, pairs, states, whole
from paraboloid.passes import trees
from paraboloid.problems import Problem
from paraboloid.quadratics.local_model import Quadratic, quadratic

RULES = {
    "single": "one batch of m",
    "debiased": "directions from m, lengths from another m",
    "folds": "the same two batches in both roles, averaged",
    "double": "one batch of 2m",
}


def steps(plan: Plan, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """By how much each rule's iterates lower the loss on all data (weight decay included), and paired differences."""
    rows = []
    for name in plan.step_problems:
        for moment, problem in states(name, plan.step_moments, seed):
            for m in plan.step_sizes:
                found: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
                for first, second in pairs(problem, m, plan.step_repeats, 1000 * seed + m):
                    for rule, iterates in proposals(problem, first, second, plan).items():
                        found[rule].append(decreases(problem, iterates, plan.weight_decay))
                stacked = {rule: torch.stack(v) for rule, v in found.items()}  # [repeats, iterations]
                rows.append({
                    "problem": name, "moment": moment, "batch_size": m,
                    "decrease": {rule: mean(v) for rule, v in stacked.items()},
                    "debiased_minus_single": mean(stacked["debiased"] - stacked["single"]),
                    "debiased_minus_double": mean(stacked["debiased"] - stacked["double"]),
                    "folds_minus_double": mean(stacked["folds"] - stacked["double"]),
                })  # fmt: skip
                tick()
    return {"iterations": list(plan.iterations), "damping": plan.damping, "repeats": plan.step_repeats, "rules": RULES,
            "rows": rows}  # fmt: skip


def proposals(problem: Problem, first: Batch, second: Batch, plan: Plan) -> dict[str, Tensor]:
    """Each rule's iterates after the plan's iterations, [points, D]."""
    count, at = max(plan.iterations), [i - 1 for i in plan.iterations]

    def fit(batch: Batch) -> Quadratic:
        return quadratic(problem.model, problem.loss_fn, batch, weight_decay=plan.weight_decay)

    both = tuple(torch.cat(t) for t in zip(first, second, strict=True))
    one, two, double = fit(first), fit(second), fit(both)  # pyright: ignore[reportArgumentType] - two tensors
    mine, theirs = (q.conjugate_directions(count, plan.damping) for q in (one, two))
    debiased = iterates(two, mine, plan.damping)
    found = {
        "single": iterates(one, mine, plan.damping),
        "debiased": debiased,
        "folds": (debiased + iterates(one, theirs, plan.damping)) / 2,
        "double": iterates(double, double.conjugate_directions(count, plan.damping), plan.damping),
    }
    return {rule: steps[at] for rule, steps in found.items()}


def iterates(q: Quadratic, directions: Tensor, damping: float) -> Tensor:
    """The steps along the first 1, 2, ... of the directions, with lengths from q."""
    slopes, curvatures = q.along(directions)
    return (-slopes / (curvatures + damping)).unsqueeze(1).mul(directions).cumsum(0)


@torch.no_grad()
def decreases(problem: Problem, steps: Tensor, weight_decay: float) -> Tensor:
    """Loss on all data at the parameters less that after each step."""
    parameters, (x, y) = trees.parameters(problem.model), whole(problem)
    start = trees.flatten(parameters, parameters)

    def loss(theta: Tensor) -> Tensor:
        f = functional_call(problem.model, trees.unflatten(theta, parameters), (x,))
        return problem.loss_fn(f, y) + weight_decay / 2 * theta.square().sum()

    here = loss(start)
    return torch.stack([here - loss(start + step) for step in steps]).double()


def mean(values: Tensor) -> dict[str, list[float]]:
    """Mean over repeats and its standard error, for each iteration."""
    return {"mean": values.mean(0).tolist(), "standard_error": (values.std(0) / len(values) ** 0.5).tolist()}
