"""During training: measure estimators at intervals, and cluster again at intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from paraboloid.data.batches import Output
from paraboloid.linalg.operand import check_count
from paraboloid.noise.clustering import GradientClustering
from paraboloid.noise.comparison import ESTIMATORS, Comparison, measure, refresh
from paraboloid.noise.estimators import SVRG, resolve
from paraboloid.noise.gradients import Gradients
from paraboloid.noise.sampler import StratifiedBatchSampler


class Monitor:
    """Call it after every step, ``monitor(step)``: compares the estimators every `every` steps.

    The estimators' own state (SVRG's reference, the clusters) is renewed only every `refresh` steps, so that what is
    measured is what training with them would see.  Arguments as in `compare`; `records` is a list of dicts with "step"
    and, for each estimator, its `NoiseMeasure`.  Serves as the callback of `pb.problems.train` too, which calls it
    with (step, model, point) where the losses are evaluated.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, dataset: Any, batch_size: int = 10, estimators: Any = ESTIMATORS,
        draws: int = 10, seed: int = 0, *, every: int = 100, refresh: int = 1000, reference: str = "draws",
        output: Output | None = None, progress: Callable[[str, int, int], None] | None = None,
    ):  # fmt: skip
        for name, value in (("batch_size", batch_size), ("draws", draws), ("every", every), ("refresh", refresh)):
            check_count(name, value)
        self.data = Gradients(model, loss_fn, dataset, seed, output)
        self.batch_size, self.draws, self.seed = batch_size, draws, seed
        self.every, self.refresh, self.reference, self.progress = every, refresh, reference, progress
        self.estimators = resolve(estimators, seed)
        for estimator in self.estimators:
            estimator.prepare(self.data, batch_size)
        self.records: list[dict[str, Any]] = []
        self._refreshed: int | None = None

    def __call__(self, step: int, model: nn.Module | None = None, point: Any = None) -> Comparison | None:
        """Measure if the step is due; steps given by `pb.problems.train` (with a point) always are."""
        stale = self._refreshed is None or step // self.refresh > self._refreshed // self.refresh
        if stale:
            for estimator in self.estimators:
                refresh(estimator, self.data, self.progress)
            self._refreshed = step
        if point is None and step % self.every:
            return None
        full = self.data.full() if self.reference == "full" else None
        found = {}
        for i, estimator in enumerate(self.estimators):
            generator = torch.Generator().manual_seed(self.seed + 7919 * (i + 1) + 104729 * step)
            found[estimator.name] = measure(estimator, self.data, self.draws, generator, full)
        self.records.append({"step": step, **found})
        return Comparison(found, self.batch_size, self.seed, self.reference)

    def to_json(self) -> list[dict[str, Any]]:
        """The records as plain data for strict JSON."""
        return [
            {
                name: value if name == "step" else {k: _finite(v) for k, v in asdict(value).items()}
                for name, value in record.items()
            }
            for record in self.records
        ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Snapshots:
    """Compare the estimators at one snapshot of the parameters after the other: call it at each of them.

    SVRG's reference is the snapshot before (at the first one, it itself); clusters are fitted at each.  Arguments as in
    `compare`.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, dataset: Any, batch_size: int = 10, estimators: Any = ESTIMATORS,
        draws: int = 10, seed: int = 0, *, output: Output | None = None,
    ):  # fmt: skip
        for name, value in (("batch_size", batch_size), ("draws", draws)):
            check_count(name, value)
        self.data = Gradients(model, loss_fn, dataset, seed, output)
        self.batch_size, self.draws, self.seed, self.count = batch_size, draws, seed, 0
        self.estimators = resolve(estimators, seed)
        for estimator in self.estimators:
            estimator.prepare(self.data, batch_size)

    def __call__(self) -> Comparison:
        full, found = self.data.full(), {}
        for i, estimator in enumerate(self.estimators):
            behind = isinstance(estimator, SVRG)
            if not behind or self.count == 0:
                estimator.refresh(self.data)
            generator = torch.Generator().manual_seed(self.seed + 7919 * (i + 1) + 104729 * self.count)
            found[estimator.name] = measure(estimator, self.data, self.draws, generator, full)
            if behind:
                estimator.refresh(self.data)
        self.count += 1
        return Comparison(found, self.batch_size, self.seed, "full")


class Reclustering:
    """Call it after every step, ``reclustering(step)``: every `every` steps clusters are refitted, and sampled from.

    clusters   a `GradientClustering`; it goes on from its centres, `passes` passes each time
    sampler    the `StratifiedBatchSampler` that the training loop draws from; None: clusters alone

    The sampler changes with the next batch that it draws.  With workers, batches drawn ahead belong to the old
    clusters while `sampler.weights` knows the new ones: then call it between epochs.
    """

    def __init__(
        self, clusters: GradientClustering, dataset: Any, sampler: StratifiedBatchSampler | None = None, *,
        every: int = 1000, passes: int = 3, batch_size: int = 256,
    ):  # fmt: skip
        for name, value in (("every", every), ("passes", passes), ("batch_size", batch_size)):
            check_count(name, value)
        self.clusters, self.dataset, self.sampler = clusters, dataset, sampler
        self.every, self.passes, self.batch_size = every, passes, batch_size

    def __call__(self, step: int) -> bool:
        """Fit if the step is due; whether it was."""
        if step % self.every or step == 0:
            return False
        self.clusters.fit(self.dataset, self.batch_size, self.passes)
        if self.sampler is not None:
            deviations = self.clusters.deviations if self.sampler.allocation == "neyman" else None
            self.sampler.update(self.clusters.assignments, deviations)
        return True
