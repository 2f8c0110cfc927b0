"""The generalised Gauss-Newton matrix at the end of training: top of the spectrum, diagonal by layer, density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid import linalg, trees
from paraboloid.inspection.subject import Subject, by_layer
from paraboloid.losses import Loss
from paraboloid.operators import GGN, Identity, LinearOperator
from paraboloid.statistics import statistics

LANCZOS_STEPS = 60
POINTS = 400  # of the density's grid
WIDTH = 0.02  # of the Gaussian that smooths the density, as a fraction of its range in decades
FLOOR = 1e-6  # of the largest eigenvalue: in float32 smaller ones are rounding


def curvature(subject: Subject, k: int, samples: int, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """The section "curvature" of the record: the GGN of the mean loss over all samples, weight decay included.

    `tick` is called once for every batch of the diagonal and for every product of the density.
    """
    beta, parameters = subject.problem.training.weight_decay, subject.parameters
    size = sum(p.numel() for p in parameters.values())
    operator: LinearOperator = GGN(subject.model, subject.problem.loss_fn, list(subject.batches), seed=seed)
    if beta:
        operator = operator + beta * Identity(parameters)
    diagonal = {name: d + beta for name, d in diagonal_ggn(subject, tick).items()}
    traces = by_layer(subject.layers, diagonal)
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
        "trace": {
            "value": sum(traces.values()),
            "standard_error": None,
            "method": "Exact, from the diagonal of the GGN" + (" plus the weight decay." if beta else "."),
        },
        "layers": [
            {"name": layer.name, "trace": traces[layer.name], "mean_diagonal": traces[layer.name] / layer.size}
            for layer in subject.layers
        ],
        "density": _density(operator, samples, seed, tick) if values[0] > 0 else None,
    }


def products(subject: Subject, samples: int) -> int:
    """How often `curvature` calls `tick`."""
    size = sum(p.numel() for p in subject.parameters.values())
    return len(subject.batches) + samples * min(LANCZOS_STEPS, size)


def diagonal_ggn(subject: Subject, tick: Callable[[], None]) -> dict[str, Tensor]:
    """The GGN's diagonal over all samples, exact, in float64; batches weigh what the loss divides by."""
    loss = Loss.from_torch(subject.problem.loss_fn)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in subject.parameters.items()}
    weight = 0.0
    for batch in subject.batches:
        stats = statistics(subject.model, loss, batch, ["diag_ggn"])
        share = float(loss.normalizer(stats.output, batch[1]))
        for name, d in stats["diag_ggn"].items():
            total[name] += share * d.double()
        weight += share
        tick()
    return {name: d / weight for name, d in total.items()}


def _density(operator: LinearOperator, samples: int, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    grid, density = linalg.spectral_density(
        _Counted(operator, tick), samples, seed, steps=LANCZOS_STEPS, points=POINTS, width=WIDTH, log=True, floor=FLOOR
    )
    return {
        "samples": samples,
        "steps": min(LANCZOS_STEPS, operator.shape[0]),
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
