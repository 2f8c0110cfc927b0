"""The bias of the mini-batch quadratic, for several batch sizes: means, ratios of sums, and what a step delivers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.bias import bias as measure
from paraboloid.inspection.subject import Subject

TOLERANCE = 0.1  # an overstatement below it is small enough to trust the batch
SUMS = (1, 5)  # ratios are given for the top direction and for the sum over the top five


def bias(
    subject: Subject, batch_sizes: Sequence[int], k: int, repeats: int, seed: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """The section "bias" of the record, without its reading; `tick` is called after every repeat."""
    training = subject.problem.training
    k = min(k, sum(p.numel() for p in subject.parameters.values()))
    table = []
    for batch_size in batch_sizes:
        found = measure(
            subject.model,
            subject.problem.loss_fn,
            subject.dataset,
            batch_size=batch_size,
            k=k,
            repeats=repeats,
            directions="eigen",
            curvature="ggn",
            weight_decay=training.weight_decay,
            seed=seed,
            progress=lambda done, repeats: tick(),
        )
        table.append({"batch_size": batch_size, **summary(found.curvature, found.slope)})
    return {
        "curvature": "ggn",
        "directions": "eigen",
        "k": k,
        "repeats": repeats,
        "weight_decay": training.weight_decay,
        "tolerance": TOLERANCE,
        "training_batch_size": training.batch_size,
        "table": table,
    }


def summary(curvature: dict[str, Tensor], slope: dict[str, Tensor]) -> dict[str, Any]:
    """Means over repeats, ratios of sums and the decrease along the top direction, from arrays [repeats, k].

    Slopes are those of directions turned downhill on their own batch, so that they can be averaged.
    """
    k = curvature["same"].shape[1]
    return {
        "curvature": {which: _means(values) for which, values in curvature.items()},
        "slope": {which: _means(values) for which, values in slope.items()},
        "ratios": [
            {
                "directions": top,
                "curvature": {w: _ratio(curvature[w][:, :top], curvature["full"][:, :top]) for w in ("same", "other")},
                "slope": {w: _ratio(slope[w][:, :top], slope["full"][:, :top]) for w in ("same", "other")},
                "slope_sum": {which: _mean(values[:, :top].sum(1)) for which, values in slope.items()},
            }
            for top in sorted({min(top, k) for top in SUMS})
        ],
        "decrease": {which: _decrease(curvature, slope, which) for which in ("same", "other")},
    }


def _decrease(curvature: dict[str, Tensor], slope: dict[str, Tensor], which: str) -> dict[str, Any]:
    """Of the Newton step along the top direction with slope and curvature of `which`: promised, and on all data."""
    c, s = curvature[which][:, 0], slope[which][:, 0]
    step = torch.where(c > 0, -s / c, torch.nan)
    promised = -(step * s + 0.5 * step**2 * c)
    delivered = -(step * slope["full"][:, 0] + 0.5 * step**2 * curvature["full"][:, 0])
    return {"promised": _mean(promised), "delivered": _mean(delivered)}


def _mean(values: Tensor) -> dict[str, float | None]:
    """Mean over repeats and its standard error."""
    found = _means(values[:, None])
    return {"value": found["mean"][0], "standard_error": found["standard_error"][0]}


def _means(values: Tensor) -> dict[str, list[float | None]]:
    """Mean over repeats (axis 0) and its standard error, for each column; None for what is undefined."""
    n = len(values)
    error = values.std(0, correction=1) / math.sqrt(n) if n > 1 else torch.full_like(values[0], math.nan)
    return {"mean": _defined(values.mean(0)), "standard_error": _defined(error)}


def _ratio(part: Tensor, whole: Tensor) -> dict[str, float | None]:
    """Sum of `part` over sum of `whole`, summed over columns and repeats, with its standard error by linearisation."""
    a, b = part.sum(1), whole.sum(1)
    n, total = len(a), b.sum().item()
    if total == 0:
        return {"value": None, "standard_error": None}
    value = a.sum().item() / total
    error = math.sqrt(n / (n - 1) * (a - value * b).square().sum().item()) / abs(total) if n > 1 else None
    return {"value": value, "standard_error": error}


def _defined(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
