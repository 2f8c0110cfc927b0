"""Solving the tangent system for all samples at once: by conjugate gradients, or by stochastic descent."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.conjugate_gradients import cg_solution
from paraboloid.linalg.operand import LinAlgError
from paraboloid.linalg.solution import Solution
from paraboloid.linalg.stochastic_descent import Diverged, NesterovDescent, largest_eigenvalue
from paraboloid.posteriors.sampled import noise
from paraboloid.posteriors.sampled.scaled_model import ScaledModel
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

MOST_ITERATIONS = 1000  # of conjugate gradients: where more are needed, the residual says so
PROBES, POWERS = 3, 8  # batches whose curvature is measured, by so many products each
BOLD = (
    4.0  # times (1 - momentum) over the largest curvature of a batch: averaging pays for the noise of so large a rate
)
HALVINGS = 12
RARELY = 20.0  # times as long as saving it takes, at least
APART = 60.0  # seconds after which a descent is given out within an epoch too, to be saved


class _Columns:
    """S (strength G) S + Lambda for columns [D, K]."""

    def __init__(self, system: TangentSystem, precision: Tensor, by_root: bool = False):
        self.system, self.precision, self.by_root = system, precision, by_root
        self.shape, self.dtype, self.device = (system.size, system.size), precision.dtype, precision.device

    def __matmul__(self, v: Tensor) -> Tensor:
        rows = v.T.contiguous() if v.dim() == 2 else v.unsqueeze(0)
        return (self.system.product(rows, self.by_root) + self.precision * rows).T.reshape(v.shape)


def by_conjugate_gradients(
    system: TangentSystem, precision: Tensor, b: Tensor, w: Tensor, tol: float, M: Any, most: int = MOST_ITERATIONS
) -> tuple[Tensor, float]:
    """Rows that solve the system to ||r|| <= tol ||b|| each, from the rows `w`, preconditioned by M; and the largest
    residual over ||b||.

    It is measured at the end, and the iteration begun anew where rounding has parted it from its own.
    """

    def solved(A: _Columns) -> Solution:
        return cg_solution(A, b.T, tol, most, M, x0=w.T)

    try:
        found = solved(_Columns(system, precision))
    except LinAlgError:
        # A curvature that is all rounding, where the g-prior enlarges what few samples saw.
        found = solved(_Columns(system, precision, by_root=True))
    return found.x.T.contiguous(), found.residual


@dataclass(frozen=True)
class Descent:
    """How stochastic descent is done.

    epochs     passes over the data of one solution; the points of the second half are averaged
    lr         None: 4 (1 - momentum) over the largest curvature of a batch, which is measured
    noisy      the noise in each batch's targets in the place of the right-hand side, as in the plain form
    """

    epochs: int = 10
    lr: float | None = None
    momentum: float = 0.9
    noisy: bool = False


@dataclass(eq=False)
class Position:
    """Where a descent is, between two steps; what is saved of one."""

    lr: float
    epoch: int = 0
    step: int = 0  # of the epoch
    v: Tensor | None = None
    average: Tensor | None = None
    averaged: int = 0
    first: list[float] = field(default_factory=list)


def batches(system: TangentSystem, epoch: int) -> Iterator[tuple[int, Any]]:
    """(number of its first data point, graph) of each batch of an epoch: shuffled where the graphs are kept, else as
    they come.  As many as the process with the most of them has; the others begin anew."""
    left = system.steps
    while left:
        for each in _pass(system, epoch):
            yield each
            left -= 1
            if not left:
                return


def _pass(system: TangentSystem, epoch: int) -> Iterator[tuple[int, Any]]:
    starts = system.curvature.starts
    with system.replay.graphs() as graphs:
        if system.replay.kept is not None:
            generator = torch.Generator().manual_seed(noise.stream(system.seed, noise.ORDER, epoch))
            for i in torch.randperm(len(system.replay.kept), generator=generator).tolist():
                yield starts[i], system.replay.kept[i]
            return
        start = 0
        for graph in graphs:
            yield start, graph
            start += len(graph.f)


def steepest(system: TangentSystem, precision: Tensor, preconditioner: Tensor) -> float:
    """The largest curvature of P ((N / B) S (strength G_B) S + Lambda) over a few batches B."""
    start, found = system.prior_noise(2**31), []
    for probe, (_, graph) in enumerate(batches(system, 0)):
        if probe == PROBES:
            break

        def product(v: Tensor, graph: Any = graph) -> Tensor:
            ((_, parts),) = system.pulled(graph, graph.hessian(system.pushed(graph, v.unsqueeze(0))))
            parts, coefficient = system.of_all(graph, parts)
            flat = torch.cat([t.reshape(-1) for t in parts]).mul_(coefficient)
            return preconditioner * (system.deviations(flat) + precision * v)

        found.append(largest_eigenvalue(product, start, POWERS))
    return max(found)


def descended(
    x: Tensor, position: Position, system: TangentSystem, settings: Descent, precision: Tensor, preconditioner: Tensor,
    b: Tensor | None, outputs: Callable[[Any, int, Tensor], Tensor],
) -> Iterator[NesterovDescent]:  # fmt: skip
    """Descent of the rows x, in place, from its position; after each epoch, and in long ones, it is given out.

    outputs(graph, start, J S x) are the vectors in output space whose pull-back is the batch's part of the gradient.
    The points of the second half of all steps are averaged.
    """
    descent = NesterovDescent(x, position.lr, settings.momentum, preconditioner)
    if position.v is not None:
        descent.v, descent.average, descent.averaged = position.v, position.average, position.averaged
        descent.first = list(position.first)
    half, last, apart = settings.epochs * system.steps // 2, time.monotonic(), APART
    for epoch in range(position.epoch, settings.epochs):
        for step, (start, graph) in enumerate(batches(system, epoch)):
            if step < position.step:  # of an epoch that was interrupted
                continue
            if epoch * system.steps + step == half:
                descent.start_average()
            u = outputs(graph, start, system.pushed(graph, x))
            for k, parts in system.pulled(graph, u):
                parts, coefficient = system.of_all(graph, parts)
                descent.step(k, parts, coefficient, precision, None if b is None else b[k], system.scale)
            descent.advance()
            ended = step + 1 == system.steps
            if ended or (system.group is None and time.monotonic() - last >= apart):
                position.epoch, position.step = (epoch + 1, 0) if ended else (epoch, step + 1)
                position.v, position.first = descent.v, descent.first
                position.average, position.averaged = descent.average, descent.averaged
                given = time.monotonic()
                yield descent
                last = time.monotonic()
                apart = max(APART, RARELY * (last - given))


def first_position(system: TangentSystem, settings: Descent, precision: Tensor, preconditioner: Tensor) -> Position:
    if settings.lr is not None:
        return Position(settings.lr)
    return Position(BOLD * (1 - settings.momentum) / steepest(system, precision, preconditioner))


def slower(position: Position, settings: Descent, error: Diverged, bound: Callable[[], float]) -> Position:
    """A position to start again from, at half the rate; tells so.  Raises ValueError where the rate was set by hand."""
    if settings.lr is not None:
        raise ValueError(
            f"lr is {settings.lr:.4g}, with which the descent diverges ({error}); expected at most about "
            f"{BOLD * (1 - settings.momentum) / bound():.2g}, {BOLD:.0f} (1 - momentum) over the largest curvature of "
            "a batch. Leave lr out to have it measured."
        ) from error
    warnings.warn(
        f"stochastic descent diverged at the learning rate {position.lr:.3g} ({error}); it starts again at half of it.",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip
    return Position(position.lr / 2)


def sample_targets(system: TangentSystem, settings: Descent) -> Callable[[Any, int, Tensor], Tensor]:
    """H_n J_n S w, less L_n eps_n / sqrt(strength) where the noise is in the targets."""

    def outputs(graph: Any, start: int, jv: Tensor) -> Tensor:
        u = graph.hessian(jv)
        return u - system.noisy_outputs(graph, start) / system.strength**0.5 if settings.noisy else u

    return outputs


def optimum_targets(linear: ScaledModel) -> Callable[[Any, int, Tensor], Tensor]:
    """The gradient of the loss at the linearised outputs."""
    return lambda graph, start, jv: linear.loss.gradient(graph.f.detach() + jv[0], graph.y).unsqueeze(0)
