"""What gradient clusters say: how much they lower the variance, and which samples stand for them and apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import take
from paraboloid.jobs.inspection.subject import Subject
from paraboloid.noise import GradientClustering, measures, members, strata

CLUSTERS = 10
PASSES = 5
SHOWN = 5  # prototypes, and as many outliers, of each cluster
LARGEST = 64  # side of an image that is shown


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
        "image": _image(inputs[0]) if isinstance(inputs, Tensor) else None,
    }


def _image(x: Tensor) -> list[Any] | None:
    """Grey [H, W] or coloured [H, W, 3] values 0..255, scaled to the image's own range; None for what is no image."""
    if not x.is_floating_point() or x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] not in (1, 3)):
        return None
    if min(x.shape[-2:]) < 4 or max(x.shape[-2:]) > LARGEST:
        return None
    x = x.detach().double()
    low, high = x.min(), x.max()
    x = ((x - low) / (high - low).clamp(min=1e-12) * 255).round().int()
    if x.dim() == 3:
        x = x[0] if len(x) == 1 else x.movedim(0, 2)
    return x.tolist()
