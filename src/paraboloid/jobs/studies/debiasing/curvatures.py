"""Curvatures: the table of digits-tanh, problems along training, Kronecker factors, a grid of networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid import problems
from paraboloid.jobs.studies.debiasing.plan import Plan
from paraboloid.jobs.studies.debiasing.trained import pairs, states, whole
from paraboloid.losses import Loss
from paraboloid.operators import KFLR
from paraboloid.problems import Problem
from paraboloid.quadratics.bias_result import Bias
from paraboloid.quadratics.local_model import quadratic
from paraboloid.quadratics.measure_bias import bias
from paraboloid.quantities.door import statistics

Tick = Callable[[], None]


def table(plan: Plan, seed: int, tick: Tick) -> dict[str, Any]:
    """digits-tanh before and after training: curvatures along top eigenvectors, and the batch gradient's norm."""
    rows = []
    for moment, problem in states("digits-tanh", (0.0, 1.0), seed):
        g = gradients(problem, plan.weight_decay)
        mean, N = g.mean(0), len(g)
        S = (g - mean).square().sum() / (N - 1)
        for m in plan.sizes:
            found = measured(problem, m, plan.table_repeats, plan.k, plan, seed)
            generator = torch.Generator().manual_seed(seed)
            squares = torch.stack([
                g[torch.randperm(N, generator=generator)[:m]].mean(0).square().sum() for _ in range(plan.table_repeats)
            ]) / mean.square().sum()  # fmt: skip
            rows.append({
                "moment": moment, "batch_size": m, **summary(found, plan.k),
                "gradient": {
                    "value": squares.mean().item(), "standard_error": (squares.std() / len(squares) ** 0.5).item(),
                    "formula": (1 + (1 - m / N) * S / m / mean.square().sum()).item(),
                },
            })  # fmt: skip
            tick()
    return {"problem": "digits-tanh", "k": plan.k, "repeats": plan.table_repeats, "rows": rows}


def gradients(problem: Problem, weight_decay: float) -> Tensor:
    """Individual gradients with the weight decay's, [N, D]."""
    loss = Loss.from_torch(problem.loss_fn)
    found = statistics(problem.model, loss, whole(problem), ["sample_grads"])["sample_grads"]
    decay = torch.cat([p.detach().flatten() for p in problem.model.parameters()]) * weight_decay
    return torch.cat([g.flatten(1) for g in found.values()], 1) + decay


def along_training(plan: Plan, seed: int, tick: Tick) -> dict[str, Any]:
    """Top eigenvectors on every problem, at initialisation and along training."""
    rows = []
    for name in plan.problems:
        for moment, problem in states(name, plan.moments, seed):
            for m in plan.sizes:
                found = measured(problem, m, plan.repeats, plan.k, plan, seed)
                rows.append({"problem": name, "moment": moment, "batch_size": m, **summary(found, plan.k)})
                tick()
    return {"k": plan.k, "repeats": plan.repeats, "rows": rows}


def measured(problem: Problem, m: int, repeats: int, k: int, plan: Plan, seed: int) -> Bias:
    """Batches differ between batch sizes, so that one unlucky draw does not show in all of them."""
    return bias(
        problem.model, problem.loss_fn, problem.train, m, k=k, repeats=repeats, weight_decay=plan.weight_decay,
        seed=1000 * seed + m,
    )  # fmt: skip


def summary(found: Bias, k: int) -> dict[str, Any]:
    """Ratios of sums to all data, along the top direction and over k."""
    return {
        which: {
            "top": {"value": found.total_ratio(which, 1), "standard_error": found.total_standard_error(which, 1)},
            "sum": {"value": found.total_ratio(which, k), "standard_error": found.total_standard_error(which, k)},
        }
        for which in ("same", "other")
    }


def factors(plan: Plan, seed: int, tick: Tick) -> dict[str, Any]:
    """Kronecker eigenvectors of a batch: both kinds of eigenvalue on it, on another batch and on all data."""
    rows = []
    for name in plan.factor_problems:
        ((_, problem),) = states(name, (1.0,), seed)
        model, loss_fn = problem.model, problem.loss_fn
        all_kron, all_exact = KFLR(model, loss_fn, whole(problem)), quadratic(model, loss_fn, whole(problem)).curvature
        for m in plan.sizes:
            kron: dict[str, list[Tensor]] = {"same": [], "other": [], "full": []}
            exact: dict[str, list[Tensor]] = {"same": [], "other": [], "full": []}
            for batch, other in pairs(problem, m, plan.factor_repeats, 1000 * seed + m):
                q, q2 = (quadratic(model, loss_fn, b) for b in (batch, other))
                D = q.kron_directions(plan.factor_directions)
                places = (("same", batch, q.curvature), ("other", other, q2.curvature))
                for which, data, curvature in places:
                    kron[which].append(KFLR(model, loss_fn, data).quadratic_forms(D))
                    exact[which].append(curvature.quadratic_forms(D))
                kron["full"].append(all_kron.quadratic_forms(D))
                exact["full"].append(all_exact.quadratic_forms(D))
            for kind, values in (("kronecker", kron), ("exact", exact)):
                found = {which: torch.stack(v).double() for which, v in values.items()}
                result = Bias(found, {}, m, len(problem.train), "kfac", "ggn", 0.0, seed)
                rows.append({"problem": name, "batch_size": m, "eigenvalue": kind,
                             **summary(result, plan.factor_directions)})  # fmt: skip
            tick()
    return {"k": plan.factor_directions, "repeats": plan.factor_repeats, "rows": rows}


def grid(plan: Plan, seed: int, tick: Tick) -> dict[str, Any]:
    """shapes-cnn over widths and depths, each network measured at the same training loss."""
    rows = []
    for depth in plan.depths:
        for width in plan.widths:
            problem, point = until(plan, width, depth, seed)
            size = sum(p.numel() for p in problem.model.parameters())
            for m in plan.grid_sizes:
                found = measured(problem, m, plan.grid_repeats, plan.grid_k, plan, seed)
                rows.append({
                    "width": width, "depth": depth, "parameters": size, "train_loss": point["train_loss"],
                    "epoch": point["epoch"], "batch_size": m, **summary(found, plan.grid_k),
                })  # fmt: skip
                tick()
    return {"k": plan.grid_k, "repeats": plan.grid_repeats, "samples": plan.grid_samples, "loss": plan.grid_loss,
            "rows": rows}  # fmt: skip


def until(plan: Plan, width: float, depth: int, seed: int) -> tuple[Problem, dict[str, Any]]:
    """The network when its training loss first falls to the plan's, or at the end of the training."""
    problem = problems.load("shapes-cnn", seed=seed, samples=plan.grid_samples, width=width, depth=depth)
    problem = dataclasses.replace(problem, training=dataclasses.replace(problem.training, lr=2e-3))
    kept: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def keep(step: int, model: torch.nn.Module, point: dict[str, Any]) -> None:
        if not kept or kept[-1][0]["train_loss"] > plan.grid_loss:
            kept[:] = [(point, {k: v.detach().clone() for k, v in model.state_dict().items()})]

    problems.train(problem, seed, epochs=plan.grid_epochs, evaluations=plan.grid_epochs, callback=keep)
    point, state = kept[0]
    problem.model.load_state_dict(state)
    return problem, point
