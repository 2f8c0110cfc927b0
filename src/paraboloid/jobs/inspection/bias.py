"""The bias of the mini-batch quadratic, for several batch sizes: means, ratios of sums, and what a step delivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.jobs.inspection.subject import Subject
from paraboloid.operators import GGN
from paraboloid.quadratics.bias_prediction import predicted_bias
from paraboloid.quadratics.bias_result import WHICH, Bias, mean_error, plain
from paraboloid.quadratics.measure_bias import bias as measure

TOLERANCE = 0.1  # an overstatement below it is small enough to trust the batch
PROBES = 8  # random vectors that estimate the trace beyond the top eigenvalues
TAIL = 60  # eigenvalues beyond them, falling geometrically, that stand for the others in the prediction
SUMS = (1, 5)  # ratios are given for the top direction and for the sum over the top five


def bias(
    subject: Subject, batch_sizes: Sequence[int], k: int, repeats: int, seed: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """The section "bias" of the record, without its reading; `tick` is called after every repeat."""
    training = subject.problem.training
    k = min(k, sum(p.numel() for p in subject.parameters.values()))
    spectrum, directions = top_of_all_data(subject, k, seed)
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
            overlap=directions,
            progress=lambda done, repeats: tick(),
        )
        assert found.overlap is not None
        row = {"batch_size": batch_size, **summary(found), "overlap": _mean(found.overlap)}
        full = found.curvature["full"].mean(0)
        for ratio in row["ratios"]:
            ratio["predicted"] = expected(
                spectrum, full[: ratio["directions"]], batch_size, subject.size, training.weight_decay
            )
        table.append(row)
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


def top_of_all_data(subject: Subject, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The spectrum of the GGN of all data without weight decay, and its top k eigenvectors [k, D].

    The k top eigenvalues, then a geometric tail with the trace of the rest, which a few random vectors estimate.
    """
    G = GGN(subject.model, subject.problem.loss_fn, subject.batches)
    values, vectors = G.eigsh(k, tol=1e-3, seed=seed)
    generator = torch.Generator(values.device).manual_seed(seed)
    signs = torch.randint(2, (PROBES, G.shape[0]), generator=generator, device=values.device).to(values) * 2 - 1
    rest = G.quadratic_forms(signs - (signs @ vectors) @ vectors.T).mean().clamp(min=0)
    last = values[-1].clamp(min=0)
    tail = last * (rest / (last + rest).clamp(min=1e-30)) ** torch.arange(1, TAIL + 1).to(values)
    tail = (tail * rest / tail.sum().clamp(min=1e-30)).clamp(max=last)
    return torch.cat([values.clamp(min=0), tail]), vectors.T


def expected(
    spectrum: Tensor, full: Tensor, batch_size: int, samples: int, weight_decay: float
) -> dict[str, float | None]:
    """What `predicted_bias` says of the sum over the top directions, whose curvatures on all data are `full`."""
    k = len(full)
    if not spectrum[0] > 0 or not full.sum() > 0 or k > min(batch_size, samples // 2, len(spectrum)):
        return {"same": None, "other": None}
    found = predicted_bias(spectrum, batch_size, samples, k, weight_decay=weight_decay)
    share = (full / full.sum()).double()
    return {which: (ratio @ share).item() for which, ratio in found.items()}


def summary(found: Bias) -> dict[str, Any]:
    """Means over repeats, ratios of sums and the decrease along the top direction.

    Slopes are those of directions turned downhill on their own batch, so that they can be averaged.
    """
    pair = WHICH[:2]
    return {
        "curvature": {which: _means(found.curvature[which]) for which in WHICH},
        "slope": {which: _means(found.slope[which]) for which in WHICH},
        "step": {which: _means(found.step(which)) for which in WHICH},
        "ratios": [
            {
                "directions": top,
                **{of: {which: _ratio(found, which, top, of) for which in pair} for of in ("curvature", "slope")},
                "slope_sum": {which: _mean(found.slope[which][:, :top].sum(1)) for which in WHICH},
            }
            for top in sorted({min(top, found.k) for top in SUMS})
        ],
        "decrease": {
            which: {
                "promised": _mean(_decrease(found, which, which)),
                "delivered": _mean(_decrease(found, which, "full")),
            }
            for which in pair
        },
        "second_batch_gain": _mean(_decrease(found, "other", "full") - _decrease(found, "same", "full")),
    }


def _decrease(found: Bias, which: str, on: str) -> Tensor:
    """By the quadratic `on`, of the Newton step along the top direction with slope and curvature of `which`: [repeats].

    The two steps of a repeat go along the same direction, so that their difference is less noisy than either.
    """
    step = found.step(which)[:, 0]
    return -(step * found.slope[on][:, 0] + 0.5 * step**2 * found.curvature[on][:, 0])


def _ratio(found: Bias, which: str, top: int, of: str) -> dict[str, float | None]:
    value, error = found.total_ratio(which, top, of), found.total_standard_error(which, top, of)
    return {"value": plain(value), "standard_error": plain(error)}


def _mean(values: Tensor) -> dict[str, float | None]:
    """Mean over repeats and its standard error."""
    value, error = mean_error(values)
    return {"value": plain(value), "standard_error": plain(error)}


def _means(values: Tensor) -> dict[str, list[float | None]]:
    """The same for each direction."""
    mean, error = mean_error(values)
    return {"mean": plain(mean), "standard_error": plain(error)}
