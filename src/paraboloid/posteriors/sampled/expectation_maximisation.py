"""Alternating posterior samples and the prior's precisions: EM, or MacKay's updates, from samples alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.linalg.operand import LinAlgError
from paraboloid.linalg.stochastic_descent import Diverged
from paraboloid.operators.vectors import split
from paraboloid.posteriors.prior_tuning.evidence import HIGHEST, LOWEST
from paraboloid.posteriors.prior_tuning.linearised import optimum
from paraboloid.posteriors.sampled.dual_optimum import dual_optimum
from paraboloid.posteriors.sampled.in_float64 import NotCarried
from paraboloid.posteriors.sampled.scaled_model import ScaledModel
from paraboloid.posteriors.sampled.shortfall import EXACT
from paraboloid.posteriors.sampled.sketch import Sketch, rank_of
from paraboloid.posteriors.sampled.solvers import (
    HALVINGS,
    MOST_ITERATIONS,
    Descent,
    by_conjugate_gradients,
    descended,
    first_position,
    optimum_targets,
    sample_targets,
    slower,
    steepest,
)  # fmt: skip
from paraboloid.posteriors.sampled.state import EMStep, Progress, State
from paraboloid.posteriors.sampled.tangent_blocks import by_blocks
from paraboloid.posteriors.sampled.tangent_kernel import TangentKernel
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

OPTIMUM = 1e-3  # of the gradient's norm, to which the linearised optimum is found
PROBED = 4  # passes over the data by which descent and conjugate gradients are compared
NEWTON_STEPS = 3  # of the linearised optimum, where passes are counted
REFINED, TOGETHER = (
    4,
    2**26,
)  # times that the kernel is asked for what rounding left; numbers that are asked for at once
FEW = 10  # iterations that are worth more than a sketch
SETTLED = 1e-3  # relative change of every precision that ends the updates


@dataclass(eq=False)
class Run:
    """EM on a tangent system: the samples under the precisions, then the precisions at the linearised optimum.

        gamma_g = D_g sum_k (w_k . S G S w_k)_g / sum_k (w_k . A w_k)_g,      lambda_g <- gamma_g / ||w*||_g^2

    with A = S G S + Lambda; and where the noise variance is not given, 2 loss(w*) / (elements - gamma) for that.

    The denominator's mean is D_g for each sample, and its noise that of the numerator: their ratio is without bias
    where there is one group, and has the variance 2 sum_i (a_i - mean a)^2 / K over A's eigendirections, a_i = g_i /
    (g_i + lambda), where the numerator alone has 2 sum_i a_i^2 / K.  w* = S^-1 (theta +
    delta) is the optimum of the linearised model under the current prior.  A fixed point is a stationary point of the
    evidence of the linearised model.  Source: Antoran et al. 2023, arXiv:2210.04994, section 4; MacKay 1992.
    """

    system: TangentSystem
    groups: Sequence[Sequence[int]]  # places of the parameters that share a precision
    theta: Tensor  # [D]
    diagonal: Tensor  # [D], of S (strength G) S
    tol: float
    descent: Descent | None = None  # None: conjugate gradients, or with `dual` exactly or by `blocks`
    dual: TangentKernel | None = None
    blocks: bool = False  # of that, solved one after the other
    across: Group = None  # the processes that hold other samples
    probes: bool = False  # whether conjugate gradients are taken in the place of the descent where they are better
    elements: float = 0.0  # of all targets, and the noise variance that the system was made with, where EM finds it
    first: float = 1.0
    loss: Any = None  # of the linearised optimum; None: that of the system
    carried: bool = False  # whether samples that rounding keeps from being solved by a Cholesky factor are refused
    made: list[Sketch] | None = None  # empty where there is none to be had

    def __post_init__(self) -> None:
        self.under_first = self.system.scale, self.diagonal

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
                self.sample(state, after)
                after(state)
            if state.steps >= em_steps or state.settled:
                return state
            self.update(state, after)
            after(state)

    def progress(self, state: State) -> Progress:
        position, last = state.position, state.history[-1] if state.history else None
        updated = last is not None and last.step < state.steps and position is None
        doing = "precision" if updated else "optimum" if position is not None and state.sampled else "samples"
        return Progress(
            doing, state.steps, 0 if position is None else position.epoch,
            0 if position is None or self.descent is None else self.descent.epochs, tuple(state.precision),
            None if last is None else sum(last.effective_dimension), None if last is None else last.residual,
        )  # fmt: skip

    def sample(self, state: State, after: Callable[[State], None]) -> None:
        """The E step, in place: samples under the current precisions, from those under the ones before."""
        precision = self.expanded(state.precision)
        if state.b is None or state.w is None:
            state.b = self.system.right_hand_sides(precision)
            state.w = self.system.prior_draws(precision)
            after(state)
        if self.probes and state.chosen is None:
            self._probe(state, precision)
            after(state)
        if self.dual is not None and self.blocks:
            state.w = by_blocks(self.dual, precision, state.b, state.w, self.tol)
        elif self.dual is not None:
            state.w = self._refined(self.dual, precision, state.b)
        elif not self._descends(state):
            state.w = self._conjugate(state, precision)
        else:
            self._descend_samples(state, precision, after)
        forms, wholes, residual = self._measured(state.b, state.w, precision)
        if self.carried and not self.blocks and self.dual is not None and not residual <= max(2 * self.tol, EXACT):
            raise NotCarried
        state.gammas = [n * form / whole for form, whole, n in zip(forms, wholes, self.counts, strict=True)]
        state.history.append(
            EMStep(state.steps, tuple(state.precision), tuple(state.gammas), residual, state.slope, state.noise)
        )
        state.sampled = True

    @torch.no_grad()
    def _refined(self, dual: TangentKernel, precision: Tensor, b: Tensor) -> Tensor:
        """By the kernel, and again for what rounding left of the right-hand sides, while that helps: where precisions
        are tiny, small weights are differences of large ones."""
        w = torch.empty_like(b)
        for part, found in zip(b.split(some := max(1, TOGETHER // b.shape[1])), w.split(some), strict=True):
            found.copy_(dual.apply(precision, part))
            left, step = math.inf, None
            for again in range(REFINED + 1):
                rest = (part - self.system.product(found)).addcmul_(precision, found, value=-1)
                before, left = left, float((rest.norm(dim=1) / part.norm(dim=1)).max())
                if step is not None and not left < before:
                    found.sub_(step)
                if not self.tol < left < before or again == REFINED:
                    break
                found.add_(step := dual.apply(precision, rest))
        return w

    def _descends(self, state: State) -> bool:
        return self.descent is not None and state.chosen != "cg"

    def _probe(self, state: State, precision: Tensor) -> None:
        """Some passes over the data by either, for one sample: the one that brings w . A w / 2 - b . w lower."""
        assert state.b is not None and state.w is not None and self.descent is not None
        passes, b, start, M = (
            min(PROBED, self.descent.epochs),
            state.b[:1],
            state.w[:1],
            self._preconditioner(precision),
        )

        def energy(x: Tensor) -> float:
            return float((x * (self.system.product(x) + precision * x - 2 * b)).sum()) / 2

        conjugate = by_conjugate_gradients(self.system, precision, b, start, self.tol, M, passes)[0]
        settings, x = replace(self.descent, epochs=passes), start.clone()
        position, outputs = first_position(self.system, settings, precision, M), sample_targets(self.system, settings)
        try:
            for descent in descended(x, position, self.system, settings, precision, M, b, outputs):
                x = descent.result()
            better = "sgd" if energy(x) < energy(conjugate) else "cg"
        except Diverged:
            better = "cg"
        state.chosen = better if self.across is None else collectives.gathered(better, self.across)[0]

    def _conjugate(self, state: State, precision: Tensor) -> Tensor:
        """By the diagonal, for as many products as a sketch takes; where that was not enough, by a sketch."""
        assert state.b is not None and state.w is not None
        w, M, most = state.w, self._preconditioner(precision), MOST_ITERATIONS
        if self.descent is not None:  # as many passes as it would make
            return by_conjugate_gradients(self.system, precision, state.b, w, self.tol, M, self.descent.epochs)[0]
        if self.rank and state.sketched is None:
            most = max(FEW, self.rank // len(self.system.everyone))
            w, residual = by_conjugate_gradients(self.system, precision, state.b, w, self.tol, M, most)
            if self.across is not None:  # one choice for all samples, wherever they are
                residual = max(collectives.gathered(residual, self.across))
            if residual <= self.tol:
                return w
            state.sketched, most = list(state.precision), MOST_ITERATIONS
        sketch = self._sketch(state)
        M = M if sketch is None else sketch.at(precision)
        return by_conjugate_gradients(self.system, precision, state.b, w, self.tol, M, most)[0]

    @cached_property
    def rank(self) -> int:
        return rank_of(self.system, self.system.group or self.across)

    def _sketch(self, state: State) -> Sketch | None:
        """That of the state, made again where a run goes on."""
        if state.sketched is not None and self.made is None:
            with suppress(LinAlgError):  # rounding made it indefinite
                self.made = [Sketch(self.system, self.expanded(state.sketched), self.rank)]
            self.made = self.made or []
        return self.made[0] if self.made else None

    @torch.no_grad()
    def _measured(self, b: Tensor, w: Tensor, precision: Tensor) -> tuple[list[float], list[float], float]:
        """Sums over the samples of (w . S G S w)_g and (w . A w)_g, and the largest relative residual."""
        products, residual = self.system.product(w), 0.0
        forms, wholes = [0.0] * len(self.groups), [0.0] * len(self.groups)
        for k in range(len(w)):
            r = (b[k] - products[k]).addcmul_(precision, w[k], value=-1)
            residual = max(residual, float(r.norm() / b[k].norm()))
            del r
            form = self.totals(products[k].mul_(w[k]))
            prior = self.totals(w[k].square().mul_(precision))
            forms = [x + y for x, y in zip(forms, form, strict=True)]
            wholes = [x + y + z for x, y, z in zip(wholes, form, prior, strict=True)]
        if self.across is None:
            return forms, wholes, residual
        every = collectives.gathered((forms, wholes, residual), self.across)
        forms, wholes = (
            [float(sum(each)) for each in zip(*(found[i] for found in every), strict=True)] for i in (0, 1)
        )
        return forms, wholes, max(found[2] for found in every)

    def _descend_samples(self, state: State, precision: Tensor, after: Callable[[State], None]) -> None:
        assert self.descent is not None and state.w is not None
        P, outputs = self._preconditioner(precision), sample_targets(self.system, self.descent)
        b = self.system.right_hand_sides(precision, data=False) if self.descent.noisy else state.b

        def again() -> Tensor:
            state.w = self.system.prior_draws(precision)
            return state.w

        state.w = self._descend(state, state.w, precision, P, b, outputs, again, after)

    def _covariance(self, state: State, precision: Tensor) -> Callable[[Tensor], Tensor]:
        """About A^-1, for rows [K, D]."""
        if self.dual is not None and not self.blocks:
            dual = self.dual
            return lambda rows: dual.apply(precision, rows)
        if (sketch := self._sketch(state)) is not None:
            M = sketch.at(precision)
            return lambda rows: (M @ rows.T).T
        P = self._preconditioner(precision)
        return lambda rows: rows * P

    def _preconditioner(self, precision: Tensor) -> Tensor:
        return 1 / (self.diagonal + precision)

    def _descend(
        self, state: State, x: Tensor, precision: Tensor, P: Tensor, b: Tensor | None, outputs: Any,
        again: Callable[[], Tensor], after: Callable[[State], None],
    ) -> Tensor:  # fmt: skip
        """The result of a descent from x; from again() at half the rate where it diverged."""
        settings: Any = self.descent
        position = state.position or first_position(self.system, settings, precision, P)
        for _ in range(HALVINGS):
            state.position = position
            try:
                result = x
                for descent in descended(x, position, self.system, settings, precision, P, b, outputs):
                    result = descent.result()
                    if position.epoch < settings.epochs:
                        after(state)
                state.position = None
                return result
            except Diverged as error:
                bound = lambda: steepest(self.system, precision, P)  # noqa: E731
                position = slower(position, settings, error, bound)
                x = again()
        raise Diverged(f"stochastic descent diverged at every learning rate down to {position.lr:.3g}; expected a "
                       "curvature without NaN or infinity. Are the model and its inputs finite?")  # fmt: skip

    def update(self, state: State, after: Callable[[State], None]) -> None:
        """The M step, in place: the linearised optimum, the precisions, and the right-hand sides that follow."""
        before, linear = self.expanded(state.precision), ScaledModel(self.system, self.loss)
        if not self._descends(state):
            M, tol, most, start = self._covariance(state, before), min(self.tol, OPTIMUM), None, state.delta
            if self.descent is not None:
                most = NEWTON_STEPS, max(1, self.descent.epochs // NEWTON_STEPS)
            if self.dual is not None and not self.blocks and (kernel := self.dual.outputs) is not None:
                factor, most = self.dual.factor(before), (NEWTON_STEPS, FEW)  # for what rounding leaves of it
                start = dual_optimum(kernel, linear, before, self.system.strength, start, factor)
            found = optimum(linear, before, self.system.strength, start, M, tol, most)
        else:
            found = self._descended_optimum(state, linear, before, after)
        state.delta, state.slope = found, self._slope(linear, found, before)
        squares = self.totals((linear.theta + found).square())
        tiny = torch.finfo(self.theta.dtype).tiny
        quieter = 1.0 if state.noise is None else self._noise(state, linear, before)
        squares = [s / quieter for s in squares] if self.system.scale is not None else squares  # in its units
        # The samples' noise may take the gamma of a group below zero: its own error is the least that EM goes on from.
        assert state.b is not None and state.w is not None
        drawn = len(state.w) if self.across is None else sum(collectives.gathered(len(state.w), self.across))
        least = [min(1.0, n / 2, (2 * n / drawn) ** 0.5) for n in self.counts]
        gammas = [max(g, at) for g, at in zip(state.gammas, least, strict=True)]
        updated = [min(max(g / max(s, tiny), LOWEST), HIGHEST) for g, s in zip(gammas, squares, strict=True)]
        pairs = zip(updated, state.precision, strict=True)
        state.settled = all(abs(new / old - 1) < SETTLED for new, old in [*pairs, (quieter, 1.0)])
        # Directions that the data does not determine, D - gamma of them, keep the prior's draw.
        shares = self.expanded([1 - min(g / n, 1.0) for g, n in zip(gammas, self.counts, strict=True)])
        self.system.reweighted(state.b, state.w, before, self.expanded(updated), shares)
        state.precision, state.steps, state.sampled = updated, state.steps + 1, False

    def _noise(self, state: State, linear: ScaledModel, precision: Tensor) -> float:
        """The noise variance that the optimum's squared errors say, over the one before; what follows from it in place.

        In units of the g-prior the system stays, for they move with the noise, and only the optimum's units change.
        """
        assert state.delta is not None and state.b is not None and state.noise is not None
        free = max(self.elements - sum(state.gammas), 1e-3 * self.elements)
        found = max(2 * float(linear.value(state.delta)) / free, torch.finfo(torch.float32).tiny)
        ratio, state.noise, state.sketched = found / state.noise, found, None
        if self.system.scale is None:
            self.system.louder(state.b, ratio**-0.5, precision)
        else:
            state.delta = state.delta * ratio**-0.5
        self.place(found)
        return ratio

    def place(self, noise: float) -> None:
        """The system under a noise variance."""
        ratio, (scale, diagonal) = noise / self.first, self.under_first
        self.system.strength, self.made = 1 / noise, None
        if scale is None:
            self.diagonal = diagonal / ratio
        else:
            self.system.scale = scale * ratio**0.5
        if self.dual is not None:
            self.dual = self.dual.renewed()

    def _slope(self, linear: ScaledModel, delta: Tensor, precision: Tensor) -> float:
        data, prior = self.system.strength * linear.gradient(delta), precision * (linear.theta + delta)
        scale = torch.maximum(data.norm(), prior.norm()).clamp(min=torch.finfo(data.dtype).tiny)
        return float((data + prior).norm() / scale)

    def _descended_optimum(self, state: State, linear: ScaledModel, precision: Tensor, after: Any) -> Tensor:
        """delta moves from where it was: gradient S J^T l' + Lambda (S^-1 theta + delta)."""
        if state.delta is None:
            state.delta = torch.zeros_like(linear.theta)
        P, b = self._preconditioner(precision), (-precision * linear.theta).unsqueeze(0)

        def again() -> Tensor:
            state.delta = torch.zeros_like(linear.theta)
            return state.delta.unsqueeze(0)

        x = state.delta.unsqueeze(0)
        return self._descend(state, x, precision, P, b, optimum_targets(linear), again, after)[0]


def as_prior(groups: Sequence[Sequence[str]], precision: Sequence[float], names: Sequence[str]) -> Any:
    """A number where all weights share one precision, else a dict by name."""
    if len(groups) == 1:
        return precision[0]
    found = {name: value for group, value in zip(groups, precision, strict=True) for name in group}
    return {name: found[name] for name in names}
