"""The forward passes that were recorded since the last step, and which of them an output of the loss comes from."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from paraboloid.quantities.recording import Recording

WAITING = 8  # passes without a loss that are held, although nobody holds their outputs
NEAR = 64  # operations between the model's output and the loss's


class Pass:
    """One forward pass: its recording (until the loss was called), inputs, and the graph nodes of its outputs.

    samples  N, of the first output that depends on parameters
    """

    def __init__(self, tape: Recording, output: Any, inputs: Any):
        found = [t for t in _tensors(output) if t.requires_grad]
        self.tape: Recording | None = tape
        self.inputs, self.samples = inputs, len(found[0]) if found else 0
        self.nodes = {t.grad_fn for t in found}
        self._outputs = [weakref.ref(t) for t in found]
        self._seen: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None

    @property
    def is_held(self) -> bool:
        """Whether somebody has an output of it."""
        return any(t() is not None for t in self._outputs)

    @property
    def is_seen(self) -> bool:
        """Whether the loss was called on it."""
        return self._seen is not None

    @property
    def seen_output(self) -> Tensor | None:
        """What the loss was called on."""
        return None if self._seen is None else self._seen[0]()

    def seen_with(self, f: Tensor, y: Tensor) -> bool:
        return self._seen is not None and self._seen[0]() is f and self._seen[1]() is y

    def see(self, f: Tensor, y: Tensor) -> None:
        self._seen, self.tape, self.inputs = (weakref.ref(f), weakref.ref(y)), None, None


class Recorded:
    """Passes in order.  Those that wait for a loss share one recording, for a loss may be of several (siamese nets)."""

    def __init__(self):
        self.passes: list[Pass] = []

    def following(self) -> Recording | None:
        """The recording that the next pass is to go on with; None for a new one.

        What was seen keeps no recording, so that the passes of an accumulated gradient are freed one by one; of passes
        that nothing was made of (an evaluation with gradients) only the last few are kept.
        """
        waiting = [p for p in self.passes if p.tape is not None]
        if len(waiting) >= WAITING and not any(p.is_held for p in waiting):
            self.passes = [p for p in self.passes if p.tape is None]
            return None
        return waiting[-1].tape if waiting else None

    def add(self, tape: Recording, output: Any, inputs: Any) -> None:
        if (new := Pass(tape, output, inputs)).nodes:
            self.passes.append(new)

    def behind(self, f: Tensor) -> list[Pass]:
        """The passes among whose outputs f is, or from whose outputs it is computed in few operations."""
        nodes = {node for p in self.passes for node in p.nodes}
        stack, seen, found = [f.grad_fn], set(), set()
        while stack and len(seen) < NEAR + len(self.passes):
            node = stack.pop(0)
            if node in nodes:
                found.add(node)
            elif node is not None and node not in seen:
                seen.add(node)
                stack += [n for n, _ in node.next_functions]
        return [p for p in self.passes if found & p.nodes]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors with axes in a model's result, whatever containers and dataclasses it is made of."""
    if isinstance(output, Tensor):
        yield from [output] if output.dim() else []
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
    elif is_dataclass(output):
        yield from _tensors([getattr(output, f.name) for f in fields(output)])
