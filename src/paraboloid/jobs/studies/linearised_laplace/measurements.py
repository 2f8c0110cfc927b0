"""Posteriors of small networks under each way to choose the prior, and under rescaled weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid import problems
from paraboloid.jobs.studies.linearised_laplace.pieces import once
from paraboloid.jobs.studies.linearised_laplace.plan import Plan
from paraboloid.jobs.uncertainty.scores import area, of_classes
from paraboloid.passes.random_state import seeded
from paraboloid.posteriors import laplace

WAYS: dict[str, tuple[str, str | None]] = {  # name -> method, match
    "evidence": ("evidence", None),
    "adapted": ("adapted", None),
    "adapted, exponent": ("adapted", "exponent"),
    "adapted, matched": ("adapted", "auto"),
}
BATCH, LR = 50, 3e-3
Tick = Callable[[], None]
Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]


def split(plan: Plan, seed: int) -> Split:
    """Training and test digits, and as many images of uniform noise."""
    problem = problems.load("digits-mlp", seed=seed)
    pairs = zip(problem.train.tensors, problem.test.tensors, strict=True)  # type: ignore[attr-defined]
    x, y = (torch.cat(pair) for pair in pairs)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[: plan.train], order[plan.train : plan.train + plan.test]
    return (x[train], y[train]), (x[test], y[test]), torch.rand(plan.test, x.shape[1], generator=generator)


def trained(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> nn.Module:
    """The model after so many epochs of Adam, in evaluation mode."""
    optimizer, generator = torch.optim.Adam(model.parameters(), LR), torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(data[0]), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][i]), data[1][i]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def quality(p: Tensor, noise: Tensor, y: Tensor) -> dict[str, float]:
    """Likelihood, calibration and accuracy on test digits, and the area by which low confidence tells noise."""
    found = of_classes(p, y)
    return {**{k: found[k] for k in ("nll", "ece", "accuracy")}, "auroc": area(-p.amax(1), -noise.amax(1))}


@torch.no_grad()
def _own(model: nn.Module, test: tuple[Tensor, Tensor], noise: Tensor) -> dict[str, float]:
    return quality(model(test[0]).softmax(1), model(noise).softmax(1), test[1])


def evidence(plan: Plan, seed: int, tick: Tick) -> list[dict[str, Any]]:
    """One row for each network, moment, seed, structure and way to choose the prior, and for the network."""
    rows = []
    for hidden in plan.networks:
        for run in range(seed, seed + plan.seeds):
            for epochs in plan.epochs:
                what = {"hidden": hidden, "run": run, "moment": epochs, "structures": list(plan.structures)}
                rows += once(plan, partial(_moment, plan, hidden, run, epochs), part="evidence", **what)
                for _ in plan.structures:
                    tick()
    return rows


def _moment(plan: Plan, hidden: int, run: int, epochs: int) -> list[dict[str, Any]]:
    train, test, noise = split(plan, run)
    with seeded(run):
        model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    trained(model, train, epochs, run)
    place = {"hidden": hidden, "epochs": epochs, "run": run}
    rows = [{**place, "structure": "network", "way": "", **_own(model, test, noise)}]
    for structure in plan.structures:
        for way, (method, match) in WAYS.items():
            posterior = laplace(model, nn.CrossEntropyLoss(), train, structure, seed=run)
            posterior.tune_prior(method, match=match)
            found = quality(posterior.predict(test[0]), posterior.predict(noise), test[1])
            rows.append({
                **place, "structure": structure, "way": way, **found,
                "prior_precision": float(posterior.prior_precision),
                "effective_dimension": float(posterior.effective_dimension()),
            })  # fmt: skip
    return rows


def rescaling(plan: Plan, seed: int, tick: Tick) -> list[dict[str, Any]]:
    """How far predictions move when weights in front of a normalisation are rescaled, the same network otherwise.

    One prior precision for all weights, one for each layer, and matched predictions, whose prior is by parameter.
    """
    train, test, _ = split(plan, seed)
    rows = []
    for factor in plan.factors:
        for name, options in {
            "one precision": {"per": "all", "match": None}, "by layer": {"per": "layer", "match": None},
            "matched": {"per": "all", "match": "auto"},
        }.items():  # fmt: skip
            found = []
            for c in (1.0, factor):
                with seeded(seed):
                    model = nn.Sequential(
                        nn.Linear(64, 16, bias=False), nn.LayerNorm(16, eps=0.0), nn.Tanh(), nn.Linear(16, 10)
                    )
                trained(model, train, plan.epochs[-1], seed).double()
                with torch.no_grad():
                    model.get_parameter("0.weight").mul_(c)
                data = (train[0].double(), train[1])
                posterior = laplace(model, nn.CrossEntropyLoss(), data, "kron", seed=seed)
                found.append(posterior.tune_prior("evidence", steps=1000, **options).predict(test[0].double()))
            change = (found[1] - found[0]).abs().max().item()
            rows.append({"factor": factor, "way": name, "change": change})
        tick()
    return rows
