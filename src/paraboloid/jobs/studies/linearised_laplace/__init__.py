"""Linearised Laplace: the evidence that fails, its repair, and what it is worth (after arXiv:2206.08900, 2404.19157).

Small networks on 400 digits, stopped early and trained long; the exact curvature against approximate ones; the prior by
evidence at the trained weights, at the optimum of the linearised model, and predictions matched to the network's
confidence; weights in front of a normalisation rescaled.  Every claim is listed with what was measured, seen or not.
"""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.studies.linearised_laplace.em import steps
from paraboloid.jobs.studies.linearised_laplace.growth import grown, methods
from paraboloid.jobs.studies.linearised_laplace.measurements import evidence, rescaling
from paraboloid.jobs.studies.linearised_laplace.page import sections
from paraboloid.jobs.studies.linearised_laplace.plan import Plan
from paraboloid.jobs.studies.linearised_laplace.reading import findings
from paraboloid.jobs.studies.parts import Progress, run_parts

__all__ = ["PARTS", "TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections"]

TITLE = "Linearised Laplace: evidence, its repair, and confidence"
PARTS = {"evidence": evidence, "rescaling": rescaling, "em": steps, "growth": grown}


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def pieces(plan: Plan) -> dict[str, int]:
    """How many ticks each part of the study makes."""
    moments = len(plan.networks) * plan.seeds * len(plan.epochs)
    grown = sum(len(methods(plan, *each)) for each in plan.growing)
    return {"evidence": moments * len(plan.structures), "rescaling": len(plan.factors), "em": 2 * (plan.em_steps + 1),
            "growth": grown}  # fmt: skip


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Every part of the study, as plain data."""
    return run_parts(PARTS, plan, seed, progress, pieces(plan))
