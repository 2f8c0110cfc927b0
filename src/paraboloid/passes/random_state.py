"""Passes that leave no trace: torch's random state and the model's buffers are as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.passes.module_tree import modules_of
from paraboloid.passes.torch_internals import own_buffers

_AS_IT_IS = nullcontext()


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


class isolated:
    """Dropout masks follow `seed`; the global random state and buffers such as running statistics are restored.

    modules: all of the model's, where they are at hand.
    """

    def __init__(self, model: nn.Module, device: torch.device, seed: int, modules: Iterable[nn.Module] | None = None):
        self.stream = RandomStream(seed, device)
        self.buffers: list[tuple[Tensor, Tensor]] = []
        for m in modules_of(model) if modules is None else modules:
            if m.training:
                self.buffers = [(b, b.detach().clone()) for b in model.buffers()]
                break

    def __enter__(self) -> None:
        self.stream.__enter__()

    def __exit__(self, *exception: object) -> None:
        self.stream.leave()
        if self.buffers:
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for b, value in self.buffers:
            if not torch.equal(b, value):  # batch norm moves its running statistics without a new version
                b.copy_(value)


@contextmanager
def isolated_with_gradients(
    model: nn.Module, device: torch.device, seed: int, modules: Iterable[nn.Module] | None = None
) -> Iterator[None]:
    """`isolated`, with a graph, whatever mode is on around the block."""
    with isolated(model, device, seed, modules), torch.inference_mode(False), torch.enable_grad():
        yield


def copied_buffers(model: Any, modules: Iterable[nn.Module] | None = None) -> AbstractContextManager[None]:
    """Modules in training mode work on copies of their buffers inside the block, their own stay untouched.

    For backward passes: a checkpoint runs its part of the forward pass again, which would move running statistics.
    `modules`: all of the model's, where they are at hand.
    """
    training = [m for m in (modules_of(model) if modules is None else modules) if m.training and own_buffers(m)]
    return _copied(training) if training else _AS_IT_IS


@contextmanager
def _copied(training: list[nn.Module]) -> Iterator[None]:
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

    def leave(self) -> None:
        """What draws outside goes on where it was, and the stream is of no further use."""
        self._write(self._outside)

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
