"""EM by samples against EM by the exact matrix, step by step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from paraboloid.jobs.studies.claims import Claim
from paraboloid.jobs.studies.linearised_laplace.growth import network
from paraboloid.jobs.studies.linearised_laplace.measurements import Split, Tick, quality, split, trained
from paraboloid.jobs.studies.linearised_laplace.pieces import once
from paraboloid.jobs.studies.linearised_laplace.plan import Plan
from paraboloid.passes.random_state import seeded
from paraboloid.passes.trees import unflatten
from paraboloid.posteriors import laplace, sampled_laplace
from paraboloid.posteriors.prior import flat
from paraboloid.posteriors.prior_tuning.evidence import mackay
from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel, optimum
from paraboloid.report.axes import whole_axis
from paraboloid.report.numbers import fixed, number
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import SERIES, inline_svg

LOSS = nn.CrossEntropyLoss()
CLOSE = 0.1  # relative difference of what is called the same
MEASURES = (
    ("precision", "precision of the prior"), ("dimension", "effective dimension"),
    ("nll", "negative log-likelihood"), ("ece", "calibration error"),
)  # fmt: skip
Rows = list[dict[str, Any]]


def steps(plan: Plan, seed: int, tick: Tick) -> Rows:
    """After each EM step: precision, effective dimension and plain predictions by the exact matrix, and by samples."""
    data = split(plan, seed)
    with seeded(seed):
        model = network(plan.networks[0])
    trained(model, data[0], plan.epochs[-1], seed)
    found: Rows = []
    what = {"part": "em", "hidden": plan.networks[0], "steps": plan.em_steps, "samples": plan.samples, "seed": seed}
    makers: dict[str, Callable[..., Rows]] = {"exact": _exactly, "sampled": _by_samples}
    for kind, make in makers.items():
        for row in once(plan, partial(make, model, data, plan, seed), **what, kind=kind):
            found.append({"kind": kind, **row})
            tick()
    return found


def _row(step: int, precision: float, dimension: float, posterior: Any, data: Split) -> dict[str, Any]:
    _, test, noise = data
    found = quality(posterior.predict(test[0]), posterior.predict(noise), test[1])
    return {"step": step, "precision": precision, "dimension": dimension, **found}


def _exactly(model: nn.Module, data: Split, plan: Plan, seed: int) -> Rows:
    """MacKay's updates with traces of the dense matrix, from the same precision."""
    exact, delta, rows = laplace(model, LOSS, data[0], "full"), None, []
    theta, linear = exact.weights, LinearisedModel.of(model, exact.likelihood.loss, data[0], None, None)
    for step in range(plan.em_steps + 1):
        if step:
            prior, precision = exact.prior(), exact.precision()
            delta = optimum(linear, flat(prior, theta), precision.strength, delta, precision.apply, 1e-3)
            updated, _ = mackay(precision, [list(theta)], unflatten(linear.theta + delta, theta))
            exact.prior_precision = next(iter(updated.values())).item()
        rows.append(_row(step, float(exact.prior_precision), float(exact.effective_dimension()), exact, data))
    return rows


def _by_samples(model: nn.Module, data: Split, plan: Plan, seed: int) -> Rows:
    """One run, gone on with step by step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(plan.em_steps + 1):
            drawn = sampled_laplace(
                model, LOSS, data[0], plan.samples, step, False, seed, match=None, checkpoint=Path(folder) / "run"
            )
            rows.append(_row(step, float(drawn.prior_precision), drawn.effective_dimension, drawn, data))
    return rows


def claims(rows: Rows) -> list[Claim]:
    """Whether EM by samples ends where the exact one does, and whether its steps make predictions better."""
    last = {row["kind"]: row for row in rows}
    one, two = last["sampled"], last["exact"]
    found: list[Claim] = [
        (f"EM by samples finds the {label} that the exact matrix finds, within {CLOSE:.0%}",
         abs(one[key] / two[key] - 1) <= CLOSE, f"{number(one[key], 4)} against {number(two[key], 4)}")
        for key, label in MEASURES[:2]
    ]  # fmt: skip
    off = {key: max(abs(a[key] - b[key]) for a, b in _pairs(rows)) for key in ("nll", "ece")}
    told = f"likelihood by up to {fixed(off['nll'], None, 3)}, calibration by up to {fixed(off['ece'], None, 3)}"
    found.append(("and its predictions are as good at every step, within .02", max(off.values()) <= 0.02,
                  f"they differ in {told}"))  # fmt: skip
    first = next(row for row in rows if row["kind"] == "sampled")
    better = one["nll"] < first["nll"] and one["ece"] < first["ece"]
    told = f"{fixed(first['nll'], None, 3)} to {fixed(one['nll'], None, 3)}, "
    told += f"{fixed(first['ece'], None, 3)} to {fixed(one['ece'], None, 3)}"
    found.append(("The steps of EM make likelihood and calibration better than the first precision's", better, told))
    return found


def _pairs(rows: Rows) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    exact, drawn = ([row for row in rows if row["kind"] == kind] for kind in ("exact", "sampled"))
    return list(zip(drawn, exact, strict=True))


def section(rows: Rows, hidden: int) -> Section:
    """Four curves over the steps, and their table."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(MEASURES))
        for axis, (key, label) in zip(axes, MEASURES, strict=True):
            for color, style, kind in ((SERIES[0], "o-", "exact"), (SERIES[1], "s--", "sampled")):
                mine = [row for row in rows if row["kind"] == kind]
                axis.plot(
                    [r["step"] for r in mine], [r[key] for r in mine], style, color=color, label=kind, markersize=4
                )
            axis.set(title=label, xlabel="EM step")
            whole_axis(axis.xaxis)
        axes[0].legend(fontsize=7)

    table = Table(
        "EM step by step",
        ["by", "step", "precision", "effective dimension", "likelihood", "calibration", "noise told"],
        [[row["kind"], str(row["step"]), number(row["precision"], 4), number(row["dimension"], 4),
          *(fixed(row[key], None, 3) for key in ("nll", "ece", "auroc"))] for row in rows],
    )  # fmt: skip
    about = f"EM of one precision on the 64-{hidden}-10 network, by the exact matrix and by samples; plain predictions."
    return Section(
        "em", "EM by samples", [], [Panel(inline_svg("em", about, (10.5, 2.7), draw), about, [table], wide=True)]
    )
