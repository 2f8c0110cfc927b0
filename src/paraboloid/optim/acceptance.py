"""Whether a step did what the quadratic model promised, and whether it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.optim import foreach
from paraboloid.optim.direction import Move


class Trial:
    """Parameters and momentum before a step."""

    def __init__(self, moves: Iterable[Move]):
        self._before: list[tuple[Move, list[Tensor]]] = [(m, [p.clone() for p in m.params]) for m in moves]
        self._momentum = [
            (state["momentum_buffer"], state["momentum_buffer"].clone())
            for m, _ in self._before for state in m.states if "momentum_buffer" in state
        ]  # fmt: skip

    def predicted(self, quadratic: Callable[[str, Tensor], float]) -> float:
        """g . delta + delta . C delta / 2 for the step delta that was taken; quadratic: delta . C delta by name."""
        total = 0.0
        for m, values in self._before:
            for name, p, g, value in zip(m.names, m.params, m.gradient, values, strict=True):
                delta = p - value
                total += float((g * delta).sum())
                total += quadratic(name, delta) / 2
        return total

    def slope(self) -> float:
        """g . delta for the step delta that was taken."""
        return sum(float(foreach.along(m.gradient, m.params, values)) for m, values in self._before)

    def take_back(self) -> None:
        for m, values in self._before:
            for p, value in zip(m.params, values, strict=True):
                p.copy_(value)
        for buffer, value in self._momentum:
            buffer.copy_(value)


def reduction_ratio(change: float, predicted: float) -> float:
    """The loss's change over the predicted one; NaN where none was predicted."""
    return change / predicted if predicted else float("nan")


def adapted(damping: float, ratio: float, lower: float, higher: float) -> float:
    """Levenberg-Marquardt: `lower` where the model predicts well (ratio > 3/4), `higher` where badly (< 1/4).

    Source: Martens & Grosse 2015, arXiv:1503.05671, section 6.5.
    """
    return lower if ratio > 3 / 4 else damping if ratio >= 1 / 4 else higher  # NaN is bad too


def total_damping(group: Mapping[str, Any]) -> float:
    """What is added to the curvature: damping, and weight decay that is part of the loss."""
    return group["damping"] + (0.0 if group.get("decoupled") else group["weight_decay"])


def quadratic_step(
    product: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    shift: Mapping[str, float],
    gradients: dict[str, Tensor],
    direction: dict[str, Tensor],
    last: dict[str, Tensor] | None,
) -> tuple[float, float, float]:
    """alpha, mu and the predicted change of M(alpha d + mu d0), M(x) = g . x + x . (C + shift I) x / 2 at its minimum.

    product  C x, exact;  shift: the damping (with weight decay) of each parameter;  last: d0, the step before; or None
    Source: Martens & Grosse 2015, arXiv:1503.05671, sections 6.4 and 7.  The predicted change leaves the shift out, as
    the reduction ratio wants it.
    """
    vectors = [direction] if last is None else [direction, last]
    images = [product(v) for v in vectors]
    A, C, b = (
        torch.zeros(n, dtype=torch.float64, device="cpu")
        for n in ((len(vectors),) * 2, (len(vectors),) * 2, (len(vectors),))
    )
    for i, v in enumerate(vectors):
        b[i] = sum(float((v[k] * gradients[k]).sum()) for k in v)
        for j, (u, image) in enumerate(zip(vectors, images, strict=True)):
            C[i, j] = sum(float((v[k] * image[k]).sum()) for k in v)
            A[i, j] = C[i, j] + sum(shift[k] * float((v[k] * u[k]).sum()) for k in v)
    x = -torch.linalg.lstsq(A.unsqueeze(0), b.view(1, -1, 1), driver="gelsd").solution.flatten()
    predicted = float(b @ x + x @ C @ x / 2)
    return float(x[0]), float(x[1]) if len(x) > 1 else 0.0, predicted
