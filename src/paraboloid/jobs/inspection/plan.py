"""How much is measured, and how it is cut down where a model is too large for that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from paraboloid import problems
from paraboloid.data.batches import call
from paraboloid.problems import Problem

PROBE = 8  # samples on which everything is tried before the training begins
GRADIENT = 3  # floating-point operations of forward and backward pass, in forward passes


@dataclass(frozen=True)
class Plan:
    """How much is measured: `Plan()` is the full report, `Plan.quick()` a first look in a fraction of the time.

    Batch sizes of which the data does not hold two are left out, and the training's own is added. `budget` and
    `training_budget` are floating-point operations; 10^10 a second is usual for small models on one core.
    """

    evaluations: int = 60  # of the losses, during the training
    checkpoints: int = 8  # at which the gradient noise is measured, spaced geometrically
    directions: int = 10
    density_samples: int = 5
    density_steps: int = 60  # of Lanczos, for each of them
    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    repeats: int = 15
    samples: int = 2048  # training samples that are measured, at most
    budget: float | None = 6e12  # for the measurements; fewer samples and repeats are taken where it would be exceeded
    training_budget: float | None = None  # the training is cut short where it would be exceeded
    curvature: str = "ggn"  # or "hessian", "kfac", "ekfac": the matrix of the curvature section
    draws: int = 20  # of each estimator of the gradient at each checkpoint, where they are compared
    is_quick: bool = False

    @classmethod
    def quick(cls, **changes: Any) -> Plan:
        """Fewer checkpoints, directions, batch sizes, samples and repeats, and of a long training only the start."""
        fewer: dict[str, Any] = {
            "evaluations": 12,
            "checkpoints": 4,
            "directions": 5,
            "density_samples": 1,
            "density_steps": 40,
            "batch_sizes": (32, 256),
            "repeats": 5,
            "draws": 10,
            "samples": 1024,
            "budget": 3e11,
            "training_budget": 2e11,
            "is_quick": True,
        }
        return cls(**{**fewer, **changes})


def fitted(plan: Plan, problem: Problem) -> tuple[Plan, int]:
    """The plan within its budgets, as far as sensible, and the number of training steps.

    Samples are halved, but at least four of the smallest batches remain; then repeats (at least 3) and vectors of the
    density (at least 1); a quick plan then takes fewer density steps, and evaluates the losses no more
    often than the training budget holds. The same problem and plan always give the same.
    """
    cost = GRADIENT * forward_operations(problem)
    steps = problems.step_count(problem)
    if plan.training_budget is not None:
        steps = min(steps, max(10, round(plan.training_budget / (cost * problem.training.batch_size))))
        once = forward_operations(problem) * (len(problem.train) + len(problem.test))  # the losses, on all of both sets
        evaluations = max(3, min(plan.evaluations, round(plan.training_budget / once)))
        plan = dataclasses.replace(plan, evaluations=evaluations)
    plan = dataclasses.replace(plan, samples=min(plan.samples, len(problem.train)))
    if (budget := plan.budget) is None:
        return plan, steps
    least = 4 * min(plan.batch_sizes)
    while _work(plan, problem) * cost > budget and plan.samples // 2 >= least:
        plan = dataclasses.replace(plan, samples=plan.samples // 2)
    while _work(plan, problem) * cost > budget and (plan.repeats > 3 or plan.density_samples > 1):
        plan = dataclasses.replace(
            plan, repeats=max(3, plan.repeats // 2), density_samples=max(1, plan.density_samples // 2)
        )
    if plan.is_quick and _work(plan, problem) * cost > budget:
        plan = dataclasses.replace(plan, density_steps=min(20, plan.density_steps))
    return plan, steps


def batch_sizes(problem: Problem, plan: Plan) -> tuple[list[int], list[int]]:
    """The batch sizes to measure, and those left out for want of two disjoint batches; ValueError if none remains."""
    size = min(len(problem.train), plan.samples)
    wanted = sorted({*plan.batch_sizes, problem.training.batch_size})
    fit = _fitting(wanted, size)
    if not fit:
        raise ValueError(
            f"{size} training samples are too few: two disjoint batches of {wanted[0]}, the smallest batch size asked "
            f"for, need {2 * wanted[0]}. Ask for smaller ones, for example --batch-sizes {max(1, size // 4)}."
        )
    return fit, [m for m in wanted if m not in fit]


def forward_operations(problem: Problem) -> float:
    """Floating-point operations of a forward pass of one sample, at least two for each parameter.

    Those of matrix products, convolutions and attention are counted, which are nearly all.
    """
    parameters = list(problem.model.parameters())
    inputs, _ = problems.read(problem.train, torch.arange(min(PROBE, len(problem.train))), parameters[0].device)
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:  # without gradients a transformer layer is one fused call that is not counted
        samples = len(call(problem.model, inputs))
    return max(counter.get_total_flops() / samples, 2.0 * sum(p.numel() for p in parameters if p.requires_grad))


def _work(plan: Plan, problem: Problem) -> float:
    """Gradients of single samples that the measurements cost, roughly; a product with the GGN counts two."""
    sizes = _fitting({*plan.batch_sizes, problem.training.batch_size}, plan.samples)
    eigen = 2 * (20 + 3 * plan.directions)
    density = 2 * plan.density_samples * plan.density_steps
    pairs = plan.repeats * (eigen * sum(sizes) + plan.directions * len(sizes) * plan.samples)
    return (2 * eigen + density) * plan.samples + pairs  # all data's eigenvectors: shown, and compared with batches'


def _fitting(sizes: Sequence[int] | set[int], samples: int) -> list[int]:
    return sorted(m for m in sizes if 2 * m <= samples)
