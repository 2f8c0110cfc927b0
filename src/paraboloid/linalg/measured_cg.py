"""Conjugate gradients whose directions come from one quadratic and whose step lengths from another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.conjugate_gradients import Iterates, stopping_rule
from paraboloid.linalg.krylov import orthogonalise
from paraboloid.passes.memory import RESIDUALS


def measured_iterates(
    A: Any,
    b: Tensor,
    B: Any,
    c: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: Tensor | None = None,
    max_iterations: int = 250,
    progress: float = 5e-4,
    tol: float = 1e-10,
    spacing: float = 1.3,
) -> Iterates:
    """As `pb.linalg.cg_iterates` on A x = b, whose search directions d_i these are, but with the iterates

        x_i = x_{i-1} + (d_i . (c - B x_0)) / (d_i . B d_i) d_i

    that the other system B x = c measures along them.  For B = A and c = b they are the iterates themselves, since the
    directions are conjugate; they stay so in floating point because residuals are orthogonalised against all earlier
    ones, as far as these fit into 256 MiB.  The directions' own system says when to stop.  Where d_i . A d_i or
    d_i . B d_i is not positive the iteration ends, see `Iterates.flat`.

    Source: the debiased CG of arXiv:2410.14325, with a start and a preconditioner.
    """
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    own, r = x.clone(), b - A @ x if x0 is not None else b.clone()
    alone = B is A and c is b
    r_other = r.clone() if alone else c - B @ x if x0 is not None else c.clone()
    start = r_other.clone()
    M = torch.ones_like(b) if preconditioner is None else preconditioner
    stop = stopping_rule("martens", tol, progress)
    steps, xs, values = [], [], []
    root, most = M.sqrt(), min(max_iterations, RESIDUALS.of() // max(1, b.nbytes))
    kept, count = b.new_empty(most, len(b)), 0  # of root * r, whose inner product is that of CG
    z = M * r
    d, rz = z.clone(), r @ z
    done, flat, iteration = bool(stop.start(_value(own, r, b), r.unsqueeze(1), b.norm().view(1))), None, 0
    while not done and iteration < max_iterations:
        Ad = A @ d
        Bd = Ad if B is A else B @ d
        if count < most:
            kept[count] = torch.nn.functional.normalize(root * r, dim=0, eps=0.0)
            count += 1
        curvature, measured = d @ Ad, d @ Bd
        if not (curvature > 0 and measured > 0):
            flat = float(torch.minimum(curvature, measured))
            break
        alpha, tau = rz / curvature, (d @ start) / measured
        own.add_(alpha * d)
        r = orthogonalise(root * (r - alpha * Ad), kept[:count])[0] / root
        x.add_(tau * d)
        r_other.sub_(tau * Bd)
        iteration += 1
        if not steps or iteration >= spacing * steps[-1]:
            steps.append(iteration)
            xs.append(x.clone())
            values.append(_value(x, r_other, c))
        done = bool(stop.after(iteration, _value(own, r, b), r.unsqueeze(1)))
        z = M * r
        rz, before = r @ z, rz
        d = z + rz / before * d
    if not steps or steps[-1] != iteration:
        steps.append(iteration)
        xs.append(x)
        values.append(_value(x, r_other, c))
    residual = float(r.norm() / b.norm()) if b.any() else 0.0
    return Iterates(steps, torch.stack(xs), torch.cat(values), iteration, residual, flat)


def _value(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """x . A x / 2 - b . x for r = b - A x, [1]."""
    return ((x * (r + b)).sum() / -2).view(1)
