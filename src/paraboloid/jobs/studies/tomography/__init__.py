"""Tomography with uncertainty: the linearised deep image prior on generated pictures (after arXiv:2203.00479).

Characters of 28 x 28 pixels from 5 to 30 angles with 5 and 10 per cent of noise: the posterior's mean against total
variation and the network's own image, its density of the true image against one variance for all pixels and against
Monte Carlo dropout, and what its intervals cover. The phantom of Shepp and Logan from few angles and from noisy ones,
with maps. Which angles to add, by the posterior, equidistant or at random. Evidence formed exactly against the one by
products alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import interpolate

from paraboloid.jobs.studies.parts import Progress, listed, run_parts
from paraboloid.jobs.studies.tomography import choices, maps
from paraboloid.jobs.studies.tomography.cells import cells_of
from paraboloid.jobs.studies.tomography.page import sections
from paraboloid.jobs.studies.tomography.plan import Plan
from paraboloid.jobs.studies.tomography.reading import findings
from paraboloid.problems.curves import SIZE
from paraboloid.problems.pictures import draw_characters, phantom

__all__ = ["TITLE", "Plan", "findings", "measure", "pieces", "plan", "sections"]

TITLE = "Tomography that knows where it may be wrong"


def plan(full: bool) -> Plan:
    return Plan.full() if full else Plan()


def pieces(plan: Plan) -> dict[str, int]:
    """How many reconstructions, or groups of them, each part makes."""
    return {"cells": plan.images * len(plan.angles) * len(plan.noise), "maps": len(plan.phantom_angles),
            "choices": plan.characters, "agreement": 1}  # fmt: skip


def measure(plan: Plan, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Every part of the study, as plain data."""
    rows = {"cells": _cells, "maps": _maps, "choices": _choices, "agreement": _agreement}
    parts = {part: listed(run) for part, run in rows.items()}
    return run_parts(parts, plan, seed, progress, pieces(plan))


def _characters(plan: Plan, count: int, seed: int) -> torch.Tensor:
    drawn = torch.from_numpy(draw_characters(count, seed))
    return drawn if plan.size == SIZE else interpolate(drawn.unsqueeze(1), size=plan.size, mode="area")[:, 0]


def _cells(plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    for i, truth in enumerate(_characters(plan, plan.images, seed)):
        for row in cells_of(truth, plan, 1000 * (seed + i)):
            yield {"image": i, **row}


def _maps(plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    truth = torch.from_numpy(phantom(plan.phantom))
    for name, angles, level in zip(maps.CASES, plan.phantom_angles, plan.phantom_noise, strict=False):
        yield maps.case(truth, name, angles, level, plan, seed)


def _choices(plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    for i, truth in enumerate(_characters(plan, plan.characters, seed + 1)):
        yield choices.curve(truth, plan.noise[0], plan, seed + i)


def _agreement(plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    yield maps.agreement(_characters(plan, 1, seed)[0], plan.angles[0], plan.noise[0], plan, seed)
