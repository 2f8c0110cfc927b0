"""The job: train, then measure stage by stage, and gather everything in one record of plain numbers."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import paraboloid
from paraboloid import problems
from paraboloid.jobs.inspection.bias import bias
from paraboloid.jobs.inspection.clusters import PASSES, clustered
from paraboloid.jobs.inspection.curvature import curvature, products
from paraboloid.jobs.inspection.matrices import NAMES
from paraboloid.jobs.inspection.noise import gradient_noise
from paraboloid.jobs.inspection.plan import PROBE, Plan, batch_sizes, fitted
from paraboloid.jobs.inspection.subject import Layer, Subject, subject
from paraboloid.linalg.operand import check_choice
from paraboloid.losses import Loss
from paraboloid.noise import Snapshots
from paraboloid.passes import trees
from paraboloid.passes.modes import evaluating
from paraboloid.problems import Problem
from paraboloid.quantities.door import statistics
from paraboloid.report import Record, reading

Progress = Callable[[str, int, int], None]  # stage, done, total

STAGES = ("training", "noise", "curvature", "bias")
NOISE_ONLY = ("training", "noise")


def inspect(
    problem: Problem, plan: Plan | None = None, *, seed: int = 0, progress: Progress | None = None,
    stages: Sequence[str] = STAGES,
) -> Record:  # fmt: skip
    """Train the problem's model in place and measure it; returns the record that `paraboloid.report` draws.

    The record is plain data with the keys problem, training, noise, curvature and bias; undefined numbers are None.
    With ``stages=NOISE_ONLY`` the last two are left out, and estimators of the gradient are compared as well. The
    same problem, plan and seed give the same record on the same machine, except for the seconds. What does not fit (no
    data, targets out of range, a layer that couples the samples) raises ValueError before the training where it can be
    known, a loss that is not finite FloatingPointError.
    """
    asked = plan or Plan()
    check_choice("curvature", asked.curvature, list(NAMES))
    batch_sizes(problem, asked)
    report = progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = {}
    with _noted() as notes:
        with evaluating(problem.model):
            _try_out(problem)
            plan, steps = fitted(asked, problem)
        sizes, dropped = batch_sizes(problem, plan)
        with _timed(seconds, "training"):
            curve, states = _train(problem, plan, steps, seed, report)
        measured = subject(problem, plan.samples, seed)
        only_noise = tuple(stages) == NOISE_ONLY
        batch_size = min(problem.training.batch_size, measured.size)
        with _timed(seconds, "noise"):
            compare = _estimators(measured, batch_size, plan, seed) if only_noise else None
            checkpoints, clusters = _noise(measured, curve, states, report, seed, compare)
        noise = {"batch_size": batch_size, "checkpoints": checkpoints, "clusters": clusters}
        measurements = (
            {} if only_noise else _curvature_and_bias(measured, plan, (sizes, dropped), seed, seconds, report)
        )
    record = {
        "problem": _describe(measured, asked, seed, seconds, notes, "noise" if only_noise else "inspect"),
        "training": {**_settings(problem, curve), "curve": curve},
        "noise": noise,
        **measurements,
    }
    for name in stages:
        record[name]["reading"] = getattr(reading, name)(record[name])
    return record


def _curvature_and_bias(
    measured: Subject, plan: Plan, batches: tuple[list[int], list[int]], seed: int, seconds: dict[str, float],
    report: Progress,
) -> dict[str, Any]:  # fmt: skip
    sizes, dropped = batches
    with _timed(seconds, "curvature"):
        density = plan.density_samples, plan.density_steps
        tick = _ticker(report, "curvature", products(measured, *density, plan.curvature))
        curved = curvature(measured, plan.directions, *density, seed, tick, plan.curvature)
    with _timed(seconds, "bias"):
        tick = _ticker(report, "bias", len(sizes) * plan.repeats)
        biased = bias(measured, sizes, plan.directions, plan.repeats, seed, tick)
    return {"curvature": curved, "bias": {**biased, "dropped": dropped}}


def checkpoint_steps(evaluated: list[int], count: int) -> set[int]:
    """At most `count` of the evaluated steps, spaced geometrically from the second to the last, and the first one."""
    last = len(evaluated) - 1
    if last < 1 or count < 2:
        return {evaluated[-1]}
    indices = {0} | {round(last ** (i / max(1, count - 2))) for i in range(count - 1)}
    return {evaluated[i] for i in indices}


def _train(
    problem: Problem, plan: Plan, total: int, seed: int, progress: Progress
) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    """The curve, and the model's state at the checkpoints; the model ends trained and in evaluation mode."""
    evaluations = max(1, min(plan.evaluations, total))
    steps = [round(total * i / evaluations) for i in range(evaluations + 1)]
    wanted = checkpoint_steps(sorted(set(steps)), plan.checkpoints)
    states: dict[int, dict[str, Any]] = {}

    def keep(step: int, model: nn.Module, point: dict[str, Any]) -> None:
        if step in wanted:
            states[step] = {k: v.detach().clone() for k, v in model.state_dict().items()}
        progress("training", step, total)

    curve = problems.train(problem, seed, steps=total, evaluations=evaluations, callback=keep)
    return curve, states


def _estimators(measured: Subject, batch_size: int, plan: Plan, seed: int) -> Snapshots | None:
    """What compares the estimators, SVRG's reference being the checkpoint before; None where the data does not hold two
    batches."""
    if 2 * batch_size > measured.size:
        return None
    problem = measured.problem
    return Snapshots(problem.model, problem.loss_fn, measured.dataset, batch_size, draws=plan.draws, seed=seed)


def _noise(
    measured: Subject, curve: list[dict[str, Any]], states: dict[int, Any], progress: Progress, seed: int,
    compare: Snapshots | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Gradient noise at each checkpoint, and the last one's clusters; the model is left in that state."""
    tick = _ticker(progress, "noise", len(states) * len(measured.batches) + PASSES + 1)
    epochs = {point["step"]: point["epoch"] for point in curve}
    found = []
    for step, state in states.items():
        measured.model.load_state_dict(state)
        noise = gradient_noise(measured, measured.problem.training.batch_size, tick)
        if compare is not None:
            noise["estimators"] = compare().to_json()["estimators"]
        found.append({"step": step, "epoch": epochs[step], **noise})
    return found, clustered(measured, seed, tick)


def _try_out(problem: Problem) -> None:
    """Take the statistics of a few samples, so that what cannot be measured is said before the training, not after."""
    try:
        loss = Loss.from_torch(problem.loss_fn)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if loss.reduction == "sum":
        raise ValueError(
            f"{type(problem.loss_fn).__name__} has reduction='sum', so that a batch's loss grows with its size and "
            "batches of different sizes cannot be compared; expected 'mean', or 'batchmean' of paraboloid.losses."
        )
    device = next(iter(trees.parameters(problem.model).values())).device
    batch = problems.read(problem.train, torch.arange(min(PROBE, len(problem.train))), device)
    statistics(problem.model, loss, batch, ["square_norms"])


def _describe(
    measured: Subject, plan: Plan, seed: int, seconds: dict[str, float], notes: list[str], verb: str
) -> dict[str, Any]:
    problem = measured.problem
    parameters = list(measured.parameters.values())
    return {
        "name": problem.name,
        "title": problem.title or problem.name,
        "description": problem.description,
        "model": {"name": type(problem.model).__name__, "structure": repr(problem.model)},
        "loss": repr(problem.loss_fn) if isinstance(problem.loss_fn, nn.Module) else type(problem.loss_fn).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "layers": [_describe_layer(layer) for layer in measured.layers],
        "train_size": len(problem.train),
        "test_size": len(problem.test),
        "measured_size": measured.size,
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": str(parameters[0].device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "quick": plan.is_quick,
        "command": _command(problem, plan, seed, verb),
        "versions": {
            "paraboloid": paraboloid.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seconds": seconds,
        "notes": notes,
    }


def _describe_layer(layer: Layer) -> dict[str, Any]:
    tensors = [{"name": k, "shape": list(p.shape), "parameters": p.numel()} for k, p in layer.parameters.items()]
    return {"name": layer.name, "kind": layer.kind, "parameters": layer.size, "tensors": tensors}


def _settings(problem: Problem, curve: list[dict[str, Any]]) -> dict[str, Any]:
    settings = problem.training
    return {
        "optimizer": {"adam": "Adam", "sgd": "SGD"}[settings.optimizer],
        "lr": settings.lr,
        "momentum": settings.momentum,
        "batch_size": settings.batch_size,
        "weight_decay": settings.weight_decay,
        "epochs": curve[-1]["epoch"],
        "steps": curve[-1]["step"],
    }


def _command(problem: Problem, plan: Plan, seed: int, verb: str) -> str:
    """The command line that gives this record again."""
    usual = Plan.quick() if plan.is_quick else Plan()
    parts = ["paraboloid", verb, problem.name, "--seed", str(seed)]
    if plan.is_quick:
        parts.append("--quick")
    if plan.curvature != usual.curvature:
        parts += ["--curvature", plan.curvature]
    if plan.draws != usual.draws:
        parts += ["--draws", str(plan.draws)]
    if plan.batch_sizes != usual.batch_sizes:
        parts += ["--batch-sizes", ",".join(map(str, plan.batch_sizes))]
    if plan.samples != usual.samples:
        parts += ["--samples", str(plan.samples)]
    return " ".join(parts)


def _ticker(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """A function that reports one more piece of the stage as done, each time it is called."""
    done = 0
    progress(stage, done, total)

    def tick() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    return tick


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Gather the texts of warnings, each once: they belong into the report, not between its progress bars."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
        texts = [" ".join(str(w.message).split()) for w in caught if issubclass(w.category, UserWarning)]
        notes += dict.fromkeys(texts)
