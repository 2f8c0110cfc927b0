"""Which parameters of a recorded batch a single call uses, directly and affinely: their second derivatives come from
that call's output alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.engine.per_sample import Part
from paraboloid.engine.recorder import Call
from paraboloid.engine.tape import Plan, Tape
from paraboloid.layers import RULES, elementwise
from paraboloid.losses import Loss
from paraboloid.passes.memory import SECOND_DERIVATIVES

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
    """The parameters that exactly one call uses, directly and affinely; and the names of all others that are used."""
    tape, plan = recorded.tape, recorded.plan
    uses: dict[str, list[tuple[int, Part | None]]] = {}
    for i, parts in enumerate(plan.parts):
        for part in parts or ():
            direct = id(part.root) in tape.names and part.use is not None and _affine(plan.calls[i], part.use.weight)
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


def _affine(call: Call, weight: Tensor) -> bool:
    """Whether the call's output is affine in the weight: by its rule, or by asking autograd for a second derivative."""
    rule = RULES[call.op]
    if rule.__module__.startswith("paraboloid.layers") and rule is not elementwise.div:
        return True

    def swapped(t: Any) -> Any:
        return fresh if t is weight else t.detach() if isinstance(t, Tensor) else t

    with torch.enable_grad():
        fresh = weight.detach().requires_grad_()
        z = call.op(*map(swapped, call.args), **{k: swapped(t) for k, t in call.kwargs.items()})
        g = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
        (J,) = torch.autograd.grad(z, fresh, g, create_graph=True)
        if not J.requires_grad:
            return True
        (second,) = torch.autograd.grad(J.sum(), fresh, allow_unused=True)
    return second is None or not second.any()
