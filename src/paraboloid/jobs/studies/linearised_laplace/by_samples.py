"""EM by samples against EM by the exact matrix, and posteriors as the network grows: what each costs and is worth."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from markupsafe import Markup
from torch import Tensor, nn

from paraboloid.jobs.studies.linearised_laplace.measurements import Tick, quality, split, trained
from paraboloid.jobs.studies.linearised_laplace.plan import Plan
from paraboloid.passes.random_state import seeded
from paraboloid.passes.trees import unflatten
from paraboloid.posteriors import laplace, sampled_laplace
from paraboloid.posteriors.prior import flat
from paraboloid.posteriors.prior_tuning.evidence import mackay
from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel, optimum
from paraboloid.report.numbers import fixed, number
from paraboloid.report.section import Panel, Section, Table

LOSS = nn.CrossEntropyLoss()
ROWS = 10**8  # numbers of the exact curvature's rows up to which the functional posterior takes part
CLOSE = 0.1  # relative difference of two precisions that are called the same


def network(hidden: int, layers: int = 1) -> nn.Sequential:
    """64-hidden-...-10 with tanh."""
    sizes = [64, *[hidden] * layers]
    inner = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*inner, nn.Linear(hidden, 10))


def weights(hidden: int, layers: int) -> int:
    """How many such a network has."""
    return sum(p.numel() for p in network(hidden, layers).parameters())


def em(plan: Plan, seed: int, tick: Tick) -> list[dict[str, Any]]:
    """After each EM step: precision, effective dimension and predictions by the exact matrix, and by samples."""
    train, test, noise = split(plan, seed)
    with seeded(seed):
        model = network(plan.networks[0])
    trained(model, train, plan.epochs[-1], seed)
    rows = []

    def note(kind: str, step: int, precision: float, dimension: float, posterior: Any) -> None:
        found = quality(posterior.predict(test[0]), posterior.predict(noise), test[1])
        rows.append({"kind": kind, "step": step, "precision": precision, "dimension": dimension, **found})
        tick()

    exact, delta = laplace(model, LOSS, train, "full"), None
    theta, linear = exact.weights, LinearisedModel.of(model, exact.likelihood.loss, train, None, None)
    for step in range(plan.em_steps + 1):
        if step:
            prior, precision = exact.prior(), exact.precision()
            delta = optimum(linear, flat(prior, theta), precision.strength, delta, precision.apply, 1e-3)
            updated, _ = mackay(precision, [list(theta)], unflatten(linear.theta + delta, theta))
            exact.prior_precision = next(iter(updated.values())).item()
        note("exact", step, float(exact.prior_precision), exact.effective_dimension(), exact)
    with tempfile.TemporaryDirectory() as folder:
        for step in range(plan.em_steps + 1):
            drawn = sampled_laplace(
                model, LOSS, train, plan.samples, step, False, seed, match=None, checkpoint=Path(folder) / "run"
            )
            note("sampled", step, float(drawn.prior_precision), drawn.effective_dimension, drawn)
    return rows


def growth(plan: Plan, seed: int, tick: Tick) -> list[dict[str, Any]]:
    """Seconds, likelihood, calibration and noise told, of each posterior with its defaults, for each network."""
    rows = []
    for hidden, layers in plan.growing:
        train, test, noise = split(plan, seed)
        with seeded(seed):
            model = network(hidden, layers)
        trained(model, train, plan.epochs[-1], seed)
        size = sum(p.numel() for p in model.parameters())
        for name, fit in methods(model, train, plan.samples, seed).items():
            start = time.perf_counter()
            predict = fit()
            spent = time.perf_counter() - start
            rows.append({"method": name, "weights": size, "seconds": spent,
                         **quality(predict(test[0]), predict(noise), test[1])})  # fmt: skip
            tick()
    return rows


def methods(model: nn.Module, train: tuple[Tensor, Tensor], samples: int, seed: int) -> dict[str, Callable[[], Any]]:
    """Each fits and tunes, and returns how to predict; functional where its rows are few enough to keep."""

    def tuned(structure: str, weights: str = "all") -> Callable[[], Any]:
        return lambda: laplace(model, LOSS, train, structure, weights, seed=seed).tune_prior().predict

    found: dict[str, Callable[[], Any]] = {
        "network": lambda: lambda x: model(x).detach().softmax(1),
        "last layer": tuned("kron", "last_layer"),
        "kron": tuned("kron"),
        "sampled": lambda: sampled_laplace(model, LOSS, train, samples, seed=seed).predict,
    }
    numbers = 9 * len(train[1]) * sum(p.numel() for p in model.parameters())
    return {**found, "functional": tuned("functional")} if numbers <= ROWS else found


def claims(results: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    """What the samples' EM finds, and whether the last layer is enough."""
    found: list[tuple[str, bool | None, str]] = []
    last = {row["kind"]: row for row in results["em"]}
    one, two = last["sampled"]["precision"], last["exact"]["precision"]
    found.append(("EM by samples finds the precision that the exact matrix finds, within 10%",
                  abs(one / two - 1) <= CLOSE, f"{number(one)} against {number(two)}"))  # fmt: skip
    largest = max(row["weights"] for row in results["growth"])
    at = {row["method"]: row for row in results["growth"] if row["weights"] == largest}
    layer, whole = at["last layer"], at["sampled"]
    enough = layer["auroc"] >= whole["auroc"] - 0.01 and layer["nll"] <= 1.02 * whole["nll"]
    told = f"noise told {fixed(layer['auroc'], None, 3)} against {fixed(whole['auroc'], None, 3)} by samples"
    likely = f"likelihood {fixed(layer['nll'], None, 3)} against {fixed(whole['nll'], None, 3)}"
    found.append(("The last layer is enough for the largest network", enough, f"{told}, {likely}"))
    seconds = [mean(row["seconds"] for row in results["growth"] if row["method"] == m) for m in ("sampled", "kron")]
    found.append(("Samples of all weights take no longer than Kronecker factors", seconds[0] <= seconds[1],
                  f"{number(seconds[0])} s against {number(seconds[1])} s, on the mean"))  # fmt: skip
    return found


def section(results: dict[str, Any]) -> Section:
    """Two tables: EM step by step, and the growing network."""
    steps = Table(
        "EM step by step",
        ["by", "step", "precision", "effective dimension", "likelihood", "calibration", "noise told"],
        [[row["kind"], str(row["step"]), number(row["precision"]), number(row["dimension"]), *_three(row)]
         for row in results["em"]],
    )  # fmt: skip
    growing = Table(
        "As the network grows", ["weights", "posterior", "seconds", "likelihood", "calibration", "noise told"],
        [[number(row["weights"]), row["method"], number(row["seconds"]), *_three(row)] for row in results["growth"]],
    )  # fmt: skip
    about = "EM with the exact matrix and with samples; what posteriors cost, and are worth, with their defaults."
    return Section("samples", "By samples", [], [Panel(Markup(""), about, [steps, growing], wide=True)])


def _three(row: dict[str, Any]) -> list[str]:
    return [fixed(row[key], None, 3) for key in ("nll", "ece", "auroc")]
