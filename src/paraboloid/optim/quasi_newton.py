"""What K-BFGS keeps for each layer, and how a step renews it: for all layers of one type of number together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.optim import foreach
from paraboloid.optim.bfgs import (
    DenseInverse,
    LimitedMemoryInverse,
    first_weight,
    is_safe,
    second_weight,
    update_columns,
)
from paraboloid.optim.layer_means import Layer, Means
from paraboloid.optim.layer_vectors import LayerVectors


class LayerState:
    """What is kept for one layer W = [weight, bias], p x q."""

    def __init__(self, layer: Layer, Hg: DenseInverse | LimitedMemoryInverse, p: int, like: Tensor):
        self.layer = layer
        self.Hg: Any = Hg
        self.A: Any = None  # tensors from the start on
        self.Ha: Any = None
        self.positions = 1.0
        self.s, self.y = like.new_zeros(p), like.new_zeros(p)
        self.counts = {"updates": 0, "skipped_g": 0, "skipped_a": 0}

    def start(self, A: Tensor, positions: float, damping: float) -> None:
        """Ha = (A + sqrt(damping T) I)^-1."""
        self.A, self.positions = A, positions
        shifted = A.clone()
        shifted.diagonal().add_((damping * positions) ** 0.5)
        self.Ha = torch.cholesky_inverse(torch.linalg.cholesky(shifted.double())).to(A.dtype)

    def direction(self, M: Tensor) -> Tensor:
        """Hg M Ha."""
        return self.Hg.times(M) if self.Ha is None else self.Hg.times(M @ self.Ha)


def learn(states: Sequence[LayerState], means: Sequence[Means], shares: Sequence[float]) -> None:
    """A <- (1 - share) A + share mean(abar abar^T) of each layer."""
    sums = foreach.scaled([m.A_sum for m in means], [share / m.rows for share, m in zip(shares, means, strict=True)])
    inputs = [state.A for state in states]
    foreach.scale_(inputs, [1 - share for share in shares])
    foreach.add_(inputs, sums)


class Together:
    """Both inverses of some layers: their vectors are one flat vector, the outputs' sides before the inputs'.

    Each layer's s and y are views of those that are kept here.
    """

    def __init__(self, states: Sequence[LayerState]):
        self.states, inverses = list(states), [state.Ha for state in states]
        p, q = [len(state.s) for state in states], [len(Ha) for Ha in inverses]
        device, self.P, self.limited = states[0].s.device, sum(p), not isinstance(states[0].Hg, DenseInverse)
        self.outputs, self.inputs, self.both = (LayerVectors(sizes, device) for sizes in (p, q, p + q))
        self.changes = LayerVectors(p + p, device)
        self.sy = torch.cat([state.s for state in states] + [state.y for state in states])
        parts = self.changes.parts(self.sy)
        for state, s, y in zip(states, parts, parts[len(states) :], strict=False):
            state.s, state.y = s, y

    def update(
        self, before: Sequence[Means], after: Sequence[Means] | None, dampings: Sequence[float], decays: Sequence[float]
    ) -> None:
        """s and y averages, double damping and BFGS on Hg; the Hessian action of A + sqrt(damping T) I on s = Ha a, and
        BFGS on Ha.  Hg stays as it is where there is nothing `after` the step."""
        states, L = self.states, len(self.states)
        g = torch.cat([m.gradients for m in before])
        if after is not None:
            self._average(before, after, g, decays)
        s, y = self.sy.view(2, -1)
        Hy = torch.cat([state.Hg.times(state.y) for state in states])
        g.mul_(self.outputs.each([1 / (m.positions * m.ranks) for m in before], g))
        vectors = torch.cat([torch.stack([s, y, Hy, g]), self._inputs(before, dampings)], 1)
        dots = self.both.dots(vectors)
        s, y, Hy, _ = vectors
        first, second, sy = [1.0] * L, [1.0] * L, [0.0] * L
        for i in range(L) if after is not None else ():
            first[i], second[i], sy[i] = self._damped(states[i], dampings[i], dots[i])
        yHy = [of[6] for of in dots]
        for state, of in zip(states, dots[L:], strict=True):
            safe = is_safe(of[1], of[0], of[15] ** 0.5)
            sy.append(of[1] if safe else 0.0)
            state.counts["skipped_a"] += not safe
        if min(first) < 1 or min(second) < 1:
            to_s, to_y = self.outputs.rows([first, second], s)
            torch.lerp(Hy[: self.P], s[: self.P], to_s, out=s[: self.P])
            y = torch.lerp(s[: self.P], y[: self.P], to_y)
        self._apply(s, y, Hy, sy, yHy, damped=min(second) < 1)

    def _average(self, before: Sequence[Means], after: Sequence[Means], g: Tensor, decays: Sequence[float]) -> None:
        """s and y, the running means of the changes of mean outputs and gradients."""
        change = torch.cat([m.outputs for m in after] + [m.gradients for m in after])
        change.mul_(self._scale(after))
        change.sub_(torch.cat([m.outputs for m in before] + [g]).mul_(self._scale(before)))
        self.sy.lerp_(change, self.changes.each([1 - decay for decay in decays] * 2, change))

    def _scale(self, means: Sequence[Means]) -> Tensor | float:
        return self.changes.each([1 / m.rows for m in means] + [1 / (m.positions * m.ranks) for m in means], self.sy)

    def _inputs(self, means: Sequence[Means], dampings: Sequence[float]) -> Tensor:
        """s, y, Ha y and the mean a of the inputs' sides, [4, Q]."""
        layers, states = self.inputs, self.states
        found = torch.empty(4, sum(layers.sizes), dtype=self.sy.dtype, device=self.sy.device)
        s, y, Hy, a = found
        torch.cat([m.a_sum for m in means], out=a)
        a.mul_(layers.each([1 / m.rows for m in means], a))
        places = [layers.parts(v) for v in (s, y, Hy, a)]
        for state, to_s, to_y, of_a in zip(states, places[0], places[1], places[3], strict=True):
            torch.mv(state.Ha, of_a, out=to_s)
            torch.mv(state.A, to_s, out=to_y)
        y.add_(s * layers.each([(d * state.positions) ** 0.5 for d, state in zip(dampings, states, strict=True)], s))
        for state, of_y, to_Hy in zip(states, places[1], places[2], strict=True):
            torch.mv(state.Ha, of_y, out=to_Hy)
        return found

    def _damped(self, state: LayerState, damping: float, of: Sequence[float]) -> tuple[float, float, float]:
        """Both weights of double damping and s . y after it, zero where a gate leaves the update out; `of`: the inner
        products of (s, y, H y, g)."""
        ss, sy, sHy, yy, yHy, HyHy, gg = of[0], of[1], of[2], of[5], of[6], of[10], of[15]
        if not (ss > 0 and yy > 0):
            return 1.0, 1.0, 0.0
        a = first_weight(sy, yHy)
        ss = a * a * ss + 2 * a * (1 - a) * sHy + (1 - a) ** 2 * HyHy
        sy = a * sy + (1 - a) * yHy
        b = second_weight(sy, ss, (damping / state.positions) ** 0.5)
        sy = b * sy + (1 - b) * ss
        safe = is_safe(sy, ss, gg**0.5)
        state.counts["updates" if safe else "skipped_g"] += 1
        return a, b, sy if safe else 0.0

    def _apply(self, s: Tensor, y: Tensor, Hy: Tensor, sy: list[float], yHy: list[float], damped: bool) -> None:
        states, P, L = self.states, self.P, len(self.states)
        if self.limited:
            scale = self.outputs.each([n**-0.5 if n > 0 else 0.0 for n in sy[:L]], s)
            pairs = self.outputs.parts(torch.stack([s[:P], y[:P]]).mul_(scale))
            for state, n, pair in zip(states, sy, pairs, strict=False):
                if n:
                    state.Hg.update(*pair)
            columns = update_columns(self.inputs, s[P:], Hy[P:], sy[L:], yHy[L:])
            matrices, sy = [state.Ha for state in states], sy[L:]
        else:
            if damped:
                parts = zip(states, self.outputs.parts(y), strict=True)
                torch.cat([state.Hg.times(v) for state, v in parts], out=Hy[:P])
                yHy[:L] = [found[1] for found in self.outputs.dots(torch.stack([y, Hy[:P]]))]
            columns = update_columns(self.both, s, Hy, sy, yHy)
            matrices = [state.Hg.H for state in states] + [state.Ha for state in states]
        for H, n, (U, V) in zip(matrices, sy, columns, strict=True):
            if n:
                H.addmm_(U, V)
