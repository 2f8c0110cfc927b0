"""Where each solver's mean is wrong on the way: far from the data, between it, and at it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid import gp
from paraboloid.jobs.studies.gp.plan import Plan

SOLVERS = ("cg", "block", "sdd", "sgd", "sgd, as published")
SYSTEMS = {"well conditioned": (0.1, 0.5), "ill conditioned": (1e-3, 0.5)}  # noise variance, lengthscale
GAP = 1.0  # half of the width of the hole in the data: extrapolation there, interpolation outside, prior beyond 6


def regions(x: Tensor) -> dict[str, Tensor]:
    """Which inputs belong to which region of the line."""
    far, hole = x.abs() > 6, x.abs() < GAP
    return {
        "interpolation": ~far & ~hole & (x.abs() < 4),
        "extrapolation": hole | (~far & (x.abs() >= 4)),
        "prior": far,
    }


def problem(points: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs on both sides of a hole, and sin(2 x) + cos(5 x) with noise."""
    g = torch.Generator().manual_seed(seed)
    x = (GAP + (4 - GAP) * torch.rand(points, generator=g, dtype=torch.float64)) * (
        1 - 2 * torch.randint(2, (points,), generator=g)
    )
    return x, torch.sin(2 * x) + torch.cos(5 * x) + noise**0.5 * torch.randn(points, generator=g, dtype=torch.float64)


def converge(plan: Plan, seed: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Root mean square error of the mean in each region over the prior's standard deviation, after so many passes."""
    line, rows = torch.linspace(-10, 10, 400, dtype=torch.float64), []
    for system, (noise, lengthscale) in SYSTEMS.items():
        x, y = problem(plan.points, noise, seed)
        kernel = gp.Matern(1.5, lengthscale)
        exact = gp.condition(kernel, x, y, noise, "cholesky", 0).mean(line)
        for solver in SOLVERS:
            for passes in plan.passes:
                mean, residual, used = after(kernel, x, y, noise, solver, passes, seed, line)
                errors = {name: float((mean - exact)[where].square().mean().sqrt())
                          for name, where in regions(line).items()}  # fmt: skip
                rows.append({"system": system, "solver": solver, "passes": used, "residual": residual, **errors})
            tick()
    return rows


def after(
    kernel: Any, x: Tensor, y: Tensor, noise: float, solver: str, passes: int, seed: int, line: Tensor
) -> tuple[Tensor, float | None, int]:
    """Mean, residual and passes: steps are what makes so many passes over the rows of K."""
    name, N = solver.split(",")[0], len(x)
    size = {"cg": N, "block": max(50, N // 10), "sdd": 64, "sgd": 128}[name]
    options: dict[str, Any] = {"steps": math.ceil(passes * N / size), "seed": seed, "samples": 0}
    if name == "cg":
        options["rank"] = max(10, N // 20)
    else:
        options["batch_size"] = size
    if solver != name:
        options["rank"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gp.condition(kernel, x, y, noise, name, **options)
    return found.mean(line), None if name == "sgd" else found.residual, passes
