"""Passes that leave no trace: torch's random state and the model's buffers are as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.passes.module_tree import modules_of
from paraboloid.passes.torch_internals import own_buffers


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """What draws from torch's global generators (initialisers, dropout) follows `seed`; they are put back afterwards.

    Those of the CPU and of `device`; without one, of all CUDA devices where CUDA is in use already.
    """
    if device is not None:
        devices = [device.index or 0] if device.type == "cuda" else []
    else:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    if not devices:  # as fork_rng, without looking for other devices
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(state)
        return
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for i in devices:
            torch.cuda.default_generators[i].manual_seed(seed)
        yield


@contextmanager
def isolated(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Dropout masks follow `seed`; the global random state and buffers such as running statistics are restored."""
    training = any(m.training for m in modules_of(model))
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if training else []
    with seeded(seed, device):
        try:
            yield
        finally:
            with torch.no_grad():
                for b, value in buffers:
                    if not torch.equal(b, value):  # batch norm moves its running statistics without a new version
                        b.copy_(value)


@contextmanager
def isolated_with_gradients(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """`isolated`, with a graph, whatever mode is on around the block."""
    with isolated(model, device, seed), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def copied_buffers(model: Any, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Modules in training mode work on copies of their buffers inside the block, their own stay untouched.

    For backward passes: a checkpoint runs its part of the forward pass again, which would move running statistics.
    `modules`: all of the model's, where they are at hand.
    """
    found = modules_of(model) if modules is None else modules
    training = [m for m in found if m.training and own_buffers(m)]
    originals = [(m, dict(own_buffers(m))) for m in training]
    for m, buffers in originals:
        own_buffers(m).update({name: None if b is None else b.detach().clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for m, buffers in originals:
            own_buffers(m).update(buffers)


class RandomStream:
    """A random state of its own for everything that draws from torch's global generators: ``with stream: ...``.

    `rewind` starts it again, so that a second pass over the same data draws the same masks.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        self.state: list[Tensor] | None = None
        self._outside: list[Tensor] = []

    def rewind(self) -> None:
        self.state = None

    def __enter__(self) -> RandomStream:
        self._outside = self._read()
        if self.state is None:
            torch.default_generator.manual_seed(self.seed)
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(self.seed)
        else:
            self._write(self.state)
        return self

    def __exit__(self, *exception) -> None:
        self.state = self._read()
        self._write(self._outside)

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
