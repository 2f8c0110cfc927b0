"""Which parameters of a recorded batch a single call uses, directly and affinely: their second derivatives come from
that call's output alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paraboloid.engine.per_sample import Part, swapped
from paraboloid.engine.plan import Plan
from paraboloid.engine.recorder import Call
from paraboloid.engine.sample_independence import Owned
from paraboloid.engine.tape import Tape
from paraboloid.layers import Use
from paraboloid.losses import Loss
from paraboloid.passes.memory import SECOND_DERIVATIVES
from paraboloid.passes.modes import autocast
from paraboloid.reductions.contractions import sample_weighted_squares, weighted_squares
from paraboloid.reductions.outer import Outer

Parts = dict[int, dict[str, Part]]  # call -> name -> part


@dataclass(frozen=True)
class Recorded:
    """One recorded batch: output f with targets y, and what a pull from f needs."""

    tape: Tape
    plan: Plan
    loss: Loss
    f: Tensor
    y: Tensor
    max_memory: int | None
    each: bool = False  # whether diagonals are those of each sample, [N, *shape], or summed, [*shape]

    def zeros(self, p: Tensor) -> Tensor:
        """A diagonal of nothing."""
        return p.new_zeros(len(self.f), *p.shape) if self.each else torch.zeros_like(p)

    def squares(self, o: Outer, weights: Tensor) -> Tensor:
        """sum_v weights[v, n] (J_n^T v)^2."""
        take = sample_weighted_squares if self.each else weighted_squares
        return take(o, weights, self.max_memory)

    @property
    def calls(self) -> list[Call]:
        return self.plan.calls

    @property
    def convolutional(self) -> bool:
        """Whether columns are pulled one at a time, which on a CPU is faster for convolutions than a batch of them."""
        return self.f.device.type == "cpu" and any(len(c.shape) > 3 for c in self.calls)

    def count(self, elements: int) -> int:
        """How many columns are pulled at a time, if each takes so many elements."""
        return SECOND_DERIVATIVES.count(elements * self.f.element_size(), self.max_memory)


def single_uses(recorded: Recorded) -> tuple[Parts, list[str]]:
    """The parameters that exactly one call uses, directly and affinely; and the names of all others that are used.

    All are others where the samples lie along no axis of some call.
    """
    tape, plan = recorded.tape, recorded.plan
    along_axes = not any(isinstance(layout, Owned) for layout in plan.layouts)
    uses: dict[str, list[tuple[int, Part | None]]] = {}
    for i, parts in enumerate(plan.parts):
        for part in parts or ():
            known = along_axes and id(part.root) in tape.names
            direct = known and part.use is not None and _affine(plan.calls[i], part.use)
            for name in tape.leaves(part.root):
                uses.setdefault(name, []).append((i, part if direct else None))
    for name in plan.missed:
        uses.setdefault(name, []).append((-1, None))
    single: Parts = {}
    others = []
    for name in tape.parameters:
        (i, part), *more = uses.get(name, [(-1, None)])
        if part is not None and not more:
            single.setdefault(i, {})[name] = part
        elif name in uses:
            others.append(name)
    return single, others


def _affine(call: Call, use: Use) -> bool:
    """Whether the call's output is affine in the weight: by its rule, or by asking autograd for a second derivative."""
    if use.affine is not None or use.is_constant:
        return use.affine is not False
    generator = torch.Generator().manual_seed(0)

    def random(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t)

    with torch.enable_grad(), autocast(use.weight.device, call.autocast):
        w = use.weight.detach().requires_grad_()
        z = call.op(*swapped(call.args, {id(use.weight): w}), **swapped(call.kwargs, {id(use.weight): w}))
        (J,) = torch.autograd.grad(z, w, random(z), create_graph=True)
        if not J.requires_grad:
            return True
        (second,) = torch.autograd.grad(J, w, random(w), allow_unused=True)
    return second is None or not second.any()
