"""Compare estimators of the mean gradient by their variance, at one snapshot of the parameters or while they move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output, Samples
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.noise.estimators import Estimator, resolve
from paraboloid.noise.gradients import Gradients
from paraboloid.noise.noise_scale import plain
from paraboloid.passes.memory import LEFT_OUT

EPSILON = 1e-7  # added to sums of squares over draws
GROUPS = 10  # of draws, for the jackknife of the normalised variance
REFERENCES = ("draws", "full")
ESTIMATORS = ("sgb", "sg2b", "svrg", "gc")


@dataclass(frozen=True)
class NoiseMeasure:
    """Variance of one estimator over its draws g^, around the reference e; E is the number of draws.

    average_variance             mean of ||g^ - e||^2 / D, for D trainable parameters
    normalized_variance          1/D sum_j [sum (g^_j - e_j)^2 / (sum g^_j^2 + 1e-7)], the sums over draws, as the
                                 authors' code has it: with many draws mean_j variance_j / E g^_j^2; 1 is pure noise
    shared_normalized_variance   sum ||g^ - e||^2 / sum ||g^||^2: one denominator for all coordinates, as in the text

    Each with its standard error over the draws, given e (NaN for a single draw): for the ratios by a jackknife over up
    to ten groups of draws.
    """

    average_variance: float
    average_variance_error: float
    normalized_variance: float
    normalized_variance_error: float
    shared_normalized_variance: float
    shared_normalized_variance_error: float
    draws: int


class Comparison(Mapping[str, NoiseMeasure]):
    """Estimator name -> NoiseMeasure; iterable and printable, with `ratio(name)` to another estimator."""

    def __init__(self, measures: dict[str, NoiseMeasure], batch_size: int, seed: int, reference: str):
        self._measures, self.batch_size, self.seed, self.reference = measures, batch_size, seed, reference

    def __getitem__(self, name: str) -> NoiseMeasure:
        if name not in self._measures:
            raise KeyError(f"{name!r} was not compared; available: {list(self._measures)}")
        return self._measures[name]

    def __iter__(self):
        return iter(self._measures)

    def __len__(self) -> int:
        return len(self._measures)

    def ratio(self, name: str, to: str = "sgb") -> tuple[float, float]:
        """Average variance of `name` over that of `to`, with its standard error (draws of the two are independent)."""
        a, b = self[name], self[to]
        if b.average_variance == 0:
            return (math.nan, math.nan)
        ratio = a.average_variance / b.average_variance
        error = math.hypot(a.average_variance_error, ratio * b.average_variance_error) / b.average_variance
        return ratio, error

    def table(self) -> str:
        """As Markdown."""
        lines = ["| estimator | average variance | normalised | shared denominator |", "|---|---|---|---|"]
        for name, m in self.items():
            lines.append(
                f"| {name} | {m.average_variance:.3g} ± {m.average_variance_error:.1g} | "
                f"{m.normalized_variance:.3f} ± {m.normalized_variance_error:.3f} | "
                f"{m.shared_normalized_variance:.3f} ± {m.shared_normalized_variance_error:.3f} |"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data for strict JSON: undefined numbers are None."""
        measures = {name: plain(m) for name, m in self.items()}
        settings = {"batch_size": self.batch_size, "seed": self.seed, "reference": self.reference}
        return {**settings, "estimators": measures}

    def __repr__(self) -> str:
        values = ", ".join(f"{k}: {m.average_variance:.3g}" for k, m in self.items())
        return f"Comparison(average variance of batches of {self.batch_size}: {values})"


def compare(
    model: nn.Module,
    loss_fn: LossFunction,
    dataset: Samples,
    batch_size: int = 10,
    estimators: Any = ESTIMATORS,
    draws: int = 10,
    seed: int = 0,
    *,
    reference: str = "draws",
    output: Output | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Variance of estimators of the mean gradient at the current parameters.

    dataset     a map-style dataset of (input, target), or a pair of tensors
    batch_size  samples of SG-B; "gc" has as many clusters, fitted at the current parameters until assignments stop
                changing (10 to 30 passes); "svrg" has its reference at the current parameters, where it is exact
    estimators  names ("sgb", "sg2b", "svrg", "gc"), estimators, samplers of batches, or a dict name -> any of these
    draws       E, of each estimator
    reference   what variance is measured around: "draws", the mean of E further draws of the same estimator, as the
                authors do it (expected values are then 1 + 1/E times too large, and a bias is not seen); or "full", the
                exact mean gradient
    progress    called as progress(estimator, done, total) after each draw and each batch of a clustering

    Gradients are those of the *unreduced* loss, so the mean is over samples whatever the loss's reduction; without
    weight decay.  Draws are streamed: memory is a few dozen vectors [D], fewer for large D.

    Raises ValueError for arguments out of range.  Source: Faghri et al. 2020, arXiv:2007.04532.
    """
    compared = Compared(
        model, loss_fn, dataset, batch_size, estimators, draws, seed, reference=reference, output=output,
        progress=progress,
    )  # fmt: skip
    return compared.measured(0, compared.estimators)


class Compared:
    """Estimators on their data, to be measured once or again and again; arguments as in `compare`."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, dataset: Samples, batch_size: int = 10,
        estimators: Any = ESTIMATORS, draws: int = 10, seed: int = 0, *, reference: str = "draws",
        output: Output | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ):  # fmt: skip
        for name, value in (("batch_size", batch_size), ("draws", draws)):
            check_count(name, value)
        check_choice("reference", reference, REFERENCES)
        self.data, self.reference, self.progress = Gradients(model, loss_fn, dataset, seed, output), reference, progress
        self.batch_size, self.draws, self.seed = batch_size, draws, seed
        self.estimators = resolve(estimators, seed)
        for estimator in self.estimators:
            estimator.prepare(self.data, batch_size)

    def renew(self, estimator: Estimator) -> None:
        if (progress := self.progress) is not None and hasattr(estimator, "progress"):
            label = f"{estimator.name} clustering"
            estimator.progress = lambda done, total: progress(label, done, total)  # type: ignore[attr-defined]
        estimator.refresh(self.data)

    def measured(self, moment: int, stale: Sequence[Estimator] = ()) -> Comparison:
        """All of them at the current parameters, by draws of this moment; the stale ones are renewed before."""
        full = self.data.full() if self.reference == "full" else None
        found = {}
        for i, estimator in enumerate(self.estimators):
            if estimator in stale:
                self.renew(estimator)
            generator = torch.Generator().manual_seed(self.seed + 7919 * (i + 1) + 104729 * moment)
            step = None if self.progress is None else partial(self.progress, estimator.name)
            found[estimator.name] = measure(estimator, self.data, self.draws, generator, full, step)
        return Comparison(found, self.batch_size, self.seed, self.reference)


@torch.no_grad()
def measure(
    estimator: Estimator,
    data: Gradients,
    draws: int,
    generator: torch.Generator,
    full: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NoiseMeasure:
    """Average and normalised variance of one estimator as it stands, around `full` or the mean of as many draws."""
    total = draws if full is not None else 2 * draws
    done = 0

    def draw() -> Tensor:
        nonlocal done
        g = estimator.draw(data, generator).double()
        done += 1
        if progress is not None:
            progress(done, total)
        return g

    if full is None:
        e = draw()
        for n in range(1, draws):
            e += (draw() - e) / (n + 1)
    else:
        e = full.double()
    D = len(e)
    groups = min(draws, GROUPS, LEFT_OUT.count(16 * D))
    noise, second = (e.new_zeros(groups, D) for _ in range(2))
    single_noise, single_second = [], []
    for n in range(draws):
        g = draw()
        deviation, square = (g - e).square_(), g.square_()
        noise[n % groups] += deviation
        second[n % groups] += square
        single_noise.append(float(deviation.sum()))
        single_second.append(float(square.sum()))
    each, squares = (
        torch.tensor(single_noise, dtype=torch.float64, device="cpu"),
        torch.tensor(single_second, dtype=torch.float64, device="cpu"),
    )
    a, b = noise.sum(0), second.sum(0)
    value = normalized_variance(a, b, EPSILON)
    left_out = (
        [normalized_variance(a - x, b - y, EPSILON) for x, y in zip(noise, second, strict=True)] if groups > 1 else []
    )
    shared = float(each.sum() / (squares.sum() + EPSILON * D))
    without = (
        (each.sum() - each) / (squares.sum() - squares + EPSILON * D) if draws > 1 else torch.empty(0, device="cpu")
    )
    return NoiseMeasure(
        float(each.mean()) / D, float(each.std() / math.sqrt(draws)) / D if draws > 1 else math.nan,
        value, _jackknife(left_out), shared, _jackknife(without.tolist()), draws,
    )  # fmt: skip


def normalized_variance(noise: Tensor, second: Tensor, epsilon: float = 0.0) -> float:
    """1/D sum_j noise_j / (second_j + epsilon), for the variance and second moment of every coordinate; 0 / 0 is 0."""
    return float(torch.where(noise == 0, 0.0, noise / (second + epsilon)).mean())


def _jackknife(left_out: list[float]) -> float:
    """Standard error from the values with one group left out at a time."""
    n = len(left_out)
    if n < 2:
        return math.nan
    values = torch.tensor(left_out, dtype=torch.float64, device="cpu")
    return math.sqrt((n - 1) / n * float((values - values.mean()).square().sum()))
