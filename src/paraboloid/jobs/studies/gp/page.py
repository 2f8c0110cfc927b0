"""The page of the study: findings, convergence by region, regression sets, Thompson sampling."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paraboloid.jobs.studies.gp.convergence import SOLVERS, SYSTEMS
from paraboloid.jobs.studies.gp.reading import claims
from paraboloid.jobs.studies.gp.regression import PUBLISHED
from paraboloid.report.numbers import fixed, number, percent
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, OTHER, SERIES, inline_svg

REGIONS = ("interpolation", "extrapolation", "prior")


def sections(results: dict[str, Any]) -> list[Section]:
    """Findings with the curves, regression sets, Thompson sampling."""
    words = {True: "seen", False: "not seen here", None: "not run"}
    table = Table("The papers' findings, and what was measured here", ["finding", "", "measured"],
                  [[claim, words[seen], measured] for claim, seen, measured in claims(results)])  # fmt: skip
    title = "Error of the mean by region, over passes through the kernel matrix"
    panel = Panel(inline_svg("convergence", title, (10.5, 5.6), lambda f: _curves(f, results["convergence"])),
                  f"{title}; relative to the prior's standard deviation.", [table], wide=True)  # fmt: skip
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
        ax = figure.subplots()
        for k, method in enumerate(methods):
            mine = {r["set"]: r["nll"] for r in rows if r["method"] == method}
            color = SERIES[k % len(SERIES)]
            ax.plot(range(len(names)), [mine[n] for n in names], marker="o", linestyle=":", color=color, label=method)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("test NLL")
        ax.legend(fontsize=7)

    cells = [[r["set"], r["method"], fixed(r["rmse"], None), fixed(r["nll"], None), percent(r["coverage"]),
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
