"""Parallel Thompson sampling: functions drawn from the posterior, each asks for the value at its own maximum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid import gp
from paraboloid.gp.prior import PriorFunctions
from paraboloid.jobs.studies.gp.plan import Plan

START, CANDIDATES, NOISE = 200, 2000, 1e-3


def optimise(plan: Plan, seed: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """The best value so far of a function drawn from the prior, over rounds, against random search."""
    g = torch.Generator().manual_seed(seed)
    kernel, d = gp.Matern(1.5, 0.5), plan.dimensions

    def uniform(count: int) -> Tensor:
        return torch.rand(count, d, generator=g, dtype=torch.float64)

    secret = PriorFunctions(kernel, 1, 2048, uniform(1), g)

    def observed(x: Tensor) -> tuple[Tensor, Tensor]:
        value = secret(x)[0]
        return value, value + NOISE**0.5 * torch.randn(len(x), generator=g, dtype=x.dtype)

    x = uniform(START)
    value, y = observed(x)
    best = {"thompson": float(value.max()), "random": float(value.max())}
    rows = [{"round": 0, **best}]
    process = gp.condition(kernel, x, y, NOISE, samples=plan.batch, seed=seed, features=512)
    for k in range(1, plan.rounds + 1):
        near = process.x[process.y.argmax()] + 0.05 * torch.randn(CANDIDATES // 2, d, generator=g, dtype=x.dtype)
        candidates = torch.cat([uniform(CANDIDATES // 2), near.clamp(0, 1)])
        chosen = candidates[process.sample(candidates).argmax(1).unique()]
        value, y = observed(chosen)
        process = process.append(chosen, y)
        best["thompson"] = max(best["thompson"], float(value.max()))
        best["random"] = max(best["random"], float(observed(uniform(plan.batch))[0].max()))
        rows.append({"round": k, **best})
        tick()
    return rows
