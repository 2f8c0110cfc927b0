"""How far to go along a preconditioned direction: clipping, grafting, and the exact quadratic model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.optim import foreach

GRAFTS = ("sgd", "adam")


def clip(lr: float, gradients: list[Tensor], directions: list[Tensor], kl: float | None, most: float | None) -> float:
    """The factor <= 1 that keeps a step of -lr d inside its trust region.

    kl    lr^2 d . g <= kl.  With d = (F + damping I)^-1 g the left side is about twice the Kullback-Leibler divergence
          between the model's predictions before and after (Ba et al. 2017, section 5)
    most  lr ||d|| <= most
    """
    factor = 1.0
    if kl is not None:
        size = lr**2 * float(foreach.dot(gradients, directions))
        factor = min(factor, (kl / size) ** 0.5 if size > 0 else 1.0)
    if most is not None:
        size = lr * float(foreach.norm(directions))
        factor = min(factor, most / size if size > 0 else 1.0)
    return factor


def grafted(kind: str, state: dict[str, Any], g: Tensor, d: Tensor) -> Tensor:
    """The direction d with the length that SGD (g itself) or Adam (betas .9, .999) would give this parameter.

    Source: Agarwal et al. 2020, arXiv:2002.11803.
    """
    if kind == "sgd":
        length = g.norm()
    else:
        if "graft_step" not in state:
            state |= {"graft_step": 0, "graft_m": torch.zeros_like(g), "graft_v": torch.zeros_like(g)}
        state["graft_step"] += 1
        state["graft_m"].lerp_(g, 0.1)
        state["graft_v"].mul_(0.999).addcmul_(g, g, value=1e-3)
        t = state["graft_step"]
        m, v = state["graft_m"] / (1 - 0.9**t), state["graft_v"] / (1 - 0.999**t)
        length = (m / (v.sqrt() + 1e-8)).norm()
    size = d.norm()
    return d * (length / size) if size > 0 else d


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
    A, C, b = (torch.zeros(n, dtype=torch.float64) for n in ((len(vectors),) * 2, (len(vectors),) * 2, (len(vectors),)))
    for i, v in enumerate(vectors):
        b[i] = sum(float((v[k] * gradients[k]).sum()) for k in v)
        for j, (u, image) in enumerate(zip(vectors, images, strict=True)):
            C[i, j] = sum(float((v[k] * image[k]).sum()) for k in v)
            A[i, j] = C[i, j] + sum(shift[k] * float((v[k] * u[k]).sum()) for k in v)
    x = -torch.linalg.lstsq(A.unsqueeze(0), b.view(1, -1, 1), driver="gelsd").solution.flatten()
    predicted = float(b @ x + x @ C @ x / 2)
    return float(x[0]), float(x[1]) if len(x) > 1 else 0.0, predicted


def adapted(damping: float, ratio: float, interval: int, omega: float = 19 / 20) -> float:
    """Levenberg-Marquardt: less damping where the model predicts well (ratio > 3/4), more where badly (< 1/4).

    Source: Martens & Grosse 2015, arXiv:1503.05671, section 6.5.
    """
    if ratio > 3 / 4:
        return damping * omega**interval
    if not ratio >= 1 / 4:  # NaN too
        return damping / omega**interval
    return damping
