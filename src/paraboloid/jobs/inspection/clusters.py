"""What gradient clusters say: how much they lower the variance, and which samples stand for them and apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import take
from paraboloid.jobs.inspection.subject import Subject
from paraboloid.jobs.pictures import picture
from paraboloid.noise import GradientClustering, measures, members, strata

CLUSTERS = 10
PASSES = 5
SHOWN = 5  # prototypes, and as many outliers, of each cluster


def clustered(subject: Subject, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Clusters of the samples' gradients at the current parameters, with their most and least typical samples.

    `variance_ratio` is the exact variance of one draw from each cluster over that of as many samples drawn without
    replacement; None where that is zero.
    """
    model, loss_fn, N = subject.model, subject.problem.loss_fn, subject.size
    K = min(CLUSTERS, N)
    clusters = GradientClustering(model, loss_fn, K, seed=seed)
    for _ in range(PASSES):
        clusters.fit(subject.dataset, passes=1)
        tick()
    found = strata(model, loss_fn, subject.dataset, clusters.assignments)
    filled = int((clusters.sizes > 0).sum())
    single = measures(model, loss_fn, subject.batches).total.variance * sum(
        p.numel() for p in subject.parameters.values()
    )
    plain = single * (1 / filled - 1 / N)
    tick()
    return {
        "batch_size": filled,
        "passes": PASSES,
        "variance_ratio": found.variance() / plain if plain else None,
        "clusters": [
            {
                "size": m.size,
                "spread": m.spread,
                "prototypes": [_sample(subject, i) for i in m.prototypes],
                "outliers": [_sample(subject, i) for i in m.outliers],
            }
            for m in members(clusters, SHOWN)
        ],
    }


def _sample(subject: Subject, index: int) -> dict[str, Any]:
    inputs, target = take(subject.dataset, torch.tensor([index]), torch.device("cpu"))
    y = target[0]
    return {
        "index": index,
        "target": y.item() if y.dim() == 0 else None,
        "image": picture(inputs[0]) if isinstance(inputs, Tensor) else None,
    }
