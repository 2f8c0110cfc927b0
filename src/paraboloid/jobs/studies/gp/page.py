"""The page of the study: findings, convergence by region, regression sets, Thompson sampling."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paraboloid.jobs.studies.claims import claims_table
from paraboloid.jobs.studies.gp.convergence import SOLVERS, SYSTEMS
from paraboloid.jobs.studies.gp.reading import claims
from paraboloid.jobs.studies.gp.regression import PUBLISHED
from paraboloid.report.numbers import fixed, number, percent
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, OTHER, SERIES, inline_svg

NARROW = 0.03  # half of the least range of likelihoods that is drawn: what differs by less is alike
REGIONS = ("interpolation", "extrapolation", "prior")


def sections(results: dict[str, Any]) -> list[Section]:
    """Findings with the curves, regression sets, Thompson sampling."""
    table = claims_table("The papers' findings, and what was measured here", claims(results))
    title = "Error of the mean by region, over passes through the kernel matrix"
    panel = Panel(inline_svg("convergence", title, (10.5, 5.6), lambda f: _curves(f, results["convergence"])),
                  f"{title}; relative to the prior's standard deviation. cg ends at its tolerance.",
                  [table], wide=True)  # fmt: skip
    return [
        Section("findings", "Findings", [], [panel]),
        Section("regression", "Regression sets", [], [_regression(results["regression"])]),
        Section("thompson", "Parallel Thompson sampling", [], [_thompson(results["thompson"])]),
    ]


def _curves(figure: Figure, rows: list[dict[str, Any]]) -> None:
    grid = figure.subplots(len(SYSTEMS), len(REGIONS), squeeze=False, sharex=True)
    for i, system in enumerate(SYSTEMS):
        for j, region in enumerate(REGIONS):
            ax = grid[i][j]
            for k, solver in enumerate(SOLVERS):
                mine = [r for r in rows if r["system"] == system and r["solver"] == solver]
                ax.plot([r["passes"] for r in mine], [max(r[region], 1e-12) for r in mine], marker="o", markersize=3,
                        color=SERIES[k % len(SERIES)], label=solver)  # fmt: skip
            ax.set(xscale="log", yscale="log")
            if i == 0:
                ax.set_title(region)
            if j == 0:
                ax.set_ylabel(system)
            if i:
                ax.set_xlabel("passes")
    grid[0][0].legend(fontsize=7)


def _regression(rows: list[dict[str, Any]]) -> Panel:
    names, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("set", "method"))

    def draw(figure: Figure) -> None:
        for i, (ax, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
            found = {r["method"]: r["nll"] for r in rows if r["set"] == name}
            for k, method in enumerate(methods):
                ax.plot([found[method]], [k], marker="o", color=SERIES[k % len(SERIES)])
            low, high = min(found.values()), max(found.values())
            half = max(0.65 * (high - low), NARROW)
            ax.set(title=name, xlabel="test NLL", ylim=(len(methods) - 0.5, -0.5))
            ax.set_xlim((low + high) / 2 - half, (low + high) / 2 + half)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.set_yticks(range(len(methods)), methods if i == 0 else [""] * len(methods))

    cells = [[r["set"], r["method"], fixed(r["rmse"], None, 3), fixed(r["nll"], None, 3), percent(r["coverage"]),
              number(r["seconds"])] for r in rows]  # fmt: skip
    tables = [Table("Standardised targets; hyperparameters by the evidence of 500 samples",
                    ["set", "method", "RMSE", "NLL", "coverage of 95 %", "seconds"], cells)]  # fmt: skip
    published = [[n, m, fixed(v, None)] for n in names for m, v in PUBLISHED.get(n, {}).items()]
    if published:
        tables.append(Table("Published (arXiv:2505.13723)", ["set", "method", "NLL"], published))
    svg = inline_svg("regression", "Test NLL of every method", (10.5, 3.6), draw)
    return Panel(svg, "Mean negative log likelihood of test targets.", tables, wide=True)


def _thompson(rows: list[dict[str, Any]]) -> Panel:
    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for name, color in (("thompson", OTHER), ("random", FULL)):
            ax.plot([r["round"] for r in rows], [r[name] for r in rows], marker="o", color=color, label=name)
        ax.set(xlabel="round", ylabel="best value")
        ax.legend()

    cells = [[str(r["round"]), fixed(r["thompson"], None), fixed(r["random"], None)] for r in rows]
    table = Table("Best value found", ["round", "Thompson sampling", "random"], cells, folded=True)
    svg = inline_svg("thompson", "Best value over rounds", (7.4, 3.2), draw)
    return Panel(svg, "Best value found of a function drawn from the prior.", [table])
