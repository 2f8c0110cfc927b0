"""Alternating posterior samples and the prior's precisions: EM, or MacKay's updates, from samples alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.operators.vectors import split
from paraboloid.posteriors.prior_tuning.evidence import HIGHEST, LOWEST
from paraboloid.posteriors.prior_tuning.linearised import optimum
from paraboloid.posteriors.sampled.scaled_model import ScaledModel
from paraboloid.posteriors.sampled.solvers import by_conjugate_gradients
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

OPTIMUM = 1e-3  # of the gradient's norm, to which the linearised optimum is found
SETTLED = 1e-3  # relative change of every precision that ends the updates


@dataclass(frozen=True)
class EMStep:
    """What is known after the samples under one prior were found.

    precision            one for each group of weights (in the g-prior's units, where there is one)
    effective_dimension  gamma of each group, the mean over the samples
    residual             ||b - A w|| / ||b|| of the worst sample
    """

    step: int
    precision: tuple[float, ...]
    effective_dimension: tuple[float, ...]
    residual: float


@dataclass(eq=False)
class State:
    """All that a run consists of: what is saved, and gone on from."""

    precision: list[float]  # of each group
    b: Tensor | None = None  # [K, D], right-hand sides under `precision`
    w: Tensor | None = None  # [K, D], the samples in units of the g-prior
    delta: Tensor | None = None  # [D], the linearised model's optimum less the weights, in the same units
    gammas: list[float] = field(default_factory=list)
    steps: int = 0  # updates of the precision that were made
    sampled: bool = False  # whether `w` and `gammas` are those of `precision`
    settled: bool = False
    history: list[EMStep] = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """EM on a tangent system: the samples under the precisions, then the precisions at the linearised optimum.

        gamma_g = D_g sum_k (w_k . S G S w_k)_g / sum_k (w_k . A w_k)_g,      lambda_g <- gamma_g / ||w*||_g^2

    with A = S G S + Lambda.  The denominator's mean is D_g for each sample, and its noise that of the numerator: their
    ratio is without bias where there is one group, and has the variance 2 sum_i (a_i - mean a)^2 / K over A's
    eigendirections, a_i = g_i / (g_i + lambda), where the numerator alone has 2 sum_i a_i^2 / K.  w* = S^-1 (theta +
    delta) is the optimum of the linearised model under the current prior.  A fixed point is a stationary point of the
    evidence of the linearised model.  Source: Antoran et al. 2023, arXiv:2210.04994, section 4; MacKay 1992.
    """

    system: TangentSystem
    groups: Sequence[Sequence[int]]  # places of the parameters that share a precision
    theta: Tensor  # [D]
    diagonal: Tensor  # [D], of S (strength G) S
    tol: float

    def expanded(self, precision: Sequence[float]) -> Tensor:
        """One precision for each weight, [D]."""
        found = torch.empty_like(self.theta)
        pieces = split(found, self.system.parameters)
        for group, value in zip(self.groups, precision, strict=True):
            for place in group:
                pieces[place].fill_(value)
        return found

    def totals(self, elementwise: Tensor) -> list[float]:
        """Sums over each group's weights."""
        sums = [piece.sum() for piece in split(elementwise, self.system.parameters)]
        return [float(sum(sums[place] for place in group)) for group in self.groups]

    @cached_property
    def counts(self) -> list[float]:
        """How many weights each group has."""
        return self.totals(torch.ones_like(self.theta))

    def go(self, state: State, em_steps: int, after: Callable[[State], None]) -> State:
        """Up to `em_steps` updates in total, and the samples under the last precisions; `after` sees every state."""
        while True:
            if not state.sampled:
                self.sample(state)
                after(state)
            if state.steps >= em_steps or state.settled:
                return state
            self.update(state)
            after(state)

    def sample(self, state: State) -> None:
        """The E step, in place: samples under the current precisions, from those under the ones before."""
        precision = self.expanded(state.precision)
        if state.b is None or state.w is None:
            state.b = self.system.right_hand_sides(precision)
            state.w = torch.zeros_like(state.b)
        state.w = by_conjugate_gradients(self.system, precision, state.b, state.w, self.tol, self.diagonal)
        products = self.system.product(state.w)
        residual = state.b - products - precision * state.w
        relative = (residual.norm(dim=1) / state.b.norm(dim=1)).max().item()
        forms = self.totals(products.mul_(state.w).sum(0))
        wholes = self.totals(torch.addcmul(products, precision, state.w.square()).sum(0))
        state.gammas = [n * form / whole for form, whole, n in zip(forms, wholes, self.counts, strict=True)]
        state.history.append(EMStep(state.steps, tuple(state.precision), tuple(state.gammas), relative))
        state.sampled = True

    def update(self, state: State) -> None:
        """The M step, in place: the linearised optimum, the precisions, and the right-hand sides that follow."""
        before, linear = self.expanded(state.precision), ScaledModel(self.system)
        sigma = 1 / (self.diagonal + before)
        state.delta = optimum(
            linear, before, self.system.strength, state.delta, lambda rows: rows * sigma, min(self.tol, OPTIMUM)
        )
        squares = self.totals((linear.theta + state.delta).square())
        tiny = torch.finfo(self.theta.dtype).tiny
        # The samples' noise may take the gamma of a group below zero: one weight is the least that EM goes on from.
        gammas = [max(g, min(1.0, n / 2)) for g, n in zip(state.gammas, self.counts, strict=True)]
        updated = [min(max(g / max(s, tiny), LOWEST), HIGHEST) for g, s in zip(gammas, squares, strict=True)]
        pairs = zip(updated, state.precision, strict=True)
        state.settled = all(abs(new / old - 1) < SETTLED for new, old in pairs)
        assert state.b is not None
        self.system.reweighted(state.b, before, self.expanded(updated))
        state.precision, state.steps, state.sampled = updated, state.steps + 1, False


def as_prior(groups: Sequence[Sequence[str]], precision: Sequence[float], names: Sequence[str]) -> Any:
    """A number where all weights share one precision, else a dict by name."""
    if len(groups) == 1:
        return precision[0]
    found = {name: value for group, value in zip(groups, precision, strict=True) for name in group}
    return {name: found[name] for name in names}
