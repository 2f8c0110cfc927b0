"""The curvature at the end of training: top of the spectrum, trace by layer, density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from paraboloid import linalg
from paraboloid.jobs.inspection.matrices import NAMES, Traces, matrix, ticks
from paraboloid.jobs.inspection.subject import Subject, by_layer
from paraboloid.operators import Identity, LinearOperator
from paraboloid.passes import trees

POINTS = 400  # of the density's grid
WIDTH = 0.02  # of the Gaussian that smooths the density, as a fraction of its range
FLOOR = 1e-6  # of the largest eigenvalue: in float32 smaller ones are rounding


def curvature(
    subject: Subject, k: int, samples: int, steps: int, seed: int, tick: Callable[[], None], kind: str = "ggn"
) -> dict[str, Any]:
    """The section "curvature" of the record: of the mean loss over all samples, weight decay included.

    kind: "ggn", "hessian", "kfac" or "ekfac". k eigenvalues; a density from `samples` random vectors and `steps`
    products for each, on a logarithmic axis, or on a linear one for the Hessian, whose eigenvalues may be negative.
    `tick` is called once for every piece of the traces (see `matrices.ticks`) and for every product of the density.
    """
    beta, parameters = subject.problem.training.weight_decay, subject.parameters
    size = sum(p.numel() for p in parameters.values())
    operator, traces = matrix(subject, kind, seed, tick)
    if beta:
        operator = operator + beta * Identity(parameters)
    values, vectors = operator.eigsh(min(k, size), seed=seed)
    squares = trees.unflatten(vectors.square(), parameters)
    eigenvalues = [
        {"value": value.item(), "layers": by_layer(subject.layers, {name: s[..., i] for name, s in squares.items()})}
        for i, value in enumerate(values)
    ]
    return {
        "operator": NAMES[kind],
        "parameters": size,
        "weight_decay": beta,
        "eigenvalues": eigenvalues,
        "trace": _trace(traces, beta, size),
        "layers": [_layer(layer, traces, beta) for layer in subject.layers],
        "density": _density(operator, samples, steps, seed, tick, kind != "hessian") if values[0] > 0 else None,
    }


def products(subject: Subject, samples: int, steps: int, kind: str = "ggn") -> int:
    """How often `curvature` calls `tick`."""
    size = sum(p.numel() for p in subject.parameters.values())
    return ticks(kind) + samples * min(steps, size)


def _layer(layer: Any, traces: Traces, beta: float) -> dict[str, Any]:
    value, error = traces.layer(layer.name)
    value += beta * layer.size
    return {"name": layer.name, "trace": value, "standard_error": error, "mean_diagonal": value / layer.size}


def _trace(traces: Traces, beta: float, size: int) -> dict[str, Any]:
    """The trace, weight decay included, with the standard error of what was estimated."""
    value, error = traces.total()
    method = f"{traces.method} Weight decay is included." if beta else traces.method
    return {"value": value + beta * size, "standard_error": error, "method": method}


def _density(
    operator: LinearOperator, samples: int, steps: int, seed: int, tick: Callable[[], None], log: bool
) -> dict[str, Any]:
    counted = _Counted(operator, tick)
    grid, density = linalg.spectral_density(
        counted, samples, seed, steps=steps, points=POINTS, width=WIDTH, log=log, floor=FLOOR
    )
    return {
        "samples": samples,
        "steps": min(steps, operator.shape[0]),
        "scale": "log" if log else "linear",
        "floor": FLOOR if log else None,
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
