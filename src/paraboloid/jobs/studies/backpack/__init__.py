"""Curvature in the place of the identity, and what each quantity costs (after arXiv:1912.10985, BackPACK).

The first experiment: the time of every first- and second-order quantity, in gradients.  The second: classifiers trained
by gradients that are preconditioned with the curvature of each batch (the GGN's diagonal, exact or by Monte Carlo;
KFAC, KFLR, KFRA) against SGD with momentum and Adam, each with a grid of learning rates and dampings, the winners over
seeds.  The findings of the paper are listed with what was measured here, seen or not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paraboloid import problems
from paraboloid.data.batches import call, take
from paraboloid.jobs.studies.backpack.methods import CURVATURE, METHODS, QUANTITIES
from paraboloid.jobs.studies.backpack.page import sections
from paraboloid.jobs.studies.backpack.reading import findings
from paraboloid.jobs.studies.comparing.kept import Kept
from paraboloid.jobs.studies.comparing.method import Method
from paraboloid.jobs.studies.comparing.runs import Task, compare, processor
from paraboloid.passes import trees
from paraboloid.problems import Problem
from paraboloid.problems.problem import loss_of
from paraboloid.quantities.door import statistics as measured
from paraboloid.report.numbers import number

__all__ = ["TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections"]

TITLE = "Preconditioning with BackPACK's curvatures"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """problems  names of classifiers, each with options of its factory, the batch size and the number of epochs
    methods   names in `methods.METHODS`
    settings  of each method's grid
    seeds     of the winners
    points    at which losses are measured, over a training
    rounds    of timing each quantity
    keep      file of finished trainings, which are not run again
    most      gradients that a batch's curvature may cost: what costs more is timed, and not trained with
    """

    problems: tuple[tuple[str, dict[str, Any], int, int], ...] = (
        ("digits-mlp", {}, 64, 10), ("digits-cnn", {}, 64, 10),
        ("shapes-cnn", {"samples": 1000, "width": 0.25}, 32, 12),
    )  # fmt: skip
    methods: tuple[str, ...] = tuple(METHODS)
    settings: int = 4
    seeds: int = 3
    points: int = 10
    rounds: int = 7
    most: float = 30.0
    keep: str | None = None

    @classmethod
    def full(cls) -> Plan:
        """The whole 3c3d, the whole grids, five seeds."""
        return cls(problems=(("digits-mlp", {}, 64, 60), ("digits-cnn", {}, 64, 60), ("shapes-cnn", {}, 128, 20)),
                   settings=9, seeds=5, points=20, rounds=31, most=1000.0)  # fmt: skip

    @classmethod
    def tiny(cls) -> Plan:
        """Seconds, for tests."""
        return cls(problems=(("digits-mlp", {}, 64, 2),), methods=("SGD-m", "DiagGGN, Monte Carlo"),
                   settings=1, seeds=2, points=2, rounds=2)  # fmt: skip


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def pieces(plan: Plan) -> dict[str, int]:
    """How many quantities are timed, and how many trainings are made at most, by problem."""
    return {name: len(QUANTITIES) + _trainings(plan, plan.methods) for name, *_ in plan.problems}


def _trainings(plan: Plan, methods: Iterable[str]) -> int:
    return sum(min(plan.settings, len(METHODS[name].grid)) + plan.seeds - 1 for name in methods)


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Costs, and the trainings of every method, by problem, as plain data."""
    report, totals = progress or (lambda part, done, total: None), pieces(plan)
    found: dict[str, Any] = {"problems": []}
    kept = None if plan.keep is None else Kept(plan.keep)
    for name, options, batch_size, epochs in plan.problems:
        start, done = time.perf_counter(), iter(range(1, totals[name] + 1))
        report(name, 0, totals[name])
        problem = problems.load(name, seed=seed, **options)
        note = partial(_note, report, name, done, totals[name])
        timed = partial(_costs, problem, batch_size, plan.rounds)
        costs = timed() if kept is None else kept.once([name, options, batch_size, plan.rounds, "costs"], timed)
        for _ in QUANTITIES:
            note()
        methods, left_out = _affordable(plan, costs)
        for _ in range(totals[name] - _trainings(plan, methods) - len(QUANTITIES)):
            note()
        task = Task(problem, batch_size, epochs, plan.points, name)
        rows = compare(task, methods, plan.settings, plan.seeds, seed, note, kept)
        found["problems"].append({
            "name": name, "options": options, "batch_size": batch_size, "epochs": epochs, "costs": costs,
            "parameters": sum(p.numel() for p in problem.model.parameters()), "samples": len(problem.train),
            "methods": rows, "left_out": left_out, "seconds": time.perf_counter() - start,
            "processor": processor(rows),
        })  # fmt: skip
    return found


def _affordable(plan: Plan, costs: list[dict[str, Any]]) -> tuple[dict[str, Method], list[str]]:
    """The methods to train with, and why the others are not, as sentences."""
    found, left_out, gradients = {}, [], {row["quantity"]: row["gradients"] for row in costs}
    for name in plan.methods:
        if (cost := gradients.get(CURVATURE.get(name, ""), 0.0)) > plan.most:
            left_out.append(f"{name} was left out: its curvature costs {number(cost, 2)} gradients here.")
        else:
            found[name] = METHODS[name]
    return found, left_out


def _note(report: Progress, name: str, done: Any, total: int) -> None:
    report(name, next(done), total)


def _costs(problem: Problem, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds of each quantity's time over that of the gradient beside it; both with the forward pass."""
    model, loss_fn = problem.model, loss_of(problem.loss_fn)
    assert loss_fn is not None  # a classifier's
    parameters = list(trees.parameters(model).values())
    x, y = take(problem.train, torch.arange(batch_size), parameters[0].device)

    def gradient() -> Any:
        return torch.autograd.grad(loss_fn.value(call(model, x), y), parameters)

    rows = []
    for quantity in QUANTITIES:
        run = partial(measured, model, loss_fn, (x, y), [quantity])
        for _ in range(3):
            for each in (run, gradient):
                each()
        ratios = [_seconds(run) / _seconds(gradient) for _ in range(rounds)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({"quantity": quantity, "gradients": middle, "low": low, "high": high})
    return rows


def _seconds(run: Callable[[], Any]) -> float:
    """Computed by this process."""
    start = time.process_time()
    run()
    return time.process_time() - start
