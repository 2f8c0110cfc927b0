"""One training of one optimiser with one setting: losses against epochs and against seconds."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from paraboloid import problems
from paraboloid.data.batches import call, sample_count, take
from paraboloid.jobs.studies.comparing.kept import Kept
from paraboloid.jobs.studies.comparing.method import Method, Setting
from paraboloid.passes.random_state import seeded
from paraboloid.problems import Problem


@dataclass(frozen=True)
class Task:
    """A problem, the size of its batches, its epochs, the number of points at which losses are measured; its name."""

    problem: Problem
    batch_size: int
    epochs: int
    points: int
    name: str = ""


Run = Callable[[Task, Method, Setting, int], dict[str, Any]]


def again(problem: Problem, seed: int) -> Problem:
    """The problem with new initial parameters, on the same data."""
    model = copy.deepcopy(problem.model)
    with seeded(seed):
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return replace(problem, model=model)


def train(task: Task, method: Method, setting: Setting, seed: int) -> dict[str, Any]:
    """The curve of a training, and what its last point says; "failed" where the loss left the numbers.

    Seconds are those that the process computed for its steps, warm start included and measurements left out; of the
    processor's, all.
    """
    problem = again(task.problem, seed)
    size = task.batch_size * method.batches
    device, began = next(problem.model.parameters()).device, time.process_time()
    N = sample_count(problem.train)
    per_epoch = math.ceil(N / size)
    total = task.epochs * per_epoch
    moments = {round(total * i / task.points) for i in range(task.points + 1)}
    _warm_up(task, method, setting, device)
    order = torch.Generator().manual_seed(seed)
    curve: list[dict[str, Any]] = []
    spent, step, indices = 0.0, 0, []
    with warnings.catch_warnings(), seeded(seed):
        warnings.simplefilter("ignore")
        start = time.process_time()
        opt = method.make(problem.model, problem.loss_fn, setting)
        if hasattr(opt, "warm_start") and callable(opt.warm_start):
            opt.warm_start([take(problem.train, i, device) for i in torch.arange(N).split(size)])
        spent += time.process_time() - start
        while True:
            if step in moments:
                curve.append({"epoch": step / per_epoch, "seconds": spent, **_measured(problem)})
                if not math.isfinite(curve[-1]["train"]):
                    break
            if step == total:
                break
            if not indices:
                indices = list(torch.randperm(N, generator=order).split(size))
            batch = take(problem.train, indices.pop(0), device)
            start = time.process_time()
            _step(method, opt, problem, batch)
            spent += time.process_time() - start
            step += 1
    failed = not math.isfinite(curve[-1]["train"])
    return {"setting": setting, "seed": seed, "curve": [_plain(p) for p in curve], "failed": failed,
            "final": None if failed else curve[-1]["train"], "test": None if failed else curve[-1]["test"],
            "accuracy": None if failed else curve[-1]["accuracy"],
            "seconds": spent, "steps": step, "processor": time.process_time() - began}  # fmt: skip


def _warm_up(task: Task, method: Method, setting: Setting, device: torch.device) -> None:
    """One step on a copy, so that nobody's seconds are those of what a process does once: imports, first calls."""
    problem = again(task.problem, 0)
    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("ignore")
        opt = method.make(problem.model, problem.loss_fn, setting)
        _step(method, opt, problem, take(problem.train, torch.arange(2), device))


def _step(method: Method, opt: Any, problem: Problem, batch: Any) -> None:
    def closure() -> Any:
        opt.zero_grad()
        loss = problem.loss_fn(call(problem.model, batch[0]), batch[1])
        loss.backward()
        return loss

    if method.calls == "batch":
        opt.step(batch)
    elif method.calls == "closure":
        opt.step(closure)
    else:
        closure()
        opt.step()


@torch.no_grad()
def _measured(problem: Problem) -> dict[str, float | None]:
    problem.model.eval()
    train, _ = problems.evaluate(problem, problem.train)
    test, accuracy = problems.evaluate(problem, problem.test)
    problem.model.train()
    return {"train": train, "test": test, "accuracy": accuracy}


def _plain(point: dict[str, Any]) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not have."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in point.items()}


def trainings(
    task: Task, method: Method, settings: int, seeds: int, seed: int, run: Run
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("grid", run) of each setting, then ("winner", run) of the best one's from each other seed."""
    grid = []
    for setting in method.grid[:settings]:
        grid.append(run(task, method, setting, seed))
        yield "grid", grid[-1]
    best = min(grid, key=lambda run: float("inf") if run["failed"] else run["final"])
    for other in range(1, seeds):
        yield "winner", run(task, method, best["setting"], seed + other)


def compare(
    task: Task, methods: dict[str, Method], settings: int, seeds: int, seed: int, note: Callable[[], None],
    kept: Kept | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every method's trainings, as plain data; `note` is called after each, and those in `kept` are not run again."""
    rows = []
    for name, method in methods.items():
        row: dict[str, Any] = {"name": name, "family": method.family, "grid": [], "winner": []}
        run = train if kept is None else partial(_once, kept, name)
        for kind, found in trainings(task, method, settings, seeds, seed, run):
            row[kind].append(found)
            note()
        rows.append(row)
    return rows


def _once(kept: Kept, name: str, task: Task, method: Method, setting: Setting, seed: int) -> dict[str, Any]:
    what = [task.name, task.batch_size, task.epochs, task.points, name, setting, seed]
    return kept.once(what, lambda: train(task, method, setting, seed))


def processor(rows: list[dict[str, Any]]) -> float:
    """Seconds of the processor that all trainings took, measuring their losses included."""
    return sum(run["processor"] for row in rows for kind in ("grid", "winner") for run in row[kind])
