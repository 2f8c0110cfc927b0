"""What mini-batches do to quadratic models, and what a second batch mends: the evidence (after arXiv:2410.14325).

The curvature of digits-tanh along a batch's own eigenvectors; three problems along training; shapes-cnn over widths
and depths; Kronecker factors; the loss along conjugate-gradient steps; Laplace posteriors fitted on few samples.  Every
ratio is a sum over repeats divided by the same sum for all data.  What is not better is said as plainly as what is.
"""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.studies.debiasing.curvatures import along_training, factors, grid, table
from paraboloid.jobs.studies.debiasing.laplace_posteriors import posteriors
from paraboloid.jobs.studies.debiasing.newton_steps import steps
from paraboloid.jobs.studies.debiasing.page import sections
from paraboloid.jobs.studies.debiasing.plan import Plan
from paraboloid.jobs.studies.debiasing.reading import findings
from paraboloid.jobs.studies.parts import Progress, run_parts

__all__ = ["PARTS", "TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections"]

TITLE = "The bias of mini-batch quadratics, and debiasing"
PARTS = {
    "table": table, "training": along_training, "grid": grid, "factors": factors, "steps": steps,
    "posteriors": posteriors,
}  # fmt: skip


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def pieces(plan: Plan) -> dict[str, int]:
    """How many ticks each part of the study makes."""
    return {
        "table": 2 * len(plan.sizes),
        "training": len(plan.problems) * len(plan.moments) * len(plan.sizes),
        "grid": len(plan.depths) * len(plan.widths) * len(plan.grid_sizes),
        "factors": len(plan.factor_problems) * len(plan.sizes),
        "steps": len(plan.step_problems) * len(plan.step_moments) * len(plan.step_sizes),
        "posteriors": len(plan.posterior_problems) * len(plan.priors) * len(plan.posterior_sizes),
    }


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Every part of the study, as plain data."""
    return run_parts(PARTS, plan, seed, progress, pieces(plan))
