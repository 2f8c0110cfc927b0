"""The page of the study: the findings, and for each problem its curves, winners and grids."""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.studies.claims import claims_table
from paraboloid.jobs.studies.comparing.page import CAPTION, curves, grids, winners
from paraboloid.jobs.studies.comparing.summary import summaries
from paraboloid.jobs.studies.quasi_newton.reading import claims
from paraboloid.report.numbers import count, short
from paraboloid.report.section import Panel, Section


def sections(results: dict[str, Any]) -> list[Section]:
    """One for each problem."""
    return [_section(problem) for problem in results["problems"]]


def _section(problem: dict[str, Any]) -> Section:
    found = summaries(problem)
    table = claims_table("The paper's findings and the goals, and what was measured", claims(problem))
    name, title = problem["name"], f"Training and test loss on {problem['name']}"
    samples, size = count(problem["samples"]), count(problem["batch_size"])
    reading = [f"{samples} samples, batches of {size}, {short(problem['epochs'])} epochs."]
    return Section(
        name,
        name,
        reading,
        [Panel(curves(name, title, found), f"{title}, {CAPTION}", [table, winners(found), grids(problem)], wide=True)],
    )
