"""Estimators of the mean gradient: each draws one flat [D] estimate at a time.

An estimator has a `name` and three methods, which `compare` and `Monitor` call:

    prepare(data, batch_size)      once, before anything else
    refresh(data)                  at a snapshot of the parameters: move references, cluster again
    draw(data, generator)          one estimate of the mean gradient at the current parameters, flat [D]

`data` is a `Gradients`: ``data.samples``, ``data.mean(indices, weights)``, ``data.full()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from paraboloid.noise.clustering import GradientClustering
from paraboloid.noise.gradients import Gradients
from paraboloid.noise.sampler import StratifiedBatchSampler


@runtime_checkable
class Estimator(Protocol):
    """What estimates the mean gradient; see the module."""

    name: str

    def prepare(self, data: Gradients, batch_size: int) -> None: ...

    def refresh(self, data: Gradients) -> None: ...

    def draw(self, data: Gradients, generator: torch.Generator) -> Tensor: ...


def random_batch(samples: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of `samples` indices without replacement, as one batch of a shuffled DataLoader."""
    if size > samples:
        raise ValueError(
            f"a batch of {size} samples was asked for and there are {samples}; expected at most that many."
        )
    if size * 20 > samples:
        return torch.randperm(samples, generator=generator, device="cpu")[:size]
    seen: dict[int, None] = {}
    while len(seen) < size:
        seen.update(
            dict.fromkeys(torch.randint(samples, (size - len(seen),), generator=generator, device="cpu").tolist())
        )
    return torch.tensor(list(seen), device="cpu")


class SGB:
    """SG-B: the mean over a batch drawn without replacement; `multiple` = 2 is SG-2B, twice the batch."""

    def __init__(self, multiple: int = 1, name: str | None = None):
        self.multiple = multiple
        self.name = name or ("sgb" if multiple == 1 else f"sg{multiple}b")

    def prepare(self, data: Gradients, batch_size: int) -> None:
        self.batch_size = self.multiple * batch_size
        if self.batch_size > data.samples:
            raise ValueError(f"{self.name!r} takes batches of {self.batch_size} samples and there are {data.samples}; "
                             "expected a smaller batch_size.")  # fmt: skip

    def refresh(self, data: Gradients) -> None:
        pass

    def draw(self, data: Gradients, generator: torch.Generator) -> Tensor:
        return data.mean(random_batch(data.samples, self.batch_size, generator))


class SVRG:
    """Stochastic variance-reduced gradient: mu - g_B(reference) + g_B(now), mu the mean gradient at the reference.

    The reference is the parameters at the last `refresh`; there the estimate is exact.  Costs two gradients a draw.
    Source: Johnson and Zhang 2013.
    """

    def __init__(self, name: str = "svrg"):
        self.name = name

    def prepare(self, data: Gradients, batch_size: int) -> None:
        self.batch_size = batch_size

    def refresh(self, data: Gradients) -> None:
        self.reference, self.mean = data.snapshot(), data.full()

    def draw(self, data: Gradients, generator: torch.Generator) -> Tensor:
        batch = random_batch(data.samples, self.batch_size, generator)
        return self.mean + (data.mean(batch) - data.mean(batch, at=self.reference))  # exact where both are equal


class GC:
    """Stratified by gradient clusters: 1/N sum_k N_k g_{k,j}, one draw j from each of `num_clusters` clusters.

    num_clusters  default: the batch size, so that a draw costs what SG-B costs
    passes        at least so many passes over the data; then until the assignments stop changing, up to `max_passes`
    batch_size    of the passes; further options are those of `GradientClustering`
    """

    def __init__(
        self, num_clusters: int | None = None, *, passes: int = 10, max_passes: int = 30, batch_size: int = 256,
        name: str = "gc", seed: int = 0, **options: Any,
    ):  # fmt: skip
        self.num_clusters, self.passes, self.max_passes, self.size = num_clusters, passes, max_passes, batch_size
        self.name, self.seed, self.options = name, seed, options
        self.clusters: GradientClustering | None = None
        self.progress: Callable[[int, int], None] | None = None

    def prepare(self, data: Gradients, batch_size: int) -> None:
        self.count = self.num_clusters or batch_size

    def refresh(self, data: Gradients) -> None:
        options: dict[str, Any] = {"output": data.output} | self.options
        self.clusters = GradientClustering(data.model, data.loss, self.count, seed=self.seed, **options)
        self.clusters.fit(
            data.dataset, self.size, self.passes, until_stable=self.passes < self.max_passes,
            max_passes=self.max_passes, progress=self.progress,
        )  # fmt: skip
        self._sampler = StratifiedBatchSampler(self.clusters.assignments, self.seed)

    def draw(self, data: Gradients, generator: torch.Generator) -> Tensor:
        return _stratified(data, self._sampler, generator)


class Stratified:
    """One draw from each cluster of given `assignments` [N], from whatever source; further options of the sampler."""

    def __init__(self, assignments: Tensor, name: str = "stratified", **options: Any):
        self.name, self.assignments, self.options = name, assignments, options

    def prepare(self, data: Gradients, batch_size: int) -> None:
        if len(self.assignments) != data.samples:
            raise ValueError(f"{self.name!r} has {len(self.assignments)} assignments for {data.samples} samples; "
                             "expected one for each.")  # fmt: skip
        self._sampler = StratifiedBatchSampler(self.assignments, **self.options)

    def refresh(self, data: Gradients) -> None:
        pass

    def draw(self, data: Gradients, generator: torch.Generator) -> Tensor:
        return _stratified(data, self._sampler, generator)


def _stratified(data: Gradients, sampler: StratifiedBatchSampler, generator: torch.Generator) -> Tensor:
    # a new order for each draw: estimates are independent
    sampler.set_epoch(int(torch.randint(2**40, (1,), generator=generator, device="cpu")))
    indices = torch.tensor(next(iter(sampler)), device="cpu")
    return data.mean(indices, sampler.weights(indices))


class Sampled:
    """The mean over batches of any sampler of yours: an iterable of lists of indices, such as a torch BatchSampler.

    It is iterated again when it ends.  If it has a method `weights(indices)`, each sample's gradient is multiplied by
    its weight.  Its randomness is its own.
    """

    def __init__(self, sampler: Iterable[Any], name: str = "sampler", weights: Callable[[Any], Tensor] | None = None):
        self.name, self.sampler = name, sampler
        self.weights = weights if weights is not None else getattr(sampler, "weights", None)
        self._batches: Iterator[Any] = iter(())

    def prepare(self, data: Gradients, batch_size: int) -> None:
        self._batches = iter(self.sampler)

    def refresh(self, data: Gradients) -> None:
        pass

    def draw(self, data: Gradients, generator: torch.Generator) -> Tensor:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.sampler)
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError(f"the sampler of {self.name!r} yielded no batch; expected lists of indices.")
        indices = torch.as_tensor(batch, device="cpu").flatten().long()
        return data.mean(indices, None if self.weights is None else self.weights(indices))


ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "sgb": SGB, "sg2b": lambda: SGB(2), "svrg": SVRG, "gc": GC,
}  # fmt: skip


def resolve(estimators: Any, seed: int) -> list[Estimator]:
    """Names, estimators, samplers, or a dict name -> any of these, as estimators with different names."""
    named = estimators.items() if isinstance(estimators, dict) else [(None, each) for each in estimators]
    found: list[Estimator] = []
    for name, each in named:
        if isinstance(each, str):
            if each not in ESTIMATORS:
                raise ValueError(f"estimator {each!r} is not known; expected one of {sorted(ESTIMATORS)}, an object "
                                 "with prepare, refresh and draw, or a sampler of batches.")  # fmt: skip
            each = GC(seed=seed) if each == "gc" else ESTIMATORS[each]()
        elif not isinstance(each, Estimator):
            if not isinstance(each, Iterable):
                raise ValueError(f"an estimator is a {type(each).__name__}; expected a name of {sorted(ESTIMATORS)}, "
                                 "an object with prepare, refresh and draw, or a sampler of batches.")  # fmt: skip
            each = Sampled(each)
        if name is not None:
            each.name = name
        found.append(each)
    names = [each.name for each in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the estimators are named {names}; expected at least one, with different names (pass a dict "
                         "name -> estimator).")  # fmt: skip
    return found
