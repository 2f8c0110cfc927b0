"""How a gradient becomes a step: small parts that are applied to each parameter group, one after the other.

A part takes a `Move` and changes its direction (or, last, the parameters).  An optimiser is a list of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_choice
from paraboloid.optim import foreach
from paraboloid.optim.options import check_number, rate

GRAFTS = ("sgd", "adam")
AUTO, SHARE = "auto", 3e-4  # kl_clip as a share of the loss, where nothing else is said


class Move:
    """One group's step in the making, for the parameters that have a gradient.

    states are torch's, by parameter; direction is what will be subtracted lr rate times, at first the gradient.
    """

    def __init__(self, group: dict[str, Any], rate: float = 1.0):
        self.group, self.rate = group, rate
        self.loss_scale: float | None = None  # of changes of the loss that are large
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.gradient: list[Tensor] = []
        self.joined: Tensor | None = None  # the gradient as one vector, where that is there
        self.direction = self.gradient

    def add(self, name: str, p: Tensor, state: dict[str, Any], g: Tensor) -> None:
        self.names.append(name)
        self.params.append(p)
        self.states.append(state)
        self.gradient.append(g)

    def kept(self, name: str) -> list[Tensor]:
        """A tensor of each parameter's state; zeros where it is new."""
        for p, state in zip(self.params, self.states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(p)
        return [state[name] for state in self.states]


Part = Callable[[Move], None]


def coupled_decay(m: Move) -> None:
    """The gradient of loss + weight_decay ||theta||^2 / 2, where decay is not decoupled."""
    if m.group["weight_decay"] and not m.group.get("decoupled"):
        m.gradient = m.direction = foreach.added(m.gradient, m.params, alpha=m.group["weight_decay"])
        m.joined = None


def decoupled_decay(m: Move) -> None:
    """theta <- (1 - lr weight_decay) theta, where decay is decoupled."""
    if m.group["weight_decay"] and m.group.get("decoupled"):
        foreach.scale_(m.params, 1 - rate(m.group) * m.group["weight_decay"])


def momentum(m: Move) -> None:
    """Heavy ball b <- momentum b + d, or Nesterov's d + momentum b."""
    mu = m.group["momentum"]
    if mu:
        buffers = m.kept("momentum_buffer")
        foreach.scale_(buffers, mu)
        foreach.add_(buffers, m.direction)
        m.direction = foreach.added(m.direction, buffers, alpha=mu) if m.group.get("nesterov") else buffers


def averaged(m: Move) -> None:
    """Momentum as a running average, b <- momentum b + (1 - momentum) d, without bias correction."""
    buffers = m.kept("momentum_buffer")
    foreach.lerp_(buffers, m.direction, 1 - m.group["momentum"])
    m.direction = buffers


def descend(m: Move) -> None:
    """theta <- theta - lr rate d."""
    foreach.add_(m.params, m.direction, alpha=-rate(m.group) * m.rate)


class Graft:
    """Each parameter's direction gets the length that SGD (the gradient) or Adam (betas .9, .999) would give it.

    Source: Agarwal et al. 2020, arXiv:2002.11803.
    """

    def __init__(self, kind: str | None):
        check_choice("graft", kind, (None, *GRAFTS))
        self.kind = kind

    def __call__(self, m: Move) -> None:
        if self.kind is None or not m.params:
            return
        lengths = foreach.norms(m.gradient if self.kind == "sgd" else _adam(m))
        shares = [n / size if size > 0 else 1.0 for n, size in zip(lengths, foreach.norms(m.direction), strict=True)]
        m.direction = foreach.scaled(m.direction, shares)


def _adam(m: Move) -> list[Tensor]:
    """Its steps for a learning rate of 1."""
    for state, g in zip(m.states, m.gradient, strict=True):
        if "graft_step" not in state:
            state |= {"graft_step": 0, "graft_m": torch.zeros_like(g), "graft_v": torch.zeros_like(g)}
        state["graft_step"] += 1
    means, squares = ([state[key] for state in m.states] for key in ("graft_m", "graft_v"))
    foreach.lerp_(means, m.gradient, 0.1)
    foreach.scale_(squares, 0.999)
    foreach.addcmul_(squares, m.gradient, m.gradient, 1e-3)
    roots, counts = foreach.roots(squares), [state["graft_step"] for state in m.states]
    whole = [math.sqrt(1 - 0.999**t) for t in counts]  # of the roots: averages start at zero
    foreach.shift_(roots, [1e-8 * w for w in whole])
    steps = foreach.quotients(means, roots)
    return foreach.scaled(steps, [w / (1 - 0.9**t) for t, w in zip(counts, whole, strict=True)])


class TrustRegion:
    """Shortens a group's direction so that the step -lr d stays inside.

    kl_clip   lr^2 d . g <= kl_clip; "auto": `share` times the scale of the loss (`Trust.scale`; 1 where not known).
              With d = (F + damping I)^-1 g the left side is about twice the Kullback-Leibler divergence between the
              model's predictions before and after (Ba et al. 2017, section 5)
    max_step  lr ||d|| <= max_step
    """

    def __init__(self, kl_clip: float | str | None = None, max_step: float | None = None, share: float = SHARE):
        for name, value in (("kl_clip", kl_clip), ("max_step", max_step)):
            if isinstance(value, str):
                check_choice(name, value, (AUTO,) if name == "kl_clip" else ())
            elif value is not None:
                check_number(name, value, 0, above=True)
        self.kl_clip, self.max_step, self.share = kl_clip, max_step, share

    def __call__(self, m: Move) -> None:
        factor, lr = 1.0, rate(m.group)
        if self.kl_clip is not None:
            size, clip = lr**2 * float(foreach.dot(m.gradient, m.direction, m.joined)), self.kl_clip
            clip = self.share * (1.0 if m.loss_scale is None else m.loss_scale) if isinstance(clip, str) else clip
            factor = min(factor, (clip / size) ** 0.5 if size > 0 else 1.0)
        if self.max_step is not None:
            size = lr * float(foreach.norm(m.direction))
            factor = min(factor, self.max_step / size if size > 0 else 1.0)
        if factor < 1:
            m.direction = foreach.scaled(m.direction, factor)
