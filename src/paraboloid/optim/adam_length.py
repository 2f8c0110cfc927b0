"""Steps in the direction of an averaged, preconditioned gradient, as long as Adam's with the same average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paraboloid.optim import foreach
from paraboloid.optim.direction import Move

DECAY, EPS = 0.999, 1e-8  # of Adam's squares


class AdamLength:
    """Each parameter's direction gets `share` times the length of Adam's step, whatever the curvature's scale is.

        d <- d share ||m / (sqrt(v) + eps)||_t / ||d||

    m is the running average that `direction.averaged` keeps, v Adam's average of squared gradients, both corrected for
    their zero start.  `measure` comes between averaging and preconditioning, `__call__` last.

    share  with lr, in Adam's learning rates: lr .1 and share .03 are Adam's 3e-3
    Source: Agarwal et al. 2020, arXiv:2002.11803 (grafting).
    """

    def __init__(self, share: float):
        self.share = share
        self._lengths: dict[int, list[float]] = {}

    def measure(self, m: Move) -> None:
        """Of the group's averages as they are now."""
        steps, corrections = self.steps(m)
        norms = zip(foreach.norms(steps), corrections, strict=True)
        self._lengths[id(m)] = [self.share * n * c for n, c in norms]

    def steps(self, m: Move) -> tuple[list[Tensor], list[float]]:
        """Adam's for a learning rate of 1, each before it is multiplied by the number beside it: the correction for the
        averages' zero start."""
        g = [_full(t) for t in m.gradient]
        squares = [self._squares(state, t) for state, t in zip(m.states, g, strict=True)]
        foreach.scale_(squares, DECAY)
        foreach.addcmul_(squares, g, g, 1 - DECAY)
        roots = foreach.roots(squares)
        count, mu = [int(state["graft_step"]) for state in m.states], m.group["momentum"]
        whole = [math.sqrt(1 - DECAY**t) for t in count]  # of the roots: averages start at zero
        foreach.shift_(roots, [EPS * w for w in whole])
        steps = foreach.quotients([_full(t) for t in m.direction], roots)
        return steps, [w / (1 - mu**t) for w, t in zip(whole, count, strict=True)]

    def _squares(self, state: dict, g: Tensor) -> Tensor:
        """Adam's average of squares, and one more of what it is of; in float32 also where a loaded state is not."""
        if "graft_v" not in state:
            state |= {"graft_step": 0, "graft_v": torch.zeros_like(g)}
        state["graft_step"] += 1
        state["graft_v"] = _full(state["graft_v"])
        return state["graft_v"]

    def __call__(self, m: Move) -> None:
        lengths, sizes = self._lengths.pop(id(m)), foreach.norms(m.direction)
        m.direction = foreach.scaled(
            m.direction, [n / size if size > 0 else 1.0 for n, size in zip(lengths, sizes, strict=True)]
        )


def _full(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
