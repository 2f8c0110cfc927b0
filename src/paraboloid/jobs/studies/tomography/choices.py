"""Which angles to add: those that the posterior would learn most from, equidistant ones, or random ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paraboloid import tomography
from paraboloid.jobs.studies.tomography import scores
from paraboloid.jobs.studies.tomography.cells import observed
from paraboloid.jobs.studies.tomography.plan import Plan

RULES = ("posterior", "equidistant", "random")


def curve(truth: Tensor, level: float, plan: Plan, seed: int) -> dict[str, Any]:
    """PSNR of the posterior's mean after so many more angles, by each rule; every rule starts from the same few."""
    first = torch.arange(plan.start, dtype=torch.float64) * math.pi / plan.start
    start = _posterior(truth, first, level, plan, seed)
    rest = (torch.arange(plan.candidates, dtype=torch.float64) + 0.5) * math.pi / plan.candidates
    ranked, gains = tomography.best_angles(start, rest, max(plan.chosen))
    shuffled = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[str, Any] = {rule: [scores.psnr(start.mean, truth)] for rule in RULES}
    for count in plan.chosen:
        total = plan.start + count
        angles = {
            "posterior": torch.cat([first, rest[ranked[:count]]]),
            "equidistant": torch.arange(total, dtype=torch.float64) * math.pi / total,
            "random": torch.cat([first, rest[shuffled[:count]]]),
        }
        for rule in RULES:
            found[rule].append(scores.psnr(_posterior(truth, angles[rule], level, plan, seed).mean, truth))
    return {"seed": seed, "noise": level, "angles": [plan.start, *(plan.start + count for count in plan.chosen)],
            "chosen": [float(rest[i]) for i in ranked], "gains": gains.tolist(), **found}  # fmt: skip


def _posterior(truth: Tensor, angles: Tensor, level: float, plan: Plan, seed: int) -> tomography.ImagePosterior:
    A = tomography.ParallelBeam(truth.shape[-1], angles)
    y, s2 = observed(A, truth, level, seed)
    fit = tomography.deep_image_prior(A, y, s2, seed, iterations=plan.iterations)
    return tomography.linearised(fit, samples=plan.samples, seed=seed)
