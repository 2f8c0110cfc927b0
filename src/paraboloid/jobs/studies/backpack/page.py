"""The page of the study: for each problem its findings, the curves of the trainings, and the costs."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paraboloid.jobs.studies.backpack.reading import claims
from paraboloid.jobs.studies.claims import claims_table
from paraboloid.jobs.studies.comparing.page import CAPTION, curves, grids, winners
from paraboloid.jobs.studies.comparing.summary import summaries
from paraboloid.report.numbers import count, number, short
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import INK, SERIES, inline_svg


def sections(results: dict[str, Any]) -> list[Section]:
    """One for each problem."""
    return [_section(problem) for problem in results["problems"]]


def _section(problem: dict[str, Any]) -> Section:
    name, found = problem["name"], summaries(problem)
    table = claims_table("The paper's findings, and what was measured", claims(problem))
    size = f"{count(problem['samples'])} samples, batches of {count(problem['batch_size'])}"
    reading = [f"{count(problem['parameters'])} parameters, {size}, {short(problem['epochs'])} epochs.",
               *problem["left_out"]]  # fmt: skip
    title = f"Training and test loss on {name}"
    return Section(name, name, reading, [
        Panel(curves(name, title, found), f"{title}, {CAPTION}", [table, winners(found), grids(problem)], wide=True),
        _costs(name, problem["costs"]),
    ])  # fmt: skip


def _costs(name: str, costs: list[dict[str, Any]]) -> Panel:
    title = f"Time of each quantity over that of a gradient, {name}"

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        values = [row["gradients"] for row in costs]
        spread = [[v - row["low"] for v, row in zip(values, costs, strict=True)],
                  [row["high"] - v for v, row in zip(values, costs, strict=True)]]  # fmt: skip
        ax.barh([row["quantity"] for row in costs], values, xerr=spread, color=SERIES[0], ecolor=INK)
        ax.axvline(1, color=INK, linewidth=1)
        ax.invert_yaxis()
        ax.set_xlabel("gradients")

    rows = [[row["quantity"], number(row["gradients"], 3), f"{number(row['low'], 3)} to {number(row['high'], 3)}"]
            for row in costs]  # fmt: skip
    table = Table("Median, and the middle half of the rounds", ["quantity", "gradients", ""], rows)
    return Panel(inline_svg(f"{name}-costs", title, (6.2, 3.8), draw), f"{title}.", [table])
