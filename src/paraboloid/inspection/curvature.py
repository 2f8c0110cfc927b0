"""The generalised Gauss-Newton matrix at the end of training: top of the spectrum, diagonal by layer, density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid import linalg, trees
from paraboloid.data import call
from paraboloid.inspection.subject import Subject, by_layer
from paraboloid.losses import Loss
from paraboloid.operators import GGN, Identity, LinearOperator
from paraboloid.quantities import DiagGGN
from paraboloid.statistics import statistics

EXACT_COLUMNS = 128  # of the root of the loss's Hessian (classes, pixels): with more the diagonal is estimated
LABELS, DRAWS = 4, 8  # sampled labels for each of so many independent estimates
POINTS = 400  # of the density's grid
WIDTH = 0.02  # of the Gaussian that smooths the density, as a fraction of its range in decades
FLOOR = 1e-6  # of the largest eigenvalue: in float32 smaller ones are rounding


def curvature(
    subject: Subject, k: int, samples: int, steps: int, seed: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """The section "curvature" of the record: the GGN of the mean loss over all samples, weight decay included.

    k eigenvalues; a density from `samples` random vectors and `steps` products for each. `tick` is called once for
    every batch of the diagonal and for every product of the density.
    """
    beta, parameters = subject.problem.training.weight_decay, subject.parameters
    size = sum(p.numel() for p in parameters.values())
    operator: LinearOperator = GGN(subject.model, subject.problem.loss_fn, list(subject.batches), seed=seed)
    if beta:
        operator = operator + beta * Identity(parameters)
    diagonal = diagonal_ggn(subject, seed, tick)
    traces = by_layer(subject.layers, {name: d + beta for name, d in diagonal.values.items()})
    values, vectors = operator.eigsh(min(k, size), seed=seed)
    squares = trees.unflatten(vectors.square(), parameters)
    eigenvalues = [
        {"value": value.item(), "layers": by_layer(subject.layers, {name: s[..., i] for name, s in squares.items()})}
        for i, value in enumerate(values)
    ]
    return {
        "operator": "GGN",
        "parameters": size,
        "weight_decay": beta,
        "eigenvalues": eigenvalues,
        "trace": _trace(diagonal, beta, size),
        "layers": [
            {"name": layer.name, "trace": traces[layer.name], "mean_diagonal": traces[layer.name] / layer.size}
            for layer in subject.layers
        ],
        "density": _density(operator, samples, steps, seed, tick) if values[0] > 0 else None,
    }


def products(subject: Subject, samples: int, steps: int) -> int:
    """How often `curvature` calls `tick`."""
    size = sum(p.numel() for p in subject.parameters.values())
    return len(subject.batches) + samples * min(steps, size)


@dataclass(frozen=True)
class Diagonal:
    """The GGN's diagonal over all samples, by parameter, in float64; with `draws` estimates of each layer's trace."""

    values: dict[str, Tensor]
    traces: list[dict[str, float]]  # one for each draw; a single one is exact


def diagonal_ggn(subject: Subject, seed: int, tick: Callable[[], None]) -> Diagonal:
    """Exact where the root of the loss's Hessian has few columns, else by Monte Carlo with labels drawn from the model.

    Batches weigh what the loss divides by.
    """
    loss = Loss.from_torch(subject.problem.loss_fn)
    exact = _root_columns(subject, loss) <= EXACT_COLUMNS
    quantity, draws = (DiagGGN(), 1) if exact else (DiagGGN(samples=LABELS), DRAWS)
    generator = torch.Generator(device=next(iter(subject.parameters.values())).device).manual_seed(seed)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in subject.parameters.items()}
    traces = [dict.fromkeys((layer.name for layer in subject.layers), 0.0) for _ in range(draws)]
    weight = 0.0
    for batch in subject.batches:
        share = 0.0
        for draw in traces:
            stats = statistics(subject.model, loss, batch, [quantity], generator=generator)
            share = float(loss.normalizer(stats.output, batch[1]))
            found = {name: share * d.double() for name, d in stats[quantity.name].items()}
            for name, trace in by_layer(subject.layers, found).items():
                draw[name] += trace
            for name, d in found.items():
                total[name] += d
        weight += share
        tick()
    values = {name: d / (weight * draws) for name, d in total.items()}
    return Diagonal(values, [{name: trace / weight for name, trace in draw.items()} for draw in traces])


def _root_columns(subject: Subject, loss: Loss) -> int:
    with torch.no_grad():
        return loss.root_columns(call(subject.model, subject.batches[0][0]))


def _trace(diagonal: Diagonal, beta: float, size: int) -> dict[str, Any]:
    """The trace, weight decay included, with the standard error of what was estimated."""
    value = sum(d.sum().item() for d in diagonal.values.values()) + beta * size
    draws = torch.tensor([sum(draw.values()) for draw in diagonal.traces], dtype=torch.float64)
    decay = " plus the weight decay" if beta else ""
    if len(draws) == 1:
        return {"value": value, "standard_error": None, "method": f"Exact, from the diagonal of the GGN{decay}."}
    error = draws.std(correction=1).item() / len(draws) ** 0.5
    method = f"Estimated from {DRAWS * LABELS} labels per sample, drawn from the model{decay}; ± one standard error."
    return {"value": value, "standard_error": error, "method": method}


def _density(operator: LinearOperator, samples: int, steps: int, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    counted = _Counted(operator, tick)
    grid, density = linalg.spectral_density(
        counted, samples, seed, steps=steps, points=POINTS, width=WIDTH, log=True, floor=FLOOR
    )
    return {
        "samples": samples,
        "steps": min(steps, operator.shape[0]),
        "floor": FLOOR,
        "grid": grid.tolist(),
        "density": density.tolist(),
    }


class _Counted:
    """The operator, with `tick` called after each product."""

    def __init__(self, operator: LinearOperator, tick: Callable[[], None]):
        self.operator, self.tick = operator, tick
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def __matmul__(self, v: Tensor) -> Tensor:
        product = self.operator @ v
        self.tick()
        return product
