"""During training: measure estimators at intervals, and cluster again at intervals."""

from __future__ import annotations

from typing import Any

from torch import nn

from paraboloid.data.batches import Samples
from paraboloid.linalg.operand import check_count
from paraboloid.losses import LossFunction
from paraboloid.noise.clustering import GradientClustering
from paraboloid.noise.comparison import ESTIMATORS, Compared, Comparison
from paraboloid.noise.estimators import SVRG
from paraboloid.noise.noise_scale import plain
from paraboloid.noise.sampler import StratifiedBatchSampler


class Monitor(Compared):
    """Call it after every step, ``monitor(step)``: compares the estimators every `every` steps.

    The estimators' own state (SVRG's reference, the clusters) is renewed only every `refresh` steps, so that what is
    measured is what training with them would see.  Arguments as in `compare`; `records` is a list of dicts with "step"
    and, for each estimator, its `NoiseMeasure`.  Serves as the callback of `pb.problems.train` too, which calls it
    with (step, model, point) where the losses are evaluated.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, dataset: Samples, batch_size: int = 10,
        estimators: Any = ESTIMATORS, draws: int = 10, seed: int = 0, *, every: int = 100, refresh: int = 1000,
        **options: Any,
    ):  # fmt: skip
        for name, value in (("every", every), ("refresh", refresh)):
            check_count(name, value)
        super().__init__(model, loss_fn, dataset, batch_size, estimators, draws, seed, **options)
        self.every, self.refresh = every, refresh
        self.records: list[dict[str, Any]] = []
        self._refreshed: int | None = None

    def __call__(self, step: int, model: nn.Module | None = None, point: Any = None) -> Comparison | None:
        """Measure if the step is due; steps given by `pb.problems.train` (with a point) always are."""
        if self._refreshed is None or step // self.refresh > self._refreshed // self.refresh:
            for estimator in self.estimators:
                self.renew(estimator)
            self._refreshed = step
        if point is None and step % self.every:
            return None
        found = self.measured(step)
        self.records.append({"step": step, **found})
        return found

    def to_json(self) -> list[dict[str, Any]]:
        """The records as plain data for strict JSON."""
        return [{k: v if k == "step" else plain(v) for k, v in record.items()} for record in self.records]


class Snapshots(Compared):
    """Compare the estimators at one snapshot of the parameters after the other: call it at each of them.

    SVRG's reference is the snapshot before (at the first one, it itself); clusters are fitted at each.  Arguments as in
    `compare`, around the exact mean gradient.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, reference="full", **options)
        self.count = 0

    def __call__(self) -> Comparison:
        behind = [estimator for estimator in self.estimators if isinstance(estimator, SVRG)]
        found = self.measured(self.count, [e for e in self.estimators if self.count == 0 or e not in behind])
        for estimator in behind:
            self.renew(estimator)
        self.count += 1
        return found


class Reclustering:
    """Call it after every step, ``reclustering(step)``: every `every` steps clusters are refitted, and sampled from.

    clusters   a `GradientClustering`; it goes on from its centres, `passes` passes each time
    sampler    the `StratifiedBatchSampler` that the training loop draws from; None: clusters alone

    The sampler changes with the next batch that it draws.  With workers, batches drawn ahead belong to the old
    clusters while `sampler.weights` knows the new ones: then call it between epochs.
    """

    def __init__(
        self, clusters: GradientClustering, dataset: Samples, sampler: StratifiedBatchSampler | None = None, *,
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
