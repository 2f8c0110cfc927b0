"""How far steps may go, by what the last ones did: the trust that an optimiser has in its own quadratic model.

A step delta promises to lower the loss: its slope g . delta is negative.  What came of it shows in the next step's
gradient g', of another batch and so without the bias of the batch that chose the step: along a parabola the loss has
changed by (g . delta + g' . delta) / 2.  Where that is a rise, averaged over a few steps, the curvature along them is
larger than the model says, because the weights have moved on or because it was measured on few samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from paraboloid.optim import foreach
from paraboloid.optim.options import check_number

MEMORY = 0.8  # of the averages of slopes
SPREAD = 0.9  # of the average of the losses
OVERSHOT = 0.5  # (g + g') . delta over |g . delta|, averaged: beyond it steps are too long
FAR = 2.0  # the same of one step, over the average: beyond it the step is given up, with the gradient that told
START = 0.1  # the rate of the first step, where nothing is known yet
CUT, GROW, EARN = 0.5, 1.05, 1.3  # of the rate: after a step that went wrong, one that did not, and before any did
LEAST = 1e-3  # of the rate
MOST = 4.0  # of it, where it may go beyond 1: steps of Adam's length know nothing of how far they should go
SHORT, SEEN = 1.1, 5  # it grows by that much, once so many slopes kept their promise
LOST = 3  # losses or gradients in a row that are not finite, after which the last step is taken back
APART = 0.05  # of what the loss fell in all: its scale is at least this
SIGMAS = 3.0  # of the last losses, above which a loss is a rise


def check_rise(factor: float | None) -> float | None:
    """`factor`, or ValueError where it is not a number above 1."""
    return factor if factor is None else check_number("rise_factor", factor, 1, above=True)


class Trust:
    """A rate in (0, 1] that multiplies the steps, cut where they overshoot or the loss rises, and growing back.

    rise_factor  a loss above it times the mean size of the last losses is a rise
    short        a share of what slopes promised, above which steps are far too short: the rate grows beyond 1, up to 4
    """

    def __init__(self, rise_factor: float, rate: float = 1.0, short: float | None = None):
        self.rise_factor, self.rate, self.short = rise_factor, rate, short
        self.size = self.mean = self.square = 0.0  # running means of |loss|, the loss, and its squared deviation
        self.promised = self.turned = 0.0  # and of |g . delta| and (g + g') . delta
        self.slopes = 0  # that the means are of
        self.slope: float | None = None  # g . delta of the last step
        self.losses = self.lost = 0
        self.first: float | None = None
        self.pending: float | None = None  # a loss that counts once its step is taken
        self.events = {"overshot": 0, "rose": 0, "taken_back": 0}
        self.why = ""

    # --- what happened --------------------------------------------------------------------------------------------

    def rises(self, loss: float, than: float | None = None) -> bool:
        """Whether a loss is far above the last ones or, on the same batch, above another loss: by more than
        rise_factor - 1 times the usual size of a loss, and (among batches) the spread between them."""
        if than is not None:
            return not loss <= than + (self.rise_factor - 1) * max(self.size, abs(than))
        spread = SIGMAS * self.square**0.5
        return self.losses > 0 and not loss <= self.mean + (self.rise_factor - 1) * self.size + spread

    def note(self, loss: float) -> None:
        """One more batch's loss."""
        if math.isfinite(loss):
            self.losses += 1
            self.first = loss if self.first is None else self.first
            share, off = max(1 / self.losses, 1 - SPREAD), loss - self.mean
            self.size += share * (abs(loss) - self.size)
            self.mean += share * off
            self.square = (1 - share) * (self.square + share * off**2)

    def scale(self) -> float | None:
        """The size of a change of the loss that is large: that of the loss, or, where that passes through zero, what it
        varies by; None as long as no loss is known."""
        if self.first is None:
            return None
        return max(self.size, self.square**0.5, APART * abs(self.first - self.mean))

    def overshoots(self, change: float) -> bool:
        """Whether the loss rises along the steps, on average; `change` is what came of the last one."""
        if self.slope is None:
            return False
        self.slopes += 1
        self.promised = MEMORY * self.promised + (1 - MEMORY) * abs(self.slope)
        self.turned = MEMORY * self.turned + (1 - MEMORY) * 2 * change
        return not self.turned <= OVERSHOT * self.promised

    def is_far_off(self, change: float) -> bool:
        """Whether the last step alone raised the loss by much more than the usual promise."""
        if self.slope is None:
            return False
        promised = MEMORY * self.promised + (1 - MEMORY) * abs(self.slope)
        return not change <= FAR * promised / (1 - MEMORY ** (self.slopes + 1))

    # --- what follows ---------------------------------------------------------------------------------------------

    def cut(self, event: str, why: str) -> None:
        self.events[event] += 1
        self.why = why
        self.rate = max(LEAST, CUT * self.rate)
        self.promised = self.turned = 0.0
        self.slopes, self.slope = 0, None

    def grow(self) -> None:
        if self.rate < 1:
            self.rate = min(1.0, (GROW if any(self.events.values()) else EARN) * self.rate)
        elif self.short is not None and self.slopes >= SEEN:
            kept = self.kept_promise or 0.0
            self.rate = min(MOST, SHORT * self.rate) if kept > self.short else max(1.0, self.rate / GROW)

    # --- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self).items()}

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update({k: dict(v) if isinstance(v, dict) else v for k, v in state.items()})

    def diagnostics(self) -> dict[str, Any]:
        """The rate, what it was cut for, how often, and the loss's change over what the slopes promised."""
        return {"rate": self.rate, **self.events, "why": self.why or "no step was shortened",
                "kept_promise": self.kept_promise}  # fmt: skip

    @property
    def kept_promise(self) -> float | None:
        """The loss's change over what the slopes promised, of the last steps."""
        return -self.turned / (2 * self.promised) if self.promised else None


States = Iterable[tuple[Tensor, dict[str, Any]]]


def remember(states: States) -> None:
    """Keep the parameters as they are before a step, as "before" of each one's state."""
    for p, state in states:
        if "before" in state:
            state["before"].copy_(p)
        else:
            state["before"] = p.detach().clone()


def slope(states: States) -> float:
    """g . (p - before) of all parameters: along the last step."""
    params, before, gradients = list[Tensor](), list[Tensor](), list[Tensor]()
    for p, state in states:
        if "before" in state and p.grad is not None:
            params.append(p)
            before.append(state["before"])
            gradients.append(p.grad)
    return float(foreach.along(gradients, params, before)) if params else 0.0


class LastStep:
    """The parameters before a step, as "before" of each one's state, and slopes along it; where they are few, parts of
    one vector, which is read and written at once."""

    def __init__(self):
        self._params: list[Tensor] = []  # whose values are parts of
        self._before: Tensor | None = None

    def slope(
        self, states: Callable[[], States], params: list[Tensor], now: Tensor | None, gradient: Tensor | None
    ) -> float:
        """g . (p - before), as `slope` has it; now and gradient: those of the step's parameters, each joined."""
        if now is None or gradient is None or self._before is None or not self._is_of(params):
            return slope(states())
        return float((now - self._before).mul_(gradient).sum(dtype=torch.float64))

    def begin(self, params: list[Tensor], states: list[dict[str, Any]], now: Tensor | None) -> None:
        """Before the parameters move."""
        if now is None:
            self._params, self._before = [], None
            remember(zip(params, states, strict=True))
        elif self._before is not None and self._is_of(params):
            self._before.copy_(now)
        else:
            self._params, self._before = params, now
            parts = now.split([p.numel() for p in params])
            for p, state, part in zip(params, states, parts, strict=True):
                state["before"] = part.view(p.shape)

    def _is_of(self, params: list[Tensor]) -> bool:
        return list(map(id, self._params)) == list(map(id, params))


def go_back(states: States) -> None:
    """The parameters before the last step."""
    for p, state in states:
        if "before" in state:
            p.copy_(state["before"])


def stop(states: States) -> None:
    """No momentum: it would lead on."""
    for _, state in states:
        if "momentum_buffer" in state:
            state["momentum_buffer"].zero_()
