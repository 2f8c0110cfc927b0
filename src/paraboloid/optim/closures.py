"""A step's closure, evaluated once and then again on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.passes.random_state import copied_buffers
from paraboloid.passes.wrappers import unwrapped

Closure = Callable[[], Any]


class Evaluation:
    """The first call of a closure in a step, with its gradients in place; `loss` is what it returned.

    `modules`: all of the model's, where they are at hand.

    Raises RuntimeError where it left no gradient on any of the parameters.
    """

    def __init__(
        self, closure: Closure, model: nn.Module, parameters: Iterable[Tensor], modules: list[nn.Module] | None = None
    ):
        self.closure, self.model, self.modules, self.parameters = closure, model, modules, list(parameters)
        self.device, self.wrapped = self.parameters[0].device, unwrapped(model) is not model
        self._random = (
            torch.get_rng_state(),
            (torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None),
        )
        with torch.enable_grad():
            self.loss = closure()
        if not any(p.grad is not None for p in self.parameters):
            raise RuntimeError("the closure left no gradient on any parameter; expected it to clear the gradients, "
                               "evaluate the loss, call backward() on it and return it.")  # fmt: skip

    @property
    def value(self) -> float:
        return _number(self.loss)

    @contextmanager
    def _as_at_first(self) -> Iterator[None]:
        """The first call's random state, and buffers (running statistics) that do not move."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), copied_buffers(self.model, self.modules), torch.enable_grad():
            cpu, cuda = self._random
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """For calling the closure once more: the first call's random state, no moved buffers (running statistics), and
        the gradients of the first call put back."""
        gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        copies = [g.clone() for _, g in gradients] if self.wrapped else []  # whose buffers hold every pass's gradients
        for p, _ in () if self.wrapped else gradients:
            p.grad = None  # whatever the closure does with gradients, these are not touched
        try:
            with self._as_at_first():
                yield
        finally:
            for p in self.parameters:
                p.grad = None
            for p, grad in gradients:
                p.grad = grad
            for (_, grad), value in zip(gradients, copies, strict=False):
                grad.data.copy_(value)

    def anew(self) -> Evaluation:
        """The step's first call over again, at the present parameters; its gradients stay."""
        with self._as_at_first():
            return Evaluation(self.closure, self.model, self.parameters, self.modules)

    def again(self) -> float:
        """The closure's value at the present parameters, see `replayed`."""
        with self.replayed():
            return _number(self.closure())


def _number(loss: Any) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
