"""Clusterings and samplers to save in the middle, and what they go on with once they are loaded again."""

from __future__ import annotations

from typing import Any

from saved import settings
from saved.comparing import plain

import paraboloid as pb

# name -> options of `pb.noise.GradientClustering`
CLUSTERINGS: dict[str, dict[str, Any]] = {
    "running": {},
    "rank 2": {"rank": 2},
    "mean": {"update": "mean"},
    "online": {"decay": 0.9},
    "first layer": {"layers": ["0"], "min_size": 3},
}
# name -> options of `pb.noise.StratifiedBatchSampler`
SAMPLERS: dict[str, dict[str, Any]] = {
    "one": {},
    "proportional": {"allocation": "proportional", "batch_size": 12},
    "ranks": {"num_replicas": 2, "rank": 1},
}


def clustering(name: str) -> Any:
    """With one seed, from which the order of the samples follows: it is no part of the state."""
    s = settings.load("many")
    return pb.noise.GradientClustering(s.model, s.loss_fn, num_clusters=5, seed=3, **CLUSTERINGS[name])


def go_on(clusters: Any, passes: int = 2) -> dict[str, Any]:
    """More passes, and what they find."""
    s = settings.load("many")
    clusters.fit(s.batch, batch_size=10, passes=passes)
    names = ("assignments", "sizes", "distances", "deviations")
    return plain({name: getattr(clusters, name) for name in names})


def sampler(name: str, seed: int = 3) -> Any:
    assignments = (settings.load("many").x.sum(1) * 2).long().clamp(-2, 2) + 2
    return pb.noise.StratifiedBatchSampler(assignments, seed=seed, **SAMPLERS[name])


def batches(drawn: Any) -> dict[str, Any]:
    """The next batches, beyond the end of a cluster, and their weights."""
    found = [batch for _ in range(3) for batch in drawn]
    return plain({"indices": found, "weights": [drawn.weights(batch) for batch in found[:2]]})
