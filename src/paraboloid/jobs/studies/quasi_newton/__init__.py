"""Kronecker-factored quasi-Newton methods against the optimisers that count now (after arXiv:2006.08877).

Deep autoencoders trained by SGD with momentum, Adam, AdamW, Muon, SOAP and Shampoo, and by K-BFGS, K-BFGS(L), KFAC,
EKFAC (as they are, clipped, grafted to Adam, with KL factors), by steps of Adam's length (along K-BFGS's direction, a
diagonal's, polar factors) and by Gauss-Newton steps (whole, and layer by layer).  Every method has a grid of the same
number of settings; the one that ends lowest in training loss runs again from other initial parameters.
Training and test loss are shown against epochs and against the seconds that the process computed.  The findings of the
paper and the goals of this package are listed with what was measured here, seen or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from paraboloid import problems
from paraboloid.jobs.studies.comparing.kept import Kept
from paraboloid.jobs.studies.comparing.method import Method, missing
from paraboloid.jobs.studies.comparing.runs import Task, compare, processor
from paraboloid.jobs.studies.quasi_newton.methods import METHODS
from paraboloid.jobs.studies.quasi_newton.page import sections
from paraboloid.jobs.studies.quasi_newton.plan import Plan
from paraboloid.jobs.studies.quasi_newton.reading import findings
from paraboloid.problems import Problem

__all__ = ["TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections", "with_data"]

TITLE = "Quasi-Newton methods for deep autoencoders"
Progress = Callable[[str, int, int], None]


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def with_data(plan: Plan, folder: str) -> Plan:
    """The paper's own MNIST autoencoder, from the user's files, in the place of the others."""
    (_, _, _, epochs), *_ = plan.problems
    return replace(plan, problems=(("mnist-autoencoder", {"data": folder}, 1000, min(epochs, 20)),))


def available(plan: Plan, problem: Problem) -> dict[str, Method]:
    """The methods that can be run here, and on a network of this size."""
    parameters = sum(p.numel() for p in problem.model.parameters())
    found = {name: METHODS[name] for name in plan.methods if missing(name, METHODS[name]) is None}
    return {name: method for name, method in found.items() if parameters <= plan.small or method.calls != "batch"}


def pieces(plan: Plan, methods: dict[str, Method]) -> int:
    """How many trainings a problem takes."""
    return sum(min(plan.settings, len(method.grid)) + plan.seeds - 1 for method in methods.values())


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """The grid of every method on every problem, and the winners from other initial parameters, as plain data."""
    report = progress or (lambda part, done, total: None)
    left_out = [why for name in plan.methods if (why := missing(name, METHODS[name]))]
    found: dict[str, Any] = {"problems": [], "left_out": left_out}
    kept = None if plan.keep is None else Kept(plan.keep)
    for name, options, batch_size, epochs in plan.problems:
        start, problem = time.perf_counter(), problems.load(name, seed=seed, **options)
        methods = available(plan, problem)
        total = pieces(plan, methods)
        report(name, 0, total)
        task = Task(problem, batch_size, epochs, plan.points, name)
        note = partial(_note, report, name, iter(range(1, total + 1)), total)
        rows = compare(task, methods, plan.settings, plan.seeds, seed, note, kept)
        found["problems"].append({
            "name": name, "batch_size": batch_size, "epochs": epochs, "samples": len(problem.train), "methods": rows,
            "seconds": time.perf_counter() - start, "processor": processor(rows),
        })  # fmt: skip
    return found


def _note(report: Progress, name: str, done: Any, total: int) -> None:
    report(name, next(done), total)
