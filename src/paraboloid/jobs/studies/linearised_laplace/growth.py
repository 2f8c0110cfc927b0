"""Posteriors as the network grows: what each costs, what it is worth, and whether the last layer is enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from paraboloid.jobs.studies.claims import Claim
from paraboloid.jobs.studies.linearised_laplace.measurements import Split, Tick, quality, split, trained
from paraboloid.jobs.studies.linearised_laplace.pieces import once
from paraboloid.jobs.studies.linearised_laplace.plan import Plan
from paraboloid.passes.random_state import seeded
from paraboloid.posteriors import laplace, sampled_laplace
from paraboloid.report.axes import log_axis
from paraboloid.report.numbers import fixed, number
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, SERIES, inline_svg

LOSS = nn.CrossEntropyLoss()
ROWS = 10**8  # numbers of the exact curvature's rows up to which the functional posterior takes part
NUMBERS = 4 * 10**7  # of posterior samples: larger networks have fewer of them
LEAST = 4
Rows = list[dict[str, Any]]
MEASURES = (
    ("seconds", "processor seconds"), ("nll", "negative log-likelihood"), ("ece", "calibration error"),
    ("auroc", "noise told, AUROC"),
)  # fmt: skip


def network(hidden: int, layers: int = 1) -> nn.Sequential:
    """64-hidden-...-10 with tanh."""
    sizes = [64, *[hidden] * layers]
    inner = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*inner, nn.Linear(hidden, 10))


def weights(hidden: int, layers: int) -> int:
    """How many such a network has."""
    with torch.device("meta"):
        return sum(p.numel() for p in network(hidden, layers).parameters())


def methods(plan: Plan, hidden: int, layers: int) -> dict[str, int]:
    """Name -> number of samples, 0 where there are none; functional where its rows are few enough to keep."""
    size = weights(hidden, layers)
    samples = max(min(plan.samples, NUMBERS // size), LEAST)
    found = {"network": 0, "last layer": 0, "kron": 0, "sampled": samples}
    return {**found, "functional": 0} if 10 * plan.train * size <= ROWS else found


def fitted(method: str, model: nn.Module, data: Split, samples: int, seed: int) -> Callable[[Any], Any]:
    """How to predict after fitting and tuning with the defaults."""
    if method == "network":
        return lambda x: model(x).detach().softmax(1)
    if method == "sampled":
        return sampled_laplace(model, LOSS, data[0], samples, seed=seed).predict
    structure, chosen = ("functional", "all") if method == "functional" else ("kron", "all")
    chosen = "last_layer" if method == "last layer" else chosen
    return laplace(model, LOSS, data[0], structure, chosen, seed=seed).tune_prior().predict


def grown(plan: Plan, seed: int, tick: Tick) -> Rows:
    """Processor seconds, those of predictions included, and the worth of each posterior for each network."""
    rows = []
    for hidden, layers in plan.growing:
        for method, samples in methods(plan, hidden, layers).items():
            what = {"part": "growth", "hidden": hidden, "layers": layers, "method": method, "samples": samples}
            found = once(plan, partial(_measured, plan, hidden, layers, method, samples, seed), **what, seed=seed)
            rows.append({"method": method, "weights": weights(hidden, layers), "samples": samples, **found})
            tick()
    return rows


def _measured(plan: Plan, hidden: int, layers: int, method: str, samples: int, seed: int) -> dict[str, float]:
    model, data = _trained(plan, hidden, layers, seed)
    _, test, noise = data
    start = time.process_time()
    predict = fitted(method, model, data, samples, seed)
    found = quality(predict(test[0]), predict(noise), test[1])
    return {"seconds": time.process_time() - start, **found}


@lru_cache(1)
def _trained(plan: Plan, hidden: int, layers: int, seed: int) -> tuple[nn.Module, Split]:
    data = split(plan, seed)
    with seeded(seed):
        model = network(hidden, layers)
    return trained(model, data[0], plan.epochs[-1], seed), data


def claims(rows: Rows) -> list[Claim]:
    """Whether the last layer is enough at each size, whether any posterior costs likelihood, and what samples cost."""
    sizes = sorted({row["weights"] for row in rows})
    at = {(row["weights"], row["method"]): row for row in rows}
    whole = {size: max(at[size, m]["auroc"] for m in ("kron", "sampled")) for size in sizes}
    enough = [at[size, "last layer"]["auroc"] >= whole[size] - 0.01 for size in sizes]
    told = [f"{fixed(at[s, 'last layer']['auroc'], None, 3)} against {fixed(whole[s], None, 3)} with {number(s)}"
            for s in sizes]  # fmt: skip
    found: list[Claim] = [
        ("The last layer is enough: it tells noise as well as all weights, within .01, at every size", all(enough),
         f"{', '.join(told)} weights")
    ]  # fmt: skip
    posteriors = [row for row in rows if row["method"] != "network"]
    kept = [row["nll"] <= 1.02 * at[row["weights"], "network"]["nll"] for row in posteriors]
    found.append(("No posterior is less likely than the network by more than 2%, at any size", all(kept),
                  f"in {sum(kept)} of {len(kept)}"))  # fmt: skip
    pairs = [(at[size, "sampled"]["nll"], at[size, "kron"]["nll"]) for size in sizes]
    told = [f"{fixed(a, None, 3)} against {fixed(b, None, 3)}" for a, b in pairs]
    found.append(("Samples of all weights are as likely as Kronecker factors, within .02, at every size",
                  all(a <= b + 0.02 for a, b in pairs), ", ".join(told)))  # fmt: skip
    times = [at[size, "sampled"]["seconds"] / at[size, "kron"]["seconds"] for size in sizes]
    longer = f"{', '.join(number(t, 2) for t in times)} times as long, from the smallest network to the largest"
    found.append(("Samples of all weights take no longer than Kronecker factors", max(times) <= 1, longer))
    return found


def section(rows: Rows) -> Section:
    """Cost and worth over the number of weights."""
    sizes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("weights", "method"))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(MEASURES))
        for axis, (key, label) in zip(axes, MEASURES, strict=True):
            for i, name in enumerate(names):
                if name == "network" and key == "seconds":
                    continue
                mine = [row for row in rows if row["method"] == name]
                color, style = (FULL, "o:") if name == "network" else (SERIES[i % len(SERIES)], "o-")
                values = [row[key] for row in mine]
                axis.plot([row["weights"] for row in mine], values, style, color=color, label=name, markersize=4)
            axis.set(title=label, xlabel="weights")
            log_axis(axis.xaxis, sizes)
            if key == "seconds":
                log_axis(axis.yaxis, [row[key] for row in rows if row["method"] != "network"])
        axes[1].legend(fontsize=7)

    table = Table(
        "As the network grows",
        ["weights", "posterior", "samples", "processor seconds", "likelihood", "calibration", "noise told"],
        [[number(row["weights"]), row["method"], str(row["samples"] or ""),
          "" if row["method"] == "network" else number(row["seconds"]),
          *(fixed(row[key], None, 3) for key in ("nll", "ece", "auroc"))] for row in rows],
    )  # fmt: skip
    about = (
        "What posteriors cost and are worth as the network grows, fitted and tuned with their defaults, on one split."
    )
    panel = Panel(inline_svg("growth", about, (10.5, 2.9), draw), about, [table], wide=True)
    return Section("growth", "As the network grows", [], [panel])
