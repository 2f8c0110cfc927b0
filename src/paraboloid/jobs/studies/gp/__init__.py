"""Gaussian processes beyond Cholesky: solvers, predictions and decisions (after arXiv:2306.11589 and 2310.20581).

Where the mean of each solver is wrong on the way, in a well- and an ill-conditioned system; regression sets of
scikit-learn (or UCI sets of yours, in the papers' splits) against scikit-learn, GPyTorch (where it is installed) and
inducing inputs; Thompson sampling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paraboloid.jobs.studies.gp.convergence import SOLVERS, SYSTEMS, converge
from paraboloid.jobs.studies.gp.page import sections
from paraboloid.jobs.studies.gp.plan import Plan
from paraboloid.jobs.studies.gp.reading import findings
from paraboloid.jobs.studies.gp.regression import regress, uci_names
from paraboloid.jobs.studies.gp.thompson import optimise
from paraboloid.jobs.studies.parts import Progress, run_parts

__all__ = ["TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections", "with_data"]

TITLE = "Gaussian processes beyond Cholesky"
PARTS = {"convergence": converge, "regression": regress, "thompson": optimise}


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def with_data(plan: Plan, folder: str) -> Plan:
    """The UCI sets in the folder, each with data.txt and index files; ValueError where there is none."""
    names = uci_names(folder)
    if not names:
        raise ValueError(f"{folder} holds no UCI set: expected folders with data.txt and index_train_0.txt.")
    return replace(plan, sets=tuple(names), data=folder)


def pieces(plan: Plan) -> dict[str, int]:
    """How many ticks each part of the study makes."""
    return {"convergence": len(SYSTEMS) * len(SOLVERS), "regression": len(plan.sets), "thompson": plan.rounds}


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Every part of the study, as plain data."""
    return run_parts(PARTS, plan, seed, progress, pieces(plan))
