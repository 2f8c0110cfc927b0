"""The main job: train a problem, then measure its gradient noise, curvature and the bias of mini-batch quadratics."""

from paraboloid.jobs.inspection.job import NOISE_ONLY, STAGES, inspect
from paraboloid.jobs.inspection.plan import Plan

__all__ = ["NOISE_ONLY", "STAGES", "Plan", "inspect"]
