"""The variance of stochastic gradients, and how much clustering lowers it (after arXiv:2007.04532).

Random-feature models over widths and shares of duplicates; image classifiers with duplicates, wrong or smoothed labels
and a learning-rate drop.  Compared at points of the training: SG-B, twice the batch, SVRG, and one draw from each of as
many gradient clusters (GC), renewed half a measurement's distance before.  The findings of the paper are listed with
what was measured here, seen or not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from paraboloid import noise, problems
from paraboloid.jobs.studies.gradient_variance.page import sections
from paraboloid.jobs.studies.gradient_variance.plan import Plan
from paraboloid.jobs.studies.gradient_variance.reading import findings
from paraboloid.jobs.studies.gradient_variance.variants import of, trained
from paraboloid.jobs.studies.parts import Progress, listed, run_parts
from paraboloid.noise.estimators import Stratified
from paraboloid.problems import Problem, folders

__all__ = ["TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections", "with_data"]

TITLE = "The variance of stochastic gradients, and clustering"


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def with_data(plan: Plan, folder: str) -> Plan:
    """The paper's own image problems, those whose files are in the folder, at the paper's batch size of 128.

    Raises ValueError where it holds none of MNIST, CIFAR-10, CIFAR-100 and ImageNet.
    """
    found, missing = [], []
    for names, read in (
        (("mnist-mlp", "mnist-cnn"), folders.mnist), (("cifar10-resnet8", "cifar10-resnet32"), folders.cifar10),
        (("cifar100-resnet32",), folders.cifar100),
        (("imagenet-resnet18",), lambda place: folders.Pictures(f"{place}/train")),
    ):  # fmt: skip
        try:
            read(folder)
            found += names
        except FileNotFoundError as error:
            missing.append(str(error))
    if not found:
        raise ValueError(f"{folder} holds no data that this study knows: " + " ".join(missing))
    return replace(plan, problems=tuple(found), data=folder, batch_size=128)


def pieces(plan: Plan) -> dict[str, int]:
    """How many trainings each part of the study makes."""
    return {"features": len(plan.widths) * len(plan.duplicated) * plan.seeds,
            "images": len(plan.problems) * len(plan.variants), "counts": 1}  # fmt: skip


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Every part of the study, as plain data."""
    parts = {"features": listed(_features), "images": listed(_images), "counts": listed(_counts)}
    return run_parts(parts, plan, seed, progress, pieces(plan))


def _monitor(problem: Problem, plan: Plan, seed: int, total: int, batch_size: int) -> noise.Monitor:
    """Measured at `points` of the training; clusters and SVRG's reference are renewed between every second of them."""
    return noise.Monitor(problem.model, problem.loss_fn, problem.train, batch_size, draws=plan.draws, seed=seed,
                         refresh=max(1, round(2 * total / plan.points)), reference="full")  # fmt: skip


def _points(monitor: noise.Monitor, plan: Plan) -> list[dict[str, Any]]:
    """The measurements, each with whether it was taken half way between two renewals."""
    return [{**record, "between": i % 2 == 1} for i, record in enumerate(monitor.to_json())]


def _features(plan: Plan, seed: int) -> Any:
    for run in range(plan.seeds):
        for width in plan.widths:
            for share in plan.duplicated:
                problem = problems.load("random-features", seed=seed + run, samples=plan.samples, hidden=width,
                                        duplicated=share)  # fmt: skip
                monitor = _monitor(problem, plan, seed + run, plan.steps, 10)
                problems.train(problem, seed + run, steps=plan.steps, evaluations=plan.points,
                               callback=partial(_note, monitor, []))  # fmt: skip
                yield {"width": width, "ratio": width / plan.samples, "duplicated": share, "run": run,
                       "points": _points(monitor, plan)}  # fmt: skip


def _images(plan: Plan, seed: int) -> Any:
    options: dict[str, Any] = {} if plan.data is None else {"data": plan.data}
    for name in plan.problems:
        for variant in plan.variants:
            problem = of(problems.load(name, seed=seed, **options), variant, seed)
            steps = -(-len(problem.train) // problem.training.batch_size) * plan.epochs
            monitor = _monitor(problem, plan, seed, steps, plan.batch_size)
            curve: list[dict[str, Any]] = []
            callback = partial(_note, monitor, curve)
            trained(problem, variant, plan.epochs, plan.points, seed, callback)
            yield {"problem": name, "variant": variant, "curve": curve, "points": _points(monitor, plan)}


def _note(monitor: noise.Monitor, curve: list[dict[str, Any]], step: int, model: Any, point: Any) -> None:
    monitor(step, model, point)
    curve.append({**point, "step": step})


def _counts(plan: Plan, seed: int) -> Any:
    """Running against fixed sizes of the clusters, at the end of one training of the random features."""
    problem = problems.load("random-features", seed=seed, samples=plan.samples, hidden=plan.widths[-1])
    problems.train(problem, seed, steps=plan.steps, evaluations=1)
    data, row = (problem.model, problem.loss_fn, problem.train), {}
    for counts in ("running", "fixed"):
        clusters = noise.GradientClustering(problem.model, problem.loss_fn, 10, counts=counts, seed=seed)
        clusters.fit(problem.train, batch_size=256, passes=3)
        found = noise.compare(*data, batch_size=10, draws=4 * plan.draws, seed=seed, estimators=[
            "sgb", Stratified(clusters.assignments, name="clusters")])  # fmt: skip
        ratio = found.ratio("clusters")
        row[counts] = {"ratio": float(ratio[0] if isinstance(ratio, tuple) else ratio),
                       "largest": int(clusters.sizes.max()), "empty": int((clusters.sizes == 0).sum())}  # fmt: skip
    yield row
