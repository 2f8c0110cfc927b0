"""How much a mini-batch quadratic misjudges the directions that were chosen with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paraboloid import trees
from paraboloid.data import Chunks, Output, sample_count, take
from paraboloid.linalg.operand import check_count
from paraboloid.quadratic import CURVATURES, Quadratic, quadratic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHICH = ("same", "other", "full")
DIRECTIONS = ("eigen", "cg")
CHUNK = 512  # samples of the full data that are evaluated together
MEASURE_BYTES = 2**28  # directions that are collected before they are measured on the full data
EIGEN_TOLERANCE = 1e-4  # relative residual of eigenvectors; curvatures along them are off by its square


@dataclass(frozen=True, eq=False)
class Bias:
    """Slopes and curvatures along directions from a batch, on that batch ("same"), another one, and all data.

    `curvature[which]` and `slope[which]` are [repeats, k] in float64.  Every direction is turned downhill on its own
    batch, so that slopes can be added over repeats.
    """

    curvature: dict[str, Tensor]
    slope: dict[str, Tensor]
    batch_size: int
    samples: int
    directions: str
    curvature_kind: str
    weight_decay: float
    seed: int

    @property
    def repeats(self) -> int:
        return len(self.curvature["full"])

    @property
    def k(self) -> int:
        return self.curvature["full"].shape[1]

    def ratio(self, which: str, of: str = "curvature") -> Tensor:
        """Sum over repeats divided by the same sum for "full", for each direction: [k]."""
        part, full = self._pair(which, of)
        return part.sum(0) / full.sum(0)

    def standard_error(self, which: str, of: str = "curvature") -> Tensor:
        """Standard error of `ratio` over the repeats, [k]; NaN for a single repeat."""
        return _ratio_error(*self._pair(which, of))

    def total_ratio(self, which: str, k: int | None = None, of: str = "curvature") -> float:
        """Sum over repeats and the first k directions (default: all), divided by the same sum for "full"."""
        part, full = (values[:, : self._first(k)].sum() for values in self._pair(which, of))
        return (part / full).item()

    def total_standard_error(self, which: str, k: int | None = None, of: str = "curvature") -> float:
        """Standard error of `total_ratio` over the repeats; NaN for a single repeat."""
        part, full = (values[:, : self._first(k)].sum(1, keepdim=True) for values in self._pair(which, of))
        return _ratio_error(part, full).item()

    def table(self) -> str:
        """Ratios to the full data with their standard errors, a row for each direction, as Markdown."""
        kinds = [(which, of) for of in ("curvature", "slope") for which in ("same", "other")]
        names = " | ".join(f"{of} {which}/full" for which, of in kinds)
        lines = [f"| direction | {names} |", "|---|" + "---|" * len(kinds)]
        columns = [(self.ratio(which, of), self.standard_error(which, of)) for which, of in kinds]
        for i in range(self.k):
            cells = " | ".join(f"{ratio[i]:.3f} ± {error[i]:.3f}" for ratio, error in columns)
            lines.append(f"| {i + 1} | {cells} |")
        totals = " | ".join(
            f"{self.total_ratio(which, of=of):.3f} ± {self.total_standard_error(which, of=of):.3f}"
            for which, of in kinds
        )
        return "\n".join([*lines, f"| all | {totals} |"])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data for strict JSON: undefined numbers are None."""
        return {
            "batch_size": self.batch_size,
            "samples": self.samples,
            "k": self.k,
            "repeats": self.repeats,
            "directions": self.directions,
            "curvature_kind": self.curvature_kind,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "curvature": {which: _plain(self.curvature[which]) for which in WHICH},
            "slope": {which: _plain(self.slope[which]) for which in WHICH},
            "ratio": {
                of: {
                    which: {
                        "value": _plain(self.ratio(which, of)),
                        "standard_error": _plain(self.standard_error(which, of)),
                    }
                    for which in ("same", "other")
                }
                for of in ("curvature", "slope")
            },
        }

    def plot(self) -> Figure:
        """A figure: curvature and slope along each direction, mean over repeats with its standard error."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        labels = {"same": "the same batch", "other": "another batch", "full": "all data"}
        styles = {"same": ("C3", "o"), "other": ("C0", "s"), "full": ("0.35", "D")}
        index = range(1, self.k + 1)
        for axes, (name, values) in zip(
            figure.subplots(1, 2), {"curvature": self.curvature, "slope": self.slope}.items(), strict=True
        ):
            for shift, which in zip((-0.1, 0.1, 0.0), WHICH, strict=True):
                mean = values[which].mean(0)
                error = values[which].std(0) / self.repeats**0.5 if self.repeats > 1 else torch.zeros_like(mean)
                color, marker = styles[which]
                axes.errorbar(
                    [i + shift for i in index], mean.tolist(), error.tolist(),
                    color=color, marker=marker, markersize=4, linewidth=1, label=labels[which],
                )  # fmt: skip
            axes.set_xlabel("direction (top first)" if self.directions == "eigen" else "direction (CG iteration)")
            axes.set_ylabel(f"directional {name}")
            axes.set_xticks(list(index) if self.k <= 12 else [1, *range(5, self.k + 1, 5)])
        axes.legend(frameon=False)
        figure.suptitle(f"Directions from batches of {self.batch_size}, measured on")
        return figure

    def _pair(self, which: str, of: str) -> tuple[Tensor, Tensor]:
        if which not in WHICH:
            raise ValueError(f"which is {which!r}; expected one of {WHICH}.")
        if of not in ("curvature", "slope"):
            raise ValueError(f"of is {of!r}; expected 'curvature' or 'slope'.")
        values = self.curvature if of == "curvature" else self.slope
        return values[which], values["full"]

    def _first(self, k: int | None) -> int:
        return self.k if k is None else check_count("k", k, most=self.k)


def bias(
    model: nn.Module,
    loss_fn: Any,
    dataset: Any,
    batch_size: int = 128,
    k: int = 10,
    repeats: int = 15,
    directions: str = "eigen",
    curvature: str = "ggn",
    weight_decay: float = 0.0,
    seed: int = 0,
    *,
    damping: float = 0.0,
    output: Output | None = None,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bias:
    """Measure the bias of mini-batch quadratics in slope and curvature along directions that a batch chose.

    Each of `repeats` times, two disjoint batches of `batch_size` samples are drawn; k directions are taken from the
    first, and slope and curvature along them are found on the first, on the second and on all data.

    dataset       a map-style dataset of (input, target), or a pair of tensors (inputs, targets); its samples are moved
                  to the model's device
    directions    "eigen": the top k eigenvectors of the first batch's curvature; "cg": its first k conjugate
                  directions, with `damping` added to the curvature
    curvature     "ggn" or "hessian"
    weight_decay  part of all three quadratics
    max_memory    bytes of recorded graphs kept for the full data, see `paraboloid.operators`
    progress      called as progress(done, repeats) after each repeat

    Same-batch curvatures along top eigenvectors are overstated, for the batch's noise helped to choose them; an
    independent batch is unbiased for the data without the first batch.  Source: arXiv:2410.14325.
    """
    samples = sample_count(dataset)
    for name, count in (("batch_size", batch_size), ("repeats", repeats)):
        check_count(name, count)
    if 2 * batch_size > samples:
        raise ValueError(f"batch_size is {batch_size} for {samples} samples; expected at most {samples // 2}, so that "
                         "two disjoint batches exist.")  # fmt: skip
    if directions not in DIRECTIONS:
        raise ValueError(f"directions is {directions!r}; expected one of {list(DIRECTIONS)}.")
    if curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}; expected one of {list(CURVATURES)}.")
    parameters = trees.parameters(model)
    check_count("k", k, most=sum(p.numel() for p in parameters.values()))
    device = next(iter(parameters.values())).device

    def fit(data: Any) -> Quadratic:
        return quadratic(model, loss_fn, data, curvature, weight_decay, output=output, seed=seed, max_memory=max_memory)

    full = fit(Chunks(dataset, max(CHUNK, batch_size), device))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {which: [] for which in WHICH}
    waiting: list[Tensor] = []  # directions not yet measured on the full data, which may have to be read for it

    def measure_on_full() -> None:
        slopes, curvatures = full.along(torch.cat(waiting))
        found["full"].extend(zip(slopes.split(k), curvatures.split(k), strict=True))
        waiting.clear()

    for repeat in range(repeats):
        first, second = torch.randperm(samples, generator=generator)[: 2 * batch_size].split(batch_size)
        same, other = (fit(take(dataset, indices, device)) for indices in (first, second))
        if directions == "eigen":
            rows = same.eigen_directions(k, tol=EIGEN_TOLERANCE, seed=seed)
        else:
            rows = same.conjugate_directions(k, damping, seed=seed)
        slopes, curvatures = same.along(rows)
        downhill = torch.where(slopes > 0, -1.0, 1.0).to(rows)
        rows = downhill.unsqueeze(1) * rows
        found["same"].append((downhill * slopes, curvatures))
        found["other"].append(other.along(rows))
        waiting.append(rows)
        if sum(r.nbytes for r in waiting) + rows.nbytes > MEASURE_BYTES:
            measure_on_full()
        if progress is not None:
            progress(repeat + 1, repeats)
    if waiting:
        measure_on_full()
    slope, curvatures = (
        {which: torch.stack([pair[i] for pair in found[which]]).double().cpu() for which in WHICH} for i in (0, 1)
    )
    return Bias(curvatures, slope, batch_size, samples, directions, curvature, weight_decay, seed)


def _ratio_error(part: Tensor, full: Tensor) -> Tensor:
    """Standard error of sum(part) / sum(full) over axis 0, by linearisation."""
    n = len(part)
    ratio = part.sum(0) / full.sum(0)
    if n < 2:
        return torch.full_like(ratio, math.nan)
    return (part - ratio * full).square().sum(0).mul(n / (n - 1)).sqrt() / full.sum(0).abs()


def _plain(values: Tensor) -> Any:
    """Nested lists, with None for what is not finite."""
    if values.dim() > 0:
        return [_plain(v) for v in values]
    return values.item() if math.isfinite(values.item()) else None
