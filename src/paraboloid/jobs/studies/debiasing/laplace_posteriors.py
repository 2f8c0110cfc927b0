"""Laplace posteriors fitted on few samples: test likelihood with biased and debiased Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from paraboloid.jobs.studies.debiasing.plan import Plan
from paraboloid.jobs.studies.debiasing.trained import CPU, Batch, pairs, states, take, whole
from paraboloid.posteriors import laplace
from paraboloid.problems import Problem

KINDS: dict[str, dict[str, Any]] = {
    "single": {"structure": "kron"},
    "single_exact": {"structure": "ekfac"},
    "debiased": {"structure": "kron", "debias": True},
    "debiased_exact": {"structure": "ekfac", "debias": True},
}


def posteriors(plan: Plan, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Mean negative log-likelihood of test samples, for posteriors of 2m samples taken for all N."""
    rows = []
    for name in plan.posterior_problems:
        ((_, problem),) = states(name, (1.0,), seed)
        test = take(problem.test, torch.arange(len(problem.test)), CPU)
        with torch.no_grad():
            map_nll = cross_entropy(problem.model(test[0]), test[1]).item()
        for prior in plan.priors:
            full = nll(problem, whole(problem), test, {"structure": "kron"}, prior, plan.draws, seed)
            for m in plan.posterior_sizes:
                found: dict[str, list[float]] = {kind: [] for kind in KINDS}
                for first, second in pairs(problem, m, plan.posterior_repeats, 1000 * seed + m):
                    both = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
                    for kind, options in KINDS.items():
                        found[kind].append(nll(problem, both, test, options, prior, plan.draws, seed))
                values = {kind: torch.tensor(v, dtype=torch.float64) for kind, v in found.items()}
                rows.append({
                    "problem": name, "prior_precision": prior, "batch_size": m, "map": map_nll, "full": full,
                    **{kind: moments(v) for kind, v in values.items()},
                    "debiased_minus_single": moments(values["debiased"] - values["single"]),
                })  # fmt: skip
                tick()
    return {"repeats": plan.posterior_repeats, "draws": plan.draws, "rows": rows}


def nll(
    problem: Problem, data: Batch, test: Batch, options: dict[str, Any], prior: float, draws: int, seed: int
) -> float:
    """Of predictions averaged over draws of the linearised outputs.

    The temperature makes the samples count as often as all data would: precision = N / n * GGN + prior.
    """
    share = len(data[1]) / len(problem.train)
    posterior = laplace(
        problem.model, problem.loss_fn, data, prior_precision=prior, temperature=share, seed=seed, **options
    )
    p = posterior.predict(test[0], link="mc", samples=draws, seed=seed)
    return -p[torch.arange(len(p)), test[1]].clamp(min=1e-12).log().mean().item()


def moments(values: Tensor) -> dict[str, float]:
    return {"value": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}
